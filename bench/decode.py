"""Decode and detect: from the bytes of a backend's frame to its whales, compared with json.loads on the same bytes."""

import gc
import gzip
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from bench.programs import BrokenError
from bench.report import Aim, Section
from whaled.model import Market, Source, Whale
from whaled.sources.mempool_space.dialect import decode
from whaled.whales.amounts import btc_to_sat
from whaled.whales.detect import Detector, Rules

RECORDING = Path(__file__).parent.parent / "tests" / "data" / "regtest-1.jsonl.gz"
TRANSACTIONS = 2000
FEW_WHALES = 4
THRESHOLD_SAT = btc_to_sat(100)
DELTA = "mempool-transactions"


class _Spent(msgspec.Struct, gc=False):
    txid: str
    vout: int
    sequence: int


class _Paid(msgspec.Struct, gc=False):
    value: int
    scriptpubkey: str
    scriptpubkey_address: str = ""


class _Entered(msgspec.Struct, gc=False):
    txid: str
    fee: int
    vsize: float
    vin: list[_Spent]
    vout: list[_Paid]


class _Changes(msgspec.Struct):
    added: list[_Entered]


class _Message(msgspec.Struct):
    delta: _Changes = msgspec.field(name=DELTA)


# Decodes every transaction in full, instead of only those that may be whales.
read_in_full = msgspec.json.Decoder(_Message).decode


def measure(rounds: int) -> Section:
    """Measure each way in turn, `rounds` times, on two frames; report medians. Raises BrokenError on a missed whale."""
    raws = frames()
    rows: list[tuple[str, ...]] = []
    ratios = []
    for raw in raws:
        found = check(raw)
        # Exclude the existing objects from garbage collection, which would otherwise scan them during measurements.
        gc.collect()
        gc.freeze()
        loads_s, full_s, detect_s = [], [], []
        for _ in range(rounds):
            loads_s.append(seconds(json.loads, raw))
            full_s.append(seconds(read_in_full, raw))
            detect_s.append(seconds(detect, raw))
        ratios.append(ratio(loads_s, detect_s))
        what = f"{found} whales, {len(raw) / 2**20:.1f} MiB"
        rows.append(row(f"json.loads alone ({what})", loads_s, peak_mib(json.loads, raw), 1.0))
        full_ratio = ratio(loads_s, full_s)
        rows.append(
            row(f"msgspec, all in full, no detection ({what})", full_s, peak_mib(read_in_full, raw), full_ratio)
        )
        rows.append(row(f"whaled, decode and detect ({what})", detect_s, peak_mib(detect, raw), ratios[-1]))
    return Section(
        title=f"Decode and detect: a frame of {TRANSACTIONS} recorded transactions",
        header=("", "us/transaction", "transactions/s", "peak MiB", "x json.loads"),
        rows=rows,
        notes=(
            f"Medians of {rounds} turns. First the transactions as recorded (one whale has 1100 inputs and is a sixth",
            f"of the frame), then with {FEW_WHALES} whales among them. Every whale is read and assessed in full.",
        ),
        aims=(
            Aim("decode and detect, times json.loads alone, as recorded", ratios[0], 5, more_is_better=True),
            Aim(f"the same with {FEW_WHALES} whales", ratios[1], 5, more_is_better=True),
        ),
    )


def frames() -> tuple[bytes, bytes]:
    """Return a frame with the transactions as recorded, and one with few whales."""
    recorded = transactions()
    return frame(recorded[:TRANSACTIONS]), frame(with_few_whales(recorded))


def transactions() -> list[dict[str, Any]]:
    """Return every transaction that entered the mempool in the recording, once."""
    found: dict[str, dict[str, Any]] = {}
    for message in messages():
        for each in message.get(DELTA, {}).get("added", ()):
            found.setdefault(each["txid"], each)
    if len(found) < TRANSACTIONS:
        raise BrokenError(f"{RECORDING} has only {len(found)} transactions")
    return list(found.values())


def with_few_whales(recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the same number of transactions in the same order, with only a few whales."""
    whales = [each for each in recorded if value_sat(each) >= THRESHOLD_SAT]
    dropped = {each["txid"] for each in whales[FEW_WHALES:]}
    return [each for each in recorded if each["txid"] not in dropped][:TRANSACTIONS]


def value_sat(transaction: dict[str, Any]) -> int:
    """Return the sum of the outputs."""
    return sum(output["value"] for output in transaction["vout"])


def frame(added: list[dict[str, Any]]) -> bytes:
    """Return a message with these transactions and all the other parts that a backend sends."""
    message: dict[str, Any] = {}
    for recorded in messages():
        if recorded.get(DELTA, {}).get("added"):
            message |= recorded
    message[DELTA] = {"sequence": 0, "added": added, "removed": [], "mined": [], "replaced": []}
    return msgspec.json.encode(message)


def messages() -> Iterator[dict[str, Any]]:
    """Yield the backend's messages in the recording."""
    with gzip.open(RECORDING, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record.get("dir") == "in":
                yield json.loads(record["raw"])


def detect(raw: bytes) -> list[Whale]:
    """Process a frame as the daemon does, up to the whales that it stores."""
    delta = decode(raw).delta
    assert delta is not None
    detector = Detector(Rules(THRESHOLD_SAT))
    candidates = detector.candidates(delta.at_least(detector.minimum_sat))
    whales = [detector.assess(each, market=Market(), now=0.0, source=Source.LIVE) for each in candidates]
    return [whale for whale in whales if whale is not None]


def check(raw: bytes) -> int:
    """Check the whales against json.loads and a sum, and return their number. Raises BrokenError."""
    found = {(whale.alert.transaction_id, whale.alert.value_sat) for whale in detect(raw)}
    sums = {(each["txid"], value_sat(each)) for each in json.loads(raw)[DELTA]["added"]}
    wanted = {(txid, value) for txid, value in sums if value >= THRESHOLD_SAT}
    if found != wanted or not wanted:
        raise BrokenError(f"{len(wanted)} whales in the frame, {len(found)} found, {len(found ^ wanted)} differ")
    return len(found)


def seconds(work: Callable[[bytes], object], raw: bytes) -> float:
    """Measure a call, with the garbage collector enabled as in the daemon."""
    began = time.perf_counter()
    work(raw)
    return time.perf_counter() - began


def ratio(slow_s: list[float], fast_s: list[float]) -> float:
    """Return the speed-up, as the median over the rounds."""
    return statistics.median(slow / fast for slow, fast in zip(slow_s, fast_s, strict=True))


def peak_mib(work: Callable[[bytes], object], raw: bytes) -> float:
    """Return the peak of the memory allocated during a call."""
    tracemalloc.start()
    try:
        work(raw)
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def row(title: str, times_s: list[float], peak: float, times: float) -> tuple[str, ...]:
    """Return a row of the table."""
    typical_s = statistics.median(times_s) / TRANSACTIONS
    return (title, f"{typical_s * 1e6:.2f}", f"{1 / typical_s:,.0f}", f"{peak:.2f}", f"{times:.1f}")
