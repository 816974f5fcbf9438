from pathlib import Path

import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from kit.gateway import running_gateway
from kit.paths import ROOT
from kit.whales import whale
from whaled.errors import TokenRefusal
from whaled.gateway.messages import AuthMessage
from whaled.metrics import Metrics
from whaled.model import Flow, UpstreamState

DOCS = ROOT / "docs" / "metrics.md"


def families(metrics: Metrics) -> dict[str, str]:
    """Name (with `_total` on counters) and type of everything exported."""
    return {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in text_string_to_metric_families(metrics.render().decode())
    }


def test_every_metric_is_documented_with_its_type() -> None:
    text = DOCS.read_text()
    missing = [name for name, kind in families(Metrics()).items() if f"| `{name}` | {kind} |" not in text]
    assert not missing


def test_names_follow_the_conventions() -> None:
    for name, kind in families(Metrics()).items():
        assert name.startswith(("whaled_", "process_")), name
        assert not name.endswith(("_ms", "_milliseconds", "_count", "_minutes")), name
        assert kind != "unknown", name


def test_every_child_of_an_enum_label_exists_from_the_start() -> None:
    registry = Metrics().registry.collectors
    assert registry.get_sample_value("whaled_connections_closed_total", {"code": "1008"}) == 0
    assert registry.get_sample_value("whaled_errors_total", {"component": "eventlog"}) == 0
    for refusal in TokenRefusal:
        assert registry.get_sample_value("whaled_authentications_total", {"outcome": refusal}) == 0


def test_amounts_are_summed_by_flow() -> None:
    metrics = Metrics()
    for flow, sat in ((Flow.INFLOW, 150_000_000), (Flow.INFLOW, 1), (Flow.UNKNOWN, None)):
        metrics.detection.whale(replace(whale(1).alert, flow_type=flow, flow_sat=sat), 1.0)
    for name, btc in (("inflow", 1.50000001), ("outflow", 0), ("internal", 0), ("unknown", None)):
        assert metrics.registry.collectors.get_sample_value("whaled_whale_flow_btc_total", {"flow": name}) == btc


@pytest.mark.parametrize("code", [1000, 4999])
def test_a_close_code_from_outside_makes_no_new_label(code: int) -> None:
    metrics = Metrics()
    before = len(list(metrics.registry.collectors.collect()))
    metrics.gateway.closed(code)
    label = str(code) if code == 1000 else "other"
    assert metrics.registry.collectors.get_sample_value("whaled_connections_closed_total", {"code": label}) == 1
    assert len(list(metrics.registry.collectors.collect())) == before


def test_authentication_failures_are_counted_by_reason() -> None:
    metrics = Metrics()
    metrics.gateway.authenticated(TokenRefusal.EXPIRED)
    metrics.gateway.authenticated(AuthMessage.TIMEOUT)
    value = metrics.registry.collectors.get_sample_value
    assert value("whaled_authentications_total", {"outcome": "expired"}) == 1
    assert value("whaled_authentications_total", {"outcome": "timeout"}) == 1


def test_the_upstream_is_in_exactly_one_state() -> None:
    metrics = Metrics()
    metrics.feed.state(UpstreamState.DEGRADED)
    states = {
        state: metrics.registry.collectors.get_sample_value("whaled_upstream_state", {"state": state})
        for state in UpstreamState
    }
    assert states == {UpstreamState.DEGRADED: 1, UpstreamState.CONNECTED: 0, UpstreamState.DISCONNECTED: 0}


async def test_deliveries_are_counted_for_all_clients_together(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, rig.connect() as one, rig.connect() as two:
        for client in (one, two):
            await client.recv()
            await client.recv()
        await rig.alerts(1, 2, 3)
        assert rig.value("whaled_messages_sent_total", type="whale_alert") == 6
        assert rig.value("whaled_messages_sent_total", type="whale_update") == 0
        assert rig.value("whaled_messages_sent_total", type="control") == 4  # two welcomes, two times `status`
        assert rig.value("whaled_events_published_total") == 3
        assert rig.value("whaled_alerts_published_total") == 3
        assert rig.value("whaled_eventlog_events_total") == 3
