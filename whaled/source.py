"""The seam between whaled and a source of transactions: what a source reports, answers and raises. Pure.

A source is one package below `whaled/sources/`. It implements `Stream` and `Backend`, and translates what its server
sends into the values here, so that detection and backfill know no server and no protocol.
"""

from collections.abc import AsyncGenerator, Container, Iterable, Sequence
from enum import Enum, auto
from functools import cached_property
from typing import Protocol

from msgspec import Struct

from whaled.errors import UpstreamError
from whaled.model import Block, FeeMarket, ProjectedBlock, Transaction, UpstreamState

# --- the stream ------------------------------------------------------------------------------------------------------


class Continuity(Enum):
    """The relation of a message's sequence number to the previous one.

    Only GAP and RESTARTED mean with certainty that something is missing; contiguous numbers do not prove completeness.
    """

    FIRST = auto()
    IN_ORDER = auto()
    NOT_IN_SYNC = auto()
    GAP = auto()
    RESTARTED = auto()


class Replacement(Struct, frozen=True):
    """A replacement: `by` replaced `replaced`. A pair can come again, with a later replacer."""

    replaced: str
    by: str


class Quote(Struct, frozen=True):
    """The price in a message, in US dollars per bitcoin; `usd` None means that the backend does not know it.

    `stated_at` is its time by the backend's clock, in Unix seconds, None if the backend gave none.
    """

    usd: float | None
    stated_at: float | None = None


class Glimpse(Protocol):
    """The two fields that decide whether a transaction matters."""

    @property
    def txid(self) -> str:
        """The transaction's id."""
        ...

    @property
    def gross_sat(self) -> int:
        """The sum of all outputs, plus the fee if it is known, in satoshi."""
        ...


class Entered(Protocol):
    """The transactions that entered the mempool by one message, read in two stages.

    The first stage, before the message is passed on, reads two fields of every transaction (`added`). The second reads
    the others on demand, from the message's bytes, of those transactions that matter: few of 100,000 do, and reading
    all of them in full takes 1.5 times as long. A source without such messages uses `Decoded`.
    """

    @property
    def added(self) -> Sequence[Glimpse]:
        """Every transaction that entered, by the first stage."""
        ...

    @property
    def size_bytes(self) -> int:
        """The size of what the second stage reads."""
        ...

    def at_least(self, minimum_sat: int) -> list[Transaction]:
        """Return, in full, the transactions whose outputs and fee add up to at least `minimum_sat`, each once.

        A transaction that the message names only as a replacer counts too.
        """
        ...

    def spending(self, outpoints: Container[str]) -> dict[str, str]:
        """Return the transactions that spend one of these outpoints (`model.outpoint`): txid by outpoint."""
        ...


class Decoded(Struct, frozen=True):
    """Transactions that entered the mempool and are decoded in full already."""

    added: tuple[Transaction, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Nothing is left to be read."""
        return 0

    def at_least(self, minimum_sat: int) -> list[Transaction]:
        """Return the transactions whose outputs and fee add up to at least `minimum_sat`."""
        return [each for each in self.added if each.gross_sat >= minimum_sat]

    def spending(self, outpoints: Container[str]) -> dict[str, str]:
        """Return the transactions that spend one of these outpoints: txid by outpoint."""
        return {key: each.txid for each in self.added for key in each.outpoints if key in outpoints}


class Listed(Protocol):
    """A transaction of the mempool as a snapshot lists it; a field that the backend does not know is None.

    The fee is in satoshi, the rate in sat/vB, `first_seen` in Unix seconds by the backend's clock. `is_replacement` is
    whether the backend has seen it replace another transaction.
    """

    @property
    def txid(self) -> str: ...  # noqa: D102 - the class describes the fields
    @property
    def fee(self) -> float | None: ...  # noqa: D102
    @property
    def vsize(self) -> float | None: ...  # noqa: D102
    @property
    def rate(self) -> float | None: ...  # noqa: D102
    @property
    def first_seen(self) -> float | None: ...  # noqa: D102
    @property
    def is_replacement(self) -> bool | None: ...  # noqa: D102


class MempoolPart(Protocol):
    """A part of the mempool in a snapshot."""

    @property
    def transactions(self) -> Sequence[Listed]:
        """Every transaction of the part."""
        ...

    def at_least(self, minimum_sat: int) -> Sequence[Listed]:
        """Return the transactions whose outputs and fee add up to at least `minimum_sat`."""
        ...


class MempoolChange(Struct, frozen=True, kw_only=True, dict=True):
    """The meaning of one message of the stream; a part that the message lacks is empty or None.

    It arrived at `received_at` by the wall clock (Unix seconds) and at `received_monotonic` by the monotonic clock.
    `continuity` is None if the message has no sequence number. `removed` does not mean dropped, and `mined` has every
    transaction of the block, coinbase included. `block` is a block that was just found, `blocks` the newest blocks of
    the chain; with `is_ready` they come from a backend that reports to be in sync, so that they are reliable.
    """

    received_at: float
    received_monotonic: float
    continuity: Continuity | None = None
    entered: Entered = Decoded()
    removed: tuple[str, ...] = ()
    mined: tuple[str, ...] = ()
    replaced: tuple[Replacement, ...] = ()
    snapshot: MempoolPart | None = None
    block: Block | None = None
    blocks: tuple[Block, ...] | None = None
    is_ready: bool = False
    fees: FeeMarket | None = None
    projected: tuple[ProjectedBlock, ...] | None = None
    price: Quote | None = None

    def predecessor(self, txid: str) -> str | None:
        """Return the transaction that `txid` replaced, None if it replaced none.

        A pair can come again with a later replacer; of several transactions, the one removed in this message is
        returned.
        """
        return self._predecessors.get(txid)

    @cached_property
    def _predecessors(self) -> dict[str, str]:
        """The replaced txid by replacer. Computed once: searching all pairs for each whale would be quadratic."""
        left = set(self.removed)
        found: dict[str, str] = {}
        for pair in self.replaced:
            known = found.setdefault(pair.by, pair.replaced)
            if known not in left and pair.replaced in left:
                found[pair.by] = pair.replaced
        return found


class Connected(Struct, frozen=True):
    """The backend's response to the subscription has arrived.

    `attempt` counts from 1 and starts again after a stable link.
    """

    attempt: int


class Lost(Struct, frozen=True):
    """The loss of the link, or a failed attempt; the next attempt follows in `next_delay_s` seconds.

    `reason` is the source's name for the cause.
    """

    reason: str
    next_delay_s: float


class StateChanged(Struct, frozen=True):
    """A change in the state of the link, which is initially disconnected."""

    state: UpstreamState
    why: str


class SnapshotTaken(Struct, frozen=True):
    """The end of a snapshot: the preceding changes had the mempool, as far as the backend lists it."""


class Shortfall(Struct, frozen=True):
    """A change in the capabilities that the backend lacks; None if it lacks none now. The stream itself continues."""

    why: str | None


StreamMessage = MempoolChange | Connected | Lost | StateChanged | SnapshotTaken | Shortfall


def degraded_by(shortfall: str | None, state: UpstreamState) -> UpstreamState:
    """Return `state`, or degraded if a connected backend lacks something that whaled needs."""
    return UpstreamState.DEGRADED if shortfall is not None and state is UpstreamState.CONNECTED else state


class Stream(Protocol):
    """The changes of a mempool, across all reconnects."""

    def messages(self) -> AsyncGenerator[StreamMessage, None]:
        """Yield messages without end."""
        ...


# --- requests --------------------------------------------------------------------------------------------------------


class BackendError(UpstreamError):
    """A request without a usable response, whatever the backend sent.

    With `is_backend_wide` the cause concerns the backend as a whole, and the next request would fail alike; otherwise
    it concerns this request only. `reason` is the source's name for the cause, from a closed set: a metric label.
    `retry_after_s` is the delay that the backend requested, in seconds.
    """

    def __init__(self, reason: str, message: str, *, is_backend_wide: bool, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.is_backend_wide = is_backend_wide
        self.retry_after_s = retry_after_s


class Confirmation(Struct, frozen=True):
    """The block that contains a transaction, according to the backend."""

    block_hash: str
    block_height: int


class Summary(Struct, frozen=True):
    """A transaction as the summary of its block lists it.

    `value` is the sum of its outputs and `fee` its fee, both in satoshi; `index` is its position in the block. A field
    is None if the backend does not know it or it cannot be read. `first_seen` is when the backend first had it (Unix
    seconds, the backend's clock).
    """

    txid: str | None
    value: int | None
    fee: int | None
    vsize: float
    index: int
    first_seen: float | None = None
    is_replacement: bool | None = None

    @property
    def gross_sat(self) -> int | None:
        """The sum of all outputs, plus the fee if it is known, in satoshi; None if the outputs are unknown."""
        return None if self.value is None else self.value + (self.fee or 0)


class Relative(Struct, frozen=True):
    """A transaction of a tree of replacements.

    `value` is the sum of its outputs in satoshi, `seen` the time at which the backend first had it (Unix seconds, the
    backend's clock), `replaced_by` the txid that replaced it.
    """

    txid: str
    value: int | None
    seen: float | None
    replaced_by: str | None


class Backend(Protocol):
    """The requests of the backfill, at a limited rate. Every method may raise BackendError, and no other error."""

    answered: int
    """The number of requests that were answered."""

    @property
    def inputs_limit(self) -> int:
        """The number of inputs above which `transaction` is not answered in time, and `large` is to be used."""
        ...

    # --- the mempool ---

    async def mempool(self) -> list[str]:
        """Return every txid in the mempool. It may be ahead of the stream."""
        ...

    async def transaction(self, txid: str) -> Transaction | None:
        """Return a transaction of the mempool in full; None if the backend does not know it (any more)."""
        ...

    async def bare(self, txid: str) -> Transaction | None:
        """Return a transaction as serialised: outputs without addresses, no prevouts, no fee. None if unknown."""
        ...

    async def large(self, txid: str) -> Transaction | None:
        """Return a transaction with more inputs than `inputs_limit`, as far as it can be completed. None if unknown."""
        ...

    async def cached(self, txid: str) -> Transaction | None:
        """Return a transaction in full that was replaced lately; None if the backend does not know it."""
        ...

    # --- outcomes ---

    async def confirmation(self, txid: str) -> Confirmation | None:
        """Return the block that contains a transaction; None if it is not mined or not known.

        After a reorganisation the backend may name a block that is no longer in the chain.
        """
        ...

    async def is_in_chain(self, place: Confirmation) -> bool:
        """Return whether the block of a confirmation is in the best chain."""
        ...

    async def replacer(self, txid: str) -> str | None:
        """Return the txid of the transaction that replaced this one; None if the backend knows of none."""
        ...

    async def spender(self, outpoint: str) -> str | None:
        """Return the txid of the transaction that spends an output (`model.outpoint`); None if unspent or unknown."""
        ...

    async def family(self, txid: str) -> list[Relative]:
        """Return every transaction in this transaction's tree of replacements, the latest first."""
        ...

    async def latest_families(self) -> list[list[Relative]]:
        """Return the trees of the latest replacements, newest first; empty from a backend without this call."""
        ...

    # --- blocks ---

    async def tip_height(self) -> int:
        """Return the height of the best block that the backend has."""
        ...

    async def block_hash(self, height: int) -> str | None:
        """Return the hash of the block at a height of the best chain; None above its tip."""
        ...

    async def block(self, block_hash: str, height: int | None = None) -> Block:
        """Return a block's position in the chain. Raises BackendError if `height` is given and is not its height."""
        ...

    async def summary(self, block_hash: str) -> list[Summary]:
        """Return the summary of every transaction in a block except the coinbase."""
        ...

    def pages_of(self, entries: Iterable[Summary]) -> list[list[Summary]]:
        """Group entries of a block into the smallest number of `page` calls that return all of them."""
        ...

    async def page(self, block_hash: str, entries: Sequence[Summary]) -> list[Transaction | None]:
        """Return the transactions of one group of `pages_of`, in full, with fee and size from the summary.

        None for a transaction that is not in the response or cannot be read: `mined` fetches it alone. Prevouts may be
        missing: `completed` fetches those.
        """
        ...

    async def mined(self, block_hash: str, entry: Summary) -> Transaction:
        """Return a transaction of a block that its page lacked. Raises BackendError if the backend does not know it."""
        ...

    async def completed(self, transaction: Transaction) -> Transaction:
        """Return a mined transaction with its prevouts if the backend provides them quickly; otherwise unchanged."""
        ...

    async def spenders(self, block_hash: str, outpoints: Iterable[str]) -> dict[str, str] | None:
        """Return the transactions of a block that spend one of these outpoints (`model.outpoint`): txid by outpoint.

        None from a backend without this call.
        """
        ...
