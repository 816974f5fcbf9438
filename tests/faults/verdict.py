"""Compares what whaled wrote down and what its clients got with what really happened."""

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

# The last word about a whale, by its fate. Whether "dropped" will do for a replaced one depends: see `_is_right`.
LAST_WORD = {
    Fate.PENDING: ("alert", "pending"),
    Fate.CONFIRMED: ("confirmed",),
    Fate.REPLACED: ("replaced",),
    Fate.EVICTED: ("dropped",),
}
SHOWN = 6
# Of the alerts may be without the amounts of their inputs where REST answers: who was mined or replaced before it was
# asked for.
INPUTS_UNKNOWN_SHARE = 0.5


class Row(Struct, frozen=True):
    """An event as the database holds it."""

    offset: int
    kind: str
    ref: str
    txid: str
    at: float
    alert: dict[str, Any]
    body: dict[str, Any] | None

    @property
    def because(self) -> str:
        """The block hash or the replacing txid: a ref that is said again has a number behind it."""
        return self.ref.partition("#")[0]


class Heard(Struct, frozen=True):
    """An event as a client got it."""

    epoch: str
    offset: int
    kind: str
    txid: str


class Frame(Struct, frozen=True):
    """A whale_alert or whale_update as it came over the socket."""

    type: str
    data: dict[str, Any]
    timestamp: str
    position: Position


class Knowable(Struct):
    """What whaled can be expected to know, and what nobody could know.

    `first_height` is what the rig saw when whaled first was told of the chain: from there on every block counts,
    whatever whaled says that it has scanned.

    `must` are whales that were in the mempool or in a block at a moment when whaled was up to date, or in the stream
    while the link demonstrably held; with those that are there at the end. `told` are those whose replacement came in
    such a stream. `inputs` are what each transaction spends. `since` is the moment whaled first was up: what was over
    before is not counted at all.
    """

    since: float
    first_height: int
    inputs: dict[str, frozenset[tuple[str, int]]]
    must: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)

    def are_rivals(self, one: str, other: str) -> bool:
        """Whether both spend the same output, and are two."""
        return one != other and not self.inputs.get(one, frozenset()).isdisjoint(self.inputs.get(other, frozenset()))


class Verdict(Struct):
    """Counts, and in words what is wrong."""

    whales: int = 0
    alerted: int = 0
    events: int = 0
    unknowable: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    missing: int = 0
    double: int = 0
    strangers: int = 0
    wrong_amounts: int = 0
    wrong_fates: int = 0
    holes: int = 0
    received: int = 0
    client_faults: int = 0
    replaced_told_as_dropped: int = 0
    inputs_unknown: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.problems

    @property
    def are_inputs_known(self) -> bool:
        """Of most whales. Where REST fails they cannot be."""
        return self.inputs_unknown <= INPUTS_UNKNOWN_SHARE * self.alerted

    def blame(self, what: str, detail: object) -> None:
        """Count one more of what is wrong."""
        setattr(self, what, getattr(self, what) + 1)
        self.problems.append(f"{what}: {detail}")


def read(database: Path) -> list[Row]:
    """Every event, with SQL of our own."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
        rows = db.execute(
            "SELECT e.offset, e.kind, e.ref, w.txid, e.at, w.alert, e.body "
            "FROM events e JOIN whales w ON w.id = e.whale ORDER BY e.offset"
        ).fetchall()
    db.close()
    return [
        Row(offset, kind, ref, txid, at, json.loads(alert), json.loads(body) if body else None)
        for offset, kind, ref, txid, at, alert, body in rows
    ]


def state(database: Path, key: str) -> str | None:
    """A value of the table `state`."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
        found = db.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
    db.close()
    return None if found is None else str(found[0])


def compare(
    rows: Sequence[Row],
    truth: Truth,
    chain: Chain,
    knowable: Knowable,
    clients: Mapping[str, tuple[Sequence[Heard], Collection[str], int]],
    *,
    frames: Sequence[Frame] | None = None,
    fates: bool = True,
) -> Verdict:
    """The verdict. `clients` by name: what each got, what it was told it missed, and its least amount in satoshi.
    `frames` are what one without a filter got, as they came.

    `fates` False leaves out the last word about each whale, for a moment when questions are still open.
    """
    verdict = Verdict(events=len(rows))
    _judge_log(rows, truth, chain, knowable, verdict)
    last = {row.txid: row for row in rows}
    for record in truth.whales():
        if record.turns and (record.txid in last or _is_within(record, chain, knowable)):
            _judge_whale(record, last.get(record.txid), truth, chain, knowable, verdict, fates=fates)
    for name, (heard, missed, least_sat) in clients.items():
        _judge_client(name, rows, heard, missed, least_sat, verdict)
    if frames is not None:
        _judge_frames(rows, frames, verdict)
    return verdict


def _judge_log(rows: Sequence[Row], truth: Truth, chain: Chain, knowable: Knowable, verdict: Verdict) -> None:
    for place, row in enumerate(rows, 1):
        if row.offset != place:
            verdict.blame("holes", f"offset {row.offset} where {place} was expected")
            break
    before: dict[str, Row] = {}
    said: set[tuple[str, str, str]] = set()
    for row in rows:
        known = truth.get(row.txid)
        if known is None or not known.whale or not known.turns:
            verdict.blame("strangers", f"{row.kind} about {row.txid[:8]}, which never was a whale")
            continue
        last = before.get(row.txid)
        before[row.txid] = row
        if (row.txid, row.kind, row.ref) in said or (row.kind == "alert") == (last is not None):
            verdict.blame("double", f"{row.kind} {row.ref[:8]} about {row.txid[:8]} at {row.offset}")
        said.add((row.txid, row.kind, row.ref))
        if row.kind == "alert":
            _judge_amounts(row, known, verdict)
            continue
        if last is not None:
            _judge_order(last, row, verdict)
        if not _could_be_said(row, known, truth, chain, knowable):
            verdict.blame("wrong_fates", f"{row.kind} {row.ref[:8]} was never true of {_life(known)}")
        wrong = _wrong_in_body(row, chain)
        if wrong:
            verdict.blame("wrong_fates", f"{row.kind} {row.ref[:8]} about {row.txid[:8]} says {wrong}")
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
    if (last.kind, last.because) == (row.kind, row.because) and last.ref != row.ref:
        verdict.blame("double", f"{row.kind} {row.ref[:8]} about {row.txid[:8]} twice running, at {row.offset}")
    if row.kind == "pending" and not _takes_back(row, last):
        verdict.blame("wrong_fates", f"pending {row.ref[:8]} about {row.txid[:8]} after {last.kind} {last.ref[:8]}")


def _takes_back(row: Row, last: Row) -> bool:
    """A block that died takes back what was said last, of itself; without a block comes back who was gone."""
    if last.kind == "confirmed":
        return row.because == last.because
    return last.kind in ("replaced", "dropped") and not row.because


def _wrong_in_body(row: Row, chain: Chain) -> dict[str, object]:
    """What an update says otherwise than its row and the chain do."""
    block = chain.block_by_hash(row.because) if row.kind == "confirmed" else None
    right: dict[str, object] = {
        "transaction_id": row.txid,
        "status": row.kind,
        "btc_value": row.alert["btc_value"],
        "block_hash": row.because if row.kind == "confirmed" else None,
        "replaced_by": row.because if row.kind == "replaced" else None,
    }
    if row.kind != "confirmed" or block is not None:  # one that is not kept any more has no height
        right["block_height"] = None if block is None else block.height
    body = row.body or {}
    return {name: body.get(name) for name, value in right.items() if body.get(name) != value}


def _could_be_said(row: Row, known: Record, truth: Truth, chain: Chain, knowable: Knowable) -> bool:
    """Whether an update was true at some time."""
    ref = row.because
    turns = known.turns
    match row.kind:
        case "confirmed":
            return any(turn.fate is Fate.CONFIRMED and turn.because == ref for turn in turns)
        case "replaced":
            # Also by one that spends the same after it was evicted for another reason.
            return ref != row.txid and (ref in _replacers(known, truth) or knowable.are_rivals(row.txid, ref))
        case "dropped":
            return any(turn.fate in (Fate.REPLACED, Fate.EVICTED) for turn in turns) or _was_nowhere(
                known, truth, chain
            )
        case _:
            return not ref or any(turn.fate is Fate.CONFIRMED and turn.because == ref for turn in turns)


def _was_nowhere(known: Record, truth: Truth, chain: Chain) -> bool:
    """A reorganisation may leave a transaction without a place: the node does not take it back. The truth notes no turn
    for that, but when the coinbase of its block went.
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
    """Whoever took its place, and whoever took theirs."""
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
    """Where it is now. The truth notes no turn for what a reorganisation left without a place."""
    if record.fate is Fate.CONFIRMED and record.block_hash in chain.stale:
        return Fate.EVICTED
    return record.fate


def _is_within(record: Record, chain: Chain, knowable: Knowable) -> bool:
    """Whether there was anything to know about it since whaled's first start."""
    fate = fate_of(record, chain)
    if fate is Fate.PENDING:
        return True
    if fate is Fate.CONFIRMED:
        return (record.height or 0) >= knowable.first_height or record.txid in knowable.must
    return record.turns[-1].at > knowable.since


def _judge_whale(
    record: Record, last: Row | None, truth: Truth, chain: Chain, knowable: Knowable, verdict: Verdict, *, fates: bool
) -> None:
    verdict.whales += 1
    fate = fate_of(record, chain)
    if last is None:
        if fate in (Fate.PENDING, Fate.CONFIRMED) or record.txid in knowable.must:
            verdict.blame("missing", _life(record))
        else:
            verdict.unknowable += 1
    elif fates and not _is_right(record, fate, last, knowable, verdict):
        verdict.blame("wrong_fates", f"last word {last.kind} {last.ref[:8]} about {_life(record)}")


def _is_right(record: Record, fate: Fate, last: Row, knowable: Knowable, verdict: Verdict) -> bool:
    if fate is Fate.CONFIRMED:
        body = last.body or {}
        return (last.kind, last.because, body.get("block_height")) == (
            "confirmed", record.block_hash, record.height,
        )  # fmt: skip
    if fate is Fate.REPLACED and last.kind == "dropped" and record.txid not in knowable.told:
        # Replaced while nobody listened, and the backend that saw it has forgotten.
        verdict.replaced_told_as_dropped += 1
        return True
    if fate is Fate.EVICTED and last.kind == "replaced":
        return knowable.are_rivals(record.txid, last.because)
    return last.kind in LAST_WORD[fate]


def _judge_client(
    name: str, rows: Sequence[Row], heard: Sequence[Heard], missed: Collection[str], least_sat: int, verdict: Verdict
) -> None:
    wanted = [(row.offset, row.kind, row.txid) for row in rows if row.alert["value_sat"] >= least_sat]
    got = [(each.offset, each.kind, each.txid) for each in heard]
    verdict.received += len(got)
    if missed:
        verdict.blame("client_faults", f"{name} was told that it missed something: {sorted(missed)[:SHOWN]}")
    if len({each.epoch for each in heard}) > 1:
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
    """Every offset once, ascending, and in each frame what the log holds."""
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
