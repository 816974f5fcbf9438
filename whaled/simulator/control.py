"""The control interface under `/simulator`: ground truth, faults and whales on demand, over HTTP."""

from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from whaled.model import SAT_PER_BTC
from whaled.simulator.faults import AnyFault
from whaled.simulator.transactions import ImpossibleError
from whaled.simulator.truth import Record
from whaled.simulator.world import World

# Records per chunk of the truth. A chunk is about 100 KB, so encoding one does not block the event loop for long.
RECORDS_PER_CHUNK = 250


class Send(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /simulator/send`: outputs that sum to exactly `btc`, at `rate` sat/vB."""

    btc: Annotated[float, Meta(ge=0.0001, le=1_000_000)]
    rate: Annotated[float, Meta(ge=1, le=300)] | None = None


class Control:
    """The routes that act on a world. `apply` triggers a fault, `catch_up` advances the world to the current time."""

    def __init__(
        self, world: World, apply: Callable[[AnyFault], Awaitable[None]], catch_up: Callable[[], None]
    ) -> None:
        self._world = world
        self._apply = apply
        self._catch_up = catch_up

    def add_to(self, app: web.Application) -> None:
        """Add the routes to an application."""
        app.router.add_get("/simulator", self._overview)
        app.router.add_get("/simulator/truth", self._truth)
        app.router.add_post("/simulator/fault", self._fault)
        app.router.add_post("/simulator/send", self._send)

    async def _overview(self, _request: web.Request) -> web.Response:
        world = self._world
        return _json(
            {
                "settings": world.settings,
                "now": world.now,
                "height": world.chain.tip.height,
                "mempool": len(world.chain.mempool),
                "whales": len(world.truth.whales()),
                "truth": len(world.truth),
            }
        )

    async def _truth(self, request: web.Request) -> web.StreamResponse:
        """Respond with JSON lines; `?whales=1` selects the whales."""
        only_whales = request.query.get("whales") in ("1", "true")
        records = self._world.truth.whales() if only_whales else self._world.truth.records()
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        for start in range(0, len(records), RECORDS_PER_CHUNK):
            await response.write(_lines(records[start : start + RECORDS_PER_CHUNK]))
        await response.write_eof()
        return response

    async def _fault(self, request: web.Request) -> web.Response:
        try:
            fault = msgspec.json.decode(await request.read(), type=AnyFault)
            self._catch_up()
            await self._apply(fault)
        except (msgspec.DecodeError, ImpossibleError) as error:
            return _json({"error": str(error)}, 400)
        return _json({"done": fault})

    async def _send(self, request: web.Request) -> web.Response:
        try:
            order = msgspec.json.decode(await request.read(), type=Send)
            self._catch_up()
            tx = self._world.pay(round(order.btc * SAT_PER_BTC), rate=order.rate)
        except (msgspec.DecodeError, ImpossibleError) as error:
            return _json({"error": str(error)}, 400)
        return _json(self._world.truth[tx.txid])


def _lines(records: list[Record]) -> bytes:
    return b"".join(msgspec.json.encode(record) + b"\n" for record in records)


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")
