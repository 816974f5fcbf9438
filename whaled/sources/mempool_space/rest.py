"""The REST calls that complete what the stream leaves out: the prevouts of live whales, and the tip height."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote

import msgspec
import structlog
from msgspec import Raw, Struct

from whaled.model import NULL_TXID, Input, Output, Transaction
from whaled.sources.mempool_space.fields import Number, Rate, read
from whaled.sources.mempool_space.http import Http, RestError, RestFailure

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The backend refuses a POST with more outpoints (status 400).
PREVOUTS_LIMIT = 100
# Above this number of inputs, `tx/:txid` takes longer than any timeout: the backend fetches each prevout from its node
# in turn, and continues even after the client has given up.
INPUTS_LIMIT = 100


class _Prevout(Struct):
    value: Rate
    scriptpubkey: str
    scriptpubkey_address: str | None = None

    def output(self) -> Output:
        return Output(round(self.value), self.scriptpubkey, self.scriptpubkey_address or None)


class _PrevoutAnswer(Struct):
    prevout: _Prevout | None


class _Outpoint(Struct, frozen=True):
    txid: str
    vout: int


class _Vin(Struct):
    txid: str
    vout: Number
    prevout: _Prevout | None = None


class _WithPrevouts(Struct):
    vin: list[_Vin]

    def outputs(self) -> dict[_Outpoint, Output]:
        """Return the known prevouts by outpoint."""
        return {_Outpoint(each.txid, each.vout): each.prevout.output() for each in self.vin if each.prevout is not None}


_decode_prevout = msgspec.json.Decoder(_PrevoutAnswer).decode
# The txids that the backend accepts in an outpoint: an invalid one would make it refuse the whole POST.
_HEX = re.compile("[0-9a-fA-F]{64}")


class Rest(Http):
    """The REST API of one backend. Created by `Rest.open`."""

    async def tip_height(self) -> int:
        """Return the height of the best block that the backend has; its node may be ahead."""
        return self.found("blocks/tip/height", await self.get("blocks/tip/height", Number))

    async def prevouts(self, transactions: Sequence[Transaction], deadline_s: float) -> list[Transaction]:
        """Return each transaction with the prevout of every input, or unchanged if they are not known in time.

        The time limit is `deadline_s` seconds. The largest transactions come first; one call may have the inputs of
        several. Never raises RestError: a whale is published with or without its inputs.
        """
        missing = {tx.txid: _missing(tx) for tx in transactions}
        spent: dict[_Outpoint, Output] = {}
        problems: dict[str, RestError] = {}
        is_late = False
        try:
            async with asyncio.timeout(deadline_s):
                await self._collect(sorted(transactions, key=lambda tx: -tx.value_sat), missing, spent, problems)
        except TimeoutError:
            is_late = True
        answers = []
        for tx in transactions:
            wanted = missing[tx.txid]
            if all(outpoint in spent for outpoint in wanted):
                answers.append(_filled(tx, spent) if wanted else tx)
            elif tx.txid in problems:
                answers.append(self._unknown(tx, problems[tx.txid].reason, str(problems[tx.txid])))
            elif is_late:
                answers.append(self._unknown(tx, RestFailure.DEADLINE, f"no answer within {deadline_s:g} s"))
            else:
                why = "the backend does not know all spent outputs"
                answers.append(self._unknown(tx, RestFailure.INCOMPLETE, why))
        return answers

    async def _collect(
        self,
        transactions: Sequence[Transaction],
        missing: Mapping[str, Sequence[_Outpoint]],
        spent: dict[_Outpoint, Output],
        problems: dict[str, RestError],
    ) -> None:
        wanted = [outpoint for tx in transactions for outpoint in missing[tx.txid] if _HEX.fullmatch(outpoint.txid)]
        chunks = [wanted[start : start + PREVOUTS_LIMIT] for start in range(0, len(wanted), PREVOUTS_LIMIT)]
        failed: dict[_Outpoint, RestError] = {}

        async def fetch(chunk: Sequence[_Outpoint]) -> None:
            try:
                spent.update(await self._spent_chunk(chunk))
            except RestError as error:
                failed.update(dict.fromkeys(chunk, error))

        async def fetch_spender(tx: Transaction) -> None:
            # gettxout does not find an output whose spender is mined; the spending transaction still has its prevouts.
            try:
                spender = await self.get(f"tx/{quote(tx.txid, safe='')}", _WithPrevouts)
            except RestError as error:
                problems[tx.txid] = error
                return
            spent.update(spender.outputs() if spender is not None else ())

        async with asyncio.TaskGroup() as group:
            for chunk in chunks:
                group.create_task(fetch(chunk))
        async with asyncio.TaskGroup() as group:
            for tx in transactions:
                unknown = [outpoint for outpoint in missing[tx.txid] if outpoint not in spent]
                error = next((failed[outpoint] for outpoint in unknown if outpoint in failed), None)
                if error is not None:
                    problems[tx.txid] = error
                elif unknown and len(tx.inputs) <= INPUTS_LIMIT:
                    group.create_task(fetch_spender(tx))

    async def _spent_chunk(self, outpoints: Sequence[_Outpoint]) -> dict[_Outpoint, Output]:
        answers = await self.post("prevouts", outpoints, list[Raw])
        if answers is None:  # the backend lacks this call
            return {}
        if len(answers) != len(outpoints):
            count = len(answers)
            answers.clear()  # the error is kept, and its traceback keeps this stack frame
            raise RestError(
                RestFailure.GARBAGE, f"POST {self.shown('prevouts')}: {count} results for {len(outpoints)} outpoints"
            )
        found = {}
        for outpoint, answer in zip(outpoints, answers, strict=True):
            prevout = read(answer, _decode_prevout, None)
            if prevout is not None and prevout.prevout is not None:
                found[outpoint] = prevout.prevout.output()
        return found

    def _unknown(self, tx: Transaction, failure: RestFailure, why: str) -> Transaction:
        self.meter.inputs_unknown(failure)
        suppressed = self.lines.admit(failure)
        if suppressed is not None:
            logger.warning(
                "whale_inputs_unknown",
                txid=tx.txid,
                inputs=len(tx.inputs),
                reason=failure.value,
                detail=why,
                suppressed=suppressed,
            )
        return tx


def _missing(tx: Transaction) -> list[_Outpoint]:
    missing = [_Outpoint(each.txid, each.vout) for each in tx.inputs if each.prevout is None]
    return [] if any(each.txid == NULL_TXID for each in missing) else missing


def _filled(tx: Transaction, spent: Mapping[_Outpoint, Output]) -> Transaction:
    return msgspec.structs.replace(
        tx,
        inputs=tuple(
            Input(each.txid, each.vout, each.sequence, spent[_Outpoint(each.txid, each.vout)])
            if each.prevout is None
            else each
            for each in tx.inputs
        ),
    )
