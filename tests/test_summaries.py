import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs
from websockets.exceptions import ConnectionClosed

from kit import daemon
from kit.clocks import SetClock
from kit.gateway import silent_client
from whaled.auth.keys import generate
from whaled.summaries import MAX_SOURCES, PERIOD_S, Summary


def summary(clock: SetClock, **bounds: Any) -> Summary:
    return Summary(structlog.get_logger(), "knocked", clock=clock, **{"per_source": 2, "in_all": 3, **bounds})


def test_the_first_lines_pass_and_one_counts_the_others() -> None:
    clock = SetClock()
    lines = summary(clock)
    with capture_logs() as logged:
        for source in ("a", "a", "a", "b", "c", "c", "c"):
            lines.line(source, address=source)
        clock.now += PERIOD_S
        lines.line("a", address="a")
    assert [line.get("address") for line in logged] == ["a", "a", "b", None, "a"]
    count = logged[3]
    assert (count["event"], count["of"], count["log_level"]) == ("log_lines_suppressed", "knocked", "info")
    assert (count["lines"], count["sources"], count["busiest"], count["busiest_lines"]) == (4, 2, "c", 3)
    assert count["seconds"] == PERIOD_S


def test_a_quiet_period_has_no_count_and_a_clock_that_steps_back_ends_one() -> None:
    clock = SetClock()
    lines = summary(clock)
    with capture_logs() as logged:
        for step in (0, 5, 5, -3600):
            clock.now += step
            lines.line("a")
        lines.flush()
    assert [line["event"] for line in logged] == ["knocked"] * 4


def test_a_million_sources_are_counted_in_bounded_memory() -> None:
    lines = summary(SetClock())
    with capture_logs() as logged:
        for number in range(MAX_SOURCES * 3):
            lines.line(f"10.0.{number // 256}.{number % 256}")
        lines.flush()
    assert logged[-1]["sources"] == MAX_SOURCES
    assert logged[-1]["lines"] == MAX_SOURCES * 3 - 3


def test_the_count_of_tracebacks_has_no_traceback() -> None:
    lines = summary(SetClock(), level="exception", in_all=1)
    with capture_logs() as logged:
        for _ in range(3):
            try:
                raise KeyError("x")
            except KeyError:
                lines.line("a")
        lines.flush()
    assert [line["log_level"] for line in logged] == ["error", "error"]
    assert logged[0]["exc_info"] is True
    assert "exc_info" not in logged[1]


async def test_the_count_comes_without_another_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whaled.summaries.PERIOD_S", 0.05)
    lines = Summary(structlog.get_logger(), "knocked", per_source=1, in_all=1)
    with capture_logs() as logged:
        lines.line("a")
        lines.line("a")
        async with asyncio.timeout(10):
            while len(logged) < 2:  # noqa: ASYNC110 - a log line is no event
                await asyncio.sleep(0.01)
    assert logged[1]["lines"] == 1


@pytest.mark.slow
@pytest.mark.long
async def test_refused_clients_cannot_flood_the_log(tmp_path: Path) -> None:
    ring = tmp_path / "keys.json"
    generate(ring, 1.0)
    config = daemon.write_config(
        tmp_path, "ws://127.0.0.1:1", auth={"enabled": True, "key_ring": str(ring), "failure_burst": 100_000}
    )
    async with daemon.running(config) as whaled:
        before = len(whaled.lines)
        for _ in range(300):
            async with whaled.connect() as client:
                await client.send(json.dumps({"type": "auth", "token": "x"}))
                with contextlib.suppress(ConnectionClosed):
                    await client.recv()
                    client.transport.abort()
        count = await whaled.logged("log_lines_suppressed", of="authentication_refused")
        lines = [line for line in whaled.lines[before:] if line["logger"].startswith("whaled.gateway")]
        assert len(lines) < 30
        assert count["busiest"] == "127.0.0.1"
        seen = sum(line["event"] == "authentication_refused" for line in lines)
        left_out = sum(line["lines"] for line in lines if line.get("of") == "authentication_refused")
        assert seen + left_out <= 300
        assert left_out > 200


@pytest.mark.slow
@pytest.mark.long
async def test_a_client_that_reconnects_continuously_cannot_flood_the_log(tmp_path: Path) -> None:
    config = daemon.write_config(tmp_path, "ws://127.0.0.1:1")
    async with daemon.running(config) as whaled:
        for _ in range(200):
            silent_client(whaled.url).close()
        await whaled.logged("log_lines_suppressed", of="client_disconnected")
        assert sum(line["event"].startswith("client_") for line in whaled.lines) < 30
