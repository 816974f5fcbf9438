"""`whaled coverage`, over a log that a daemon has written."""

import json
from pathlib import Path

import pytest

from kit.whales import alert_draft
from whaled.cli.main import main
from whaled.config.sections import EventLogSettings
from whaled.eventlog.meters import EventLogMeter
from whaled.eventlog.store import EventLog
from whaled.model import Scan
from whaled.registry import Registry


def scan(height: int, **found: int) -> Scan:
    counts = {"seen": 0, "late": 0, "missed_down": 0, "missed_gap": 0, "missed_never_relayed": 0} | found
    return Scan(
        height=height, hash=f"{height:064x}", mined_at=1_795_400_000.0 + height, scanned_at=1_795_400_001.0,
        lead_s=321.4 if counts["seen"] else None, **counts,
    )  # fmt: skip


async def written(path: Path, *scans: Scan) -> None:
    async with EventLog.open(EventLogSettings(path=str(path)), EventLogMeter(Registry())) as log:
        await log.append([alert_draft(1)])
        for each in scans:
            await log.put_scan(each)


async def test_blocks_are_listed_newest_first_with_why_whales_were_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.db"
    await written(
        path, scan(10, seen=3, missed_down=1), scan(11, late=1, missed_gap=2, missed_never_relayed=4), scan(12)
    )
    capsys.readouterr()
    assert main(["coverage", "--db-path", str(path), "--json", "--blocks", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["height"] for row in rows] == [12, 11]
    assert (rows[1]["late"], rows[1]["missed_gap"], rows[1]["missed_never_relayed"]) == (1, 2, 4)
    assert main(["coverage", "--db-path", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "3 blocks, 11 whales, 3 known before their block (27.3%)" in shown.replace("\n", " ")
    assert "321 s" in shown


async def test_blocks_that_were_not_scanned_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w.db"
    await written(path, scan(10, seen=1), scan(11), scan(21))
    capsys.readouterr()
    assert main(["coverage", "--db-path", str(path)]) == 0
    shown = capsys.readouterr().out
    places = [shown.index(part) for part in ("21 ", "9 not scanned", "11 ", "10 ")]
    assert places == sorted(places)
    assert "3 blocks, 1 whale, 1 known before their block (100.0%); 9 not scanned since block 10" in " ".join(
        shown.split()
    )
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["coverage", "--db-path", str(path), "--blocks", "1"]) == 0
    assert "9 not scanned since block 10" in " ".join(capsys.readouterr().out.split())


async def test_without_a_scan_the_command_reports_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await written(tmp_path / "w.db")
    assert main(["coverage", "--db-path", str(tmp_path / "w.db")]) == 0
    assert "no block scanned yet" in capsys.readouterr().out


def test_a_log_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coverage", "--db-path", str(tmp_path / "none.db")]) == 78
    assert "none.db" in capsys.readouterr().err
    assert not (tmp_path / "none.db").exists()


def test_a_file_that_is_not_an_event_log_is_left_alone_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("# not a database\n")
    assert main(["coverage", "--db-path", str(tmp_path / "README.md")]) == 78
    assert "README.md: this is not an event log" in capsys.readouterr().err


@pytest.mark.parametrize("blocks", ["0", "-3", "9" * 30])
async def test_a_number_of_blocks_that_cannot_be_is_refused(tmp_path: Path, blocks: str) -> None:
    await written(tmp_path / "w.db")
    assert main(["coverage", "--db-path", str(tmp_path / "w.db"), f"--blocks={blocks}"]) == 78
