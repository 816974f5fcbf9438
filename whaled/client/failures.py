"""What ends a stream. Everything else is answered by coming back."""

from whaled.errors import WhaledError


class StreamError(WhaledError):
    """Base of what iterating over a stream raises. The stream is over; `stream.position` says how far it came."""


class AuthenticationFailed(StreamError):  # noqa: N818 - the public name says what happened, not what class it is
    """The server does not accept the credential, or wants one and none was given. Coming back with the same is useless.

    `message` is what the server said, or would say; it never says why a token was refused (the server's log does).
    `advice` is what can be seen from here, and what to do.
    """

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(f"{message}: {advice}" if advice else message)
        self.message = message
        self.advice = advice


class SubscriptionError(StreamError):
    """The server does not accept the filters or the position, or the token has no `read` permission.

    `code` is the server's error code (`invalid_filter`, `invalid_position`, `forbidden` ...), `path` the part of the
    filters it is about, where there is one.
    """

    def __init__(self, code: str, message: str, path: str | None = None) -> None:
        super().__init__(f"{message} ({path})" if path else message)
        self.code = code
        self.path = path


class ProtocolError(StreamError):
    """The other side sent something that protocol version 1 does not allow. Nothing was skipped: it is the next thing
    after `stream.position`.
    """


class UnusableServerError(StreamError):
    """The server turned the connection away in a way that waiting does not mend: a status such as 403 or 404, a
    redirect, a certificate that cannot be verified, or a close for abuse.
    """


class LinkLostError(StreamError):
    """The connection could not be made, or ended. Raised by a stream with `reconnect=False` only.

    `code` is the WebSocket close code, 1006 where there was none. `retry_after_s` is how long the server asked to
    stay away. `was_up_s` is how long the subscription had been standing.
    """

    def __init__(
        self, reason: str, *, code: int = 1006, retry_after_s: float | None = None, was_up_s: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.retry_after_s = retry_after_s
        self.was_up_s = was_up_s
