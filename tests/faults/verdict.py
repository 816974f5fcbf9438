"""The comparison of whaled's log and its clients' events with the simulator's ground truth."""

import json
import sqlite3
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from whaled.model import SAT_PER_BTC, Position
from whaled.simulator.chain import Chain
from whaled.simulator.truth import Fate, Record, Truth

# The kinds of a whale's last event that are correct for its outcome. `_is_right` decides whether "dropped" is accepted
# for a replaced whale.
LAST_WORD = {
    Fate.PENDING: ("alert", "pending"),
    Fate.CONFIRMED: ("confirmed",),
    Fate.REPLACED: ("replaced",),
    Fate.EVICTED: ("dropped",),
}
SHOWN = 6
# The largest share of alerts without input amounts if REST works: a transaction may be mined or replaced before its
# inputs are requested.
INPUTS_UNKNOWN_SHARE = 0.5


class Row(Struct, frozen=True):
    """An event as stored in the database."""

    offset: int
    kind: str
    ref: str
    repeat: int
    txid: str
    at: float
    alert: dict[str, Any]
    body: dict[str, Any] | None

    @property
    def because(self) -> str:
        """The block hash or the replacing txid."""
        return self.ref


class ClientEvent(Struct, frozen=True):
    """An event as a client received it."""

    epoch: str
    offset: int
    kind: str
    txid: str


class Frame(Struct, frozen=True):
    """A whale_alert or whale_update frame as received from the socket."""

    type: str
    data: dict[str, Any]
    timestamp: str
    position: Position


class Knowable(Struct):
    """The limits of what whaled can be expected to know.

    `first_height` is the height that the rig recorded when whaled first received blocks: whaled must know every whale
    in blocks from there on, whatever it reports as scanned.

    `must` are the whales that whaled must know: those in the mempool or in a block at a time when whaled was up to
    date, and those in the stream while the link demonstrably held. `reported` are those whose replacement was in such a
    stream. `inputs` are the outpoints that each transaction spends. `since` is the time whaled was first up: whales
    that left the mempool before it are not counted.
    """

    since: float
    first_height: int
    inputs: dict[str, frozenset[tuple[str, int]]]
    must: set[str] = field(default_factory=set)
    reported: set[str] = field(default_factory=set)

    def are_rivals(self, one: str, other: str) -> bool:
        """Return whether two different transactions spend the same output."""
        return one != other and not self.inputs.get(one, frozenset()).isdisjoint(self.inputs.get(other, frozenset()))


class Verdict(Struct):
    """The counts, and descriptions of the problems found."""

    whales: int = 0
    alerted: int = 0
    events: int = 0
    unknowable: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    missing: int = 0
    double: int = 0
    unknown_whales: int = 0
    wrong_amounts: int = 0
    wrong_outcomes: int = 0
    holes: int = 0
    received: int = 0
    client_faults: int = 0
    replaced_reported_as_dropped: int = 0
    inputs_unknown: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.problems

    @property
    def are_inputs_known(self) -> bool:
        """True if the input amounts of enough alerts are known, which requires that REST works."""
        return self.inputs_unknown <= INPUTS_UNKNOWN_SHARE * self.alerted

    def blame(self, what: str, detail: object) -> None:
        """Count a problem in the field named `what`, and describe it."""
        setattr(self, what, getattr(self, what) + 1)
        self.problems.append(f"{what}: {detail}")


def read(database: Path) -> list[Row]:
    """Read every event, with SQL that is independent of the event log's code."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
        rows = db.execute(
            "SELECT e.offset, e.kind, e.ref, e.repeat, w.txid, e.at, w.alert, e.body "
            "FROM events e JOIN whales w ON w.id = e.whale ORDER BY e.offset"
        ).fetchall()
    db.close()
    return [
        Row(offset, kind, ref, repeat, txid, at, json.loads(alert), json.loads(body) if body else None)
        for offset, kind, ref, repeat, txid, at, alert, body in rows
    ]


def state(database: Path, key: str) -> str | None:
    """Return a value of the table `state`, None if it is absent."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
        found = db.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
    db.close()
    return None if found is None else str(found[0])


def compare(
    rows: Sequence[Row],
    truth: Truth,
    chain: Chain,
    knowable: Knowable,
    clients: Mapping[str, tuple[Sequence[ClientEvent], Collection[str], int]],
    *,
    frames: Sequence[Frame] | None = None,
    outcomes: bool = True,
) -> Verdict:
    """Return the verdict.

    `clients` has for each name the events received, the notices of missed events, and the least amount in satoshi of
    the client's filter. `frames` are the raw frames received by a client without a filter. With `outcomes` False, the
    last event of each whale is not checked, for a time when outcomes are still undetermined.
    """
    verdict = Verdict(events=len(rows))
    _judge_log(rows, truth, chain, knowable, verdict)
    last = {row.txid: row for row in rows}
    for record in truth.whales():
        if record.turns and (record.txid in last or _is_within(record, chain, knowable)):
            _judge_whale(record, last.get(record.txid), truth, chain, knowable, verdict, outcomes=outcomes)
    for name, (received, missed, least_sat) in clients.items():
        _judge_client(name, rows, received, missed, least_sat, verdict)
    if frames is not None:
        _judge_frames(rows, frames, verdict)
    return verdict


def _judge_log(rows: Sequence[Row], truth: Truth, chain: Chain, knowable: Knowable, verdict: Verdict) -> None:
    for place, row in enumerate(rows, 1):
        if row.offset != place:
            verdict.blame("holes", f"offset {row.offset} where {place} was expected")
            break
    before: dict[str, Row] = {}
    seen: set[tuple[str, str, str, int]] = set()
    for row in rows:
        known = truth.get(row.txid)
        if known is None or not known.whale or not known.turns:
            verdict.blame("unknown_whales", f"{row.kind} about {row.txid[:8]}, which never was a whale")
            continue
        last = before.get(row.txid)
        before[row.txid] = row
        if (row.txid, row.kind, row.ref, row.repeat) in seen or (row.kind == "alert") == (last is not None):
            verdict.blame("double", f"{row.kind} {row.ref[:8]} about {row.txid[:8]} at {row.offset}")
        seen.add((row.txid, row.kind, row.ref, row.repeat))
        if row.kind == "alert":
            _judge_amounts(row, known, verdict)
            continue
        if last is not None:
            _judge_order(last, row, verdict)
        if not _was_true(row, known, truth, chain, knowable):
            verdict.blame("wrong_outcomes", f"{row.kind} {row.ref[:8]} was never true of {_life(known)}")
        wrong = _wrong_in_body(row, chain)
        if wrong:
            verdict.blame("wrong_outcomes", f"{row.kind} {row.ref[:8]} about {row.txid[:8]} has {wrong}")
    verdict.alerted = len(before)
    verdict.sources = dict(sorted(Counter(row.alert["source"] for row in rows if row.kind == "alert").items()))
    verdict.kinds = dict(sorted(Counter(row.kind for row in rows).items()))


def _judge_amounts(row: Row, known: Record, verdict: Verdict) -> None:
    alert = row.alert
    exact = {"value_sat": known.out_sat, "input_count": known.n_in, "output_count": known.n_out}
    maybe = {"moved_sat": known.moved_sat, "fee_sat": known.fee_sat}
    wrong = {name: (alert[name], real) for name, real in exact.items() if alert[name] != real}
    wrong |= {name: (alert[name], real) for name, real in maybe.items() if alert[name] not in (None, real)}
    if round(alert["btc_value"] * SAT_PER_BTC) != known.out_sat:
        wrong["btc_value"] = (alert["btc_value"], known.out_sat)
    if wrong:
        verdict.blame("wrong_amounts", f"{row.txid[:8]} {wrong}")
    verdict.inputs_unknown += alert["moved_sat"] is None


def _judge_order(last: Row, row: Row, verdict: Verdict) -> None:
    if (last.kind, last.because) == (row.kind, row.because) and last.repeat != row.repeat:
        verdict.blame("double", f"{row.kind} {row.ref[:8]} about {row.txid[:8]} twice running, at {row.offset}")
    if row.kind == "pending" and not _takes_back(row, last):
        verdict.blame("wrong_outcomes", f"pending {row.ref[:8]} about {row.txid[:8]} after {last.kind} {last.ref[:8]}")


def _takes_back(row: Row, last: Row) -> bool:
    """Return whether a `pending` event may follow the last one.

    It follows a confirmation with the same block's hash, after that block left the chain, and a replacement or a drop
    without a hash.
    """
    if last.kind == "confirmed":
        return row.because == last.because
    return last.kind in ("replaced", "dropped") and not row.because


def _wrong_in_body(row: Row, chain: Chain) -> dict[str, object]:
    """Return the fields of an update that contradict its row or the chain."""
    block = chain.block_by_hash(row.because) if row.kind == "confirmed" else None
    right: dict[str, object] = {
        "transaction_id": row.txid,
        "status": row.kind,
        "btc_value": row.alert["btc_value"],
        "block_hash": row.because if row.kind == "confirmed" else None,
        "replaced_by": row.because if row.kind == "replaced" else None,
    }
    if row.kind != "confirmed" or block is not None:  # the height of a block that the chain no longer keeps is unknown
        right["block_height"] = None if block is None else block.height
    body = row.body or {}
    return {name: body.get(name) for name, value in right.items() if body.get(name) != value}


def _was_true(row: Row, known: Record, truth: Truth, chain: Chain, knowable: Knowable) -> bool:
    """Return whether an update was true at some time."""
    ref = row.because
    turns = known.turns
    match row.kind:
        case "confirmed":
            return any(turn.fate is Fate.CONFIRMED and turn.because == ref for turn in turns)
        case "replaced":
            # A transaction that spends the same output after this one was evicted also counts as its replacement.
            return ref != row.txid and (ref in _replacers(known, truth) or knowable.are_rivals(row.txid, ref))
        case "dropped":
            return any(turn.fate in (Fate.REPLACED, Fate.EVICTED) for turn in turns) or _was_nowhere(
                known, truth, chain
            )
        case _:
            return not ref or any(turn.fate is Fate.CONFIRMED and turn.because == ref for turn in turns)


def _was_nowhere(known: Record, truth: Truth, chain: Chain) -> bool:
    """Return whether a transaction was at some time neither in the mempool nor in the chain after a reorganisation.

    The node does not take every transaction of an abandoned block back into its mempool. The ground truth records no
    turn for that, only the time at which the coinbase of the block left the chain.
    """
    for place, turn in enumerate(known.turns):
        block = chain.stale.get(turn.because) if turn.fate is Fate.CONFIRMED else None
        if block is None:
            continue
        coinbase = truth.get(block.txs[0].txid)
        later = known.turns[place + 1 : place + 2]
        if not later or coinbase is None or later[0].at > coinbase.turns[-1].at:
            return True
    return False


def _replacers(known: Record, truth: Truth) -> set[str]:
    """Return the transactions that replaced it, directly or through other replacements."""
    found: set[str] = set()
    todo = [turn.because for turn in known.turns if turn.fate is Fate.REPLACED and turn.because]
    while todo:
        txid = todo.pop()
        if txid not in found:
            found.add(txid)
            later = truth.get(txid)
            todo += [turn.because for turn in later.turns if turn.fate is Fate.REPLACED] if later else []
    return found


def fate_of(record: Record, chain: Chain) -> Fate:
    """Return the current outcome, EVICTED for a transaction that the ground truth has only in an abandoned block."""
    if record.fate is Fate.CONFIRMED and record.block_hash in chain.stale:
        return Fate.EVICTED
    return record.fate


def _is_within(record: Record, chain: Chain, knowable: Knowable) -> bool:
    """Return whether the whale was in the mempool or in a counted block since whaled's first start."""
    fate = fate_of(record, chain)
    if fate is Fate.PENDING:
        return True
    if fate is Fate.CONFIRMED:
        return (record.height or 0) >= knowable.first_height or record.txid in knowable.must
    return record.turns[-1].at > knowable.since


def _judge_whale(
    record: Record,
    last: Row | None,
    truth: Truth,
    chain: Chain,
    knowable: Knowable,
    verdict: Verdict,
    *,
    outcomes: bool,
) -> None:
    verdict.whales += 1
    fate = fate_of(record, chain)
    if last is None:
        if fate in (Fate.PENDING, Fate.CONFIRMED) or record.txid in knowable.must:
            verdict.blame("missing", _life(record))
        else:
            verdict.unknowable += 1
    elif outcomes and not _is_right(record, fate, last, knowable, verdict):
        verdict.blame("wrong_outcomes", f"last event {last.kind} {last.ref[:8]} about {_life(record)}")


def _is_right(record: Record, fate: Fate, last: Row, knowable: Knowable, verdict: Verdict) -> bool:
    if fate is Fate.CONFIRMED:
        body = last.body or {}
        return (last.kind, last.because, body.get("block_height")) == (
            "confirmed", record.block_hash, record.height,
        )  # fmt: skip
    if fate is Fate.REPLACED and last.kind == "dropped" and record.txid not in knowable.reported:
        # It was replaced while whaled was not connected, and the backend no longer has the replacement.
        verdict.replaced_reported_as_dropped += 1
        return True
    if fate is Fate.EVICTED and last.kind == "replaced":
        return knowable.are_rivals(record.txid, last.because)
    return last.kind in LAST_WORD[fate]


def _judge_client(
    name: str,
    rows: Sequence[Row],
    received: Sequence[ClientEvent],
    missed: Collection[str],
    least_sat: int,
    verdict: Verdict,
) -> None:
    wanted = [(row.offset, row.kind, row.txid) for row in rows if row.alert["value_sat"] >= least_sat]
    got = [(each.offset, each.kind, each.txid) for each in received]
    verdict.received += len(got)
    if missed:
        verdict.blame("client_faults", f"{name} was notified of missed events: {sorted(missed)[:SHOWN]}")
    if len({each.epoch for each in received}) > 1:
        verdict.blame("client_faults", f"{name} saw several epochs")
    if got != wanted:
        place = next(
            (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted))
        )
        verdict.blame(
            "client_faults",
            f"{name} got {len(got)} of {len(wanted)} events, and at {place} {got[place : place + 2]} "
            f"instead of {wanted[place : place + 2]}",
        )


def _judge_frames(rows: Sequence[Row], frames: Sequence[Frame], verdict: Verdict) -> None:
    """Check that the frames have every offset once, in order, and the contents of the log."""
    offsets = [each.position.offset for each in frames]
    for before, after in pairwise(offsets):
        if after != before + 1:
            verdict.blame("client_faults", f"frames: offset {after} came after {before}")
            return
    if offsets[:1] != [row.offset for row in rows[:1]] or len(offsets) != len(rows):
        verdict.blame("client_faults", f"frames: {len(frames)} of {len(rows)}, from {offsets[:1]}")
        return
    for row, frame in zip(rows, frames, strict=True):
        kind, data = ("whale_alert", row.alert) if row.kind == "alert" else ("whale_update", row.body)
        at = datetime.fromtimestamp(row.at, UTC).isoformat()
        if (frame.type, frame.data, frame.timestamp) != (kind, data, at):
            other = {name for name in {*frame.data, *(data or {})} if frame.data.get(name) != (data or {}).get(name)}
            verdict.blame("client_faults", f"frames: {frame.type} at {row.offset} is not the {row.kind}: {other}")
            return


def _life(record: Record) -> str:
    life = " ".join(
        f"{turn.fate.value}@{turn.at % 1e5:.2f}{':' + turn.because[:8] if turn.because else ''}"
        for turn in record.turns
    )
    return f"{record.txid[:8]} ({record.kind.value}: {life})"
