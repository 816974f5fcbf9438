"""The status line that `systemctl status` shows."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from msgspec import Struct

from whaled.model import SAT_PER_BTC, Alert, UpstreamState
from whaled.ops.systemd import Notifier
from whaled.whales.owners import Owners, summary

# The interval of the status line. People read it, so systemd need not be woken more often.
STATUS_S = 1.0


class Status(Struct, frozen=True):
    """The state of the daemon.

    `shortfall` is what the backend cannot give; `last_whale` is an alert and its time (Unix seconds).
    """

    upstream: UpstreamState
    shortfall: str | None
    clients: int
    last_whale: tuple[Alert, float] | None
    head: int
    addresses: Sequence[str]
    owners: Owners
    is_short_of_memory: bool

    def line(self) -> str:
        """Return the status in one line."""
        whale = "none yet" if self.head == 0 else "none in the log"
        if self.last_whale is not None:
            alert, at = self.last_whale
            when = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            whale = f"{when} {alert.value_sat / SAT_PER_BTC:.2f} BTC"
        parts = [
            f"upstream {self.upstream.value}" + (f" ({self.shortfall})" if self.shortfall is not None else ""),
            f"{self.clients} clients",
            f"last whale {whale}",
            f"offset {self.head}",
            f"clients connect to {', '.join(self.addresses)}",
        ]
        if self.owners:
            parts.append(f"address book: {summary(self.owners)}")
        if self.is_short_of_memory:
            parts.append("memory short, shedding load")
        return "; ".join(parts)


async def report_status(notifier: Notifier, text: Callable[[], str]) -> None:
    """Keep the status line of `systemctl status` current until cancelled."""
    while True:
        notifier.status(text())
        await asyncio.sleep(STATUS_S)
