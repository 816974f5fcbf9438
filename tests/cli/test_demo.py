"""`whaled run --simulate`: each world has an event log of its own, and nothing else is put at risk by it."""

from pathlib import Path

import pytest

from kit import daemon
from kit.gateway import ask, receive_type
from kit.whales import alert_draft
from whaled.bookmarks import SIMULATED_WORLD
from whaled.cli.demo import begin_log, with_owners
from whaled.config.sections import Config, DetectionSettings, EventLogSettings
from whaled.errors import OperatorError
from whaled.eventlog.meters import EventLogMeter
from whaled.eventlog.store import EventLog
from whaled.registry import Registry
from whaled.reloading import Boot
from whaled.simulator.owners import BOOKS
from whaled.simulator.scripts import Network


def settings(directory: Path) -> EventLogSettings:
    return EventLogSettings(path=str(directory / "whaled.db"))


async def test_a_new_world_begins_a_new_log_in_the_place_of_the_one_before(tmp_path: Path) -> None:
    await begin_log(settings(tmp_path), "1")
    async with EventLog.open(settings(tmp_path), EventLogMeter(Registry())) as first:
        await first.append([alert_draft(1)])
    await begin_log(settings(tmp_path), "2")
    async with EventLog.open(settings(tmp_path), EventLogMeter(Registry())) as second:
        assert (second.head, await second.recall(SIMULATED_WORLD)) == (0, "2")
        assert second.epoch != first.epoch


async def test_a_log_of_a_real_backend_is_not_touched(tmp_path: Path) -> None:
    async with EventLog.open(settings(tmp_path), EventLogMeter(Registry())) as real:
        await real.append([alert_draft(1)])
    with pytest.raises(OperatorError) as caught:
        await begin_log(settings(tmp_path), "1")
    assert str(caught.value) == (
        f"{tmp_path}/whaled.db: this event log holds events from another backend; --simulate starts a new world, which "
        "needs a separate log: name a file that does not exist yet with --db-path"
    )
    async with EventLog.open(settings(tmp_path), EventLogMeter(Registry())) as real:
        assert (real.head, await real.recall(SIMULATED_WORLD)) == (1, None)


async def test_a_log_that_another_whaled_uses_is_not_removed(tmp_path: Path) -> None:
    await begin_log(settings(tmp_path), "1")
    async with EventLog.open(settings(tmp_path), EventLogMeter(Registry())):
        with pytest.raises(Exception, match="another whaled"):
            await begin_log(settings(tmp_path), "2")
    assert (tmp_path / "whaled.db").exists()


def test_the_owners_of_the_world_are_known_unless_the_operator_has_a_book() -> None:
    assert with_owners(Boot(Config(), None)).config.detection.address_book == str(BOOKS[Network.MAINNET])
    mine = Boot(Config(detection=DetectionSettings(address_book="mine.csv")), None)
    assert with_owners(mine) == mine


@pytest.mark.slow
async def test_the_daemon_of_a_real_backend_imports_nothing_of_the_simulator(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    async with daemon.running(config, env={"PYTHONPROFILEIMPORTTIME": "1"}) as process:
        process.process.terminate()
        assert await process.ended() == 0
        await process.heard_all()
    imported = {line.rpartition("|")[2].strip() for line in process.raw if line.startswith("import time:")}
    assert "whaled.service" in imported
    assert {
        name for name in imported if name.split(".")[:2] in (["whaled", "simulator"], ["whaled", "client"])
    } == set()


@pytest.mark.slow
@pytest.mark.long
async def test_a_restarted_demo_has_no_events_of_the_previous_world(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    async with daemon.running(config, "--simulate") as first, first.connect() as client:
        alert = await receive_type(client, "whale_alert")
        first.process.terminate()
        assert await first.ended() == 0
    async with daemon.running(config, "--simulate") as second, second.connect() as client:
        assert (await second.logged("simulator_log_removed"))["events"] > 0
        await ask(client, type="subscribe", since=alert["position"])
        subscribed = await receive_type(client, "subscribed")
        assert subscribed["recovered"] is False
        assert subscribed["position"]["epoch"] != alert["position"]["epoch"]
        await second.logged("whale_detected")
        assert [line for line in second.lines if line["event"] == "whale_updated" and line["status"] == "pending"] == []
