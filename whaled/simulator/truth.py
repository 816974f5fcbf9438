"""The ground truth: every transaction that was made, and its outcome."""

from enum import StrEnum

from msgspec import Struct, field

from whaled.simulator.chain import Block, Leaving
from whaled.simulator.transactions import Tx, TxKind

# Turns kept per transaction, the latest ones.
MAX_TURNS = 256


class Fate(StrEnum):
    """The state of a transaction. `unrelayed`: made, but neither in the mempool nor mined."""

    UNRELAYED = "unrelayed"
    PENDING = "pending"
    CONFIRMED = "confirmed"
    REPLACED = "replaced"
    EVICTED = "evicted"


class Turn(Struct, frozen=True, gc=False):
    """A change of state: its time, the new state, and the txid or block hash that caused it."""

    at: float
    fate: Fate
    because: str = ""


class Record(Struct):
    """The record of a transaction. Amounts are in satoshi, times in Unix seconds.

    `moved_sat` excludes outputs to the script of an input. `via_block` means that it was never in the mempool. `turns`
    is its history.
    """

    txid: str
    kind: TxKind
    whale: bool
    out_sat: int
    moved_sat: int
    in_sat: int
    fee_sat: int
    vsize: float
    n_in: int
    n_out: int
    sent_at: float
    fate: Fate = Fate.UNRELAYED
    via_block: bool = True
    height: int | None = None
    block_hash: str | None = None
    replaced_by: str | None = None
    turns: list[Turn] = field(default_factory=list)


class Truth:
    """The records by txid: the latest `limit` whales, and as many other transactions."""

    def __init__(self, threshold_sat: int, limit: int) -> None:
        self._threshold = threshold_sat
        self._limit = limit
        self._whales: dict[str, Record] = {}
        self._others: dict[str, Record] = {}

    def __len__(self) -> int:
        return len(self._whales) + len(self._others)

    def __getitem__(self, txid: str) -> Record:
        record = self.get(txid)
        if record is None:
            raise KeyError(txid)
        return record

    def get(self, txid: str) -> Record | None:
        """Return the record of a transaction, None if it is unknown or was dropped."""
        return self._whales.get(txid) or self._others.get(txid)

    def records(self) -> list[Record]:
        """Return all records in the order in which the transactions were made."""
        return sorted((*self._whales.values(), *self._others.values()), key=lambda record: record.sent_at)

    def whales(self) -> list[Record]:
        """Return the records of transactions of at least the threshold, without coinbases."""
        return list(self._whales.values())

    def note(self, tx: Tx) -> Record:
        """Return the record of a transaction, creating it if there is none."""
        known = self.get(tx.txid)
        if known is not None:
            return known
        out_sat = tx.out_sat
        record = Record(
            txid=tx.txid,
            kind=tx.kind,
            whale=out_sat >= self._threshold and not tx.is_coinbase,
            out_sat=out_sat,
            moved_sat=tx.moved_sat,
            in_sat=tx.in_sat,
            fee_sat=tx.fee,
            vsize=tx.vsize,
            n_in=len(tx.inputs),
            n_out=len(tx.outputs),
            sent_at=tx.sent_at,
        )
        shelf = self._whales if record.whale else self._others
        shelf[tx.txid] = record
        if len(shelf) > self._limit:
            del shelf[next(iter(shelf))]
        return record

    def pending(self, tx: Tx, at: float) -> None:
        """Record that a transaction entered the mempool, or returned to it."""
        record = self.note(tx)
        if not record.turns:
            record.via_block = False
        record.height = record.block_hash = record.replaced_by = None
        self._turn(record, Turn(at, Fate.PENDING))

    def left(self, tx: Tx, why: Leaving, by: Tx | None, at: float) -> None:
        """Record that a transaction left the mempool without being mined."""
        record = self.note(tx)
        fate = Fate.REPLACED if why is Leaving.REPLACED else Fate.EVICTED
        record.replaced_by = by.txid if by and fate is Fate.REPLACED else None
        record.height = record.block_hash = None
        self._turn(record, Turn(at, fate, by.txid if by else ""))

    def mined(self, block: Block, at: float) -> None:
        """Record that a block joined the best chain."""
        for tx in block.txs:
            record = self.note(tx)
            record.height, record.block_hash, record.replaced_by = block.height, block.hash, None
            self._turn(record, Turn(at, Fate.CONFIRMED, block.hash))

    def unmined(self, block: Block, at: float) -> None:
        """Record that a block left the best chain, which ends its coinbase for good."""
        record = self.get(block.txs[0].txid)
        if record is not None:
            record.height = record.block_hash = None
            self._turn(record, Turn(at, Fate.EVICTED, block.hash))

    def _turn(self, record: Record, turn: Turn) -> None:
        record.fate = turn.fate
        record.turns.append(turn)
        del record.turns[:-MAX_TURNS]
