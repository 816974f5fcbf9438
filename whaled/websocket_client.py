"""Opening and closing of WebSocket connections, as the link to a backend and the client both need them."""

import asyncio

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException
from websockets.protocol import Protocol


class Connect(connect):
    """A `connect` that follows no redirect.

    A credential is thus sent only to the configured server, and the redirect's target can be reported to the operator.
    """

    def process_redirect(self, exc: Exception) -> Exception:
        """Return the error with which the attempt ends, instead of the target of the redirect."""
        return exc


async def hang_up(connection: ClientConnection, timeout_s: float) -> None:
    """Close the connection; abort it after `timeout_s`, since a peer that stopped reading never completes the close."""
    try:
        async with asyncio.timeout(timeout_s):
            await connection.close()
    except (TimeoutError, WebSocketException):
        pass
    finally:
        connection.transport.abort()
        forget_last_message(connection.protocol)


def forget_last_message(protocol: Protocol) -> None:
    """Release the last message of a connection that ended without a close frame.

    The protocol keeps the error that ended it. Its traceback has the frame of the parser, and that has the message and
    the protocol itself: a cycle, which would keep megabytes until the next full garbage collection.
    """
    if protocol.parser_exc is not None:
        protocol.parser_exc.__traceback__ = None
