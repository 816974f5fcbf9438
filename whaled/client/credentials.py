"""The token of a stream: where it comes from, when it is renewed, and what happens when the server refuses it."""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from whaled.auth import tokenfile
from whaled.auth.tokentext import API_KEY_PREFIX, is_opaque, time_problem, token_in
from whaled.client.failures import AuthenticationFailed, LinkLostError

TokenProvider = Callable[[], Awaitable[str]]

log = logging.getLogger("whaled.client")

# Before the first connection, a token counts as expired or not yet valid only if it is off by more than this: the clock
# of this machine may be wrong.
CLOCK_TOLERANCE_S = 300.0
OPAQUE = "neither a JWT (three parts with dots between) nor an API key (whk_...)"
# A provider whose tokens are refused one after another is misconfigured, and further attempts would run into the
# server's rate limit.
MAX_REFUSED_IN_A_ROW = 3


class Credentials:
    """The current token of a stream. `provider` is awaited when there is none, it was refused, or it expires soon."""

    def __init__(
        self, token: str | None, provider: TokenProvider | None, timeout_s: float, *, comes_back: bool = True
    ) -> None:
        self.token = None if token is None else _read("`token`", token)
        self._was_accepted = False
        self._warned_about: str | None = None  # the token of the last warning
        self._provider = provider
        self._timeout_s = timeout_s
        self._comes_back = comes_back  # whether a refused token may be replaced by another one from the provider
        self._given = self.token
        self._descendant: str | None = None  # the newest token that the server issued in place of `_given`
        self._refused: str | None = None
        self._refused_in_a_row = 0

    async def current(self) -> str | None:
        """Return the token to connect with, None if there is none.

        Raises LinkLostError if the provider may have one later, AuthenticationFailed if the server is certain to refuse
        the token. Once the server has accepted a token, later ones are not checked here: the clock of this machine may
        be wrong.
        """
        if self.token is None and self._provider is not None:
            try:
                token = await self._fetch(self._provider)
            except OSError as error:  # includes TimeoutError
                raise LinkLostError(f"no token: {str(error) or 'the token provider did not answer in time'}") from error
            if token == self._refused:
                raise AuthenticationFailed(
                    "Invalid or expired token", f"the same token was given again; {_advice(token)}"
                )
            self.token = token
        if self.token is not None and not self._was_accepted:
            self._check(self.token)
        return self.token

    def _check(self, token: str) -> None:
        problem = time_problem(token, time.time(), CLOCK_TOLERANCE_S)
        if problem is not None:
            raise AuthenticationFailed("Invalid or expired token", f"{problem}; get a new token")
        if is_opaque(token) and token != self._warned_about:
            self._warned_about = token
            log.warning("the token is %s: the server may refuse it", OPAQUE)

    async def renewed(self) -> str | None:
        """Return a new token from the provider, None if the stream should ask the server to refresh the current one."""
        if self._provider is None:
            return None
        try:
            token = await self._fetch(self._provider)
        except (OSError, AuthenticationFailed):
            return None
        if token == self.token:
            return None
        self.token = token
        return token

    async def _fetch(self, provider: TokenProvider) -> str:
        async with asyncio.timeout(self._timeout_s):
            text = await provider()
        try:
            token = _read("the text from the token provider", text)
        except ValueError as error:
            raise AuthenticationFailed("Invalid or expired token", str(error)) from None
        if token == self._given and self._descendant is not None:
            return self._descendant  # refreshing the same token twice would revoke its whole family
        self._given, self._descendant = token, None
        return token

    def refreshed(self, token: str) -> None:
        """Use the token that the server issued in place of the current one."""
        self.token = self._descendant = token

    def accepted(self) -> None:
        """Record that the server accepted the token."""
        self._refused_in_a_row = 0
        self._was_accepted = True

    def doubted(self, token: str | None) -> None:
        """Fetch another token before the next attempt: the server did not state whether this one is valid."""
        if self._provider is not None and self.token == token:
            self.token = None

    def refused(self, token: str | None, message: str) -> None:
        """Record that the server refused this token. Raises AuthenticationFailed if there is no other."""
        if self.token != token:
            return  # a newer token has already replaced it
        self._refused_in_a_row += 1
        self._refused, self.token = token, None
        if token is None:
            raise AuthenticationFailed(message, "this server requires a token, and this stream has none")
        if self._provider is None or not self._comes_back:
            raise AuthenticationFailed(message, _advice(token))
        if self._refused_in_a_row >= MAX_REFUSED_IN_A_ROW:
            raise AuthenticationFailed(
                message, f"the server refused {self._refused_in_a_row} tokens from the provider in a row"
            )


def _advice(token: str) -> str:
    """Return what to do about a refused token, with the reason if the token itself shows it."""
    reason = f"it is {OPAQUE}" if is_opaque(token) else time_problem(token, time.time())
    if reason is None:
        reason = "the server's log has the reason for the refusal"
    return f"get a new token; {reason}"


def read_token(path: str | os.PathLike[str]) -> str:
    """Return the token in a file, in any of the forms that docs/client.md lists.

    Logs a warning if every user of the machine can read the file. Raises ValueError with the file's name and the
    problem, or OSError.
    """
    found = tokenfile.read(Path(path))
    if found.warning is not None:
        log.warning("%s", found.warning)
    return found.token


def _read(name: str, text: str) -> str:
    try:
        return token_in(text, may_be_opaque=True)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def is_api_key(token: str | None) -> bool:
    """Return whether a credential is an API key."""
    return token is not None and token.startswith(API_KEY_PREFIX)


def auth_message(token: str) -> dict[str, str]:
    """Return the `auth` message for a token, the first message of a connection."""
    return {"type": "auth", "api_key" if is_api_key(token) else "token": token}
