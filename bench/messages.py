"""The messages that are measured. Each contains its number and the time of sending, for the load client.

Both are in the transaction id, which has 64 hex digits and is the same in the backend's frame and in the client's.
"""

import hashlib
import time

from whaled.gateway import messages
from whaled.gateway.framing import text_frame
from whaled.model import Alert, Event, Flow, Kind, Shape, Source, Status, Whale

# The same as in load.c and limit.c.
MARK = "b0a7b0a7b0a7b0a7"
FRAME_BYTES = 900
# All offsets have the same number of digits, so that all frames have the same size.
FIRST_OFFSET = 1_000_000


def stamp(number: int) -> str:
    """Return a txid of MARK, the message's number and the monotonic time in ns, 16 hex digits each."""
    return f"{MARK}{number:016x}{time.monotonic_ns():016x}".ljust(64, "0")


def event(number: int, padding: str = "") -> Event:
    """Return an alert like those of a live daemon; `padding` makes its frame longer."""
    alert = Alert(
        transaction_id=stamp(number),
        btc_value=150.00001470,
        value_sat=15_000_001_470,
        moved_sat=12_345_678_901,
        fee_sat=1_470,
        usd_value=9_750_000.96,
        btc_usd=65_000.0,
        fee_rate=10.48,
        vsize=140.25,
        urgency_score=0.81,
        flow_type=Flow.INFLOW,
        exchange_addresses=(),
        confidence_score=0.9,
        from_labels=(padding,),
        to_labels=(),
        shape=Shape.TRANSFER,
        reasons=("two_outputs",),
        input_count=1,
        output_count=2,
        rbf_enabled=True,
        predicted_confirmation_block=900_001,
        detection_timestamp="2026-01-01T00:00:00.123456+00:00",
        status=Status.PENDING,
        source=Source.LIVE,
        price_timestamp="2026-01-01T00:00:00.000+00:00",
        matched_rules=("threshold_btc",),
        flow_sat=11_111_110_811,
    )
    return Event(offset=FIRST_OFFSET + number, kind=Kind.ALERT, at=1_800_000_000.123456, whale=Whale(alert))


def padding(epoch: str) -> str:
    """Return the padding that makes the frame of an event FRAME_BYTES long."""
    noise = hashlib.sha512(b"nothing repeats in it, as in addresses").hexdigest()
    return noise[: FRAME_BYTES - len(text_frame(messages.event(event(0), epoch)))]


def frame(number: int, epoch: str, filler: str) -> bytes:
    """Return the complete WebSocket frame of an event."""
    return text_frame(messages.event(event(number, filler), epoch))
