"""`whaled check` and `whaled repair`, on real files with real damage; killed in the middle."""

import asyncio
import json
import os
import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kit.backups import held, ignore, names, write
from kit.damage import ROWS, as_version_3, edit, filled, stored_offsets
from kit.eventlog import Meter, locked, open_log, scan
from kit.whales import NOW, alert_draft, txid, update_draft, whale
from whaled.bookmarks import text
from whaled.cli.main import main
from whaled.errors import EventLogError, LogFailure
from whaled.eventlog import notes, queries
from whaled.eventlog.damage import of_events, outside
from whaled.eventlog.inspection import inspect
from whaled.eventlog.repair import Repaired, repair
from whaled.model import Draft, Kind, Whale

REPAIRED_AT = 1_790_000_000.0
ASIDE = "whaled.db.damaged-20260921T141320Z"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "whaled.db"


def repaired(path: Path) -> Repaired:
    return repair(path, now=REPAIRED_AT, progress=ignore)


def read(path: Path) -> bytes:
    return path.read_bytes()


def answer(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and answer of `check --json`."""
    capsys.readouterr()
    status = main(["check", "--json", *options, "--db-path", str(path)])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "lost", "_"), ROWS.values(), ids=ROWS)
async def test_damaged_rows_are_listed_and_removed_and_become_a_gap(
    path: Path, change: str, lost: set[int], _: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    epoch = await filled(path)
    before = await held(path)
    edit(path, "PRAGMA foreign_keys = OFF", change)
    status, found = answer(path, capsys, "--deep")
    assert (status, found["damaged_rows"], found["is_whole"]) == (1, len(lost), False)
    listed = {n for each in found["damages"] for n in range(each["first"], each["through"] + 1)}
    assert listed == lost
    done = repaired(path)
    assert not done.is_renewed
    assert done.aside == path.with_name(ASIDE)
    assert answer(path, capsys, "--deep")[0] == 0
    assert answer(path, capsys)[0] == 0
    meter = Meter()
    async with open_log(path, meter) as log:
        assert (log.epoch, log.head) == (epoch, 6)
        assert await log.between(0, 6, 99) == [event for event in before if event.offset not in lost]
        assert log.whole_from == max(lost) + 1
        assert meter.damaged_rows == 0
        assert (await log.recall(text("height")), len(await log.read(queries.scans, 0, 900_000))) == ("800001", 2)
        assert [event.offset for event in await log.append([alert_draft(7)])] == [7]
    # Nothing is lost but the damage: the old file is as it was.
    async with open_log(path.with_name(ASIDE)) as log:
        assert await stored_offsets(log) == [event.offset for event in before if event.offset not in lost]
    lines = path.with_name(f"{ASIDE}.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert {entry["row"]["offset"] for entry in entries if entry["table"] == "events"} == lost


async def test_a_log_that_is_whole_is_not_changed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await filled(path)
    before = read(path)
    assert repaired(path).aside is None
    assert main(["repair", "--db-path", str(path)]) == 0
    assert main(["repair", "--dry-run", "--db-path", str(path)]) == 0
    assert capsys.readouterr().out.count("nothing to repair") == 2
    assert read(path) == before
    status, found = answer(path, capsys, "--deep")
    assert (status, found["is_whole"], found["rows_read"], found["events_without_checksum"]) == (0, True, 10, 0)


async def test_a_gap_is_a_gap_until_retention_reaches_it(path: Path) -> None:
    await filled(path)
    edit(path, "UPDATE events SET ref = 'x' WHERE offset = 2")
    repaired(path)
    edit(path, "UPDATE events SET ref = 'x' WHERE offset = 4")
    repaired(path)
    meter = Meter()
    async with open_log(path, meter) as log:
        assert [event.offset for event in await log.between(0, 6, 99)] == [1, 3, 5, 6]
        assert (log.whole_from, meter.damaged_rows) == (5, 0)
        await log.prune(NOW + 90 * 86_400 + 6, follows_blocks=False)
        assert (log.oldest, log.whole_from) == (6, 6)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM gaps").fetchone() == (0,)


async def test_a_repair_gives_rows_of_older_versions_their_checksums(path: Path) -> None:
    epoch = await filled(path)
    as_version_3(path)
    edit(path, "UPDATE whales SET alert = '{' WHERE id = 3")
    found = inspect(path, ignore, is_deep=True)
    assert (found.version, found.damaged, found.unverified) == (3, 1, 6)
    repaired(path)
    async with open_log(path) as log:
        assert (log.epoch, await stored_offsets(log)) == (epoch, [1, 2, 4, 5, 6])
    with closing(sqlite3.connect(path)) as db:
        for table in ("events", "whales", "spends", "blocks", "state", "log"):
            assert db.execute(f"SELECT count(*) FROM {table} WHERE checksum IS NULL").fetchone() == (0,)


async def test_a_damaged_counter_begins_a_new_epoch(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    epoch = await filled(path)
    edit(path, "UPDATE log SET head = 2")
    status, found = answer(path, capsys, "--deep")
    assert (status, found["epoch"], found["head"], found["damages"][0]["table"]) == (1, None, 6, "log")
    assert main(["repair", "--db-path", str(path)]) == 0
    assert "new epoch" in capsys.readouterr().out
    async with open_log(path) as log:
        assert log.epoch != epoch
        assert await stored_offsets(log) == [1, 2, 3, 4, 5, 6]


async def test_damaged_notes_scans_and_outpoints_are_taken_out(path: Path) -> None:
    async with open_log(path) as log:
        await log.append([Draft(kind=Kind.ALERT, at=NOW, whale=Whale(whale(1).alert, (), ("a:0", "b:0")))])
        await log.write(notes.put_scan, scan(1, NOW))
        await log.keep(text("a"), "1")
        await log.keep(text("b"), "2")
    edit(
        path,
        "UPDATE state SET value = 3 WHERE key = 'a'",
        "UPDATE blocks SET seen = 7",
        "UPDATE spends SET outpoint = 'c:0' WHERE outpoint = 'a:0'",
    )
    done = repaired(path)
    assert {each.row for each in done.inspected.damages} == {"a", "height 1", "c:0"}
    async with open_log(path) as log:
        assert (await log.recall(text("a")), await log.recall(text("b")), await log.read(queries.scans, 0, 9)) == (
            None,
            "2",
            [],
        )
        assert await log.read_each(queries.outpoints, [txid(1)]) == {txid(1): ["b:0"]}


@pytest.mark.parametrize("has_checksum", [True, False], ids=["checksum", "none"])
async def test_a_note_that_cannot_be_read_is_named_and_taken_out(
    path: Path, has_checksum: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    await filled(path)
    async with open_log(path) as log:
        await log.keep(text("first_block"), "90000q")
    if not has_checksum:
        edit(path, "UPDATE state SET checksum = NULL WHERE key = 'first_block'")
    status, found = answer(path, capsys, "--deep")
    assert (status, [(each["table"], each["row"]) for each in found["damages"]]) == (1, [("state", "first_block")])
    repaired(path)
    assert answer(path, capsys, "--deep")[0] == 0
    [line] = path.with_name(f"{ASIDE}.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == {"key": "first_block", "value": "90000q"}
    async with open_log(path) as log:
        assert (await log.recall(text("first_block")), await log.recall(text("height"))) == (None, "800001")


@pytest.mark.slow
@pytest.mark.parametrize("row", [(1, 2**63 - 1), (-5, 0), (2, 4), (6, 7)])
async def test_a_gap_that_no_repair_made_is_named_and_taken_out(
    path: Path, row: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    epoch = await filled(path)
    edit(path, f"INSERT INTO gaps VALUES ({row[0]}, {row[1]}, 0)")
    for options in ([], ["--deep"]):
        status, found = answer(path, capsys, *options)
        named = [(each["table"], each["row"]) for each in found["damages"]]
        assert (status, found["gaps"], named) == (1, [], [("gaps", f"offsets {row[0]} to {row[1]}")])
    assert main(["repair", "--dry-run", "--db-path", str(path)]) == 1
    assert "gaps: 1 rows before, 0 saved, 1 lost\n" in capsys.readouterr().out
    repaired(path)
    assert answer(path, capsys, "--deep")[0] == 0
    [line] = path.with_name(f"{ASIDE}.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == {"first": row[0], "through": row[1]}
    async with open_log(path) as log:
        assert (log.epoch, log.whole_from, await stored_offsets(log)) == (epoch, 1, [1, 2, 3, 4, 5, 6])


async def test_the_outpoints_of_a_lost_whale_are_listed_and_removed(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with open_log(path) as log:
        drafts = [Draft(kind=Kind.ALERT, at=NOW, whale=Whale(whale(n).alert, (), (f"{n}:0",))) for n in (1, 2)]
        await log.append(drafts)
    edit(path, "DELETE FROM whales WHERE id = 2")
    _, found = answer(path, capsys, "--deep")
    assert [(each["table"], each["row"]) for each in found["damages"]] == [("events", "offset 2"), ("spends", "2:0")]
    repaired(path)
    assert answer(path, capsys, "--deep")[0] == 0


@pytest.mark.slow
async def test_the_rows_outside_a_damaged_page_are_saved(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with open_log(path) as log:
        epoch = log.epoch
        stored = await log.append([alert_draft(n, addresses=30) for n in range(1, 301)])
    pages = len(read(path)) // 4096
    by_offset = {event.offset: event for event in stored}
    whole = read(path)
    saved = 0
    for page in random.Random(7).sample(range(2, pages), 12):
        write(path, whole[: page * 4096] + os.urandom(4096) + whole[(page + 1) * 4096 :])
        if answer(path, capsys, "--deep")[0] == 0:
            continue  # a free page, or one that holds nothing yet
        done = repair(path, now=REPAIRED_AT + page, progress=ignore)
        assert done.aside is not None
        async with open_log(path) as log:
            events = await log.between(0, log.head, 1_000)
            assert events == [by_offset[event.offset] for event in events]
            assert (log.head, log.epoch) == (300, epoch) or done.is_renewed
            saved += len(events)
            assert [event.offset for event in await log.append([alert_draft(999)])] == [301]
        assert answer(path, capsys, "--deep")[0] == 0
    assert saved > 12 * 200


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
async def test_flipped_bits_are_found_and_repaired_or_the_file_is_refused(
    path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is flipped: no event is ever wrong, and what a repair leaves is whole."""
    async with open_log(path) as log:
        stored = await log.append(
            [alert_draft(n, at=NOW + n) for n in range(1, 61)] + [update_draft(n) for n in range(1, 31)]
        )
        await log.write(notes.put_scan, scan(800_000, NOW))
    by_offset = {event.offset: event for event in stored}
    draw = random.Random(seed)
    data = bytearray(read(path))
    for _ in range(3):
        data[draw.randrange(100, len(data))] ^= 1 << draw.randrange(8)
    write(path, bytes(data))
    try:
        async with open_log(path) as log:
            for event in await log.between(0, log.head, 1_000):
                assert event == by_offset[event.offset]
    except EventLogError as error:
        assert error.reason is LogFailure.CORRUPT  # noqa: PT017 - either way is right
    if main(["repair", "--db-path", str(path)]) != 0:
        assert "its first page is damaged" in capsys.readouterr().err
        return
    async with open_log(path) as log:
        for event in await log.between(0, log.head, 1_000):
            assert event == by_offset[event.offset]
    assert answer(path, capsys, "--deep")[0] == 0


async def test_check_and_dry_run_work_while_a_daemon_runs_and_repair_refuses(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await filled(path)
    edit(path, "UPDATE events SET ref = 'x' WHERE offset = 2")
    async with open_log(path) as log:
        await log.append([alert_draft(8)])
        with locked(path):  # nor do they wait for a writer
            assert answer(path, capsys, "--deep")[1]["head"] == 7
            assert main(["repair", "--dry-run", "--db-path", str(path)]) == 1
        assert "would be removed: 1 row" in capsys.readouterr().out
        assert main(["repair", "--db-path", str(path)]) == 1
        assert (
            f"whaled runs (process {os.getpid()}) and has this event log open. Stop it first" in capsys.readouterr().err
        )
        await log.append([alert_draft(9)])
    assert ASIDE not in names(path)


def test_without_a_log_check_and_repair_report_that(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("check", "repair"):
        assert main([command, "--db-path", str(path)]) == 78
        assert "no such file" in capsys.readouterr().err
    path.write_text("gateway:\n  port: 8765\n")
    for command in ("check", "repair"):
        assert main([command, "--db-path", str(path)]) == 78
        assert "this is not an event log" in capsys.readouterr().err


async def test_the_shallow_check_finds_missing_events(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await filled(path)
    assert answer(path, capsys)[0] == 0
    edit(path, "DELETE FROM events WHERE offset IN (2, 3, 6)")
    status, found = answer(path, capsys)
    assert (status, found["damaged_rows"], found["rows_read"]) == (1, 3, 0)
    assert [each["row"] for each in found["damages"]] == ["offsets 2 to 3", "offset 6"]


async def test_commands_that_read_the_log_leave_damaged_rows_out_and_report_them(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await filled(path)
    edit(path, "UPDATE whales SET alert = '{' WHERE id = 1", "UPDATE blocks SET seen = 5 WHERE height = 800000")
    assert main(["accuracy", "--json", "--db-path", str(path)]) == 0
    assert "1 damaged row skipped, the first: offset 5" in capsys.readouterr().err
    assert main(["coverage", "--json", "--db-path", str(path)]) == 0
    shown = capsys.readouterr()
    assert [json.loads(line)["height"] for line in shown.out.splitlines()] == [800_001]
    assert "height 800000" in shown.err


def test_a_gap_is_no_damage() -> None:
    damage = of_events(5, 20, "x")
    assert [(each.first, each.through) for each in outside(damage, [(1, 3), (7, 8), (10, 12), (20, 30)])] == [
        (5, 6), (9, 9), (13, 19),
    ]  # fmt: skip
    assert outside(damage, [(1, 40)]) == []
    assert outside(damage, []) == [damage]


KILLED = """
import os, signal, sys
from pathlib import Path
from whaled.eventlog import repair
calls = 0
def count(frame, event, arg):
    global calls
    if event in ("call", "c_call") and "eventlog" in frame.f_code.co_filename:
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
sys.setprofile(count)
repair.repair(Path(sys.argv[1]), now=1.0, progress=lambda done, of_all: None)
print(calls)
"""


@pytest.mark.slow
@pytest.mark.long
async def test_a_repair_that_is_killed_at_any_moment_leaves_a_log(path: Path, tmp_path: Path) -> None:
    epoch = await filled(path)
    edit(path, "UPDATE events SET ref = 'x' WHERE offset = 2")
    whole = read(path)

    async def run(file: Path, calls: int) -> tuple[int, bytes]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", KILLED, str(file), str(calls), stdout=subprocess.PIPE
        )
        out, _ = await process.communicate()
        return process.returncode or 0, out

    status, out = await run(path, -1)
    assert status == 0
    total = int(out)
    # Every moment of the end, where files change their names, and some before.
    moments = [*range(1, total - 120, max(1, total // 12)), *range(total - 120, total, 6)]
    for moment in moments:
        directory = tmp_path / str(moment)
        directory.mkdir()
        file = directory / "whaled.db"
        file.write_bytes(whole)
        assert (await run(file, moment))[0] == -9
        async with open_log(file) as log:
            assert (log.epoch, log.head, await stored_offsets(log)) == (epoch, 6, [1, 3, 4, 5, 6])
        repair(file, now=2.0, progress=ignore)
        async with open_log(file) as log:
            assert (log.epoch, await stored_offsets(log)) == (epoch, [1, 3, 4, 5, 6])
