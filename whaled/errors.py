"""The errors that whaled raises, grouped by who has to act on them, and the catalogue of WebSocket close codes.

Pure.
"""

import errno
from dataclasses import dataclass
from enum import Enum, IntEnum, StrEnum


class ExitStatus(IntEnum):
    """Exit codes of the process. systemd and scripts read them."""

    STOPPED = 0
    FAILED = 1
    USAGE = 2
    CONFIG = 78  # EX_CONFIG of sysexits.h


class WhaledError(Exception):
    """Base class of every error that whaled raises on purpose."""


class OperatorError(WhaledError):
    """An error that only the operator can fix, in a file, a key or a port. The process exits with status 78."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault in the configuration.

    `where` is the key's path (`gateway.port`). `problem` states the value found and the values allowed. `source` names
    the file and line, the environment variable or the command-line option that the value came from.
    """

    where: str
    problem: str
    source: str = ""

    def __str__(self) -> str:
        prefix = f"{self.source}: " if self.source else ""
        place = f"{self.where}: " if self.where else ""
        return f"{prefix}{place}{self.problem}"


class ConfigError(OperatorError):
    """An unusable configuration. `faults` has every fault found, not only the first."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = faults


class BookFailure(StrEnum):
    """The reason an address book was refused (a metric label)."""

    UNREADABLE = "unreadable"
    NOT_A_BOOK = "not_a_book"
    EMPTY = "empty"
    SHRUNK = "shrunk"
    TOO_LARGE = "too_large"
    FAULTS = "faults"
    READER_FAILED = "reader_failed"


class BookError(ConfigError):
    """An unusable address book. `lines` is the number of lines with faults, including those not listed."""

    def __init__(self, faults: tuple[Fault, ...], *, reason: BookFailure, lines: int = 0) -> None:
        super().__init__(faults)
        self.reason = reason
        self.lines = lines


class KeyRingError(OperatorError):
    """Signing keys that are missing, unreadable, readable by other users, or too weak."""


class ListenError(OperatorError):
    """A listening socket that could not be opened. `remedy` names the setting that determines its address."""

    def __init__(self, host: str, port: int, error: OSError | str, remedy: str) -> None:
        in_use = ""
        if isinstance(error, OSError):
            # The event loop's message repeats the address; the reason follows its last colon.
            reason = reason_of(error).rpartition(": ")[2]
            in_use = ", or stop what uses the port" if error.errno == errno.EADDRINUSE else ""
        else:
            reason = error
        super().__init__(f"cannot listen on {host} port {port}: {reason}; {remedy}{in_use}")


class DescriptorsError(OperatorError):
    """A limit on file descriptors that is too low to serve a single client."""

    def __init__(self, limit: int, least: int) -> None:
        super().__init__(
            f"the limit of file descriptors is {limit:,}, and {least:,} are needed for a single client: raise "
            "LimitNOFILE= of the unit, ulimit -n, or the container's nofile limit"
        )
        self.limit = limit
        self.least = least


class EventLogError(WhaledError):
    """A failure to read or write the event log. The daemon stops rather than publish events it has not stored."""

    def __init__(self, message: str, *, reason: "LogFailure") -> None:
        super().__init__(message)
        self.reason = reason


class LogFailure(StrEnum):
    """The reason the event log failed (a metric label)."""

    DISK_FULL = "disk_full"
    LOCKED = "locked"
    CORRUPT = "corrupt"
    READ_ONLY = "read_only"
    NEWER_SCHEMA = "newer_schema"
    FOREIGN = "foreign"
    IO = "io"
    CLOSED = "closed"


class AccessError(WhaledError):
    """A failure to read or write the access database: revocations, issued tokens, the audit log."""


class CanaryFailure(StrEnum):
    """The reason a canary did not arrive (a metric label)."""

    LATE = "late"
    ERROR = "error"


class UpstreamError(WhaledError):
    """A failure of the mempool backend; whaled reconnects or repeats the request."""


class ClientErrorCode(StrEnum):
    """`code` of an error frame to a client."""

    INVALID_JSON = "invalid_json"
    INVALID_MESSAGE = "invalid_message"
    INVALID_FILTER = "invalid_filter"
    INVALID_POSITION = "invalid_position"
    UNKNOWN_TYPE = "unknown_type"
    RATE_LIMITED = "rate_limited"
    TOO_MANY_CONNECTIONS = "too_many_connections"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    INTERNAL = "internal"


class ClientError(WhaledError):
    """A client's message that whaled cannot act on. It replies with an error frame and keeps the connection open."""

    def __init__(self, code: ClientErrorCode, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.path = path


class TokenRefusal(StrEnum):
    """The reason a credential was refused. For logs and metrics only: whaled never sends it to a client."""

    MALFORMED = "malformed"
    UNKNOWN_KEY = "unknown_key"
    BAD_SIGNATURE = "bad_signature"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    BAD_CLAIMS = "bad_claims"
    TOO_LONG = "too_long"
    REVOKED = "revoked"
    UNKNOWN_API_KEY = "unknown_api_key"
    WRONG_NETWORK = "wrong_network"


class TokenError(WhaledError):
    """A token or API key that was refused.

    `claimant` is a short form of the identity that the credential claims, unverified. `client_id` is set only if the
    signature is valid.
    """

    def __init__(self, reason: TokenRefusal, detail: str = "", *, claimant: str = "", client_id: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail
        self.claimant = claimant
        self.client_id = client_id


class Close(Enum):
    """Every way in which whaled closes a client's connection: (close code, reason).

    The library answers a client's close with its own code, and closes with 1002 after a protocol error.
    """

    GOING_AWAY = (1001, "Server is going away")
    NOT_UTF8 = (1007, "Text is not UTF-8")
    BAD_DEFLATE = (1007, "Compressed message is damaged")
    AUTH_REQUIRED = (1008, "Authentication required")
    TOKEN_EXPIRED = (1008, "Token expired")
    TOKEN_REVOKED = (1008, "Token revoked")
    RATE_LIMITED = (1008, "Rate limit exceeded")
    FRAME_TOO_BIG = (1009, "Message too big")
    BUG = (1011, "Internal error")
    RESTART = (1012, "Service restart")
    FULL = (1013, "Too many connections")
    AUTH_LIMITED = (1013, "Rate limit exceeded")
    TOO_SLOW = (1013, "Too slow")
    OVERLOADED = (1013, "Server overloaded")

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason


_JSON_KINDS = {
    type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"
}  # fmt: skip


def json_kind(value: object) -> str:
    """Return what a decoded JSON value is, as an error for a client names it."""
    return _JSON_KINDS.get(type(value), "an object")


def reason_of(error: Exception) -> str:
    """Return the reason of an error in words: for an OSError the system's, without its number and path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def why_unreadable(error: OSError | UnicodeError) -> str:
    """Return the reason why a file cannot be read, in words and without its path."""
    return "there is no such file" if isinstance(error, FileNotFoundError) else reason_of(error)


def most_informative(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first WhaledError of a group, else its first exception: a failed task makes others fail too."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            leaves.append(error)
    return next((leaf for leaf in leaves if isinstance(leaf, WhaledError)), leaves[0])
