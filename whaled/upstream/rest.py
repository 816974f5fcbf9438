"""What a mempool backend is asked over REST: the calls that fill what the WebSocket leaves out."""

import asyncio
from collections.abc import Iterable, Sequence

import msgspec
import structlog
from msgspec import Struct

from whaled.model import FeeMarket, Input, Output, Transaction
from whaled.upstream.dialect import MAX_USD
from whaled.upstream.http import Http, RestError, RestFailure
from whaled.upstream.transactions import Number, Rate, Satoshi

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The backend refuses more in one POST (400).
PREVOUTS_LIMIT = 100
COINBASE = "0" * 64


class _Prevout(Struct):
    value: Satoshi
    scriptpubkey: str
    scriptpubkey_address: str | None = None

    def output(self) -> Output:
        return Output(self.value, self.scriptpubkey, self.scriptpubkey_address or None)


class _PrevoutAnswer(Struct):
    prevout: _Prevout | None


class _Outpoint(Struct, frozen=True):
    txid: str
    vout: int


class _Vin(Struct):
    txid: str
    vout: Number
    prevout: _Prevout | None = None


class _Spender(Struct):
    vin: list[_Vin]


class _Fees(Struct):
    fastest: Rate = msgspec.field(name="fastestFee")
    half_hour: Rate = msgspec.field(name="halfHourFee")
    hour: Rate = msgspec.field(name="hourFee")
    economy: Rate = msgspec.field(name="economyFee")
    minimum: Rate = msgspec.field(name="minimumFee")


class _Prices(Struct):
    usd: float = msgspec.field(name="USD", default=-1)


class Rest(Http):
    """The REST API of one backend. Made by `Rest.open`."""

    async def tip_height(self) -> int:
        """Height of the best block, straight from bitcoind."""
        return self.found("blocks/tip/height", await self.get("blocks/tip/height", Number))

    async def fees(self) -> FeeMarket:
        """The recommended fee rates. RestError with status 503 until the backend is in sync."""
        # Backends before 3.3 know whole numbers only.
        found = await self.get("fees/precise", _Fees) or await self.get("fees/recommended", _Fees)
        fees = self.found("fees/recommended", found)
        return FeeMarket(fees.fastest, fees.half_hour, fees.hour, fees.economy, fees.minimum)

    async def price(self) -> float | None:
        """US dollars per bitcoin; None while the backend does not know."""
        prices = await self.get("prices", _Prices)
        return prices.usd if prices is not None and 0 < prices.usd <= MAX_USD else None

    async def prevouts(self, tx: Transaction, deadline_s: float) -> Transaction:
        """`tx` with the spent output in every input, or `tx` as it is if that is not known within `deadline_s` seconds.

        Never raises: a whale is announced with or without its inputs.
        """
        missing = [each for each in tx.inputs if each.prevout is None]
        if not missing or any(each.txid == COINBASE for each in missing):
            return tx
        try:
            async with asyncio.timeout(deadline_s):
                spent = await self._spent(tx.txid, missing)
        except TimeoutError:
            return self._unknown(tx, RestFailure.DEADLINE, f"no answer within {deadline_s:g} s")
        except RestError as exc:
            return self._unknown(tx, exc.reason, str(exc))
        if any(spent.get((each.txid, each.vout)) is None for each in missing):
            return self._unknown(tx, RestFailure.INCOMPLETE, "the backend does not know all spent outputs")
        return msgspec.structs.replace(
            tx, inputs=tuple(_with_prevout(each, spent.get((each.txid, each.vout))) for each in tx.inputs)
        )

    async def _spent(self, txid: str, missing: Sequence[Input]) -> dict[tuple[str, int], Output]:
        chunks = [missing[start : start + PREVOUTS_LIMIT] for start in range(0, len(missing), PREVOUTS_LIMIT)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._spent_chunk(chunk)) for chunk in chunks]
        except BaseExceptionGroup as failed:
            refused, bugs = failed.split(RestError)
            if refused is None or bugs is not None:
                raise
            raise _first(refused.exceptions) from None
        spent = {outpoint: output for task in tasks for outpoint, output in task.result().items()}
        if len(spent) < len({(each.txid, each.vout) for each in missing}):
            # gettxout knows nothing of outputs whose spender is mined; the spender itself still tells.
            spender = await self.get(f"tx/{txid}", _Spender)
            for each in spender.vin if spender is not None else ():
                if each.prevout is not None:
                    spent[each.txid, each.vout] = each.prevout.output()
        return spent

    async def _spent_chunk(self, inputs: Sequence[Input]) -> dict[tuple[str, int], Output]:
        outpoints = [_Outpoint(each.txid, each.vout) for each in inputs]
        answers = await self.post("prevouts", outpoints, list[_PrevoutAnswer | None])
        if answers is None:  # a backend without this call
            return {}
        if len(answers) != len(outpoints):
            count = len(answers)
            answers.clear()  # the task group keeps the error, its traceback this frame
            raise RestError(
                RestFailure.GARBAGE, f"POST {self.shown_base}prevouts: {count} answers to {len(outpoints)} questions"
            )
        return {
            (outpoint.txid, outpoint.vout): answer.prevout.output()
            for outpoint, answer in zip(outpoints, answers, strict=True)
            if answer is not None and answer.prevout is not None
        }

    def _unknown(self, tx: Transaction, failure: RestFailure, why: str) -> Transaction:
        self.meter.inputs_unknown(failure)
        suppressed = self.lines.admit(failure)
        if suppressed is not None:
            log.warning(
                "inputs of a whale stay unknown",
                txid=tx.txid,
                inputs=len(tx.inputs),
                reason=failure.value,
                detail=why,
                suppressed=suppressed,
            )
        return tx


def _with_prevout(spending: Input, output: Output | None) -> Input:
    if spending.prevout is not None or output is None:
        return spending
    return Input(spending.txid, spending.vout, spending.sequence, output)


def _first(exceptions: Iterable[BaseException]) -> BaseException:
    for exc in exceptions:
        return _first(exc.exceptions) if isinstance(exc, BaseExceptionGroup) else exc
    raise AssertionError("an exception group is never empty")
