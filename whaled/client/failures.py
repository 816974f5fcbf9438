"""The errors that end a stream. On any other failure the stream reconnects."""

from whaled.errors import WhaledError


class StreamError(WhaledError):
    """Base class of the errors that iterating over a stream raises. The stream has ended at `stream.position`."""


class AuthenticationFailed(StreamError):  # noqa: N818 - the public name states the event
    """The server refused the token, or requires one and none was given. Retrying with the same token is useless.

    `message` is the server's error message, or the one it would send. It never contains the reason for the refusal,
    which is in the server's log. `advice` is the reason as far as the token itself shows it, and what to do.
    """

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(f"{message}: {advice}" if advice else message)
        self.message = message
        self.advice = advice


class SubscriptionError(StreamError):
    """The server refused the filters or the position, or the token lacks the `read` permission.

    `code` is the server's error code (`invalid_filter`, `invalid_position`, `forbidden` ...). `path` is the part of the
    filters that the error refers to, if any.
    """

    def __init__(self, code: str, message: str, path: str | None = None) -> None:
        super().__init__(f"{message} ({path})" if path else message)
        self.code = code
        self.path = path


class ProtocolError(StreamError):
    """The server sent something that protocol version 1 does not allow.

    No event was skipped: the invalid frame is the first one after `stream.position`.
    """


class UnusableServerError(StreamError):
    """The server refused the connection for a lasting reason.

    Such as a status 403 or 404, a redirect, a certificate that cannot be verified, or a close for abuse.
    """


class LinkLostError(StreamError):
    """The connection was lost or could not be opened. Only a stream with `reconnect=False` raises it.

    `code` is the WebSocket close code, 1006 if there was none. `retry_after_s` is the wait that the server requested.
    `was_up_s` is how long the stream had been subscribed.
    """

    def __init__(
        self, reason: str, *, code: int = 1006, retry_after_s: float | None = None, was_up_s: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.retry_after_s = retry_after_s
        self.was_up_s = was_up_s
