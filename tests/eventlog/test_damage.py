"""Damaged rows in real files: skipped and counted, never the end of the daemon, and never a wrong event."""

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from threading import Event as Latch

import pytest
import structlog

from kit.damage import HEX, ROWS, as_version_3, edit, filled, stored_offsets
from kit.eventlog import Meter, open_log, scan
from kit.whales import NOW, alert_draft, txid, update_draft, whale
from whaled.bookmarks import text
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import notes, queries
from whaled.eventlog.damage import Damage, KnownDamage, Table, merged, of_events
from whaled.eventlog.pages import PAGE_BYTES
from whaled.eventlog.store import EventLog
from whaled.model import Draft, Kind, Whale


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "whaled.db"


def force(path: Path, table: str, old: str, new: str, *statements: str) -> None:
    """Change rows in ways that the table does not allow, as a flipped bit in a record does."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        (sql,) = db.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
        assert old in sql
        db.execute("PRAGMA writable_schema = ON")
        change = "UPDATE sqlite_schema SET sql = ? WHERE name = ?"
        db.execute(change, (sql.replace(old, new).replace(") STRICT", ")"), table))
        db.execute("PRAGMA writable_schema = RESET")
        for statement in statements:
            db.execute(statement)
        db.execute("PRAGMA writable_schema = ON")
        db.execute(change, (sql, table))
        db.execute("PRAGMA writable_schema = RESET")


def flip(path: Path, text: bytes, *, bit: int = 0) -> None:
    """Flip a bit of the last byte of a text that is in the file once, in a leaf of a table."""
    data = bytearray(path.read_bytes())
    assert data.count(text) == 1
    data[data.index(text) + len(text) - 1] ^= 1 << bit
    path.write_bytes(data)


OLD_ROWS = {name: case for name, case in ROWS.items() if case[2]}


async def requires_skipping(path: Path, lost: set[int]) -> None:
    """Opens, reads, stores and looks up as if nothing was; what is lost is neither given nor wrong."""
    meter = Meter()
    async with open_log(path, meter) as log:
        assert await stored_offsets(log) == [offset for offset in range(1, 7) if offset not in lost]
        assert log.whole_from == max(lost) + 1
        assert meter.damaged_rows == len(lost)
        await stored_offsets(log)
        assert meter.damaged_rows == len(lost)  # counted once
        (event,) = await log.append([alert_draft(7, at=NOW + 7)])
        assert event.offset == 7
        for n in (1, 2, 3):
            for each in await log.append([update_draft(n, Kind.DROPPED, ref="", at=NOW + 8)]):
                assert each.whale.alert.transaction_id == txid(n)
        for about, known in (await log.read_each(queries.whales, map(txid, range(1, 8)))).items():
            assert known.alert.transaction_id == about
        assert {event.whale.alert.transaction_id for event in await log.read(queries.pending, 0, 99)} <= {
            txid(4),
            txid(7),
        }
        await log.read_each(queries.histories, map(txid, range(1, 8)))
        await log.read(queries.gone_since, 0.0, 99)
        await log.read(queries.confirmed_in, "00block")
        assert 0 <= await log.offset_before(NOW + 6.5) <= 6
        assert meter.failures == []
    async with open_log(path) as log:
        assert log.head >= 7


@pytest.mark.slow
@pytest.mark.parametrize(("change", "lost", "_"), ROWS.values(), ids=ROWS)
async def test_a_damaged_row_is_skipped_and_all_others_are_served(
    path: Path, change: str, lost: set[int], _: bool
) -> None:
    epoch = await filled(path)
    edit(path, "PRAGMA foreign_keys = OFF", change)
    await requires_skipping(path, lost)
    async with open_log(path) as log:
        assert log.epoch == epoch


@pytest.mark.slow
@pytest.mark.parametrize(("change", "lost", "_"), OLD_ROWS.values(), ids=OLD_ROWS)
async def test_damage_of_rows_that_older_versions_stored_is_found_where_it_shows(
    path: Path, change: str, lost: set[int], _: bool
) -> None:
    await filled(path)
    edit(path, "PRAGMA foreign_keys = OFF", *(f"UPDATE {table} SET checksum = NULL" for table in ("events", "whales")))
    edit(path, "PRAGMA foreign_keys = OFF", change)
    await requires_skipping(path, lost)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "old", "new", "change", "lost"),
    [
        ("events", "kind TEXT NOT NULL", "kind ANY", "UPDATE events SET kind = NULL WHERE offset = 3", {3}),
        ("events", "kind TEXT", "kind ANY", "UPDATE events SET kind = 7 WHERE offset = 3", {3}),
        ("events", "ref TEXT", "ref ANY", "UPDATE events SET ref = 1.5 WHERE offset = 3", {3}),
        ("events", " at REAL NOT NULL", " at ANY", "UPDATE events SET at = NULL WHERE offset = 3", {3}),
        ("events", " at REAL", " at ANY", "UPDATE events SET at = 'noon' WHERE offset = 3", {3}),
        ("events", "high_at REAL", "high_at ANY", "UPDATE events SET high_at = x'00' WHERE offset = 6", {6}),
        ("events", "body TEXT", "body ANY", "UPDATE events SET body = 12 WHERE offset = 5", {5}),
        ("events", "whale INTEGER", "whale ANY", "UPDATE events SET whale = 'x' WHERE offset = 3", {3}),
        ("events", "checksum INTEGER", "checksum ANY", "UPDATE events SET checksum = 'x' WHERE offset = 3", {3}),
        ("whales", "alert TEXT NOT NULL", "alert ANY", "UPDATE whales SET alert = NULL WHERE id = 3", {3}),
        ("whales", "addresses TEXT", "addresses ANY", "UPDATE whales SET addresses = 3 WHERE id = 3", {3}),
    ],
)  # fmt: skip
async def test_a_value_of_a_wrong_type_is_skipped(
    path: Path, table: str, old: str, new: str, change: str, lost: set[int]
) -> None:
    """SQLite's own check says so of the row, and that is no reason not to start."""
    await filled(path)
    force(path, table, old, new, "PRAGMA foreign_keys = OFF", change)
    meter = Meter()
    async with open_log(path, meter) as log:
        assert await stored_offsets(log) == [offset for offset in range(1, 7) if offset not in lost]
        assert log.whole_from == max(lost) + 1
        assert [event.offset for event in await log.append([alert_draft(7), update_draft(3)])] == [7, 8]
        assert meter.failures == []


@pytest.mark.parametrize("bit", range(8))
async def test_a_flipped_bit_is_never_a_wrong_event(path: Path, bit: int) -> None:
    await filled(path)
    flip(path, b'"value_sat":15000000003', bit=bit)
    meter = Meter()
    async with open_log(path, meter) as log:
        assert await stored_offsets(log) == [1, 2, 4, 5, 6]
        assert meter.damaged_rows == 1


async def test_a_damaged_page_loses_only_its_own_events(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(n, addresses=60) for n in range(1, 201)])
        await log.read(queries.check)
        await log.keep(text("all of it is"), "in the file")
    meter = Meter()
    async with open_log(path, meter) as log:
        with path.open("r+b") as raw:
            data = raw.read()
            raw.seek(data.index(txid(100).encode()) // 4096 * 4096)
            raw.write(b"\xff" * 4096)
        held = await stored_offsets(log)
        assert 100 not in held
        assert set(range(1, 60)) | set(range(140, 201)) <= set(held)
        assert meter.damaged_rows == 200 - len(held)
        assert [event.offset for event in await log.append([alert_draft(201)])] == [201]
        assert meter.failures == []
        with pytest.raises(EventLogError):
            await log.read(queries.check)
    with pytest.raises(EventLogError, match="whaled repair") as caught:
        async with open_log(path):
            pass
    assert caught.value.reason is LogFailure.CORRUPT


async def test_damage_is_logged_once_with_the_offset_and_what_to_do(path: Path) -> None:
    await filled(path)
    edit(path, "UPDATE events SET ref = 'x' WHERE offset IN (2, 3)")
    with structlog.testing.capture_logs() as lines:
        async with open_log(path) as log:
            await stored_offsets(log)
            await stored_offsets(log)
    (line,) = [line for line in lines if line["log_level"] == "error"]
    assert (line["table"], line["row"], line["rows"]) == ("events", "offsets 2 to 3", 2)
    assert line["problem"] == "its checksum does not match"
    assert line["event"] == "eventlog_rows_damaged"


async def test_events_removed_by_retention_are_no_damage(path: Path) -> None:
    meter = Meter()
    async with open_log(path, meter) as log:
        await log.append([alert_draft(n, at=NOW + n * 86_400) for n in range(20)])
        await log.prune(NOW + 100 * 86_400)
        assert log.oldest == 11
        assert [event.offset for event in await log.between(0, 20, 3)] == [11, 12, 13]
        assert [event.offset for event in await log.between(4, 20, 3)] == [11, 12, 13]
        assert await log.between(2, 7, 9) == []
        assert (log.whole_from, meter.damaged_rows) == (11, 0)
        edit(path, "DELETE FROM events WHERE offset = 15")
        await log.between(10, 20, 99)
        assert (log.whole_from, meter.damaged_rows) == (16, 1)


async def test_a_page_states_how_far_it_was_read_despite_damaged_rows(path: Path) -> None:
    await filled(path)
    edit(path, "UPDATE events SET ref = 'x' WHERE offset IN (1, 2, 6)")
    async with open_log(path) as log:
        page = await log.page(0, log.head, 2)
        assert (page.events, page.through, page.is_whole) == ([], 2, False)
        page = await log.page(2, log.head, 2)
        assert ([event.offset for event in page.events], page.through, page.is_whole) == ([3, 4], 4, True)
        page = await log.page(4, log.head, 2)
        assert ([event.offset for event in page.events], page.through, page.is_whole) == ([5], 6, False)
        assert (await log.page(6, log.head, 2)).through == 6
        assert [event.offset for event in await log.between(0, log.head, 1)] == [3]


async def test_a_page_is_bounded_in_bytes(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(n, addresses=5_000) for n in range(12)])
        page = await log.page(0, 12, 100)
        size = len(page.events) * 5_000 * 40
        assert PAGE_BYTES / 2 < size < PAGE_BYTES * 1.5
        assert page.through == page.events[-1].offset
        assert await stored_offsets(log) == list(range(1, 13))


async def test_the_offset_of_a_time_is_never_too_late_despite_damage(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([alert_draft(n, at=float(10 * n)) for n in range(1, 41)])
        edit(
            path,
            "UPDATE events SET high_at = 7e9 WHERE offset IN (3, 20, 21, 22, 30)",
            "DELETE FROM events WHERE offset IN (10, 21)",
        )
        for at in range(0, 420, 5):
            exact = min(40, (at - 1) // 10) if at else 0
            found = await log.offset_before(float(at))
            assert found <= exact
            # What lies between is damaged: who replays from there is told.
            assert set(range(found + 1, exact + 1)) <= {3, 10, 20, 21, 22, 30}


async def test_an_update_of_a_whale_whose_alert_is_damaged_is_stored_and_sent(path: Path) -> None:
    await filled(path)
    edit(path, "UPDATE whales SET alert = '{' WHERE id = 3")
    async with open_log(path) as log:
        (event,) = await log.append([update_draft(3)])
        assert event.whale == Whale(whale(3).alert, whale(3).addresses)
        assert await log.append([alert_draft(3)]) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE log SET head = 3", "UPDATE log SET head = 7", "UPDATE log SET epoch = 'abc'", "DELETE FROM log",
        f"UPDATE log SET epoch = {HEX}", "UPDATE log SET checksum = NULL", "UPDATE log SET created_at = 1",
        "UPDATE log SET head = 9223372036854775807",
    ],
)  # fmt: skip
async def test_a_damaged_counter_begins_a_new_epoch_behind_the_newest_event(path: Path, change: str) -> None:
    epoch = await filled(path)
    edit(path, change)
    meter = Meter()
    async with open_log(path, meter) as log:
        assert log.epoch != epoch
        assert (log.head, log.oldest, meter.damaged_rows) == (6, 1, 1)
        assert [event.offset for event in await log.append([alert_draft(7)])] == [7]
        again = log.epoch
    async with open_log(path) as log:
        assert (log.epoch, log.head) == (again, 7)


@pytest.mark.parametrize("offset", [8, 2**40, 2**63 - 1])
async def test_an_event_beyond_the_counter_does_not_prevent_appends(path: Path, offset: int) -> None:
    epoch = await filled(path)
    edit(path, f"UPDATE events SET offset = {offset} WHERE offset = 6")
    meter = Meter()
    async with open_log(path, meter) as log:
        assert (log.epoch, log.head) == (epoch, 6)
        assert [event.offset for event in await log.append([alert_draft(n) for n in range(7, 12)])] == [7, 8, 9, 10, 11]
        assert await stored_offsets(log) == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
        assert log.whole_from == 7


async def test_an_offset_below_one_does_not_keep_pruning_from_its_end(path: Path) -> None:
    await filled(path)
    edit(path, "UPDATE events SET offset = -9223372036854775807 WHERE offset = 1")
    async with open_log(path) as log:
        assert log.oldest == 2
        assert await log.prune(NOW + 91 * 86_400, follows_blocks=False) == 6
        assert log.oldest == 7


async def test_damaged_notes_and_block_scans_are_as_if_there_were_none(path: Path) -> None:
    await filled(path)
    edit(
        path,
        "UPDATE state SET value = '800002' WHERE key = 'height'",
        f"UPDATE blocks SET hash = {HEX} WHERE height = 800000",
    )
    meter = Meter()
    async with open_log(path, meter) as log:
        assert await log.recall(text("height")) is None
        assert [scan.height for scan in await log.read(queries.scans, 0, 900_000)] == [800_001]
        assert [scan.height for scan in await log.read(queries.newest_scans, 9, queries.ANY_HEIGHT)] == [800_001]
        assert await log.prune(NOW) == 0
        assert meter.damaged_rows == 2
        await log.write(notes.put_scan, scan(800_000, NOW))
        await log.keep(text("height"), "1")
        assert (await log.recall(text("height")), len(await log.read(queries.scans, 0, 900_000))) == ("1", 2)


# Values that no reader of a note can use, by its key.
UNREADABLE_NOTES = [
    (key, value)
    for key in ("first_block", "began_at", "canary", "told_blocks", "verified_offset", "starts")
    for value in ("90000q", "[1,2]", "null", "NaN", "1e400", "9" * 24, "9" * 5_000, "")
]


@pytest.mark.slow
@pytest.mark.parametrize("has_checksum", [True, False], ids=["checksum", "none"])
@pytest.mark.parametrize(("key", "value"), UNREADABLE_NOTES, ids=lambda text: text[:12])
async def test_a_note_that_cannot_be_read_is_as_if_there_were_none(
    path: Path, key: str, value: str, has_checksum: bool
) -> None:
    await filled(path)
    async with open_log(path) as log:
        await log.keep(text(key), value)
    if not has_checksum:
        edit(path, f"UPDATE state SET checksum = NULL WHERE key = '{key}'")
    meter = Meter()
    with structlog.testing.capture_logs() as lines:
        async with open_log(path, meter) as log:
            assert await log.recall(text(key)) is None
            assert await log.recall(text(key)) is None
            assert await stored_offsets(log) == [1, 2, 3, 4, 5, 6]
            assert meter.damaged_rows == 1
    named = [line for line in lines if line.get("table") == "state"]
    assert [line["row"] for line in named] == [key]


@pytest.mark.parametrize("value", ["90000q", "null", "9" * 5_000])
async def test_a_note_of_what_was_pruned_that_cannot_be_read_is_written_again(path: Path, value: str) -> None:
    await filled(path)
    async with open_log(path) as log:
        await log.keep(text("pruned_offset"), value)
    async with open_log(path) as log:
        assert (await log.recall(text("pruned_offset")), await stored_offsets(log)) == ("0", [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("first_block", "900000"), ("began_at", str(NOW)), ("canary", str(1e9)), ("verified_offset", "0"),
        ("told_blocks", '[{"height":1,"hash":"00","previous_hash":null,"timestamp":1760000000}]'),
        ("starts", '{"clean":1,"unclean":0,"is_running":true}'), ("any other", "x"),
    ],
)  # fmt: skip
async def test_a_note_that_can_be_read_is_given(path: Path, key: str, value: str) -> None:
    async with open_log(path) as log:
        await log.keep(text(key), value)
        assert await log.recall(text(key)) == value


def spending(n: int, outpoint: str) -> Draft:
    return Draft(kind=Kind.ALERT, at=NOW, whale=Whale(whale(n).alert, (), (outpoint,)))


NEWEST_WHALE = "DELETE FROM whales WHERE id = (SELECT max(id) FROM whales)"


@pytest.mark.parametrize(
    "change",
    [
        NEWEST_WHALE,
        f"{NEWEST_WHALE}; DELETE FROM events WHERE whale NOT IN (SELECT id FROM whales)",
        "DELETE FROM whales",
        "DELETE FROM whales; DELETE FROM spends",
        f"{NEWEST_WHALE}; UPDATE events SET whale = {2**63 - 1} WHERE whale = 9",
        f"UPDATE whales SET id = {2**63 - 1} WHERE id = 9",
    ],
)
async def test_a_new_whale_gets_no_number_that_a_lost_one_had(path: Path, change: str) -> None:
    """Else its alert would be taken for one that is stored, and it would spend what the lost one spent."""
    async with open_log(path) as log:
        await log.append([spending(n, f"{n:064x}:0") for n in range(1, 10)])
    edit(path, "PRAGMA foreign_keys = OFF", *change.split("; "))
    async with open_log(path) as log:
        event = await log.rehearse(alert_draft(99))
        assert event.whale.alert.transaction_id == txid(99)
        [first] = await log.append([spending(10, f"{10:064x}:0")])
        [second] = await log.append([alert_draft(11)])
        assert (first.offset, second.offset) == (10, 11)
        assert [each.whale.alert.transaction_id for each in await log.between(9, 11, 9)] == [txid(10), txid(11)]
        assert await log.read_each(queries.outpoints, [txid(10), txid(11)]) == {txid(10): [f"{10:064x}:0"]}
        assert await log.append([alert_draft(10), alert_draft(11)]) == []
        assert len(await log.append([update_draft(10), update_draft(11)])) == 2
    async with open_log(path) as log:
        assert [each.offset for each in await log.between(9, 13, 9)] == [10, 11, 12, 13]


@pytest.mark.parametrize(
    "row", [(1, 2**63 - 1), (-5, 0), (-(2**63), 3), (0, 3), (5, 3), (2, 4), (7, 7), (6, 7), (2**63 - 1, 2**63 - 1)]
)
async def test_a_gap_that_no_repair_made_is_ignored(path: Path, row: tuple[int, int]) -> None:
    epoch = await filled(path)
    edit(path, "PRAGMA ignore_check_constraints = ON", f"INSERT INTO gaps VALUES ({row[0]}, {row[1]}, 0)")
    meter = Meter()
    with structlog.testing.capture_logs() as lines:
        async with open_log(path, meter) as log:
            assert (log.epoch, log.oldest, log.whole_from, meter.damaged_rows) == (epoch, 1, 1, 1)
            assert await stored_offsets(log) == [1, 2, 3, 4, 5, 6]
    assert [line["row"] for line in lines if line.get("table") == "gaps"] == [f"offsets {row[0]} to {row[1]}"]


async def test_a_damaged_outpoint_is_not_attributed_to_another_whale(path: Path) -> None:
    def spending(n: int, *outpoints: str) -> Draft:
        return Draft(kind=Kind.ALERT, at=NOW, whale=Whale(whale(n).alert, (), outpoints))

    async with open_log(path) as log:
        await log.append([spending(1, "a:0", "b:0"), spending(2, "c:0")])
        edit(path, "UPDATE spends SET whale = 2 WHERE outpoint = 'a:0'")
        assert await log.read_each(queries.spenders, ["a:0", "b:0", "c:0"]) == {"b:0": [txid(1)], "c:0": [txid(2)]}
        assert await log.read_each(queries.outpoints, [txid(1), txid(2)]) == {txid(1): ["b:0"], txid(2): ["c:0"]}


# --- connections of their own ----------------------------------------------------------------------------------------

LOOKUPS: dict[str, Callable[[EventLog], object]] = {
    "whales": lambda log: log.read_each(queries.whales, [txid(1)]),
    "histories": lambda log: log.read_each(queries.histories, [txid(1)]),
    "rivals": lambda log: log.read_each(queries.spenders, ["a:0"]),
    "outpoints": lambda log: log.read_each(queries.outpoints, [txid(1)]),
    "scans": lambda log: log.read(queries.scans, 0, 9),
    "newest_scans": lambda log: log.read(queries.newest_scans, 9, queries.ANY_HEIGHT),
    "state": lambda log: log.recall(text("height")),
    "append": lambda log: log.append([alert_draft(9)]),
    "offset_before": lambda log: log.offset_before(NOW),
}  # fmt: skip
SEARCHES: dict[str, Callable[[EventLog], object]] = {
    "pending": lambda log: log.read(queries.pending, 0, 9),
    "gone_since": lambda log: log.read(queries.gone_since, 0.0, 9),
    "confirmed_in": lambda log: log.read(queries.confirmed_in, "00block"),
    "prune": lambda log: log.prune(NOW),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("call", [*LOOKUPS.values(), *SEARCHES.values()], ids=[*LOOKUPS, *SEARCHES])
async def test_nothing_waits_for_a_page_of_a_replay(path: Path, call: Callable[[EventLog], object]) -> None:
    await filled(path)
    await requires_no_waiting(path, "page_thread", call)


@pytest.mark.slow
@pytest.mark.parametrize("call", [*LOOKUPS.values(), lambda log: log.between(0, 9, 9)], ids=[*LOOKUPS, "between"])
async def test_nothing_waits_for_a_search_through_all_events(path: Path, call: Callable[[EventLog], object]) -> None:
    await filled(path)
    await requires_no_waiting(path, "search_thread", call)


async def requires_no_waiting(path: Path, thread: str, call: Callable[[EventLog], object]) -> None:
    async with open_log(path) as log:
        release = Latch()
        getattr(log._threads, thread).submit(release.wait)
        try:
            async with asyncio.timeout(10):
                await call(log)  # type: ignore[misc]  # a coroutine of the log
        finally:
            release.set()


# --- the schema ------------------------------------------------------------------------------------------------------


async def test_a_log_without_checksums_is_brought_forward_and_read(path: Path) -> None:
    epoch = await filled(path)
    as_version_3(path)
    meter = Meter()
    async with open_log(path, meter) as log:
        assert (log.epoch, log.head, log.whole_from) == (epoch, 6, 1)
        assert await stored_offsets(log) == [1, 2, 3, 4, 5, 6]
        assert (await log.recall(text("height")), len(await log.read(queries.scans, 0, 900_000))) == ("800001", 2)
        await log.append([update_draft(3), alert_draft(7)])
        assert await stored_offsets(log) == [1, 2, 3, 4, 5, 6, 7, 8]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*), count(checksum) FROM events").fetchone() == (8, 2)
        assert db.execute("SELECT count(*) FROM state WHERE checksum IS NULL").fetchone() == (0,)
    edit(path, "UPDATE events SET ref = 'x' WHERE offset = 8", "UPDATE state SET value = 7")
    async with open_log(path, meter) as log:
        assert await stored_offsets(log) == [1, 2, 3, 4, 5, 6, 7]
        assert await log.recall(text("height")) is None


async def test_a_damaged_log_without_checksums_is_brought_forward_too(path: Path) -> None:
    await filled(path)
    as_version_3(path)
    edit(path, "UPDATE events SET kind = 'eaten' WHERE offset = 5", "DELETE FROM events WHERE offset = 2")
    async with open_log(path) as log:
        assert await stored_offsets(log) == [1, 3, 4, 6]


# --- values ----------------------------------------------------------------------------------------------------------


def test_known_damage_counts_each_row_once() -> None:
    known = KnownDamage()
    adds = [(5, 5), (7, 9), (5, 5), (8, 8), (6, 6), (1, 20), (30, 31), (21, 29), (1, 40), (1, 40)]
    assert [known.add(of_events(*each, "x")) for each in adds] == [1, 3, 0, 0, 1, 15, 2, 9, 9, 0]
    note = Damage(table=Table.STATE, row="a", problem="x")
    assert [known.add(note), known.add(note)] == [1, 0]
    assert known.rows == 41
    known.forget_before(39)
    assert known.rows == 3


def test_neighbours_with_one_problem_are_one_range() -> None:
    found = merged([of_events(1, 1, "x"), of_events(2, 4, "x"), of_events(5, 5, "y"), of_events(7, 7, "y")])
    assert [(each.row, each.rows) for each in found] == [("offsets 1 to 4", 4), ("offset 5", 1), ("offset 7", 1)]
