"""One request of the admin API as an act sees it, and the refusals that an act may raise."""

from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum

from msgspec import Struct

from whaled.errors import WhaledError


class Code(StrEnum):
    """`code` of an error of the admin API."""

    BAD_REQUEST = "bad_request"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    TIMEOUT = "timeout"
    CONFLICT = "conflict"
    TOO_LARGE = "too_large"
    INTERNAL = "internal"


STATUS = {
    Code.BAD_REQUEST: 400,
    Code.FORBIDDEN: 403,
    Code.NOT_FOUND: 404,
    Code.METHOD_NOT_ALLOWED: 405,
    Code.TIMEOUT: 408,
    Code.CONFLICT: 409,
    Code.TOO_LARGE: 413,
    Code.INTERNAL: 500,
}


class Outcome(StrEnum):
    """The end of an act (a metric label)."""

    DONE = "done"
    REFUSED = "refused"
    FAILED = "failed"


class CallError(WhaledError):
    """A call that is refused. `code` determines the status of the response."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


class Call(Struct, frozen=True):
    """One request.

    `actor` is who sent it ("uid 0 (root)"), `origin` the way it came. `query` has the parameters of the URL, `body` the
    JSON object of a POST; both come from outside, and the act checks them.
    """

    actor: str
    origin: str
    query: Mapping[str, str]
    body: Mapping[str, object]

    def number(self, name: str, default: int, most: int) -> int:
        """Return a whole number from 0 to `most` of the query. Raises CallError."""
        text = self.query.get(name)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) <= len(str(most)) and int(text) <= most):
            raise CallError(Code.BAD_REQUEST, f"{name}: expected a whole number from 0 to {most}")
        return int(text)


class Route(Struct, frozen=True):
    """One act: its method and path, and the function that performs it. It returns what msgspec encodes to JSON.

    `act` raises CallError. Acts with method POST are logged with their actor.
    """

    method: str
    path: str
    act: Callable[[Call], Awaitable[object]]
