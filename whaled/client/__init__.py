"""The public Python client: whale alerts as an async stream that resumes by itself. See docs/client.md.

    async with WhaleStream("ws://127.0.0.1:8765", token=token, filters={"min_btc": 500}) as stream:
        async for event in stream:
            match event:
                case WhaleAlert():
                    print(event.data.btc_value, event.data.transaction_id)
                case Missed():
                    print("events were lost before", event.position)

Everything not named here is an implementation detail.
"""

from whaled.client.credentials import read_token
from whaled.client.dial import Limits
from whaled.client.events import (
    AlertData,
    Connected,
    Disconnected,
    Missed,
    Progress,
    StreamEvent,
    TokenRenewed,
    UpdateData,
    UpstreamStatus,
    WhaleAlert,
    WhaleUpdate,
)
from whaled.client.failures import (
    AuthenticationFailed,
    LinkLostError,
    ProtocolError,
    StreamError,
    SubscriptionError,
    UnusableServerError,
)
from whaled.client.since import Last, Since, parse_since
from whaled.client.stream import Retry, WhaleStream
from whaled.model import Position

__all__ = [
    "AlertData",
    "AuthenticationFailed",
    "Connected",
    "Disconnected",
    "Last",
    "Limits",
    "LinkLostError",
    "Missed",
    "Position",
    "Progress",
    "ProtocolError",
    "Retry",
    "Since",
    "StreamError",
    "StreamEvent",
    "SubscriptionError",
    "TokenRenewed",
    "UnusableServerError",
    "UpdateData",
    "UpstreamStatus",
    "WhaleAlert",
    "WhaleStream",
    "WhaleUpdate",
    "parse_since",
    "read_token",
]
