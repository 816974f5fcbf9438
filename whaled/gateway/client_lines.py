"""The gateway's log lines about clients. Clients can cause any of them at will, so each kind is rate limited."""

import asyncio
from collections import Counter
from typing import Self

import structlog

from whaled.summaries import MAX_SOURCES, PERIOD_S, Summary

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Lines per ten seconds, in total and per source. Unauthenticated connections get few, since metrics count them and
# their lines would hide important ones.
STRANGERS = 5
STRANGER = 2
# After a restart all clients reconnect at once: these lines suffice to see which ones, without a line for each of
# 10,000.
CLIENTS = 100
CLIENT = 5


class ClientLines:
    """The log lines about clients. On exit from the context, the counts of suppressed lines are logged."""

    def __init__(self) -> None:
        self._refused = Summary(logger, "authentication_refused", per_source=STRANGER, in_all=STRANGERS)
        self._origin = Summary(
            logger,
            "origin_refused",
            per_source=STRANGER,
            in_all=STRANGERS,
        )
        self._proxy = Summary(logger, "proxy_header_refused", level="warning", per_source=STRANGER, in_all=STRANGERS)
        self._connected = Summary(logger, "client_connected", per_source=CLIENT, in_all=CLIENTS)
        self._left = Summary(logger, "client_disconnected", per_source=CLIENT, in_all=CLIENTS)
        self._stranger_left = Summary(logger, "client_disconnected", per_source=STRANGER, in_all=STRANGERS)
        self._shed = Summary(logger, "client_shed", per_source=CLIENT, in_all=CLIENTS)
        self._failed = Summary(logger, "client_failed", level="exception", per_source=1, in_all=STRANGERS)
        # Connections that did not become a session since the last line about them, by reason and by network.
        self._turned_away: Counter[str] = Counter()
        self._networks: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0)  # connections that were just aborted report it in the next iteration of the loop
        self.flush()

    def refused(self, address: str, reason: str, client_id: str | None) -> None:
        """Log a refused credential. `client_id` is known if the credential was once valid.

        Lines are limited per `client_id` if possible, since clients behind a proxy share an address.
        """
        self._refused.line(client_id or address, address=address, reason=reason, client_id=client_id)

    def turned_away(self, reason: str, network: str) -> None:
        """Count a connection that did not become a session. One line with the counts is logged every ten seconds."""
        self._turned_away[reason] += 1
        if network in self._networks or len(self._networks) < MAX_SOURCES:
            self._networks[network] += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._count_turned_away)

    def _count_turned_away(self) -> None:
        if self._timer is None:
            return
        self._timer.cancel()
        self._timer = None
        (busiest, of_busiest), *_ = self._networks.most_common(1)
        logger.info("connections_refused", **self._turned_away, busiest=busiest, of_busiest=of_busiest)
        self._turned_away.clear()
        self._networks.clear()

    def origin_refused(self, address: str, origin: str) -> None:
        """Log a connection attempt by a page whose origin is not allowed."""
        self._origin.line(address, address=address, origin=origin)

    def proxy_failed(self, address: str, problem: str) -> None:
        """Log a header of a trusted proxy that cannot be read, or is missing."""
        self._proxy.line(address, address=address, problem=problem)

    def connected(self, address: str, client_id: str | None) -> None:
        """Log a client that is admitted: it has authenticated, or need not."""
        self._connected.line(client_id or address, address=address, client_id=client_id)

    def left(self, address: str, client_id: str | None, *, was_ready: bool, code: int, seconds: float) -> None:
        """Log the end of a session. `was_ready` is True if the client had been admitted."""
        lines = self._left if was_ready else self._stranger_left
        lines.line(client_id or address, address=address, client_id=client_id, code=code, seconds=seconds)

    def shed(self, address: str, unsent_bytes: int) -> None:
        """Log a session that is closed to save memory."""
        self._shed.line(address, address=address, unsent_bytes=unsent_bytes)

    def failed(self, address: str) -> None:
        """Log the exception being handled, a bug met while serving a client."""
        self._failed.line(address, address=address)

    def flush(self) -> None:
        """Log the counts of the lines suppressed up to now."""
        for summary in (
            self._refused, self._origin, self._proxy, self._connected, self._left, self._stranger_left, self._shed,
            self._failed,
        ):  # fmt: skip
            summary.flush()
        self._count_turned_away()
