"""The token of a stream: given, asked for, renewed, refused."""

import asyncio
from collections.abc import Awaitable, Callable

from whaled.client.failures import AuthenticationFailed, LinkLostError

TokenProvider = Callable[[], Awaitable[str]]

API_KEY_PREFIX = "whk_"
# A provider whose tokens are refused one after the other is misconfigured; going on would only earn a ban.
MAX_REFUSED_IN_A_ROW = 3


class Credentials:
    """At most one token at a time. `provider` is asked when there is none, or the one there was is refused or ends."""

    def __init__(self, token: str | None, provider: TokenProvider | None, timeout_s: float) -> None:
        self.token = token
        self._provider = provider
        self._timeout_s = timeout_s
        self._refused: str | None = None
        self._refused_in_a_row = 0

    async def current(self) -> str | None:
        """The token to connect with, None if there is none. Raises LinkLostError if one may be had later."""
        if self.token is None and self._provider is not None:
            try:
                token = await self._ask(self._provider)
            except OSError as error:  # TimeoutError too
                raise LinkLostError(f"no token: {str(error) or 'the token provider did not answer in time'}") from error
            if token == self._refused:
                raise AuthenticationFailed(
                    "Invalid or expired token", "the token provider gave the refused token again"
                )
            self.token = token
        return self.token

    async def renewed(self) -> str | None:
        """A fresh token of the provider; None if the server should be asked to refresh the old one."""
        if self._provider is None:
            return None
        try:
            token = await self._ask(self._provider)
        except OSError:
            return None
        if token == self.token:
            return None
        self.token = token
        return token

    async def _ask(self, provider: TokenProvider) -> str:
        async with asyncio.timeout(self._timeout_s):
            return await provider()

    def accepted(self) -> None:
        """The server let this stream in."""
        self._refused_in_a_row = 0

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
        if self._provider is None:
            raise AuthenticationFailed(message, "get a new token; the server's log says why this one was refused")
        if self._refused_in_a_row >= MAX_REFUSED_IN_A_ROW:
            raise AuthenticationFailed(
                message, f"{self._refused_in_a_row} tokens of the provider in a row were refused"
            )


def auth_message(token: str) -> dict[str, str]:
    """The first message."""
    return {"type": "auth", "api_key" if token.startswith(API_KEY_PREFIX) else "token": token}
