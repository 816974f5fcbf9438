"""What can go wrong, sorted by whose fault it is, and the catalogue of WebSocket close codes."""

import errno
from dataclasses import dataclass
from enum import Enum, IntEnum, StrEnum


class ExitStatus(IntEnum):
    """How the process ends. systemd and scripts read these."""

    STOPPED = 0
    FAILED = 1
    USAGE = 2
    CONFIG = 78  # EX_CONFIG of sysexits.h


class WhaledError(Exception):
    """Base of all errors whaled raises on purpose."""


class OperatorError(WhaledError):
    """The operator must change something: a file, a key, a port. The process ends with status 78."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with the configuration.

    `where` is the key's path (`gateway.port`), `problem` says what was found and what is allowed, `source` names
    the file and line, the environment variable or the command-line option it came from.
    """

    where: str
    problem: str
    source: str = ""

    def __str__(self) -> str:
        prefix = f"{self.source}: " if self.source else ""
        place = f"{self.where}: " if self.where else ""
        return f"{prefix}{place}{self.problem}"


class ConfigError(OperatorError):
    """The configuration cannot be used. Carries every fault found, not only the first."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = faults


class BookFailure(StrEnum):
    """Why an address book was refused (a metric label)."""

    UNREADABLE = "unreadable"
    NOT_A_BOOK = "not_a_book"
    EMPTY = "empty"
    SHRUNK = "shrunk"
    TOO_LARGE = "too_large"
    FAULTS = "faults"
    READER_FAILED = "reader_failed"


class BookError(ConfigError):
    """The address book cannot be used. `lines` is the number of lines with faults, named or not."""

    def __init__(self, faults: tuple[Fault, ...], *, reason: BookFailure, lines: int = 0) -> None:
        super().__init__(faults)
        self.reason = reason
        self.lines = lines


class KeyRingError(OperatorError):
    """The signing keys are missing, unreadable, readable by others, or too weak."""


class ListenError(OperatorError):
    """A listening socket could not be opened; `remedy` says what sets its address."""

    def __init__(self, host: str, port: int, error: OSError | str, remedy: str) -> None:
        in_use = ""
        if isinstance(error, OSError):
            # The event loop's text names the address a second time, with the reason behind the last colon.
            reason = (error.strerror or str(error)).rpartition(": ")[2]
            in_use = ", or stop what uses the port" if error.errno == errno.EADDRINUSE else ""
        else:
            reason = error
        super().__init__(f"cannot listen on {host} port {port}: {reason}; {remedy}{in_use}")


class DescriptorsError(OperatorError):
    """The limit of file descriptors leaves none for clients."""

    def __init__(self, limit: int, least: int) -> None:
        super().__init__(
            f"the limit of file descriptors is {limit:,}, and {least:,} are needed for a single client: raise "
            "LimitNOFILE= of the unit, ulimit -n, or the container's nofile limit"
        )
        self.limit = limit
        self.least = least


class EventLogError(WhaledError):
    """The event log cannot be read or written. The daemon stops rather than publish what is not stored."""

    def __init__(self, message: str, *, reason: "LogFailure") -> None:
        super().__init__(message)
        self.reason = reason


class LogFailure(StrEnum):
    """Why the event log failed (a metric label)."""

    DISK_FULL = "disk_full"
    LOCKED = "locked"
    CORRUPT = "corrupt"
    READ_ONLY = "read_only"
    NEWER_SCHEMA = "newer_schema"
    FOREIGN = "foreign"
    IO = "io"
    CLOSED = "closed"


class CanaryFailure(StrEnum):
    """Why a canary did not arrive (a metric label)."""

    LATE = "late"
    ERROR = "error"


class UpstreamError(WhaledError):
    """The mempool backend did not do what it should; whaled reconnects or asks again."""


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
    """A client sent something that cannot be done; it is answered with an error frame and stays connected."""

    def __init__(self, code: ClientErrorCode, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.path = path


class TokenRefusal(StrEnum):
    """Why a credential was refused. For logs and metrics only: a client is never told."""

    MALFORMED = "malformed"
    UNKNOWN_KEY = "unknown_key"
    BAD_SIGNATURE = "bad_signature"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    BAD_CLAIMS = "bad_claims"
    TOO_LONG = "too_long"
    REVOKED = "revoked"


class TokenError(WhaledError):
    """A token or API key is not accepted. `claimant` is a short name for who it claims to be, unverified; `client_id`
    is given where the signature is right.
    """

    def __init__(self, reason: TokenRefusal, detail: str = "", *, claimant: str = "", client_id: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = detail
        self.claimant = claimant
        self.client_id = client_id


class Close(Enum):
    """Every way whaled closes a client's connection: (code, reason, may the client come back as it is?)."""

    NORMAL = (1000, "", True)
    GOING_AWAY = (1001, "Server is going away", True)
    PROTOCOL_ERROR = (1002, "Protocol error", False)
    NOT_UTF8 = (1007, "Text is not UTF-8", False)
    BAD_DEFLATE = (1007, "Compressed message is damaged", False)
    AUTH_REQUIRED = (1008, "Authentication required", False)
    TOKEN_EXPIRED = (1008, "Token expired", False)
    TOKEN_REVOKED = (1008, "Token revoked", False)
    RATE_LIMITED = (1008, "Rate limit exceeded", False)
    FRAME_TOO_BIG = (1009, "Message too big", False)
    BUG = (1011, "Internal error", True)
    RESTART = (1012, "Service restart", True)
    FULL = (1013, "Too many connections", True)
    AUTH_LIMITED = (1013, "Rate limit exceeded", True)
    TOO_SLOW = (1013, "Too slow", True)
    OVERLOADED = (1013, "Server overloaded", True)

    def __init__(self, code: int, reason: str, retry: bool) -> None:
        self.code = code
        self.reason = reason
        self.retry = retry


def why_unreadable(error: OSError | UnicodeError) -> str:
    """The reason why a file cannot be read, in words and without its path."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
