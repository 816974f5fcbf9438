"""`whaled accuracy`: how the predictions of a log turned out."""

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from kit.whales import NOW, alert_draft, confirmed_draft, whale
from whaled.cli.main import main
from whaled.config.sections import EventLogSettings
from whaled.eventlog.meters import EventLogMeter
from whaled.eventlog.store import EventLog
from whaled.model import Block, Draft, Status, Whale
from whaled.registry import Registry
from whaled.whales import lifecycle


def predicted(number: int, urgency: float | None, height: int | None, status: Status = Status.PENDING) -> Whale:
    known = whale(number)
    return replace(
        known,
        alert=replace(
            known.alert, urgency_score=urgency, predicted_confirmation_block=height, status=status,
            detection_timestamp="2027-01-15T08:00:00.000000+00:00",
        ),
    )  # fmt: skip


def mined(known: Whale, height: int, waited_s: float) -> list[Draft]:
    block = Block(height=height, hash=f"{height:064x}", previous_hash=None, timestamp=int(NOW))
    return [lifecycle.alerted(known, NOW), lifecycle.confirmed(known, block, NOW + waited_s)]


async def written(path: Path) -> None:
    undone = predicted(4, 0.97, 100)
    async with EventLog.open(EventLogSettings(path=str(path)), EventLogMeter(Registry())) as log:
        await log.append(
            [
                *mined(predicted(1, 0.97, 100), 100, 60),
                *mined(predicted(2, 0.97, 100), 101, 700),
                *mined(predicted(3, None, None), 100, 61),
                *mined(undone, 100, 60),
                lifecycle.pending_again(undone, f"{100:064x}", NOW + 90),
                *mined(predicted(5, 0.97, None, Status.CONFIRMED), 100, 60),
                alert_draft(6),
            ]
        )


async def test_confirmed_whales_alerted_before_their_block_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.db"
    await written(path)
    capsys.readouterr()
    assert main(["accuracy", "--db-path", str(path), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["urgency"], row["whales"], row["on_time"], row["late"]) for row in rows] == [
        (0.95, 2, 1, 1),
        (None, 1, 0, 0),
    ]
    assert rows[0]["wait_median_s"] == 60.0
    assert main(["accuracy", "--db-path", str(path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in shown[1:]] == [
        "0.95 - 1.00 2 2 50% 0% 50% 0 .. +1 1 min 11 min",
        "unknown 1 0 1 min 1 min",
        "all 3 2 50% 0% 50% 0 .. +1 1 min 11 min",
    ]
    assert max(map(len, shown)) <= 80


async def test_whales_older_than_the_requested_time_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.db"
    async with EventLog.open(EventLogSettings(path=str(path)), EventLogMeter(Registry())) as log:
        await log.append([alert_draft(1, at=1.0), confirmed_draft(1, at=2.0)])
    capsys.readouterr()
    assert main(["accuracy", "--db-path", str(path), "--last", "7d"]) == 0
    assert "no whale" in capsys.readouterr().out
    assert main(["accuracy", "--db-path", str(path)]) == 0
    assert "all" in capsys.readouterr().out


def test_a_time_without_a_unit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["accuracy", "--last", "7"])
    assert "found '7', expected a duration with its unit" in capsys.readouterr().err


def test_an_empty_file_is_reported_as_without_whales(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.db").touch()
    assert main(["accuracy", "--db-path", str(tmp_path / "w.db")]) == 0
    assert "no whale" in capsys.readouterr().out


def test_a_log_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accuracy", "--db-path", str(tmp_path / "none.db")]) == 78
    assert "none.db" in capsys.readouterr().err
