"""Every expression of every dashboard has data on a whaled at work, asked of a real Prometheus."""

import asyncio
import re
import signal
import ssl
from pathlib import Path
from typing import Any

import pytest

from grafana.dashboard_rules import DASHBOARDS, expressions, load
from grafana.scene import RATE_INTERVAL, Prometheus, acting
from kit import daemon
from kit.prometheus import needed
from whaled.simulator.settings import SimulatorSettings

pytestmark = [pytest.mark.slow, pytest.mark.long]

# All of it takes some 20 s: a restart and a reload must be apart by more than what a rate looks back.
LIMIT_S = 45
# What the traffic must have made of the counters, so that a line at 0 is not all that is asked for.
HAPPENED = (
    'whaled_authentications_total{outcome="success"}',
    'whaled_authentications_total{outcome="malformed"}',
    'whaled_authentications_total{outcome="unknown_key"}',
    'whaled_connections_closed_total{code="1008"}',
    'whaled_messages_rejected_total{code="rate_limited"}',
    'whaled_messages_received_total{type="invalid"}',
    'whaled_messages_sent_total{type="whale_alert"}',
    'whaled_replays_total{recovered="true"}',
    'whaled_replays_total{recovered="false"}',
    'whaled_whales_total{flow="inflow"}',
    'whaled_whales_total{flow="outflow"}',
    'whaled_whale_updates_total{kind="confirmed"}',
    'whaled_whale_updates_total{kind="replaced"}',
    'whaled_rest_requests_total{outcome="answered"}',
    'whaled_rest_requests_total{outcome="server_error"}',
    "whaled_upstream_parts_skipped_total",
    "sum(whaled_upstream_reconnects_total)",
    'whaled_errors_total{component="upstream"}',
    "whaled_canary_seconds_count",
)
BUSY = SimulatorSettings(seed=7, rate=60.0, whale_share=0.5, poll_interval=0.1, block_interval=2.0, port=0)


def filled_in(dashboard: Any, expression: str) -> str:
    """The expression as Grafana sends it, with everything chosen."""
    values = {one["name"]: one.get("allValue", "") for one in dashboard["templating"]["list"]}
    values |= {"__rate_interval": RATE_INTERVAL, "__range": f"{LIMIT_S}s"}
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], expression)


async def empty(ask: Prometheus, questions: dict[str, str]) -> dict[str, str]:
    """Those that have no point that is a number."""
    return {name: question for name, question in questions.items() if not await ask.has_data(question, LIMIT_S)}


async def test_no_panel_is_empty_on_a_whaled_at_work(
    tmp_path: Path, certificate: tuple[Path, Path, ssl.SSLContext]
) -> None:
    needed("prometheus")
    dashboards = [load(path) for path in DASHBOARDS]
    left = {
        f"{dashboard['title']}: {name}": filled_in(dashboard, expression)
        for dashboard in dashboards
        for name, expression in expressions(dashboard)
    }
    assert len(left) > 100
    left |= {f"did not happen: {series}": f"{series} > 0" for series in HAPPENED}
    restarted = f"changes(process_start_time_seconds[{RATE_INTERVAL}]) > 0"
    async with acting(tmp_path, certificate, BUSY) as (scene, ask):
        async with daemon.running(scene.config) as whaled:
            await ask.becomes("whaled_connections > 2")
            whaled.signal(signal.SIGTERM)
            assert await whaled.ended() == 0
        async with daemon.running(scene.config) as whaled:
            try:
                async with asyncio.timeout(LIMIT_S):
                    await ask.becomes(restarted)
                    await ask.becomes(restarted, there=False)
                    whaled.signal(signal.SIGHUP)
                    await whaled.logged("reload_finished")
                    while left:
                        left = await empty(ask, left)
            except TimeoutError:
                pytest.fail("no data:\n" + "\n".join(f"{name}: {question}" for name, question in left.items()))
            whaled.signal(signal.SIGTERM)
            assert await whaled.ended() == 0


async def test_expressions_without_data_or_with_a_parse_error_are_found(
    tmp_path: Path, certificate: tuple[Path, Path, ssl.SSLContext]
) -> None:
    needed("prometheus")
    async with acting(tmp_path, certificate, BUSY) as (_, ask):
        assert await empty(ask, {"nothing": "whaled_nothing", "not a number": "vector(0) / 0", "one": "vector(1)"}) == {
            "nothing": "whaled_nothing",
            "not a number": "vector(0) / 0",
        }
        with pytest.raises(ValueError, match="parse error"):
            await ask.has_data("sum(", 10)
