"""The acts of the admin API on a running daemon: look at it, close connections, reload."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

from msgspec import Struct

from whaled import __version__
from whaled.admin import views
from whaled.admin.calls import Call, CallError, Code, Route
from whaled.errors import Close
from whaled.eventlog.store import EventLog
from whaled.gateway.connection import Connection
from whaled.gateway.phase import Phase
from whaled.gateway.roster import KEEPALIVE_SLOTS
from whaled.gateway.server import Gateway
from whaled.ingest.committer import Committer
from whaled.ingest.intake import Intake
from whaled.ops.memory_watch import MemoryWatch

API = 1
# Connections on one page, and the most that a caller may ask for: 500 are 150 KB of JSON.
PAGE = 200
MOST_PAGE = 500
# Connections that are looked at or closed before the loop runs other work: 0.5 ms at 5 us to describe one, and at 50 us
# to close one.
LOOKED_AT_ONCE = 100
CLOSED_AT_ONCE = 10
MOST_NUMBER = 2**53
MOST_ID_CHARS = 256

T = TypeVar("T")


class Canary(Protocol):
    """The canary as the status shows it."""

    def is_alive(self) -> bool:
        """Return whether canaries arrive."""
        ...

    def since_arrival_s(self) -> float:
        """Return the seconds since the last one arrived."""
        ...


class Reloads(Protocol):
    """The reloads of the daemon."""

    problem: str | None
    ended_at: float | None

    async def perform(self) -> str | None:
        """Reload. Return the reason it was refused; None if it was applied."""
        ...


class Parts(Struct, frozen=True, kw_only=True):
    """The parts of the running daemon that acts use. `path` is the event log."""

    gateway: Gateway
    event_log: EventLog
    path: str
    committer: Committer
    intake: Intake
    memory_watch: MemoryWatch
    canary: Canary
    reloads: Reloads
    is_stopping: Callable[[], bool]


class Desk:
    """The acts. Each takes a Call and returns a value of `views`."""

    def __init__(self, parts: Parts, started_at: float) -> None:
        self._parts = parts
        self._started_at = started_at

    def routes(self) -> tuple[Route, ...]:
        """Return the routes of ROUTES."""
        return tuple(Route(method, path, partial(act, self)) for (method, path), act in ROUTES.items())

    async def version(self, _call: Call) -> views.Version:
        """Return the version of the daemon."""
        return views.Version(version=__version__, api=API)

    async def status(self, _call: Call) -> views.Status:
        """Return the state of the daemon."""
        parts = self._parts
        gateway, log, roster = parts.gateway, parts.event_log, parts.gateway.roster
        unsent = 0
        async for connection in _slices(roster.all(), LOOKED_AT_ONCE):
            unsent += connection.unsent
        whale = parts.committer.last_whale
        limit = parts.memory_watch.found.limit_bytes
        return views.Status(
            version=__version__,
            pid=os.getpid(),
            started_at=self._started_at,
            now=time.time(),
            is_stopping=parts.is_stopping(),
            upstream=gateway.upstream,
            shortfall=parts.intake.shortfall,
            addresses=list(gateway.addresses),
            event_log=parts.path,
            epoch=log.epoch,
            head=log.head,
            oldest=log.oldest,
            connections=roster.total,
            authenticated=roster.authenticated,
            replaying=gateway.subscriptions.replaying,
            connections_limit=roster.limit,
            unsent_bytes=unsent,
            memory_used_bytes=parts.memory_watch.found.used_bytes,
            memory_limit_bytes=int(limit) if limit != float("inf") else None,
            is_short_of_memory=gateway.is_short_of_memory,
            last_whale=None
            if whale is None
            else views.Whale(at=whale[1], txid=whale[0].transaction_id, value_sat=whale[0].value_sat),
            canary_arrives=parts.canary.is_alive(),
            canary_arrived_s_ago=parts.canary.since_arrival_s(),
            last_reload_at=parts.reloads.ended_at,
            last_reload_problem=parts.reloads.problem,
        )

    async def clients(self, call: Call) -> views.Clients:
        """Return a page of connections: at most `limit`, after the cursor `after` of the page before."""
        limit = max(1, call.number("limit", PAGE, MOST_PAGE))
        slot, number = _cursor(call.query.get("after", "0-0"))
        found: list[views.Client] = []
        last = (slot, number)
        now = self._parts.gateway.now()
        for place in range(slot, KEEPALIVE_SLOTS):
            async for connection in _slices(self._parts.gateway.roster.group(place), LOOKED_AT_ONCE):
                if (place, connection.number) <= last or connection.phase >= Phase.CLOSING:
                    continue
                if len(found) == limit:
                    return views.Clients(clients=found, next=f"{last[0]}-{last[1]}")
                found.append(self._client(connection, now))
                last = (place, connection.number)
        return views.Clients(clients=found, next=None)

    def _client(self, connection: Connection, now: float) -> views.Client:
        session = connection.session
        subscriptions = self._parts.gateway.subscriptions
        delivery = subscriptions.delivery(connection)
        state = "unauthenticated" if not connection.is_client else "paused"
        if delivery is not None:
            state = "replaying" if delivery.is_replaying else "live"
        return views.Client(
            connection=connection.number,
            client_id=session.grant.client_id if session is not None and session.grant is not None else None,
            address=connection.address,
            since=connection.connected_at or None,
            delivery=state,
            filter="" if delivery is None else views.summary(delivery.filter),
            offset=None if delivery is None else delivery.offset,
            lag=None if delivery is None else max(0, subscriptions.hub.head - delivery.offset),
            unsent_bytes=connection.unsent,
            budget=None if session is None else round(session.budget(now), 1),
        )

    async def disconnect(self, call: Call) -> views.Disconnected:
        """Close all connections of a client (`client_id`) or one (`connection`). They may connect again."""
        body = call.body
        if (
            body.keys() == {"client_id"}
            and isinstance(name := body["client_id"], str)
            and 0 < len(name) <= MOST_ID_CHARS
        ):
            found = await self._connections(lambda each: _client_id(each) == name)
            missing = "no connection of this client is open; `whaled clients` lists those that are"
        elif body.keys() == {"connection"} and _is_number(number := body["connection"]):
            found = await self._connections(lambda each: each.number == number)
            missing = f"connection {number} is not open; `whaled clients` lists those that are"
        else:
            raise CallError(
                Code.BAD_REQUEST,
                'expected either {"client_id": a string of 1 to 256 characters} or {"connection": a number}',
            )
        count = 0
        async for connection in _slices(found, CLOSED_AT_ONCE):
            if connection.phase < Phase.CLOSING:
                connection.close(Close.GOING_AWAY)
                count += 1
        if not count:
            raise CallError(Code.NOT_FOUND, missing)
        return views.Disconnected(disconnected=count)

    async def _connections(self, wanted: Callable[[Connection], bool]) -> list[Connection]:
        return [each async for each in _slices(self._parts.gateway.roster.all(), 10 * LOOKED_AT_ONCE) if wanted(each)]

    async def reload(self, call: Call) -> views.Reloaded:
        """Reload the configuration, and return at its end."""
        if call.body:
            raise CallError(Code.BAD_REQUEST, "a reload takes no parameters: send {} or no body")
        if self._parts.is_stopping():
            raise CallError(Code.CONFLICT, "the daemon is stopping: its next start reads the configuration")
        problem = await self._parts.reloads.perform()
        return views.Reloaded(applied=problem is None, problem=problem, pid=os.getpid())


# Every act, by method and path. Other rooms pass routes of their own to AdminServer.
ROUTES: dict[tuple[str, str], Callable[[Desk, Call], Awaitable[object]]] = {
    ("GET", "/v1/version"): Desk.version,
    ("GET", "/v1/status"): Desk.status,
    ("GET", "/v1/clients"): Desk.clients,
    ("POST", "/v1/disconnect"): Desk.disconnect,
    ("POST", "/v1/reload"): Desk.reload,
}


def _client_id(connection: Connection) -> str | None:
    session = connection.session
    return session.grant.client_id if session is not None and session.grant is not None else None


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_NUMBER


def _cursor(text: str) -> tuple[int, int]:
    """Parse the cursor of a page. Raises CallError."""
    parts = text.split("-")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) <= 16 for part in parts):
        raise CallError(Code.BAD_REQUEST, "after: expected the `next` of the page before")
    return int(parts[0]), int(parts[1])


async def _slices(items: Iterable[T], at_once: int) -> AsyncIterator[T]:
    """Yield items, and let the event loop run after each slice of them."""
    remaining = iter(items)
    while some := list(islice(remaining, at_once)):
        for item in some:
            yield item
        await asyncio.sleep(0)
