"""Descriptors: how many connections fit below the limit, and a daemon that has none left goes on."""

import asyncio
import resource
import signal
from pathlib import Path

import pytest
import yaml

from kit import daemon
from kit.daemon import busy_simulator, get
from kit.gateway import receive_type
from whaled.errors import DescriptorsError, ExitStatus
from whaled.gateway.listener import Reserve
from whaled.ops import descriptors


@pytest.mark.parametrize(
    ("soft", "hard", "possible", "raised_to"),
    [
        (1024, 65536, 10_000, 10_000 + 272 + descriptors.OWN),
        (65536, 65536, 10_000, None),
        (1024, 1024, 1024 - 272 - descriptors.OWN, None),
        (100, 100, 1, None),
        (1024, resource.RLIM_INFINITY, 10_000, 10_000 + 272 + descriptors.OWN),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 10_000, None),
    ],
)
def test_connections_are_as_many_as_fit_below_the_limit(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, possible: int, raised_to: int | None
) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: set_to.append(pair))
    assert descriptors.connections_possible(10_000, beside=272) == possible
    assert set_to == ([] if raised_to is None else [(raised_to, hard)])


@pytest.mark.parametrize("hard", [272 + descriptors.OWN + 1, 65536, resource.RLIM_INFINITY])
def test_one_client_more_than_whaled_needs_itself_is_enough_to_start(
    monkeypatch: pytest.MonkeyPatch, hard: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, hard))
    descriptors.check(beside=272)


def test_a_limit_that_leaves_no_descriptor_for_clients_is_the_operators_to_raise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 272 + descriptors.OWN))
    with pytest.raises(DescriptorsError, match="is 400, and 401 are needed for a single client: raise LimitNOFILE="):
        descriptors.check(beside=272)


def limited(descriptors_: int) -> tuple[str, ...]:
    """A launcher that leaves a command with so many descriptors."""
    return ("sh", "-c", f'ulimit -n {descriptors_} && exec "$@"', "sh")


@pytest.mark.slow
async def test_a_start_without_descriptors_for_clients_is_refused(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1/")
    async with daemon.starting(config, launcher=limited(464)) as whaled:
        assert await whaled.ended() == ExitStatus.CONFIG
        await whaled.heard_all()
    assert "limit of file descriptors is 464, and 465 are needed for a single client" in whaled.raw[-1]


@pytest.mark.slow
async def test_a_start_with_few_descriptors_logs_how_many_clients_they_allow(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1/")
    async with daemon.running(config, launcher=limited(470)) as whaled:
        (line,) = [line for line in whaled.lines if "connections_possible" in line]
        assert (line["level"], line["connections_possible"], line["needed"]) == ("error", 6, 10_464)
        assert "\nwhaled_connections_limit 6.0\n" in await get(whaled.http + "/metrics")


@pytest.mark.slow
async def test_without_descriptors_clients_wait_in_the_kernel_and_those_connected_go_on(tmp_path: Path) -> None:
    async with busy_simulator() as simulator:
        config = daemon.write_config(
            tmp_path, simulator.url, canary={"interval": "200ms"}, eventlog={"prune_interval": "100ms"}
        )
        async with daemon.running(config) as whaled, whaled.connect(max_queue=None) as client:
            await receive_type(client, "whale_alert")
            pid = whaled.process.pid
            soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (max_descriptor(pid) + 1, hard))
            newcomers = [asyncio.create_task(connected(whaled)) for _ in range(3 * Reserve.SIZE)]
            line = await whaled.logged("accept_paused")
            assert line["level"] == "error"
            for _ in range(40):  # alerts go on, and with them everything that opens files now and then
                await receive_type(client, "whale_alert")
            settings = yaml.safe_load(config.read_text())
            settings["gateway"]["max_unsent"] = "128KiB"
            config.write_text(yaml.safe_dump(settings))
            whaled.signal(signal.SIGHUP)
            await whaled.logged("reload_finished")
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
            async with asyncio.timeout(20):
                assert await asyncio.gather(*newcomers) == ["welcome"] * len(newcomers)
            again = await whaled.logged("accept_resumed")
            assert again["level"] == "warning"
            assert again["after_s"] > 0
            assert whaled.lines.index(again) > whaled.lines.index(line)
            metrics = await get(whaled.http + "/metrics")
            assert "\nwhaled_accepts_failed_total 0.0\n" not in metrics
            lines = [each for each in whaled.lines if each["event"] == line["event"]]
            assert len(lines) <= 3
            whaled.signal(signal.SIGTERM)
            assert await whaled.ended() == 0
            assert not [text for text in whaled.raw if "Traceback" in text]


async def connected(whaled: daemon.Daemon) -> str:
    """The type of the first message of a client that may have to wait."""
    async with whaled.connect(open_timeout=60) as client:
        await receive_type(client, "welcome")
        return "welcome"


def max_descriptor(pid: int) -> int:
    """The highest descriptor open."""
    return max(int(each.name) for each in Path(f"/proc/{pid}/fd").iterdir())
