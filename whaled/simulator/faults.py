"""The faults that can be simulated, as values for tests, the command line and `POST /simulator/fault`."""

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

Positive = Annotated[float, Meta(gt=0, le=86_400)]


class Garbage(StrEnum):
    """Kinds of invalid frames."""

    NOT_JSON = "not_json"
    TRUNCATED = "truncated"
    NULL = "null"
    NUMBER = "number"
    ARRAY = "array"
    EMPTY = "empty"
    WRONG_TYPES = "wrong_types"
    MISSING_KEYS = "missing_keys"
    NEGATIVE_VALUE = "negative_value"
    DEEP = "deep"
    BINARY = "binary"


_TXID = "ab" * 32
PAYLOADS = {
    Garbage.NOT_JSON: b"<html><body>502 Bad Gateway</body></html>",
    Garbage.TRUNCATED: b'{"mempool-transactions":{"sequence":7,"added":[{"txid":"',
    Garbage.NULL: b"null",
    Garbage.NUMBER: b"42",
    Garbage.ARRAY: b'["mempool-transactions"]',
    Garbage.EMPTY: b"",
    Garbage.WRONG_TYPES: b'{"mempool-transactions":{"sequence":"seven","added":{},"removed":7,"mined":null,'
    b'"replaced":0}}',
    Garbage.MISSING_KEYS: b'{"mempool-transactions":{"added":[{"txid":"' + _TXID.encode() + b'"}]}}',
    Garbage.NEGATIVE_VALUE: b'{"mempool-transactions":{"sequence":0,"added":[{"txid":"'
    + _TXID.encode()
    + b'","vin":[],"vout":[{"value":-1,"scriptpubkey":""}],"fee":0,"vsize":1}],"removed":[],"mined":[],"replaced":[]}}',
    Garbage.DEEP: b'{"mempool-transactions":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    Garbage.BINARY: bytes(range(256)),
}


class RestMode(StrEnum):
    """The kinds of REST failure: with an error status, without a response, or with a late response."""

    STATUS = "status"
    TIMEOUT = "timeout"
    SLOW = "slow"


class Fault(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="fault"):
    """Base class of the faults. In JSON: `{"fault":"burst","n":2000}`."""


class DropLink(Fault, frozen=True, kw_only=True, tag="drop_link"):
    """Every connection ends without a close frame."""


class Stall(Fault, frozen=True, kw_only=True, tag="stall"):
    """The backend freezes: connections stay open, it sends nothing and does not respond to pings or REST."""

    seconds: Positive = 10.0


class Restart(Fault, frozen=True, kw_only=True, tag="restart"):
    """The backend process ends without close frames and restarts after `down` seconds, with sequence 0.

    With `cache` it has its mempool at once. Without it, `resend` delays its start until a client has subscribed, which
    then gets the last 8 blocks and the whole mempool again. Otherwise no client is sent what happened meanwhile.
    """

    cache: bool = False
    resend: bool = True
    down: Annotated[float, Meta(ge=0, le=3600)] = 0.0


class SendGarbage(Fault, frozen=True, kw_only=True, tag="garbage"):
    """The backend sends an invalid frame to every client."""

    kind: Garbage = Garbage.NOT_JSON


class Burst(Fault, frozen=True, kw_only=True, tag="burst"):
    """`n` transactions arrive at once."""

    n: Annotated[int, Meta(ge=1, le=20_000)] = 2_000


class Reorg(Fault, frozen=True, kw_only=True, tag="reorg"):
    """`depth` blocks are replaced by `depth` + 1 others. With `database` the backend notices it."""

    depth: Annotated[int, Meta(ge=1, le=1_000)] = 1
    database: bool | None = None


class LoseBitcoind(Fault, frozen=True, kw_only=True, tag="lose_bitcoind"):
    """The node does not respond to the backend. With `forget` it comes back with an empty mempool."""

    seconds: Positive = 10.0
    forget: bool = False


class FailRest(Fault, frozen=True, kw_only=True, tag="fail_rest"):
    """The next `times` REST requests fail."""

    mode: RestMode = RestMode.STATUS
    status: Annotated[int, Meta(ge=400, le=599)] = 500
    seconds: Positive = 5.0
    times: Annotated[int, Meta(ge=1, le=1_000_000)] = 1


class LateBlock(Fault, frozen=True, kw_only=True, tag="late_block"):
    """A block arrives while the backend fetches: new transactions are `added` as confirmed, without fee or time."""


AnyFault = DropLink | Stall | Restart | SendGarbage | Burst | Reorg | LoseBitcoind | FailRest | LateBlock


def encode(fault: AnyFault) -> bytes:
    """Return the body of `POST /simulator/fault` for a fault."""
    return msgspec.json.encode(fault)


# `--fault-every` draws from these: all faults that a client must survive unattended.
ROUTINE: tuple[AnyFault, ...] = (
    DropLink(),
    Stall(seconds=5),
    Restart(cache=False, resend=True, down=1),
    Restart(cache=False, resend=False, down=3),
    Restart(cache=True, down=3),
    SendGarbage(kind=Garbage.TRUNCATED),
    SendGarbage(kind=Garbage.WRONG_TYPES),
    Burst(n=500),
    Reorg(depth=1),
    Reorg(depth=3),
    LoseBitcoind(seconds=15),
    FailRest(status=503, times=5),
    FailRest(mode=RestMode.SLOW, seconds=3, times=3),
    LateBlock(),
)
