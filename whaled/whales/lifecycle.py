"""A whale's life: the events about it, as drafts, and which of them may follow which. Pure.

Pending -> confirmed | replaced | dropped -> pending again. `TRANSITIONS` is the one table of it. Whatever reports an
event, the stream or a request to the backend, asks `next_event` before the event log takes it.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Flag, auto
from typing import NamedTuple

from msgspec.structs import replace

from whaled.model import Alert, Block, Draft, Kind, Status, Update, Whale


class Origin(Flag):
    """The way a report about a whale arrived.

    The stream reports changes one by one, and may lag behind the node. A polled report gives the whale's present state,
    so events before it may be missing. What follows from a conflict with another whale is polled too.
    """

    STREAM = auto()
    POLLED = auto()


class Step(NamedTuple):
    """An event of a whale's history: its kind, the block hash or txid it refers to, and its repeat number."""

    kind: Kind
    ref: str = ""
    repeat: int = 1


History = list[Step]
"""The events held about a whale, in order. Retention may have removed the first ones."""

GONE = frozenset({Kind.REPLACED, Kind.DROPPED})
WAITING = frozenset({Kind.ALERT, Kind.PENDING})

EITHER = Origin.STREAM | Origin.POLLED
# By the kind of a whale's newest event (None: no event is held), the kinds that may follow it, and whose report of it
# counts.
TRANSITIONS: Mapping[Kind | None, Mapping[Kind, Origin]] = {
    None: {Kind.ALERT: EITHER, Kind.CONFIRMED: EITHER, Kind.REPLACED: EITHER, Kind.DROPPED: Origin.POLLED},
    Kind.ALERT: {Kind.CONFIRMED: EITHER, Kind.REPLACED: EITHER, Kind.DROPPED: Origin.POLLED},
    Kind.PENDING: {Kind.CONFIRMED: EITHER, Kind.REPLACED: EITHER, Kind.DROPPED: Origin.POLLED},
    # From one block to another, without an event in between: the block of the same height on another branch.
    # Not to REPLACED: the stream lags behind its node, so a block scan may have read the block already while the stream
    # still reports an earlier replacement. If that block has left the chain, the backfill reports PENDING first.
    Kind.CONFIRMED: {Kind.CONFIRMED: EITHER, Kind.PENDING: Origin.POLLED},
    # From one replacer to another: the whale returned in between, and the stream says so. A request may name any later
    # one of a chain of replacers.
    Kind.REPLACED: {Kind.CONFIRMED: EITHER, Kind.REPLACED: Origin.STREAM, Kind.PENDING: Origin.POLLED},
    Kind.DROPPED: {Kind.CONFIRMED: EITHER, Kind.REPLACED: EITHER, Kind.PENDING: Origin.POLLED},
}
NOBODY = Origin(0)

# By consensus a miner's clock may be this far ahead. A block older than this was mined while whaled was not watching;
# only then is the block's own time more accurate than the time of its receipt.
BLOCK_CLOCK_S = 7200.0


def next_event(draft: Draft, history: History, origin: Origin) -> Draft | None:
    """Return the draft in the form to store, None if it repeats the newest event or may not follow it.

    The log accepts each kind, ref and repeat number of a whale once. A whale that moves back and forth between two
    branches of the chain repeats an earlier event; the repetition is numbered.
    """
    newest = history[-1] if history else None
    if origin not in TRANSITIONS[newest.kind if newest is not None else None].get(draft.kind, NOBODY):
        return None
    if newest is not None and not _may_refer(draft, newest):
        return None
    # Retention may have removed earlier repetitions, so the highest stored number counts, not their quantity.
    repeats = [step.repeat for step in history if (step.kind, step.ref) == (draft.kind, draft.ref)]
    return replace(draft, repeat=max(repeats) + 1) if repeats else draft


def _may_refer(draft: Draft, newest: Step) -> bool:
    """Return whether the ref of a draft, whose kind may follow, fits the newest event.

    A block that left the chain revokes only the newest event, and only if that names this block. A replaced or dropped
    whale becomes pending again without a block.
    """
    if draft.kind is Kind.PENDING:
        return draft.ref == (newest.ref if newest.kind is Kind.CONFIRMED else "")
    return (draft.kind, draft.ref) != (newest.kind, newest.ref)


def valid(
    drafts: Sequence[Draft], histories: Mapping[str, History], origin: Origin, *, with_repeated: bool = False
) -> list[Draft]:
    """Return those drafts that may follow, in the form to store and in order. Each counts for those after it.

    `histories` are those of the whales by txid; none is needed for a whale of which no event is held. With
    `with_repeated`, a draft that repeats the newest event is among them in the form of that event. The log does not
    store it again, but it states what is true of the whale now.
    """
    lives: dict[str, list[Step]] = {}
    found: list[Draft] = []
    for draft in drafts:
        txid = draft.whale.alert.transaction_id
        life = lives.setdefault(txid, list(histories.get(txid, ())))
        event = next_event(draft, life, origin)
        if event is not None:
            life.append(Step(event.kind, event.ref, event.repeat))
            found.append(event)
        elif with_repeated and life and life[-1][:2] == (draft.kind, draft.ref):
            found.append(replace(draft, repeat=life[-1].repeat))
    return found


def lacks_outcome(history: History) -> bool:
    """Return whether the newest event may not be the outcome.

    The whale is pending, or an older whaled recorded it as replaced after a scan had confirmed it: that report of the
    stream may be older than the block.
    """
    kinds = [step.kind for step in history[-2:]]
    return kinds[-1] in WAITING or kinds == [Kind.CONFIRMED, Kind.REPLACED]


def alerted(whale: Whale, now: float) -> Draft:
    """Return the event for a newly detected whale."""
    return Draft(kind=Kind.ALERT, at=now, whale=whale)


def replacing(whale: Whale, replaced: str | None) -> Whale:
    """Return the whale with `replaces` set to `replaced`, unchanged if that is None."""
    return whale if replaced is None else replace(whale, alert=replace(whale.alert, replaces=replaced))


def confirmed(whale: Whale, block: Block, now: float) -> Draft:
    """Return the event for a whale in a block. `blocks_off` is positive if it took longer than predicted."""
    alert = whale.alert
    predicted = alert.predicted_confirmation_block
    update = Update(
        transaction_id=alert.transaction_id,
        status=Status.CONFIRMED,
        btc_value=alert.btc_value,
        block_height=block.height,
        block_hash=block.hash,
        seconds_to_confirmation=_waited_s(alert, block, now),
        predicted_confirmation_block=predicted,
        blocks_off=block.height - predicted if predicted is not None else None,
    )
    return Draft(kind=Kind.CONFIRMED, at=now, whale=whale, ref=block.hash, update=update)


def replaced(whale: Whale, by: str, now: float) -> Draft:
    """Return the event for a whale whose inputs another transaction spends. A later replacer makes a further event."""
    update = Update(
        transaction_id=whale.alert.transaction_id,
        status=Status.REPLACED,
        btc_value=whale.alert.btc_value,
        replaced_by=by,
    )
    return Draft(kind=Kind.REPLACED, at=now, whale=whale, ref=by, update=update)


def dropped(whale: Whale, now: float) -> Draft:
    """Return the event for a whale that left the mempool and is in no block.

    The caller must have waited for the grace period and queried the backend.
    """
    update = Update(transaction_id=whale.alert.transaction_id, status=Status.DROPPED, btc_value=whale.alert.btc_value)
    return Draft(kind=Kind.DROPPED, at=now, whale=whale, update=update)


def pending_again(whale: Whale, block_hash: str, now: float) -> Draft:
    """Return the event for a whale that is pending again, because its block `block_hash` is no longer in the chain."""
    update = Update(transaction_id=whale.alert.transaction_id, status=Status.PENDING, btc_value=whale.alert.btc_value)
    return Draft(kind=Kind.PENDING, at=now, whale=whale, ref=block_hash, update=update)


def detected_at(alert: Alert) -> float:
    """Return the time of detection of a whale, in Unix seconds."""
    return datetime.fromisoformat(alert.detection_timestamp).timestamp()


def _waited_s(alert: Alert, block: Block, now: float) -> float | None:
    """Return the seconds from detection to confirmation, None for a whale that was confirmed when first seen."""
    if alert.status is Status.CONFIRMED:
        return None
    detected = detected_at(alert)
    mined = float(block.timestamp) if now - block.timestamp > BLOCK_CLOCK_S else now
    return round(max(0.0, mined - detected), 3)
