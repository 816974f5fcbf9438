"""The routes of the backend's REST interface, and the faults that may come instead of an answer."""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from msgspec import Struct

from whaled.simulator.answers import Answer, Answers, error
from whaled.simulator.faults import FailRest, RestMode

PREFIX = "/api/v1/"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


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
    """REST of the backend that `current` returns. While `running` is not set nothing is answered."""

    def __init__(self, current: Callable[[], Answers], faults: RestFaults, running: asyncio.Event) -> None:
        self._current = current
        self._faults = faults
        self._running = running

    def add_to(self, app: web.Application) -> None:
        """Put the routes on an application."""
        for path, answer in _GET.items():
            app.router.add_get(PREFIX + path, self._handler(answer))
        app.router.add_post(PREFIX + "prevouts", self._prevouts)
        for gone in ("address/{rest:.*}", "scripthash/{rest:.*}"):
            app.router.add_get(PREFIX + gone, self._handler(_not_without_index))

    def _handler(self, answer: Callable[[Answers, web.Request], Answer]) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            refusal = await self._fault()
            return _respond(refusal or answer(self._current(), request))

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
    kind = "application/json" if answer.is_json else "text/plain"
    return web.Response(body=answer.body, status=answer.status, content_type=kind, charset="utf-8")


def _not_without_index(_answers: Answers, _request: web.Request) -> Answer:
    return error(405, "Address lookups cannot be used with bitcoind as backend.")


def _named(answer: Callable[[Answers, str], Answer], name: str) -> Callable[[Answers, web.Request], Answer]:
    return lambda answers, request: answer(answers, request.match_info[name])


_GET: dict[str, Callable[[Answers, web.Request], Answer]] = {
    "tx/{txid}": _named(Answers.tx, "txid"),
    "tx/{txid}/status": _named(Answers.tx_status, "txid"),
    "tx/{txid}/rbf": _named(Answers.tx_rbf, "txid"),
    "tx/{txid}/cached": _named(Answers.tx_cached, "txid"),
    "replacements": lambda answers, _: answers.replacements(),
    "transaction-times": lambda answers, request: answers.transaction_times(request.query.getall("txId[]", [])),
    "mempool": lambda answers, _: answers.mempool(),
    "mempool/txids": lambda answers, _: answers.mempool_txids(),
    "mempool/recent": lambda answers, _: answers.mempool_recent(),
    "blocks/tip/height": lambda answers, _: answers.tip_height(),
    "blocks/tip/hash": lambda answers, _: answers.tip_hash(),
    "blocks": lambda answers, _: answers.blocks(),
    "blocks/{height}": _named(Answers.blocks, "height"),
    "block-height/{height}": _named(Answers.block_height, "height"),
    "block/{hash}": _named(Answers.block, "hash"),
    "block/{hash}/summary": _named(Answers.block_summary, "hash"),
    "block/{hash}/txids": _named(Answers.block_txids, "hash"),
    "block/{hash}/txs": _named(Answers.block_txs, "hash"),
    "block/{hash}/txs/{index}": lambda answers, request: answers.block_txs(
        request.match_info["hash"], request.match_info["index"]
    ),
    "chain-tips": lambda answers, _: answers.chain_tips(),
    "fees/recommended": lambda answers, _: answers.fees(whole=True),
    "fees/precise": lambda answers, _: answers.fees(whole=False),
    "fees/mempool-blocks": lambda answers, _: answers.part("mempool-blocks"),
    "prices": lambda answers, _: answers.part("conversions"),
    "backend-info": lambda answers, _: answers.part("backendInfo"),
    "difficulty-adjustment": lambda answers, _: answers.part("da"),
    "init-data": lambda answers, _: answers.init_data(),
}
