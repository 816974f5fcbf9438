"""Recorded responses and frames of real backends, their ground truth, and simulated transactions that match them."""

import gzip
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec
from msgspec import Struct

from kit.paths import DATA
from whaled.simulator.scripts import Script, ScriptType
from whaled.simulator.serial import assemble
from whaled.simulator.transactions import Coin, Payment, Tx, TxKind

Json = dict[str, Any]
FOLDER = DATA / "real"


class Answer(Struct, frozen=True):
    """A REST response as received."""

    label: str
    path: str
    data: str | None
    status: int
    type: str | None
    body: str

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return msgspec.json.decode(self.body)


class Frame(Struct, frozen=True):
    """A message of the stream as received; `label` names the transactions in it."""

    label: str
    raw: str

    @property
    def json(self) -> Json:
        """The message, parsed."""
        found: Json = msgspec.json.decode(self.raw)
        return found


class Recording(Struct, frozen=True):
    """The responses and frames of one backend."""

    txids: dict[str, str]
    blocks: dict[str, str]
    answers: tuple[Answer, ...]
    frames: tuple[Frame, ...]

    def answer(self, path: str, label: str | None = None) -> Answer:
        """Return the first response to this path."""
        return next(each for each in self.answers if each.path == path and label in (None, each.label))

    def tx(self, label: str, rest: str = "") -> Answer:
        """Return the response to `tx/:txid` followed by `rest`."""
        return self.answer(f"tx/{self.txids[label]}{rest}")

    def block(self, label: str, rest: str = "") -> Answer:
        """Return the response to `block/:hash` followed by `rest`."""
        return self.answer(f"block/{self.blocks[label]}{rest}")

    def added(self, label: str) -> Json:
        """Return a transaction as the stream first sent it."""
        return next(tx for frame in self.frames for tx in added(frame) if tx["txid"] == self.txids[label])

    def streamed(self) -> set[str]:
        """Return the labels of the transactions that the stream added."""
        there = {tx["txid"] for frame in self.frames for tx in added(frame)}
        return {label for label, txid in self.txids.items() if txid in there}

    def replacer(self, loser: str, winner: str) -> tuple[Json, bool]:
        """Return a transaction as `replaced[].by`, and whether a block message contained it."""
        for frame in self.frames:
            message = frame.json
            for pair in message.get("mempool-transactions", {}).get("replaced", ()):
                if (pair["replaced"], pair["by"]["txid"]) == (self.txids[loser], self.txids[winner]):
                    return pair["by"], "block" in message
        raise AssertionError(f"{loser} is never replaced by {winner}")


def added(frame: Frame) -> list[Json]:
    """Return the list `added` of a message."""
    found: list[Json] = frame.json.get("mempool-transactions", {}).get("added", [])
    return found


@cache
def recording(name: str) -> Recording:
    """Return one of the recordings."""
    return msgspec.json.decode(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()), type=Recording)


def like(label: str) -> Tx:
    """Return a simulated transaction with the inputs and outputs of a recorded one. The signatures differ."""
    found = recording("none").tx(label)
    # REST no longer has replaced transactions; the stream of a backend with electrs included their inputs.
    return like_body(found.json if found.status == 200 else recording("esplora").added(label))


def like_body(body: Json) -> Tx:
    """Return a simulated transaction with the inputs and outputs of a transaction in JSON with prevouts."""
    return assemble(
        TxKind.EXACT,
        [Coin(vin["txid"], vin["vout"], vin["prevout"]["value"], _script(vin["prevout"])) for vin in body["vin"]],
        [Payment(vout["value"], _script(vout)) for vout in body["vout"]],
        body["fee"],
        sent_at=0.0,
        sequence=body["vin"][0]["sequence"],
        version=body["version"],
    )


def _script(output: Json) -> Script:
    return Script(
        output["scriptpubkey"],
        output.get("scriptpubkey_address", ""),
        output["scriptpubkey_asm"],
        ScriptType(output["scriptpubkey_type"]),
    )


def _lines(name: str) -> Iterator[Any]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


@cache
def recorded_frames() -> tuple[bytes, ...]:
    """Return every frame that a real backend sent on both connections, in order."""
    return tuple(entry["raw"].encode() for entry in _lines("regtest-1.jsonl.gz") if entry["dir"] == "in")


@cache
def real_shapes() -> dict[str, dict[str, Any]]:
    """Return mainnet transactions in esplora's format without signatures, and their correct shapes, by name."""
    return {entry["name"]: entry for entry in _lines("shapes.jsonl.gz")}


@cache
def truth() -> tuple[dict[str, Any], ...]:
    """Return the transactions that were sent to the backend's bitcoind, and their outcomes."""
    return tuple(_lines("regtest-1.truth.jsonl.gz"))


def true_transactions() -> dict[str, dict[str, Any]]:
    """Return the transactions that were sent, by txid."""
    return {entry["txid"]: entry for entry in truth() if entry["event"] == "tx"}


def burst_frame() -> bytes:
    """Return the largest recorded frame, which has 1108 transactions."""
    return max(recorded_frames(), key=len)
