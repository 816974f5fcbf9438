"""What can be made to go wrong, as values: the same for tests, the command line and `POST /simulator/fault`."""

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

Positive = Annotated[float, Meta(gt=0, le=86_400)]


class Garbage(StrEnum):
    """Frames no backend should send."""

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
    """How REST fails: an error status, no answer at all, or a late one."""

    STATUS = "status"
    TIMEOUT = "timeout"
    SLOW = "slow"


class Fault(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="fault"):
    """One fault. `{"fault":"burst","n":2000}` in JSON."""


class DropLink(Fault, frozen=True, kw_only=True, tag="drop_link"):
    """Every connection ends without a close frame."""


class Stall(Fault, frozen=True, kw_only=True, tag="stall"):
    """The backend freezes: connections stay open, nothing is said, pings are not answered."""

    seconds: Positive = 10.0


class Restart(Fault, frozen=True, kw_only=True, tag="restart"):
    """The backend process ends without a word and comes back after `down` seconds: sequence 0.

    With `cache` it has its mempool at once. Without, `resend` holds its start back until a client has subscribed,
    which then gets the last 8 blocks and the whole mempool again; otherwise nobody hears of what happened meanwhile.
    """

    cache: bool = False
    resend: bool = True
    down: Annotated[float, Meta(ge=0, le=3600)] = 0.0


class SendGarbage(Fault, frozen=True, kw_only=True, tag="garbage"):
    """One bad frame to everybody."""

    kind: Garbage = Garbage.NOT_JSON


class Burst(Fault, frozen=True, kw_only=True, tag="burst"):
    """Many transactions at once."""

    n: Annotated[int, Meta(ge=1, le=20_000)] = 2_000


class Reorg(Fault, frozen=True, kw_only=True, tag="reorg"):
    """`depth` blocks are replaced by one more. `database`: the backend has one, notices, and corrects its blocks."""

    depth: Annotated[int, Meta(ge=1, le=1_000)] = 1
    database: bool | None = None


class LoseBitcoind(Fault, frozen=True, kw_only=True, tag="lose_bitcoind"):
    """The node does not answer the backend. With `forget` it comes back with an empty mempool."""

    seconds: Positive = 10.0
    forget: bool = False


class FailRest(Fault, frozen=True, kw_only=True, tag="fail_rest"):
    """The next `times` REST answers fail."""

    mode: RestMode = RestMode.STATUS
    status: Annotated[int, Meta(ge=400, le=599)] = 500
    seconds: Positive = 5.0
    times: Annotated[int, Meta(ge=1, le=1_000_000)] = 1


class LateBlock(Fault, frozen=True, kw_only=True, tag="late_block"):
    """A block comes while the backend fetches: new transactions are `added` as confirmed, without fee or time."""


AnyFault = DropLink | Stall | Restart | SendGarbage | Burst | Reorg | LoseBitcoind | FailRest | LateBlock


def encode(fault: AnyFault) -> bytes:
    """The body of `POST /simulator/fault` for this fault."""
    return msgspec.json.encode(fault)


# What `--fault-every` picks from: everything a client must survive by itself.
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
