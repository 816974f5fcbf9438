"""Coverage: why a whale was missed, and the row of a scanned block."""

from kit.whales import NOW
from whaled.backfill.coverage import INTERRUPTIONS_LIMIT, Cover, Interruptions, Sighting, covers, scan_of
from whaled.model import Scan

A, B = "aa" * 32, "bb" * 32


def test_a_missed_whale_is_attributed_to_an_outage_first_and_to_a_gap_second() -> None:
    interruptions = Interruptions()
    interruptions.was_down(100.0, 200.0)
    interruptions.gap(300.0)
    assert interruptions.why_missed(150.0, 160.0) is Cover.DOWN
    assert interruptions.why_missed(50.0, 100.0) is Cover.DOWN
    assert interruptions.why_missed(200.0, 350.0) is Cover.DOWN
    assert interruptions.why_missed(201.0, 350.0) is Cover.GAP
    assert interruptions.why_missed(301.0, 350.0) is Cover.NEVER_RELAYED
    assert interruptions.why_missed(201.0, 299.0) is Cover.NEVER_RELAYED


def test_an_outage_lasts_until_the_link_is_up_however_often_it_is_reported() -> None:
    interruptions = Interruptions()
    interruptions.connected(5.0)  # nothing was lost
    interruptions.lost(10.0)
    interruptions.lost(20.0)
    assert interruptions.why_missed(0.0, 9.0) is Cover.NEVER_RELAYED
    assert interruptions.why_missed(0.0, 10.0) is Cover.DOWN
    assert interruptions.why_missed(1000.0, 1001.0) is Cover.DOWN
    interruptions.connected(30.0)
    assert interruptions.why_missed(15.0, 16.0) is Cover.DOWN
    assert interruptions.why_missed(31.0, 32.0) is Cover.NEVER_RELAYED


def test_outages_and_gaps_are_remembered_within_bounds() -> None:
    interruptions = Interruptions()
    for number in range(INTERRUPTIONS_LIMIT + 1):
        interruptions.was_down(10.0 * number, 10.0 * number + 1)
        interruptions.gap(10.0 * number + 5)
    assert interruptions.why_missed(0.0, 5.0) is Cover.NEVER_RELAYED
    assert interruptions.why_missed(10.0, 10.0) is Cover.DOWN
    assert interruptions.why_missed(15.0, 15.0) is Cover.GAP


def test_the_row_of_a_block_counts_its_whales_and_gives_the_median_lead() -> None:
    sightings = [Sighting(lead) for lead in (10.0, 30.0, 20.0, -3.0, 0.0, None)]
    assert covers(sightings, Cover.GAP) == [Cover.SEEN] * 3 + [Cover.LATE] * 2 + [Cover.GAP]
    row = scan_of(7, A, NOW, NOW + 1, sightings, Cover.GAP)
    assert row == Scan(
        height=7, hash=A, mined_at=NOW, scanned_at=NOW + 1, seen=3, late=2, missed_down=0, missed_gap=1,
        missed_never_relayed=0, lead_s=20.0,
    )  # fmt: skip
    assert scan_of(7, A, NOW, NOW, [], Cover.DOWN).lead_s is None
    assert scan_of(7, A, NOW, NOW, [Sighting(None)], Cover.DOWN).missed_down == 1
    assert scan_of(7, A, NOW, NOW, [Sighting(None)], Cover.NEVER_RELAYED).missed_never_relayed == 1
