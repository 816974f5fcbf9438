"""The resident memory of a connection, by its state."""

import asyncio
from dataclasses import dataclass, replace

from bench.attack.assaults import Order
from bench.attack.rig import Place, Surroundings, rig
from bench.report import Row

# Below gateway.max_unauthenticated, so that none is displaced. It is measured before the handshake times out.
COUNT = 800
LOOK_S, SETTLE_S = 0.05, 0.5
SECONDS = 4.0
# Estimate per number: start a daemon, connect clients, stop it.
AROUND_S = 10.0
HEADER: Row = ("connection", "KiB, ws", "KiB, wss")


@dataclass(frozen=True, slots=True)
class Size:
    """A kind of connection, with its orders for ws and wss; None if it does not exist."""

    name: str
    plain: Order | None
    tls: Order | None


def held(payload: str) -> Order:
    """Return an order for strangers that stay connected."""
    return Order("strangers", count=COUNT, payload=payload, addresses=COUNT, seconds=SECONDS)


SIZES = (
    Size("silent", held(""), held("")),
    Size("in the TLS handshake, silent", None, held("hello")),
    Size("half a request", held("half a request"), None),
    Size("15 KiB of a request", held("half a request of 15 KiB"), None),
    Size("WebSocket, not authenticated", held("handshake"), None),
    Size(
        "authenticated",
        Order("clients", count=COUNT, addresses=COUNT, every_s=0.5, seconds=SECONDS),
        Order("clients", count=COUNT, addresses=COUNT, every_s=0.5, seconds=SECONDS, tls=True),
    ),
)


def expected_s() -> float:
    """Estimate the duration of `measure`, which starts a daemon for each number."""
    return AROUND_S * sum((size.plain is not None) + (size.tls is not None) for size in SIZES)


async def measure(place: Place) -> list[Row]:
    """Return a row per kind of connection."""
    found: list[Row] = []
    for size in SIZES:
        cells = [await kib(place, order, is_tls=is_tls) for order, is_tls in ((size.plain, False), (size.tls, True))]
        found.append((size.name, *cells))
    return found


async def kib(place: Place, order: Order | None, *, is_tls: bool) -> str:
    """Measure the KiB per connection, with COUNT connections."""
    if order is None:
        return ""
    async with rig(replace(place, victims=1, victim_tokens=place.victim_tokens[:2]), Surroundings(tls=is_tls)) as it:
        await it.window(1.0)
        before_mib, before = it.daemon.resident_mib(), it.daemon.descriptors
        attacking = asyncio.create_task(it.attack([order]))
        while it.daemon.descriptors < before + COUNT - 2 and not attacking.done():  # noqa: ASYNC110 - the state of another process
            await asyncio.sleep(LOOK_S)
        await asyncio.sleep(SETTLE_S)
        there, grown_mib = it.daemon.descriptors - before, it.daemon.resident_mib() - before_mib
        await attacking
    return f"{1024 * grown_mib / there:.1f}" if there > COUNT / 2 else f"only {there} held"
