"""The token of a stream: given, asked for, renewed, refused."""

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

# Before the first connection a token is judged by this machine's clock only if no clock can be as wrong as that.
CLOCK_TOLERANCE_S = 300.0
OPAQUE = "neither a JWT (three parts with dots between) nor an API key (whk_...)"
# A provider whose tokens are refused one after the other is misconfigured; going on would only earn a ban.
MAX_REFUSED_IN_A_ROW = 3


class Credentials:
    """At most one token at a time. `provider` is asked when there is none, or the one there was is refused or ends."""

    def __init__(
        self, token: str | None, provider: TokenProvider | None, timeout_s: float, *, comes_back: bool = True
    ) -> None:
        self.token = None if token is None else _read("`token`", token)
        self._was_accepted = False
        self._named: str | None = None  # an odd token that was logged
        self._provider = provider
        self._timeout_s = timeout_s
        self._comes_back = comes_back  # with another token of the provider
        self._given = self.token
        self._descendant: str | None = None  # what the server made of the token that was given
        self._refused: str | None = None
        self._refused_in_a_row = 0

    async def current(self) -> str | None:
        """The token to connect with, None if there is none.

        Raises LinkLostError if one may be had later, AuthenticationFailed if the server is certain to refuse it. Once
        the server accepted one, it alone judges: the clock of this machine may be wrong.
        """
        if self.token is None and self._provider is not None:
            try:
                token = await self._ask(self._provider)
            except OSError as error:  # TimeoutError too
                raise LinkLostError(f"no token: {str(error) or 'the token provider did not answer in time'}") from error
            if token == self._refused:
                raise AuthenticationFailed(
                    "Invalid or expired token", f"the same token was given again; {_advice(token)}"
                )
            self.token = token
        if self.token is not None and not self._was_accepted:
            self._look_at(self.token)
        return self.token

    def _look_at(self, token: str) -> None:
        problem = time_problem(token, time.time(), CLOCK_TOLERANCE_S)
        if problem is not None:
            raise AuthenticationFailed("Invalid or expired token", f"{problem}; get a new token")
        if is_opaque(token) and token != self._named:
            self._named = token
            log.warning("the token is %s: the server may refuse it", OPAQUE)

    async def renewed(self) -> str | None:
        """A fresh token of the provider; None if the server should be asked to refresh the old one."""
        if self._provider is None:
            return None
        try:
            token = await self._ask(self._provider)
        except (OSError, AuthenticationFailed):
            return None
        if token == self.token:
            return None
        self.token = token
        return token

    async def _ask(self, provider: TokenProvider) -> str:
        async with asyncio.timeout(self._timeout_s):
            text = await provider()
        try:
            token = _read("what the token provider gave", text)
        except ValueError as error:
            raise AuthenticationFailed("Invalid or expired token", str(error)) from None
        if token == self._given and self._descendant is not None:
            return self._descendant  # a token that was refreshed must not be refreshed again
        self._given, self._descendant = token, None
        return token

    def refreshed(self, token: str) -> None:
        """The server gave this token in place of the one in use."""
        self.token = self._descendant = token

    def accepted(self) -> None:
        """The server let this stream in."""
        self._refused_in_a_row = 0
        self._was_accepted = True

    def doubted(self, token: str | None) -> None:
        """The server may not take this token, and does not say: the provider is asked before the next attempt."""
        if self._provider is not None and self.token == token:
            self.token = None

    def refused(self, token: str | None, message: str) -> None:
        """The server does not take this token (any more). Raises AuthenticationFailed if there is no other."""
        if self.token != token:
            return  # a newer one is there already
        self._refused_in_a_row += 1
        self._refused, self.token = token, None
        if token is None:
            raise AuthenticationFailed(message, "this server wants a token, and this stream has none")
        if self._provider is None or not self._comes_back:
            raise AuthenticationFailed(message, _advice(token))
        if self._refused_in_a_row >= MAX_REFUSED_IN_A_ROW:
            raise AuthenticationFailed(
                message, f"{self._refused_in_a_row} tokens of the provider in a row were refused"
            )


def _advice(token: str) -> str:
    """What to do about a token that was refused, with the reason if it can be seen from here."""
    reason = f"it is {OPAQUE}" if is_opaque(token) else time_problem(token, time.time())
    if reason is None:
        reason = "the server's log says why this one was refused"
    return f"get a new token; {reason}"


def read_token(path: str | os.PathLike[str]) -> str:
    """The token in a file, whatever surrounds it (docs/client.md lists the forms).

    A file that every user of the machine can read is logged as a warning. Raises ValueError that names the file and
    what is wrong, or OSError.
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


def auth_message(token: str) -> dict[str, str]:
    """The first message."""
    return {"type": "auth", "api_key" if token.startswith(API_KEY_PREFIX) else "token": token}
