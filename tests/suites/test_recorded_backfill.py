"""The acceptance test of the backfill: a real backend's recorded stream, and answers made of what was really sent.

The stand-in says every frame that was recorded, at its place among what happened, and answers REST as its node would
have known it at that moment. What should be in the log is read from the truth, with none of the code under test.
"""

import asyncio
import gzip
import json
from bisect import insort
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import WSMsgType, web

from kit.backfill import Clock, Rig, watching
from kit.paths import DATA
from kit.recordings import true_transactions, truth
from whaled.model import Kind, Scan

Json = dict[str, Any]
RECORDING = DATA / "regtest-1.jsonl.gz"
# Replaced 5 ms after it was sent, between two polls: the backend itself never saw it.
UNSEEN = "whale_replaced_within_a_poll"
# The stream's `C` block names its 2001 transactions only in the recorded frame.
MANY = "2001 txids"


class Node:
    """The node and the backend's memory, as of the moment that the truth was told until."""

    def __init__(self) -> None:
        self.sent = true_transactions()
        self.pool: dict[str, None] = {}
        self.chain: list[Json] = []
        self.blocks: dict[str, Json] = {}
        self.replaced_by: dict[str, str] = {}
        self.known: dict[str, Json] = {}
        self.at = 0.0

    def happen(self, entry: Json) -> None:
        """Something of the truth."""
        self.at = entry["t"]
        match entry["event"]:
            case "tx" if entry["via"] == "mempool":
                self.pool[entry["txid"]] = None
            case "replaced":
                self.pool.pop(entry["txid"], None)
                if entry["txid"] in self.known:
                    self.replaced_by[entry["txid"]] = entry["replaced_by"]
            case "evicted":
                self.pool.pop(entry["txid"], None)
            case "block":
                self._connect(entry)
            case "orphaned":
                dead = self.chain.pop()
                assert dead["id"] == entry["hash"]
                self.pool.update(dict.fromkeys(dead["txids"]))
            case "note" if entry["what"] == "backend killed":
                self.replaced_by.clear()

    def _connect(self, entry: Json) -> None:
        txids = list(self.pool) if entry["txids"] == MANY else entry["txids"]
        block = {
            "id": entry["hash"],
            "height": entry["height"],
            "timestamp": int(entry["t"]),
            "previousblockhash": self.chain[-1]["id"] if self.chain else "00" * 32,
            "coinbase": entry["coinbase"],
            "txids": txids,
        }
        assert not self.chain or self.chain[-1]["height"] == entry["height"] - 1
        self.chain.append(block)
        self.blocks[block["id"]] = block
        for txid in txids:
            self.pool.pop(txid, None)

    def hear(self, frame: Json) -> None:
        """What the backend said it had seen by now."""
        delta = frame.get("mempool-transactions", {})
        for tx in (*delta.get("added", ()), *(pair["by"] for pair in delta.get("replaced", ()))):
            self.known[tx["txid"]] = tx

    def at_height(self, height: int) -> Json | None:
        return next((block for block in self.chain if block["height"] == height), None)

    def holder(self, txid: str) -> Json | None:
        return next((block for block in self.chain if txid in block["txids"]), None)

    def whole(self, txid: str) -> Json:
        """A transaction as REST has it. Of what the stream never gave, the truth has the sums only."""
        if txid in self.known:
            return {**self.known[txid], "status": {"confirmed": self.holder(txid) is not None}}
        sent = self.sent[txid]
        values = [sent["max_out_sat"], sent["out_sat"] - sent["max_out_sat"]]
        return {
            "txid": txid,
            "vin": [{"txid": "11" * 32, "vout": n, "sequence": 0, "prevout": None} for n in range(sent["n_in"])],
            "vout": [{"value": value, "scriptpubkey": "0014aa"} for value in values if value],
            "fee": sent["fee_sat"],
            "weight": sent["vsize"] * 4,
            "status": {"confirmed": self.holder(txid) is not None},
        }

    def stripped(self, txid: str) -> Json:
        sent = self.sent[txid]
        fee, vsize = sent.get("fee_sat", 1000), sent.get("vsize", 141)  # those of the burst were not written down
        return {"txid": txid, "fee": fee, "vsize": vsize, "value": sent["out_sat"]}

    def tree(self, txid: str) -> Json | None:
        """The replacements that a transaction is part of."""
        if txid not in self.replaced_by and txid not in self.replaced_by.values():
            return None
        while txid in self.replaced_by:
            txid = self.replaced_by[txid]
        return self._branch(txid)

    def _branch(self, txid: str) -> Json:
        losers = [loser for loser, winner in self.replaced_by.items() if winner == txid]
        time = self.sent[txid]["t"]
        return {
            "tx": {**self.stripped(txid), "time": int(time)},
            "time": int(time),
            "replaces": [*map(self._branch, losers)],
        }


class StandIn:
    """The recorded backend on one port."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.url = ""
        self.sequence = 0
        self.subscribed = asyncio.Event()
        self._socket: web.WebSocketResponse | None = None

    async def say(self, raw: str) -> None:
        frame = json.loads(raw)
        self.node.hear(frame)
        self.sequence = frame.get("mempool-transactions", {}).get("sequence", self.sequence)
        assert self._socket is not None
        await self._socket.send_str(raw)

    async def break_off(self) -> None:
        """As a killed backend does."""
        self.subscribed.clear()
        assert self._socket is not None
        await self._socket.close()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        self._socket = socket
        async for message in socket:
            asked = json.loads(message.data) if message.type is WSMsgType.TEXT else {}
            if asked.get("track-mempool"):
                self.subscribed.set()
            elif asked.get("track-mempool-block", -1) >= 0:
                await socket.send_str(json.dumps(self._projected(asked["track-mempool-block"])))
        return socket

    def _projected(self, index: int) -> Json:
        there = [txid for txid in self.node.known if txid in self.node.pool] if index == 0 else []
        rows = []
        for txid in there:
            tx = self.node.stripped(txid)
            rows.append([txid, tx["fee"], tx["vsize"], tx["value"], tx["fee"] / tx["vsize"], 0, 0])
        parts = {"index": index, "sequence": self.sequence, "blockTransactions": rows}
        return {"projected-block-transactions": parts}

    async def rest(self, request: web.Request) -> web.Response:
        node = self.node
        parts = request.path.removeprefix("/api/v1/").split("/")
        answer: Any = None
        match parts:
            case ["blocks", "tip", "height"]:
                answer = node.chain[-1]["height"]
            case ["block-height", height]:
                block = node.at_height(int(height))
                return web.Response(text=block["id"]) if block else web.Response(status=500)
            case ["block", block_hash]:
                answer = {k: v for k, v in node.blocks[block_hash].items() if k not in {"txids", "coinbase"}}
            case ["block", block_hash, "summary"]:
                block = node.blocks[block_hash]
                coinbase = {"txid": block["coinbase"], "fee": 0, "vsize": 100, "value": 50 * 10**8}
                answer = [coinbase, *map(node.stripped, block["txids"])]
            case ["block", block_hash, "txs", index]:
                txids = node.blocks[block_hash]["txids"]
                answer = [node.whole(txid) for txid in txids[int(index) - 1 : int(index) + 9]]
            case ["mempool", "txids"]:
                answer = list(node.pool)
            case ["replacements"]:
                roots = {winner for winner in node.replaced_by.values() if winner not in node.replaced_by}
                answer = [node.tree(root) for root in list(roots)[:25]]
            case ["prevouts"]:
                answer = [None] * len(await request.json())
            case ["tx", txid, *rest]:
                return self._tx(txid, rest)
        return web.json_response(answer) if answer is not None else web.Response(status=404)

    def _tx(self, txid: str, rest: list[str]) -> web.Response:
        node = self.node
        holder = node.holder(txid)
        is_there = holder is not None or txid in node.pool
        was_mined = any(txid in block["txids"] for block in node.blocks.values())
        match rest:
            case ["rbf"]:
                return web.json_response({"replacements": node.tree(txid), "replaces": None})
            case ["cached"] if txid in node.replaced_by:
                return web.json_response(node.whole(txid))
            case ["status"] if holder is not None:
                place = {
                    "block_height": holder["height"],
                    "block_hash": holder["id"],
                    "block_time": holder["timestamp"],
                }
                return web.json_response({"confirmed": True, **place})
            case ["status"] if is_there or was_mined:  # the trap of a dead block
                return web.json_response({"confirmed": False})
            case [] if is_there:
                return web.json_response(node.whole(txid))
        return web.Response(status=204 if rest == ["cached"] else 404)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["StandIn"]:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/api/v1/ws", self.stream)
        app.router.add_route("*", "/{path:.*}", self.rest)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"ws://127.0.0.1:{runner.addresses[0][1]}/api/v1/ws"
            yield self
        finally:
            await runner.cleanup()


def timeline() -> list[tuple[float, int, str, Any]]:
    """What happened and what was said, in the order of their times."""
    steps: list[tuple[float, int, str, Any]] = []
    with gzip.open(RECORDING, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            row = json.loads(line)
            if row["dir"] in {"in", "close"}:
                insort(steps, (row["t"], number, row["dir"], row.get("raw")))
    first = min(step[0] for step in steps)
    told = [entry for entry in truth() if entry["event"] != "final"]
    for number, entry in enumerate(told):
        steps.append((max(entry["t"], first - 1), -len(told) + number, "truth", entry))
    return sorted(steps, key=lambda step: step[:2])


async def worked(rig: Rig, backend: StandIn) -> None:
    """Wait until a round of work is over that began after this."""
    for _ in range(2):
        rounds = rig.tally.rounds
        await backend.say('{"pong":true}')
        await rig.until(lambda rounds=rounds: rig.tally.rounds > rounds)  # type: ignore[misc]


async def replayed(directory: Path, drop_after: float = 30.0) -> tuple[Rig, Node, dict[int, Scan]]:
    """Everything, from the first frame to the last and the grace after it."""
    node, clock = Node(), Clock()
    started = False
    node.chain.append(genesis())
    node.blocks[node.chain[0]["id"]] = node.chain[0]
    async with StandIn(node).listening() as backend:
        steps = timeline()
        clock.ahead_s = steps[0][0] - clock()
        async with watching(backend, clock, directory, settled=False, drop_after=drop_after, interval=10.0) as rig:
            for at, _, what, said in steps:
                clock.ahead_s += max(0.0, at - clock())
                if what == "truth":
                    node.happen(said)
                elif what == "close":
                    if started and at < steps[-1][0] - 1:
                        await backend.break_off()
                else:
                    started = True
                    async with asyncio.timeout(10):
                        await backend.subscribed.wait()
                    heard = len(rig.observer.messages)
                    await backend.say(said)
                    await rig.until(lambda heard=heard: len(rig.observer.messages) > heard)  # type: ignore[misc]
                    await worked(rig, backend)
            for _ in range(4):
                clock.ahead_s += drop_after
                await worked(rig, backend)
            return rig, node, await rig.scans()


def genesis() -> Json:
    """The block that was the tip when the recording began."""
    tip = "78840ee21596459c0d0ff837f044d23b4fb512bd75480e0f719f1b81c34e9506"
    return {"id": tip, "height": 263, "timestamp": 1_795_376_000, "coinbase": "00" * 32, "txids": []}


@pytest.mark.slow
async def test_every_whale_that_was_in_the_mempool_or_in_a_block_is_in_the_log_once_with_its_outcome(
    tmp_path: Path,
) -> None:
    rig, node, scans = await replayed(tmp_path)
    events = rig.events
    alerts = [event.whale.alert.transaction_id for event in events if event.kind is Kind.ALERT]
    whales = {txid: entry for txid, entry in node.sent.items() if entry["whale"]}
    seen = {txid for txid, entry in whales.items() if entry["kind"] != UNSEEN}
    assert sorted(alerts) == sorted(seen)
    newest = {event.whale.alert.transaction_id: event for event in events}
    finals = {entry["txid"]: entry for entry in truth() if entry["event"] == "final"}
    for txid in seen:
        event, final = newest[txid], finals[txid]
        if final["status"] == "confirmed":
            holder = node.holder(txid)
            assert holder is not None
            assert (event.kind, event.update and event.update.block_hash) == (Kind.CONFIRMED, holder["id"]), final
            assert final["height"] == holder["height"]
        elif final["status"] == "replaced":
            assert event.kind in {Kind.REPLACED, Kind.DROPPED}, final
            if event.kind is Kind.REPLACED and final["kind"] != "whale_rbf_original":
                assert event.ref == final["replaced_by"]
        else:
            assert event.kind is Kind.DROPPED, final
    assert {height: scan.hash for height, scan in scans.items()} == {
        block["height"]: block["id"] for block in node.chain[1:]
    }
    assert rig.tally.reorgs == [2, 2]
    assert not rig.tally.failures
    offsets = [event.offset for event in events]
    assert offsets == list(range(1, len(offsets) + 1))
