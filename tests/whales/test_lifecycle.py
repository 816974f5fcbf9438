"""What becomes of a whale, as drafts for the log."""

from datetime import UTC, datetime

import pytest

from kit.transactions import BTC, NOW, output, transaction, txid
from whaled.model import Block, Draft, Kind, Market, Source, Status, Update, Whale
from whaled.whales import lifecycle
from whaled.whales.detect import Rules, assess
from whaled.whales.labels import AddressBook


def whale(*, confirmed: bool = False, tip: int | None = 100) -> Whale:
    """A whale detected at NOW, predicted for the block after `tip`."""
    found = assess(
        transaction([output(150 * BTC)], confirmed=confirmed),
        rules=Rules(100 * BTC),
        book=AddressBook(),
        market=Market(projected=(), tip_height=tip),
        now=NOW,
        source=Source.LIVE,
    )
    assert found is not None
    return found


def block(height: int = 103, timestamp: float = NOW) -> Block:
    """A block."""
    return Block(height=height, hash="b" * 64, previous_hash="a" * 64, timestamp=int(timestamp))


def update(draft: Draft) -> Update:
    """The update of a draft that must have one."""
    assert draft.update is not None
    return draft.update


def test_an_alert_is_the_whale_itself_without_an_update() -> None:
    draft = lifecycle.alerted(whale(), NOW)
    assert (draft.kind, draft.at, draft.ref, draft.update) == (Kind.ALERT, NOW, "", None)


def test_a_confirmation_scores_the_prediction_and_has_its_block_as_ref() -> None:
    draft = lifecycle.confirmed(whale(), block(), NOW + 600)
    assert (draft.kind, draft.ref) == (Kind.CONFIRMED, "b" * 64)
    assert update(draft) == Update(
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
    told = update(lifecycle.confirmed(whale(tip=None), block(), NOW + 600))
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
    told = update(lifecycle.confirmed(whale(), block(timestamp=NOW + mined), NOW + told_after))
    assert told.seconds_to_confirmation == pytest.approx(waited)


def test_a_whale_first_seen_confirmed_has_no_wait() -> None:
    assert update(lifecycle.confirmed(whale(confirmed=True), block(), NOW)).seconds_to_confirmation is None


def test_a_replacement_has_the_replacer_as_ref() -> None:
    draft = lifecycle.replaced(whale(), txid(2), NOW)
    assert (draft.kind, draft.ref) == (Kind.REPLACED, txid(2))
    assert (update(draft).status, update(draft).replaced_by) == (Status.REPLACED, txid(2))


def test_dropped_and_pending_again_have_their_kind_ref_and_status() -> None:
    gone = lifecycle.dropped(whale(), NOW)
    assert (gone.kind, gone.ref, update(gone).status) == (Kind.DROPPED, "", Status.DROPPED)
    back = lifecycle.pending_again(whale(), "b" * 64, NOW)
    assert (back.kind, back.ref, update(back).status) == (Kind.PENDING, "b" * 64, Status.PENDING)
    assert {update(draft).btc_value for draft in (gone, back)} == {150.0}


def test_the_detection_time_of_an_alert_is_utc_with_milliseconds() -> None:
    told = whale().alert.detection_timestamp
    assert told == "2027-01-15T08:00:00.000+00:00"
    assert datetime.fromisoformat(told) == datetime.fromtimestamp(NOW, UTC)
