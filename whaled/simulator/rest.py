"""The routes of the backend's REST interface and of electrs' beside it, and the faults instead of an answer."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from aiohttp import web
from msgspec import Struct

from whaled.simulator.answers import Answer, Answers, error, nowhere
from whaled.simulator.electrs import Electrs
from whaled.simulator.electrs import nowhere as electrs_nowhere
from whaled.simulator.faults import FailRest, RestMode

PREFIX = "/api/v1/"
# Where nginx shows electrs.
ELECTRS_PREFIX = "/api/"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Server = TypeVar("Server", Answers, Electrs)


class RestFaults(Struct):
    """How many answers fail from now on, and how."""

    fault: FailRest | None = None
    left: int = 0

    def begin(self, fault: FailRest) -> None:
        """The next answers fail."""
        self.fault, self.left = fault, fault.times

    def take(self) -> FailRest | None:
        """The fault for this answer, if one is due."""
        if self.fault is None or self.left == 0:
            return None
        self.left -= 1
        return self.fault


class Rest:
    """REST of the backend that `current` returns, and of electrs where it reads it. While `running` is not set nothing
    is answered.
    """

    def __init__(
        self,
        current: Callable[[], Answers],
        electrs: Electrs | None,
        faults: RestFaults,
        running: asyncio.Event,
    ) -> None:
        self._current = current
        self._electrs = electrs
        self._faults = faults
        self._running = running

    def add_to(self, app: web.Application) -> None:
        """Put the routes on an application."""
        for path, answer in _GET.items():
            app.router.add_get(PREFIX + path, self._handler(self._current, answer))
        app.router.add_post(PREFIX + "prevouts", self._prevouts)
        electrs = self._electrs
        if electrs is None:
            for path, answer in _GET_OF_NODE.items():
                app.router.add_get(PREFIX + path, self._handler(self._current, answer))
        app.router.add_route("*", PREFIX + "{rest:.*}", self._handler(self._current, _nowhere))
        if electrs is not None:
            for path, found in _GET_OF_ELECTRS.items():
                app.router.add_get(ELECTRS_PREFIX + path, self._handler(lambda: electrs, found))
            app.router.add_route("*", ELECTRS_PREFIX + "{rest:.*}", self._handler(lambda: electrs, _nowhere_in_electrs))

    def _handler(self, current: Callable[[], Server], answer: Callable[[Server, web.Request], Answer]) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            refusal = await self._fault()
            return _respond(refusal or answer(current(), request))

        return handle

    async def _prevouts(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        refusal = await self._fault()
        return _respond(refusal or self._current().prevouts(body))

    async def _fault(self) -> Answer | None:
        await self._running.wait()
        fault = self._faults.take()
        if fault is None:
            return None
        match fault.mode:
            case RestMode.TIMEOUT:
                # Ends when the client gives up: aiohttp then cancels this handler.
                await asyncio.Event().wait()
            case RestMode.SLOW:
                await asyncio.sleep(fault.seconds)
                return None
            case RestMode.STATUS:
                return error(fault.status, "simulated failure")
        return None


def _respond(answer: Answer) -> web.Response:
    headers = {"Content-Type": answer.kind} if answer.body else {}
    return web.Response(body=answer.body, status=answer.status, headers=headers)


def _not_without_index(_answers: Answers, _request: web.Request) -> Answer:
    return error(405, "Address lookups cannot be used with bitcoind as backend.")


def _nowhere(_answers: Answers, request: web.Request) -> Answer:
    return nowhere(request.method, request.path)


def _nowhere_in_electrs(_electrs: Electrs, request: web.Request) -> Answer:
    return electrs_nowhere(request.path.removeprefix(ELECTRS_PREFIX.rstrip("/")))


def _named(answer: Callable[[Server, str], Answer], name: str) -> Callable[[Server, web.Request], Answer]:
    return lambda server, request: answer(server, request.match_info[name])


def _paired(
    answer: Callable[[Server, str, str], Answer], first: str, second: str
) -> Callable[[Server, web.Request], Answer]:
    return lambda server, request: answer(server, request.match_info[first], request.match_info[second])


# What the backend answers in every mode.
_GET: dict[str, Callable[[Answers, web.Request], Answer]] = {
    "tx/{txid}/rbf": _named(Answers.tx_rbf, "txid"),
    "tx/{txid}/cached": _named(Answers.tx_cached, "txid"),
    "replacements": lambda answers, _: answers.replacements(),
    "transaction-times": lambda answers, request: answers.transaction_times(request.query.getall("txId[]", [])),
    "blocks/tip/height": lambda answers, _: answers.tip_height(),
    "blocks": lambda answers, _: answers.blocks(),
    "blocks/{height}": _named(Answers.blocks, "height"),
    "block/{hash}": _named(Answers.block, "hash"),
    "block/{hash}/summary": _named(Answers.block_summary, "hash"),
    "chain-tips": lambda answers, _: answers.chain_tips(),
    "fees/recommended": lambda answers, _: answers.fees(whole=True),
    "fees/precise": lambda answers, _: answers.fees(whole=False),
    "fees/mempool-blocks": lambda answers, _: answers.part("mempool-blocks"),
    "prices": lambda answers, _: answers.part("conversions"),
    "backend-info": lambda answers, _: answers.part("backendInfo"),
    "difficulty-adjustment": lambda answers, _: answers.part("da"),
    "init-data": lambda answers, _: answers.init_data(),
}
# What it does not answer where it reads electrs, which does.
_GET_OF_NODE: dict[str, Callable[[Answers, web.Request], Answer]] = {
    "tx/{txid}": _named(Answers.tx, "txid"),
    "tx/{txid}/hex": _named(Answers.tx_hex, "txid"),
    "tx/{txid}/status": _named(Answers.tx_status, "txid"),
    "tx/{txid}/outspends": _named(Answers.tx_outspends, "txid"),
    "mempool": lambda answers, _: answers.mempool(),
    "mempool/txids": lambda answers, _: answers.mempool_txids(),
    "mempool/recent": lambda answers, _: answers.mempool_recent(),
    "blocks/tip/hash": lambda answers, _: answers.tip_hash(),
    "block-height/{height}": _named(Answers.block_height, "height"),
    "block/{hash}/header": _named(Answers.block_header, "hash"),
    "block/{hash}/raw": _named(Answers.block_raw, "hash"),
    "block/{hash}/txids": _named(Answers.block_txids, "hash"),
    "block/{hash}/txs": _named(Answers.block_txs, "hash"),
    "block/{hash}/txs/{index}": _paired(Answers.block_txs, "hash", "index"),
    "address/{rest:.*}": _not_without_index,
    "scripthash/{rest:.*}": _not_without_index,
}
_GET_OF_ELECTRS: dict[str, Callable[[Electrs, web.Request], Answer]] = {
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
