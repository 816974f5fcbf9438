"""Logs damaged with dd, sqlite3 and a random number generator: nothing is lost in silence, and nothing is wrong."""

import asyncio
import json
import random
import re
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import structlog

from kit.backups import names, write
from kit.damage import edit
from kit.eventlog import Meter, open_log, scan
from kit.whales import NOW, alert_draft, txid, update_draft, whale
from whaled.bookmarks import PRUNED_OFFSET, text
from whaled.cli.main import main
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import notes, rawfile
from whaled.eventlog.inspection import inspect
from whaled.eventlog.repair import repair
from whaled.model import Draft, Kind, Whale

PAGE = 4096
WHALES, UPDATES, BLOCKS = 120, 40, 30
EVENTS = WHALES + UPDATES
KEYS = {
    "events": "offset",
    "whales": "id",
    "spends": "outpoint || ' ' || whale",
    "blocks": "height",
    "state": "key",
}
Rows = dict[str, dict[Any, tuple[Any, ...]]]


def spending(n: int) -> Draft:
    """The n-th whale, with what it spends; some have more addresses than a page holds."""
    about = whale(n, addresses=200 if n % 25 == 0 else 3)
    outpoints = tuple(f"{txid(10_000 + n)}:{index}" for index in range(1 + n % 4))
    return Draft(kind=Kind.ALERT, at=NOW + n, whale=Whale(about.alert, about.addresses, outpoints))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a log of some hundred pages."""
    path = tmp_path_factory.mktemp("whole") / "whaled.db"

    async def fill() -> None:
        async with open_log(path) as log:
            await log.append([spending(n) for n in range(1, WHALES + 1)])
            await log.append([update_draft(n, at=NOW + WHALES) for n in range(1, UPDATES + 1)])
            for height in range(BLOCKS):
                await log.write(notes.put_scan, scan(800_000 + height, NOW + height))
            await log.keep(text("verified_offset"), str(EVENTS - 3))

    asyncio.run(fill())
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path, whole: bytes) -> Path:
    path = tmp_path / "whaled.db"
    path.write_bytes(whole)
    return path


def read(path: Path) -> bytes:
    return path.read_bytes()


def overwrite(path: Path, at: int, data: bytes) -> None:
    """As dd with conv=notrunc does."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def pages_of(path: Path, name: str, kind: int) -> list[int]:
    """The pages of one kind in the tree of a table or an index, the root first."""
    data = read(path)
    with closing(sqlite3.connect(path)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (name,)).fetchone()
    found, waiting = [], [root]
    for number in waiting:
        page = data[(number - 1) * PAGE : number * PAGE]
        if page[0] == kind:
            found.append(number)
        if page[0] in {rawfile.INTERIOR_INDEX, rawfile.INTERIOR_TABLE}:
            (cells,) = struct.unpack_from(">H", page, 3)
            places = [8, *struct.unpack_from(f">{cells}H", page, 12)]
            waiting += [struct.unpack_from(">I", page, place)[0] for place in places]
    return found


def rows_of(path: Path) -> Rows:
    """Every row by its key, without its checksum."""
    with closing(sqlite3.connect(path)) as db:
        return {
            table: {row[0]: row[1:-1] for row in db.execute(f"SELECT {key}, * FROM {table}")}
            for table, key in KEYS.items()
        }


def restored_from_index(path: Path) -> set[str]:
    """The keys of spends that a repair restored from their index alone: a damaged entry may have a plausible value."""
    with closing(sqlite3.connect(path)) as db:
        return {key for (key,) in db.execute(f"SELECT {KEYS['spends']} FROM spends WHERE checksum IS NULL")}


def head_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("SELECT head FROM log").fetchone()[0])


def listed(aside: Path) -> dict[str, set[Any]]:
    """The keys of the rows that a repair listed as lost; None stands for rows of which no key is known."""
    keys: dict[str, set[Any]] = {table: set() for table in KEYS}
    for line in aside.with_name(f"{aside.name}.jsonl").read_text().splitlines():
        entry = json.loads(line)
        row, table = entry["row"], entry["table"]
        if not row:
            keys[table].add(None)
        elif table == "spends":
            keys[table].add(f"{row['outpoint']} {row['whale']}")
        else:
            keys[table].add(row[KEYS[table]])
    return keys


def lines_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and what was printed, errors too."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return status, shown.out + shown.err


async def require_repaired(path: Path, before: Rows, capsys: pytest.CaptureFixture[str]) -> Rows | None:
    """Repair.

    All that is lost is reported, all else is what was written, and the daemon opens it. Returns the rows that are left,
    None where the file was refused.
    """
    lines_of(capsys, "check", "--db-path", path)
    lines_of(capsys, "check", "--deep", "--db-path", path)
    planned, plan = lines_of(capsys, "repair", "--dry-run", "--db-path", path)
    status, shown = lines_of(capsys, "repair", "--db-path", path)
    if status:
        assert (status, planned) == (1, 1)
        assert re.search("first page is damaged|no row of it can be read", shown)
        return None
    asides = [path.with_name(each) for each in names(path) if ".damaged-" in each and not each.endswith(".jsonl")]
    after = rows_of(path)
    state = {key: value for key, value in after["state"].items() if key != PRUNED_OFFSET.key}
    if not asides:
        assert "nothing to repair" in shown
        assert after == before
        return after
    assert planned == 1
    match = re.search(r"removed: ([\d,]+) row", shown)
    assert match is not None
    assert f"would be removed: {match[1]} row" in plan
    (aside,) = asides
    lost = listed(aside)
    for table in KEYS:
        kept = state if table == "state" else after[table]
        missing = set(before[table]) - set(after[table]) - {PRUNED_OFFSET.key}
        if table == "events" and "may have been lost" in shown:  # behind the last one that anything proves
            missing = {offset for offset in missing if offset <= head_of(path)}
        assert missing <= lost[table] or None in lost[table], (table, missing - lost[table])
        by_index = restored_from_index(path) if table == "spends" else set()
        for key, row in kept.items():
            assert row == before[table][key] if key in before[table] else key in by_index, (table, key)
        if by_index:
            assert f" ({len(by_index):,} of them by an index, without checksums)" in shown
        assert f"{table}: " in shown
    assert lines_of(capsys, "check", "--deep", "--db-path", path)[0] == 0
    assert lines_of(capsys, "check", "--db-path", path)[0] == 0
    meter = Meter()
    async with open_log(path, meter) as log:
        held = [event.offset for event in await log.between(0, log.head, 100_000)]
        assert held == sorted(after["events"])
        assert meter.damaged_rows == 0
        (event,) = await log.append([alert_draft(99_999)])
        assert event.offset > max(held, default=0)
    return after


def random_bytes(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(1, len(data) // PAGE) * PAGE
        size = PAGE * draw.randint(1, 3)
        data[at : at + size] = draw.randbytes(len(data[at : at + size]))


def zeroed(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(1, len(data) // PAGE) * PAGE
        data[at : at + PAGE] = bytes(PAGE)


def torn(data: bytearray, draw: random.Random) -> None:
    """Sectors that were never written, anywhere behind the first page."""
    for _ in range(draw.randint(1, 5)):
        at = draw.randrange(PAGE // 512, len(data) // 512) * 512
        data[at : at + 512] = draw.randbytes(512)


def swapped(data: bytearray, draw: random.Random) -> None:
    """A page written to the place of another one."""
    source, target = (draw.randrange(1, len(data) // PAGE) * PAGE for _ in range(2))
    data[target : target + PAGE] = data[source : source + PAGE]


def flipped(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.randint(1, 12)):
        data[draw.randrange(PAGE, len(data))] ^= 1 << draw.randrange(8)


def truncated(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(PAGE, len(data)) :]


def first_page(data: bytearray, draw: random.Random) -> None:
    at = draw.choice([0, 16, 20, 28, 60, 100, draw.randrange(PAGE)])
    size = draw.choice([1, 8, 16, 100, PAGE])
    data[at : min(at + size, PAGE)] = draw.randbytes(min(at + size, PAGE) - at)


DAMAGES = (random_bytes, zeroed, torn, swapped, flipped, truncated, first_page)
DELETIONS = (
    "DELETE FROM events WHERE offset <= 20",
    "DELETE FROM events WHERE offset > 150",
    "DELETE FROM events",
    "DELETE FROM events WHERE offset % 7 = 3",
    "DELETE FROM whales WHERE id % 11 = 2",
    "DELETE FROM log",
    "DROP TABLE spends",
    "DROP TABLE blocks",
    "DROP INDEX spends_by_whale",
    "UPDATE log SET head = 12",
    "UPDATE events SET ref = 'x' WHERE offset % 13 = 1",
    "UPDATE whales SET alert = '{}' WHERE id = 77",
)


SEEDS = [*range(4), *(pytest.param(seed, marks=[pytest.mark.slow, pytest.mark.long]) for seed in range(4, 30))]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
async def test_random_damage_is_reported_repaired_and_never_a_wrong_row(
    path: Path, damage: Callable[[bytearray, random.Random], None], seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows_of(path)
    draw = random.Random(f"{damage.__name__} {seed}")
    data = bytearray(read(path))
    damage(data, draw)
    write(path, data)
    await require_repaired(path, before, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("statement", DELETIONS)
async def test_rows_and_tables_that_were_deleted_are_reported(
    path: Path, statement: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows_of(path)
    edit(path, "PRAGMA foreign_keys = OFF", statement)
    assert lines_of(capsys, "check", "--deep", "--db-path", path)[0] == 1
    assert await require_repaired(path, before, capsys) is not None


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
async def test_several_kinds_of_damage_at_once(path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = rows_of(path)
    draw = random.Random(seed)
    edit(path, "PRAGMA foreign_keys = OFF", draw.choice(DELETIONS))
    data = bytearray(read(path))
    for damage in draw.sample(DAMAGES[:-1], 2):
        damage(data, draw)
    write(path, data)
    await require_repaired(path, before, capsys)


# --- one fault at a time ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "size"), [(0, 16), (0, PAGE), (16, 2), (60, 4), (68, 4), (44, 4), (100, 8), (103, 2), (200, PAGE - 200)]
)
async def test_a_damaged_first_page_is_named_by_every_command_and_a_backup_is_what_helps(
    path: Path, whole: bytes, at: int, size: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    overwrite(path, at, b"\xa7" * size)
    for command in (["check"], ["check", "--deep"], ["repair"], ["repair", "--dry-run"], ["backup", tmp_path / "copy"]):
        status, shown = lines_of(capsys, *command, "--db-path", path)
        assert status == 1, command
        assert f"{path}: its first page is damaged; repair cannot read it. Restore a backup (`whaled restore" in shown
    with pytest.raises(EventLogError, match="its first page is damaged; repair cannot read it") as caught:
        async with open_log(path):
            pass
    assert caught.value.reason is LogFailure.CORRUPT
    assert "`whaled repair`" not in str(caught.value)
    source = tmp_path / "backup.db"
    write(source, whole)
    assert lines_of(capsys, "restore", source, "--db-path", path)[0] == 0
    async with open_log(path) as log:
        assert log.head == EVENTS


@pytest.mark.parametrize("byte", [b"\xf9", b"\xff", b"\x80"])
async def test_a_schema_that_is_not_utf8_is_a_damaged_first_page(
    path: Path, byte: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """SQLite quotes the byte in its message."""
    overwrite(path, read(path).index(b"CHECK (id = 1)"), byte)
    for command in (["check"], ["check", "--deep"], ["repair"], ["repair", "--dry-run"], ["backup", tmp_path / "copy"]):
        status, shown = lines_of(capsys, *command, "--db-path", path)
        assert (status, f"{path}: its first page is damaged" in shown) == (1, True), command
    with pytest.raises(EventLogError, match="its first page is damaged; repair cannot read it") as caught:
        async with open_log(path):
            pass
    assert caught.value.reason is LogFailure.CORRUPT


@pytest.mark.parametrize("size", [16, PAGE])
async def test_a_first_page_that_the_write_ahead_log_has_is_not_damaged(
    path: Path, size: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As long as SQLite reads it there; a file that it refuses is named as above."""
    async with open_log(path):
        edit(path, "CREATE TABLE other (x)")  # a new first page
        crashed = tmp_path / "crashed.db"
        write(crashed, read(path))
        write(crashed.with_name("crashed.db-wal"), read(path.with_name("whaled.db-wal")))
    overwrite(crashed, 0, bytes(size))
    status, shown = lines_of(capsys, "check", "--deep", "--db-path", crashed)
    assert (status, "no damage" in shown) == (0, True) or "first page is damaged" in shown
    assert (lines_of(capsys, "repair", "--db-path", crashed)[0] == 0) is (status == 0)


async def test_a_file_of_another_format_is_not_treated_as_a_damaged_log(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(path, random.Random(3).randbytes(40 * PAGE))
    for command in ("check", "repair"):
        status, shown = lines_of(capsys, command, "--db-path", path)
        assert status == 78
        assert "this is not an event log" in shown
    write(path, b"")
    edit(path, "CREATE TABLE events (offset INTEGER PRIMARY KEY, x TEXT)", "INSERT INTO events VALUES (1, 'y')")
    assert "was not made by whaled" in lines_of(capsys, "check", "--db-path", path)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "kind", "loses"),
    [
        ("events", rawfile.LEAF_TABLE, {"events", "whales", "spends"}),
        ("events", rawfile.INTERIOR_TABLE, set()),
        ("whales", rawfile.LEAF_TABLE, {"events", "whales", "spends"}),
        ("whales", rawfile.INTERIOR_TABLE, set()),
        ("blocks", rawfile.LEAF_TABLE, {"blocks"}),
        ("spends", rawfile.LEAF_INDEX, set()),  # an index has the same
        ("spends", rawfile.INTERIOR_INDEX, set()),
        ("spends_by_whale", rawfile.LEAF_INDEX, set()),
        ("sqlite_autoindex_events_1", rawfile.LEAF_INDEX, set()),
    ],
)
async def test_a_damaged_page_costs_what_is_on_it_and_no_more(
    path: Path, table: str, kind: int, loses: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows_of(path)
    pages = pages_of(path, table, kind)
    number = pages[len(pages) // 2]
    with rawfile.RawFile.open(path) as raw:
        on_it = len(list(raw.records(number)))
    overwrite(path, (number - 1) * PAGE, random.Random(1).randbytes(PAGE))
    after = await require_repaired(path, before, capsys)
    assert after is not None
    gone = {name: len(before[name]) - len(after[name]) for name in KEYS}
    assert {name for name, rows in gone.items() if rows} <= loses
    if table in gone:
        assert gone[table] <= on_it
        assert gone[table] or not loses


async def test_events_below_an_unreadable_page_are_not_reported_as_missing(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root,) = pages_of(path, "events", rawfile.INTERIOR_TABLE)
    overwrite(path, (root - 1) * PAGE, bytes(PAGE))
    _, shown = lines_of(capsys, "check", "--db-path", path)
    assert "file: table events cannot be read to its end" in shown
    assert "missing" not in shown
    _, shown = lines_of(capsys, "repair", "--dry-run", "--db-path", path)
    assert f"events: offsets 1 to {EVENTS}: their pages of the file are damaged" in shown
    assert f"events: {EVENTS} rows before, {EVENTS} saved, 0 lost" in shown


async def test_rows_found_only_in_an_index_are_saved_and_reported_as_without_checksums(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows_of(path)
    for number in (
        each for kind in (rawfile.LEAF_INDEX, rawfile.INTERIOR_INDEX) for each in pages_of(path, "spends", kind)
    ):
        overwrite(path, (number - 1) * PAGE, bytes(PAGE))
    status, shown = lines_of(capsys, "check", "--deep", "--db-path", path)
    assert status == 1
    assert "file: table spends cannot be read to its end" in shown
    status, shown = lines_of(capsys, "repair", "--db-path", path)
    count = len(before["spends"])
    assert (
        f"spends: {count} rows before, {count} saved ({count} of them by an index, without checksums), 0 lost" in shown
    )
    assert rows_of(path) == before


async def test_events_that_are_missing_at_the_beginning_are_damage(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(path, "DELETE FROM events WHERE offset <= 30")
    status, shown = lines_of(capsys, "check", "--db-path", path)
    assert (status, "events: offsets 1 to 30 are missing" in shown) == (1, True)
    meter = Meter()
    async with open_log(path, meter) as log:
        assert (log.oldest, log.whole_from, meter.damaged_rows) == (31, 31, 30)
    assert lines_of(capsys, "repair", "--db-path", path)[0] == 0
    status, shown = lines_of(capsys, "check", "--deep", "--db-path", path)
    assert (status, "gap: offsets 1 to 30 were removed" in shown) == (0, True)
    after = Meter()
    async with open_log(path, after) as log:
        assert (log.oldest, after.damaged_rows) == (31, 0)


async def test_a_log_without_any_event_has_lost_them(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(path, "DELETE FROM events")
    status, shown = lines_of(capsys, "check", "--db-path", path)
    assert status == 1
    assert f"{path}: no events, newest offset {EVENTS}," in shown
    assert f"events: offsets 1 to {EVENTS} are missing" in shown
    with structlog.testing.capture_logs() as lines:
        async with open_log(path) as log:
            assert (log.head, log.oldest) == (EVENTS, EVENTS + 1)
    (line,) = [line for line in lines if line["log_level"] == "error"]
    assert line["row"] == f"offsets 1 to {EVENTS}"


async def test_whales_without_events_show_the_loss_in_a_log_of_an_older_version(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(path, "DELETE FROM state", "DELETE FROM log", "DELETE FROM events WHERE offset <= 30 OR offset > 120")
    status, shown = lines_of(capsys, "check", "--db-path", path)
    assert status == 1
    assert shown.count("there is no event about it any more, and retention did not remove it") == 19
    assert "and 11 more findings" in shown


async def test_events_removed_by_retention_are_no_loss(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with open_log(path) as log:
        assert await log.prune(NOW + 90 * 86_400 + 50.5, follows_blocks=False) == 50
    assert lines_of(capsys, "check", "--deep", "--db-path", path)[0] == 0
    meter = Meter()
    async with open_log(path, meter) as log:
        assert (log.oldest, meter.damaged_rows) == (51, 0)
    edit(path, "DELETE FROM events WHERE offset BETWEEN 51 AND 53")
    assert "events: offsets 51 to 53 are missing" in lines_of(capsys, "check", "--db-path", path)[1]


@pytest.mark.slow
@pytest.mark.parametrize("table", ["events", "whales", "spends", "blocks", "state", "log", "gaps"])
async def test_a_missing_table_is_named_and_made_again(
    path: Path, table: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = rows_of(path)
    source = tmp_path / "before.db"
    write(source, read(path))
    edit(path, "PRAGMA foreign_keys = OFF", f"DROP TABLE {table}")
    commands: list[list[object]] = [["check"], ["check", "--deep"], ["repair", "--dry-run"]]
    for command in commands:
        status, shown = lines_of(capsys, *command, "--db-path", path)
        assert status == 1
        assert f"file: table {table} is missing" in shown
    readers: list[list[object]] = [["coverage"], ["accuracy"], ["backup", tmp_path / "copy"]]
    for command in readers:
        status, shown = lines_of(capsys, *command, "--db-path", path)
        assert status == 1
        assert f"the event log is damaged: table {table} is missing" in shown
    with pytest.raises(EventLogError, match=f"table {table} is missing.*whaled repair") as caught:
        async with open_log(path):
            pass
    assert caught.value.reason is LogFailure.CORRUPT
    beside = tmp_path / "beside.db"
    write(beside, read(path))
    assert lines_of(capsys, "restore", source, "--db-path", beside)[0] == 0
    if table in KEYS:
        assert await require_repaired(path, before, capsys) is not None
    else:
        assert lines_of(capsys, "repair", "--db-path", path)[0] == 0
        assert rows_of(path) == before


async def test_a_table_that_is_dropped_while_the_daemon_runs_ends_it_with_a_clear_line(path: Path) -> None:
    async with open_log(path) as log:
        edit(path, "PRAGMA foreign_keys = OFF", "DROP TABLE spends")
        with pytest.raises(
            EventLogError, match=r"cannot store events: no such table: .*spends.*whaled repair"
        ) as caught:
            await log.append([spending(9_999)])
        assert caught.value.reason is LogFailure.CORRUPT


async def test_events_after_a_lost_counter_are_reported_as_lost(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(path, f"DELETE FROM events WHERE offset > {EVENTS - 8}", f"UPDATE log SET head = {EVENTS - 8}")
    lost = f"events after {EVENTS - 8} may have been lost (at least up to {EVENTS - 3})"
    status, shown = lines_of(capsys, "repair", "--dry-run", "--db-path", path)
    assert status == 1
    assert f"log: the row with epoch and newest offset: its checksum does not match; {lost}" in shown
    assert f"events: offsets {EVENTS - 7} to {EVENTS - 3} are missing" in shown
    assert lines_of(capsys, "repair", "--db-path", path)[0] == 0
    assert f"gap: offsets {EVENTS - 7} to {EVENTS - 3} were" in lines_of(capsys, "check", "--db-path", path)[1]
    async with open_log(path) as log:
        assert [event.offset for event in await log.append([alert_draft(9_999)])] == [EVENTS - 2]


async def test_the_daemon_reports_events_behind_a_lost_counter(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(path, f"DELETE FROM events WHERE offset > {EVENTS - 8}", "DELETE FROM log")
    assert (
        "log: the row with epoch and newest offset is missing; events after"
        in lines_of(capsys, "check", "--db-path", path)[1]
    )
    with structlog.testing.capture_logs() as lines:
        async with open_log(path) as log:
            assert log.head == EVENTS - 3
    (line,) = [line for line in lines if line["log_level"] == "error"]
    assert "at least up to 157" in line["problem"]


async def test_a_page_only_in_the_write_ahead_log_counts_while_a_daemon_runs(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(path, "UPDATE events SET ref = 'x' WHERE offset = 5")
    async with open_log(path) as log:
        await log.append([alert_draft(5_000 + n) for n in range(20)])
        assert len(read(path.with_name("whaled.db-wal"))) > 0
        status, shown = lines_of(capsys, "repair", "--dry-run", "--db-path", path)
        assert status == 1
        assert f"events: {EVENTS + 20} rows before, {EVENTS + 19} saved, 1 lost" in shown
        allowed = {"whaled.db", "whaled.db-wal", "whaled.db-shm", "whaled.db.lock"}
        assert names(path) <= allowed  # nothing was put beside the log
    status, shown = lines_of(capsys, "repair", "--db-path", path)
    assert f"events: {EVENTS + 20} rows before, {EVENTS + 19} saved, 1 lost" in shown


def test_sentences(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(
        path, "DELETE FROM events WHERE offset IN (5, 100, 101, 102)", "UPDATE events SET at = 1 WHERE offset IN (8, 9)"
    )
    status, shown = lines_of(capsys, "check", "--deep", "--db-path", path)
    assert status == 1
    assert "events: offset 5 is missing\n" in shown
    assert "events: offsets 100 to 102 are missing\n" in shown
    assert "events: offsets 8 to 9: their checksums do not match\n" in shown
    assert "`whaled repair` removes what is damaged" in shown
    found = inspect(path, lambda _done, _of_all: None, is_deep=True)
    assert found.damaged == 6
    done = repair(path, now=NOW, progress=lambda _done, _of_all: None)
    assert done.salvaged is not None
    assert "gap: offset 5 was removed by an earlier repair\n" in lines_of(capsys, "check", "--db-path", path)[1]


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2, 3])
async def test_a_wrong_schema_version_costs_no_row(
    path: Path, version: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows_of(path)
    edit(path, f"PRAGMA user_version = {version}")
    with pytest.raises(EventLogError, match=f"which schema version {version} does not have"):
        async with open_log(path):
            pass
    assert await require_repaired(path, before, capsys) == {
        **before, "state": rows_of(path)["state"],
    }  # fmt: skip


async def test_rows_of_a_dropped_table_are_saved_from_pages_that_are_free(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless SQLite was made to overwrite them."""
    before = rows_of(path)
    edit(path, "PRAGMA secure_delete = OFF", "PRAGMA foreign_keys = OFF", "DROP TABLE events")
    after = await require_repaired(path, before, capsys)
    assert after is not None
    assert len(after["events"]) > EVENTS / 2


async def test_rows_that_retention_removed_do_not_come_back(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with open_log(path) as log:
        await log.prune(NOW + 90 * 86_400 + 100.5, follows_blocks=False)
    before = rows_of(path)
    assert min(before["events"]) == 101
    data = bytearray(read(path))
    at = data.rindex(txid(110).encode()) // PAGE * PAGE
    data[at : at + PAGE] = bytes(PAGE)
    write(path, data)
    after = await require_repaired(path, before, capsys)
    assert after is not None
    assert set(after["events"]) <= set(before["events"])
    assert set(after["whales"]) <= set(before["whales"])


async def test_a_page_in_the_place_of_another_one_does_not_keep_a_reader_for_ever(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows_of(path)
    leaves = pages_of(path, "events", rawfile.LEAF_TABLE)
    data = read(path)
    first, last = ((number - 1) * PAGE for number in (leaves[0], leaves[-2]))
    async with open_log(path) as log:
        overwrite(path, last, data[first : first + PAGE])
        held = [event.offset for event in await log.between(0, log.head, 1_000)]
        assert held == sorted(set(held))
        assert held[-1] == EVENTS
        for at in range(0, 200, 7):
            assert 0 <= await log.offset_before(NOW + at) <= EVENTS
    assert await require_repaired(path, before, capsys) is not None
