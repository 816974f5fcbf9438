"""A long event log, built once for all attacks that replay it."""

import hashlib
import time
from pathlib import Path

from msgspec.structs import replace

from bench import messages
from bench.programs import BrokenError
from whaled.eventlog.damage import Damage
from whaled.eventlog.writer import Writer
from whaled.model import Draft, Kind, Status, Update, Whale

BUSY_TIMEOUT_S = 5.0
APART_S = 2.0
AGO_S = 30 * 86_400.0
PAGE = 20_000
# Values from 100 BTC on, so that filters match some of them.
LEAST_SAT = 10_000_000_000
SPREAD_SAT = 90_000_000_000


def build(path: Path, count: int) -> None:
    """Build a log of `count` events, `APART_S` apart: alerts, each followed by its `dropped`.

    The last event is so old that the daemon does not check it with the backend again.
    """
    writer = Writer(path, BUSY_TIMEOUT_S, _damaged)
    now = time.time()
    writer.open(now)
    try:
        began = now - AGO_S - count * APART_S
        for first in range(0, count, PAGE):
            numbers = range(first, min(first + PAGE, count))
            writer.append([_draft(number, began + number * APART_S) for number in numbers])
    finally:
        writer.close()


def _damaged(damage: Damage) -> None:
    raise BrokenError(f"the new log is damaged: {damage}")


_BASE = messages.event(0).whale.alert


def _draft(number: int, at: float) -> Draft:
    txid = hashlib.sha256(str(number // 2).encode()).hexdigest()
    alert = replace(_BASE, transaction_id=txid, value_sat=LEAST_SAT + number // 2 * 7919 % SPREAD_SAT)
    whale = Whale(alert, (f"bc1q{txid[:38]}", f"bc1q{txid[20:58]}"))
    if number % 2 == 0:
        return Draft(kind=Kind.ALERT, at=at, whale=whale)
    update = Update(transaction_id=txid, status=Status.DROPPED, btc_value=alert.btc_value)
    return Draft(kind=Kind.DROPPED, at=at, whale=whale, update=update)
