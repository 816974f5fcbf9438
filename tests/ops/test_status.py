"""The status line that `systemctl status` shows."""

from msgspec.structs import replace

from kit.whales import whale
from whaled.model import UpstreamState
from whaled.ops.status import Status
from whaled.whales.owners import Owners

NEW = Status(
    upstream=UpstreamState.CONNECTED,
    shortfall=None,
    clients=0,
    last_whale=None,
    head=0,
    addresses=("127.0.0.1:8765", "[::1]:8765"),
    owners=Owners(),
    is_short_of_memory=False,
)


def test_a_new_daemon_names_its_backend_clients_and_addresses() -> None:
    assert NEW.line() == (
        "upstream connected; 0 clients; last whale none yet; offset 0; clients connect to 127.0.0.1:8765, [::1]:8765"
    )


def test_the_last_whale_has_its_time_and_value() -> None:
    alert = replace(whale(1).alert, value_sat=12_345_000_000)
    assert (
        "; last whale 2025-01-01T00:00:00Z 123.45 BTC; offset 7; "
        in replace(NEW, last_whale=(alert, 1735689600.0), head=7).line()
    )
    assert "; last whale none in the log; offset 7; " in replace(NEW, head=7).line()


def test_a_shortfall_and_short_memory_are_in_the_line() -> None:
    line = replace(NEW, upstream=UpstreamState.DEGRADED, shortfall="no blocks", is_short_of_memory=True).line()
    assert line.startswith("upstream degraded (no blocks); ")
    assert line.endswith("; memory short, shedding load")
