"""What becomes of a whale: the drafts for the log, and which of them may follow which."""

from datetime import UTC, datetime
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.transactions import detected, output, relaxed, transaction
from kit.whales import BTC, NOW, txid
from whaled.model import Block, Draft, Kind, Status, Update, Whale
from whaled.whales import lifecycle
from whaled.whales.lifecycle import GONE, TRANSITIONS, WAITING, Origin, Step, next_event

A, B = "aa" * 32, "bb" * 32
EITHER = Origin.STREAM | Origin.POLLED
NOBODY = Origin(0)


def whale_of(*, confirmed: bool = False, tip: int | None = 100) -> Whale:
    """A whale detected at NOW, predicted for the block after `tip`."""
    return detected(transaction([output(150 * BTC)], confirmed=confirmed), tip_height=tip)


def block(height: int = 103, timestamp: float = NOW, block_hash: str = B) -> Block:
    """A block."""
    return Block(height=height, hash=block_hash, previous_hash=A, timestamp=int(timestamp))


def update_of(draft: Draft) -> Update:
    """The update of a draft that must have one."""
    assert draft.update is not None
    return draft.update


def test_an_alert_is_the_whale_itself_without_an_update() -> None:
    draft = lifecycle.alerted(whale_of(), NOW)
    assert (draft.kind, draft.at, draft.ref, draft.update) == (Kind.ALERT, NOW, "", None)


def test_a_confirmation_scores_the_prediction_and_has_its_block_as_ref() -> None:
    draft = lifecycle.confirmed(whale_of(), block(), NOW + 600)
    assert (draft.kind, draft.ref) == (Kind.CONFIRMED, "b" * 64)
    assert update_of(draft) == Update(
        transaction_id=txid(1),
        status=Status.CONFIRMED,
        btc_value=150.0,
        block_height=103,
        block_hash="b" * 64,
        seconds_to_confirmation=600.0,
        predicted_confirmation_block=101,
        blocks_off=2,
    )


def test_without_a_prediction_nothing_is_scored() -> None:
    told = update_of(lifecycle.confirmed(whale_of(tip=None), block(), NOW + 600))
    assert (told.predicted_confirmation_block, told.blocks_off) == (None, None)


@pytest.mark.parametrize(
    ("mined", "told_after", "waited"),
    [
        (600, 601, 601),  # live: the miner's clock is coarse, ours is not
        (600 + 7000, 601, 601),  # a clock ahead of ours, as consensus allows
        (600, 90_000, 600),  # found in a scan of what was missed: the block's own time is the better one
        (-600, 90_000, 0),  # never negative
    ],
)
def test_the_wait_ends_when_the_block_was_mined(mined: float, told_after: float, waited: float) -> None:
    told = update_of(lifecycle.confirmed(whale_of(), block(timestamp=NOW + mined), NOW + told_after))
    assert told.seconds_to_confirmation == pytest.approx(waited)


def test_a_whale_first_seen_confirmed_has_no_wait() -> None:
    assert update_of(lifecycle.confirmed(whale_of(confirmed=True), block(), NOW)).seconds_to_confirmation is None


def test_a_replacement_has_the_replacer_as_ref() -> None:
    draft = lifecycle.replaced(whale_of(), txid(2), NOW)
    assert (draft.kind, draft.ref) == (Kind.REPLACED, txid(2))
    assert (update_of(draft).status, update_of(draft).replaced_by) == (Status.REPLACED, txid(2))


def test_dropped_and_pending_again_have_their_kind_ref_and_status() -> None:
    gone = lifecycle.dropped(whale_of(), NOW)
    assert (gone.kind, gone.ref, update_of(gone).status) == (Kind.DROPPED, "", Status.DROPPED)
    back = lifecycle.pending_again(whale_of(), "b" * 64, NOW)
    assert (back.kind, back.ref, update_of(back).status) == (Kind.PENDING, "b" * 64, Status.PENDING)
    assert {update_of(draft).btc_value for draft in (gone, back)} == {150.0}


def test_the_detection_time_of_an_alert_is_utc_with_milliseconds() -> None:
    told = whale_of().alert.detection_timestamp
    assert told == "2027-01-15T08:00:00.000+00:00"
    assert datetime.fromisoformat(told) == datetime.fromtimestamp(NOW, UTC)


# --- which event may follow which ---


def draft_of(kind: Kind, ref: str) -> Draft:
    """The draft of this kind about one whale."""
    about = whale_of()
    match kind:
        case Kind.ALERT:
            return lifecycle.alerted(about, NOW)
        case Kind.CONFIRMED:
            return lifecycle.confirmed(about, block(block_hash=ref), NOW)
        case Kind.REPLACED:
            return lifecycle.replaced(about, ref, NOW)
        case Kind.DROPPED:
            return lifecycle.dropped(about, NOW)
        case Kind.PENDING:
            return lifecycle.pending_again(about, ref, NOW)


def ref_of(kind: Kind, *, other: bool = False) -> str:
    """A ref as events of this kind have it."""
    return {Kind.CONFIRMED: B if other else A, Kind.REPLACED: txid(3 if other else 2)}.get(kind, "")


# For each newest event, whose report of each next event counts, in the order of Kind: an alert, a confirmation, a
# replacement, a drop, pending again. Written out once more, so that no change of the table goes unnoticed.
EXPECTED: dict[Kind | None, tuple[Origin, Origin, Origin, Origin, Origin]] = {
    None: (EITHER, EITHER, EITHER, Origin.POLLED, NOBODY),
    Kind.ALERT: (NOBODY, EITHER, EITHER, Origin.POLLED, NOBODY),
    Kind.CONFIRMED: (NOBODY, EITHER, NOBODY, NOBODY, Origin.POLLED),
    Kind.REPLACED: (NOBODY, EITHER, Origin.STREAM, NOBODY, Origin.POLLED),
    Kind.DROPPED: (NOBODY, EITHER, EITHER, NOBODY, Origin.POLLED),
    Kind.PENDING: (NOBODY, EITHER, EITHER, Origin.POLLED, NOBODY),
}


@pytest.mark.parametrize("origin", [Origin.STREAM, Origin.POLLED], ids=["stream", "polled"])
@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("newest", [None, *Kind])
def test_the_table_allows_what_it_should_from_every_state(newest: Kind | None, kind: Kind, origin: Origin) -> None:
    assert TRANSITIONS.keys() == {None, *Kind}
    history = [] if newest is None else [Step(newest, ref_of(newest))]
    ref = ref_of(kind, other=True)
    if kind is Kind.PENDING and newest is Kind.CONFIRMED:
        ref = ref_of(newest)
    draft = draft_of(kind, ref)
    expected = draft if origin in EXPECTED[newest][list(Kind).index(kind)] else None
    assert next_event(draft, history, origin) == expected


@pytest.mark.parametrize("origin", [Origin.STREAM, Origin.POLLED], ids=["stream", "polled"])
@pytest.mark.parametrize("kind", list(Kind))
def test_the_newest_event_is_never_repeated(kind: Kind, origin: Origin) -> None:
    history = [Step(Kind.ALERT), Step(kind, ref_of(kind))]
    assert next_event(draft_of(kind, ref_of(kind)), history, origin) is None
    assert next_event(draft_of(kind, ref_of(kind)), [*history[:-1], Step(kind, ref_of(kind), 2)], origin) is None


@pytest.mark.parametrize("origin", [Origin.STREAM, Origin.POLLED], ids=["stream", "polled"])
def test_a_repeated_event_is_stored_only_after_a_different_one(origin: Origin) -> None:
    confirmed = lifecycle.confirmed(whale_of(), block(block_hash=A), NOW)
    assert next_event(confirmed, [], origin) == confirmed
    assert next_event(confirmed, [Step(Kind.ALERT)], origin) == confirmed
    assert next_event(confirmed, [Step(Kind.ALERT), Step(Kind.CONFIRMED, A)], origin) is None
    history = [Step(Kind.ALERT), Step(Kind.CONFIRMED, A), Step(Kind.PENDING, A)]
    again = next_event(confirmed, history, origin)
    assert again is not None
    assert (again.ref, again.repeat) == (A, 2)
    history.append(Step(Kind.CONFIRMED, A, 2))
    assert next_event(confirmed, history, origin) is None
    third = next_event(confirmed, [*history, Step(Kind.PENDING, A, 2)], origin)
    assert third is not None
    assert (third.ref, third.repeat) == (A, 3)


def polled(draft: Draft, history: list[Step]) -> Draft | None:
    return next_event(draft, history, Origin.POLLED)


def test_an_event_that_no_longer_holds_is_not_stored() -> None:
    buried = [Step(Kind.ALERT), Step(Kind.CONFIRMED, A)]
    assert polled(lifecycle.dropped(whale_of(), NOW), buried) is None
    assert polled(lifecycle.replaced(whale_of(), txid(2), NOW), buried) is None
    assert polled(lifecycle.pending_again(whale_of(), B, NOW), buried) is None
    assert polled(lifecycle.pending_again(whale_of(), A, NOW), buried) is not None
    replaced = [Step(Kind.ALERT), Step(Kind.REPLACED, txid(2))]
    assert polled(lifecycle.dropped(whale_of(), NOW), replaced) is None
    assert polled(lifecycle.replaced(whale_of(), txid(3), NOW), replaced) is None
    assert polled(lifecycle.confirmed(whale_of(), block(), NOW), replaced) is not None
    waiting = [Step(Kind.ALERT)]
    assert polled(lifecycle.pending_again(whale_of(), "", NOW), waiting) is None
    assert polled(lifecycle.alerted(whale_of(), NOW), waiting) is None
    assert polled(lifecycle.alerted(whale_of(), NOW), []) is not None


def test_a_replaced_whale_is_not_pending_because_of_an_earlier_block() -> None:
    gone = [Step(Kind.ALERT), Step(Kind.CONFIRMED, A), Step(Kind.REPLACED, txid(2))]
    assert polled(lifecycle.pending_again(whale_of(), A, NOW), gone) is None
    assert polled(lifecycle.pending_again(whale_of(), "", NOW), gone) is not None
    assert polled(lifecycle.pending_again(whale_of(), "", NOW), gone[:2]) is None


def test_a_repeated_outcome_gets_a_new_number_after_retention_removed_the_first() -> None:
    held = [Step(Kind.DROPPED, "", 2), Step(Kind.PENDING, "", 2)]
    again = polled(lifecycle.dropped(whale_of(), NOW), held)
    assert again is not None
    assert (again.ref, again.repeat) == ("", 3)


def test_a_confirmation_by_a_scan_is_the_same_event_as_one_by_the_stream() -> None:
    draft = lifecycle.confirmed(whale_of(), block(), NOW)
    assert polled(draft, [Step(Kind.ALERT), Step(draft.kind, draft.ref)]) is None


def test_a_draft_counts_for_those_after_it() -> None:
    told = [
        lifecycle.alerted(whale_of(), NOW),
        lifecycle.replaced(whale_of(), txid(2), NOW),
        lifecycle.replaced(whale_of(), txid(3), NOW),
        lifecycle.confirmed(whale_of(), block(), NOW),
        lifecycle.confirmed(whale_of(), block(), NOW),
    ]
    assert lifecycle.valid(told, {}, Origin.POLLED) == [told[0], told[1], told[3]]
    assert lifecycle.valid(told, {txid(1): [Step(Kind.ALERT)]}, Origin.STREAM) == told[1:4]


def test_a_whale_lacks_its_outcome_while_it_waits_or_a_late_replacement_hid_its_block() -> None:
    assert lifecycle.lacks_outcome([Step(Kind.ALERT)])
    assert lifecycle.lacks_outcome([Step(Kind.CONFIRMED, A), Step(Kind.PENDING, A)])
    assert lifecycle.lacks_outcome([Step(Kind.CONFIRMED, A), Step(Kind.REPLACED, txid(2))])
    for kind in (Kind.CONFIRMED, Kind.REPLACED, Kind.DROPPED):
        assert not lifecycle.lacks_outcome([Step(Kind.ALERT), Step(kind, ref_of(kind))])


REPORTS = st.lists(
    st.tuples(
        st.sampled_from(Kind),
        st.sampled_from([A, B]),
        st.sampled_from([2, 3]),
        st.sampled_from([Origin.STREAM, Origin.POLLED]),
    ),
    max_size=40,
)


@relaxed
@given(REPORTS)
def test_no_sequence_of_reports_makes_an_impossible_or_doubled_history(
    reports: list[tuple[Kind, str, int, Origin]],
) -> None:
    """Reports of the stream and of requests in any order, as often as they like, true or not."""
    history: list[Step] = []
    for kind, block_hash, replacer, origin in reports:
        ref = {Kind.REPLACED: txid(replacer), Kind.CONFIRMED: block_hash}.get(kind, "")
        if kind is Kind.PENDING and history and history[-1].kind is Kind.CONFIRMED:
            ref = block_hash
        event = next_event(draft_of(kind, ref), history, origin)
        if event is not None:
            history.append(Step(event.kind, event.ref, event.repeat))
    assert len(set(history)) == len(history)  # as the log's unique key demands
    assert [step.kind for step in history].count(Kind.ALERT) <= 1
    assert all(step.kind is not Kind.ALERT for step in history[1:])
    assert not history or history[0].kind is not Kind.PENDING
    for before, after in pairwise(history):
        assert before[:2] != after[:2]
        if after.kind is Kind.PENDING:
            assert before.kind in GONE | {Kind.CONFIRMED}
            assert after.ref == (before.ref if before.kind is Kind.CONFIRMED else "")
        elif after.kind is Kind.DROPPED:
            assert before.kind in WAITING
        elif after.kind is Kind.REPLACED:
            assert before.kind is not Kind.CONFIRMED
    for kind, ref in {step[:2] for step in history}:
        assert [step.repeat for step in history if step[:2] == (kind, ref)] == list(
            range(1, 1 + sum(step[:2] == (kind, ref) for step in history))
        )


@pytest.mark.parametrize(("first", "second"), list(product([Origin.STREAM, Origin.POLLED], repeat=2)))
def test_one_outcome_reported_by_both_is_stored_once(first: Origin, second: Origin) -> None:
    for draft in (lifecycle.confirmed(whale_of(), block(), NOW), lifecycle.replaced(whale_of(), txid(2), NOW)):
        history = [Step(Kind.ALERT)]
        assert next_event(draft, history, first) == draft
        assert next_event(draft, [*history, Step(draft.kind, draft.ref)], second) is None
