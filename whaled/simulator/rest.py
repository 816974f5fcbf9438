"""The routes of the backend's REST API and of electrs's, and the simulated REST failures."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from aiohttp import web
from msgspec import Struct

from whaled.simulator.electrs import Electrs
from whaled.simulator.electrs import nowhere as electrs_nowhere
from whaled.simulator.faults import FailRest, RestMode
from whaled.simulator.responses import Response, Responses, error, nowhere

PREFIX = "/api/v1/"
# nginx serves electrs under this prefix.
ELECTRS_PREFIX = "/api/"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Server = TypeVar("Server", Responses, Electrs)


class RestFaults(Struct):
    """The current REST fault, and the number of requests that it still affects."""

    fault: FailRest | None = None
    left: int = 0

    def begin(self, fault: FailRest) -> None:
        """Make the next responses fail."""
        self.fault, self.left = fault, fault.times

    def take(self) -> FailRest | None:
        """Return the fault for the current request, if any, and count it."""
        if self.fault is None or self.left == 0:
            return None
        self.left -= 1
        return self.fault


class Rest:
    """The REST API of the backend that `current` returns, and of electrs in esplora mode.

    Requests wait while `running` is not set.
    """

    def __init__(
        self,
        current: Callable[[], Responses],
        electrs: Electrs | None,
        faults: RestFaults,
        running: asyncio.Event,
    ) -> None:
        self._current = current
        self._electrs = electrs
        self._faults = faults
        self._running = running

    def add_to(self, app: web.Application) -> None:
        """Add the routes to an application."""
        for path, respond in _GET.items():
            app.router.add_get(PREFIX + path, self._handler(self._current, respond))
        app.router.add_post(PREFIX + "prevouts", self._prevouts)
        electrs = self._electrs
        if electrs is None:
            for path, respond in _GET_OF_NODE.items():
                app.router.add_get(PREFIX + path, self._handler(self._current, respond))
        app.router.add_route("*", PREFIX + "{rest:.*}", self._handler(self._current, _nowhere))
        if electrs is not None:
            for path, found in _GET_OF_ELECTRS.items():
                app.router.add_get(ELECTRS_PREFIX + path, self._handler(lambda: electrs, found))
            app.router.add_route("*", ELECTRS_PREFIX + "{rest:.*}", self._handler(lambda: electrs, _nowhere_in_electrs))

    def _handler(self, current: Callable[[], Server], respond: Callable[[Server, web.Request], Response]) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            refusal = await self._fault()
            return _respond(refusal or respond(current(), request))

        return handle

    async def _prevouts(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        refusal = await self._fault()
        return _respond(refusal or self._current().prevouts(body))

    async def _fault(self) -> Response | None:
        await self._running.wait()
        fault = self._faults.take()
        if fault is None:
            return None
        match fault.mode:
            case RestMode.TIMEOUT:
                # Waits until the client disconnects: aiohttp then cancels this handler.
                await asyncio.Event().wait()
            case RestMode.SLOW:
                await asyncio.sleep(fault.seconds)
                return None
            case RestMode.STATUS:
                return error(fault.status, "simulated failure")
        return None


def _respond(response: Response) -> web.Response:
    headers = {"Content-Type": response.kind} if response.body else {}
    return web.Response(body=response.body, status=response.status, headers=headers)


def _not_without_index(_responses: Responses, _request: web.Request) -> Response:
    return error(405, "Address lookups cannot be used with bitcoind as backend.")


def _nowhere(_responses: Responses, request: web.Request) -> Response:
    return nowhere(request.method, request.path)


def _nowhere_in_electrs(_electrs: Electrs, request: web.Request) -> Response:
    return electrs_nowhere(request.path.removeprefix(ELECTRS_PREFIX.rstrip("/")))


def _named(respond: Callable[[Server, str], Response], name: str) -> Callable[[Server, web.Request], Response]:
    return lambda server, request: respond(server, request.match_info[name])


def _paired(
    respond: Callable[[Server, str, str], Response], first: str, second: str
) -> Callable[[Server, web.Request], Response]:
    return lambda server, request: respond(server, request.match_info[first], request.match_info[second])


# Routes of the backend in every mode.
_GET: dict[str, Callable[[Responses, web.Request], Response]] = {
    "tx/{txid}/rbf": _named(Responses.tx_rbf, "txid"),
    "tx/{txid}/cached": _named(Responses.tx_cached, "txid"),
    "replacements": lambda responses, _: responses.replacements(),
    "transaction-times": lambda responses, request: responses.transaction_times(request.query.getall("txId[]", [])),
    "blocks/tip/height": lambda responses, _: responses.tip_height(),
    "blocks": lambda responses, _: responses.blocks(),
    "blocks/{height}": _named(Responses.blocks, "height"),
    "block/{hash}": _named(Responses.block, "hash"),
    "block/{hash}/summary": _named(Responses.block_summary, "hash"),
    "chain-tips": lambda responses, _: responses.chain_tips(),
    "fees/recommended": lambda responses, _: responses.fees(whole=True),
    "fees/precise": lambda responses, _: responses.fees(whole=False),
    "fees/mempool-blocks": lambda responses, _: responses.part("mempool-blocks"),
    "prices": lambda responses, _: responses.part("conversions"),
    "backend-info": lambda responses, _: responses.part("backendInfo"),
    "difficulty-adjustment": lambda responses, _: responses.part("da"),
    "init-data": lambda responses, _: responses.init_data(),
}
# Routes that the backend serves only if it reads its node. In esplora mode electrs serves them.
_GET_OF_NODE: dict[str, Callable[[Responses, web.Request], Response]] = {
    "tx/{txid}": _named(Responses.tx, "txid"),
    "tx/{txid}/hex": _named(Responses.tx_hex, "txid"),
    "tx/{txid}/status": _named(Responses.tx_status, "txid"),
    "tx/{txid}/outspends": _named(Responses.tx_outspends, "txid"),
    "mempool": lambda responses, _: responses.mempool(),
    "mempool/txids": lambda responses, _: responses.mempool_txids(),
    "mempool/recent": lambda responses, _: responses.mempool_recent(),
    "blocks/tip/hash": lambda responses, _: responses.tip_hash(),
    "block-height/{height}": _named(Responses.block_height, "height"),
    "block/{hash}/header": _named(Responses.block_header, "hash"),
    "block/{hash}/raw": _named(Responses.block_raw, "hash"),
    "block/{hash}/txids": _named(Responses.block_txids, "hash"),
    "block/{hash}/txs": _named(Responses.block_txs, "hash"),
    "block/{hash}/txs/{index}": _paired(Responses.block_txs, "hash", "index"),
    "address/{rest:.*}": _not_without_index,
    "scripthash/{rest:.*}": _not_without_index,
}
_GET_OF_ELECTRS: dict[str, Callable[[Electrs, web.Request], Response]] = {
    "tx/{txid}": _named(Electrs.tx, "txid"),
    "tx/{txid}/hex": _named(Electrs.tx_hex, "txid"),
    "tx/{txid}/raw": _named(Electrs.tx_raw, "txid"),
    "tx/{txid}/status": _named(Electrs.tx_status, "txid"),
    "tx/{txid}/outspends": _named(Electrs.tx_outspends, "txid"),
    "tx/{txid}/outspend/{vout}": _paired(Electrs.tx_outspend, "txid", "vout"),
    "txs/outspends": lambda electrs, request: electrs.txs_outspends(request.query.get("txids")),
    "mempool": lambda electrs, _: electrs.mempool(),
    "mempool/txids": lambda electrs, _: electrs.mempool_txids(),
    "mempool/recent": lambda electrs, _: electrs.mempool_recent(),
    "blocks/tip/height": lambda electrs, _: electrs.tip_height(),
    "blocks/tip/hash": lambda electrs, _: electrs.tip_hash(),
    "blocks": lambda electrs, _: electrs.blocks(),
    "blocks/{height}": _named(Electrs.blocks, "height"),
    "block-height/{height}": _named(Electrs.block_height, "height"),
    "block/{hash}": _named(Electrs.block, "hash"),
    "block/{hash}/status": _named(Electrs.block_status, "hash"),
    "block/{hash}/header": _named(Electrs.block_header, "hash"),
    "block/{hash}/raw": _named(Electrs.block_raw, "hash"),
    "block/{hash}/txids": _named(Electrs.block_txids, "hash"),
    "block/{hash}/txid/{index}": _paired(Electrs.block_txid, "hash", "index"),
    "block/{hash}/txs": _named(Electrs.block_txs, "hash"),
    "block/{hash}/txs/{index}": _paired(Electrs.block_txs, "hash", "index"),
}
