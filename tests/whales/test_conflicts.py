"""Two transactions that spend the same output: one has replaced the other, whether or not the backend says so."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from msgspec.structs import replace

from kit.pipeline import Pipeline, Published, opened, pays, received, timed
from kit.whales import BTC, NOW, alert_draft, txid
from whaled.config.sections import DetectionSettings
from whaled.eventlog import queries
from whaled.eventlog.rows import Rows
from whaled.eventlog.store import EventLog
from whaled.source import MempoolChange
from whaled.sources.mempool_space.dialect import decode
from whaled.whales import lifecycle
from whaled.whales.conflicts import linked, present

BLOCK = {"id": "b1" * 32, "height": 900_001, "timestamp": int(NOW), "previousblockhash": "b0" * 32}
NUMBERS = {txid(number): number for number in range(10)}


def spending(number: int, *coins: int, value: int = 100 * BTC) -> dict[str, Any]:
    """A transaction that spends these coins."""
    inputs = [{"txid": txid(1000 + coin), "vout": 0, "sequence": 1, "prevout": None} for coin in coins]
    return pays(number, value) | {"vin": inputs}


def message(
    added: tuple[dict[str, Any], ...] = (), removed: tuple[int, ...] = (), mined: tuple[int, ...] = ()
) -> MempoolChange:
    delta = {
        "sequence": 1,
        "added": list(added),
        "removed": [txid(number) for number in removed],
        "mined": [txid(number) for number in mined],
        "replaced": [],
    }
    return received(encode({"mempool-transactions": delta, **({"block": BLOCK} if mined else {})}), NOW)


def encode(parts: dict[str, Any]) -> bytes:
    return json.dumps(parts, separators=(",", ":")).encode()


def told(published: Published) -> list[tuple[str, int, int | str]]:
    """Return the kind of each event, the number of its whale, and its ref as the number of a txid or in short."""
    return [
        (event.kind.value, NUMBERS[event.whale.alert.transaction_id], NUMBERS.get(event.ref, event.ref[-2:]))
        for event in published.events
    ]


def running_on(log: EventLog) -> tuple[Pipeline, Published]:
    published = Published()
    running, _ = timed(log, DetectionSettings(), published)
    return running, published


async def test_a_package_whose_parent_pays_less_replaces_the_spender_of_its_coin(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        running, published = running_on(log)
        await running.handle(message((spending(1, 7),)))
        parent, child = spending(2, 7, value=99 * BTC), spending(3, 8, value=1)
        await running.handle(message((parent, child), removed=(1,)))
        await running.handle(message((spending(4, 9),)))
        await running.handle(message((spending(5, 9),), removed=(4,)))
    assert told(published) == [
        ("alert", 1, ""),
        ("replaced", 1, 2),
        ("alert", 4, ""),
        ("alert", 5, ""),
        ("replaced", 4, 5),
    ]
    assert published.events[3].whale.alert.replaces == txid(4)


async def test_a_whale_that_left_together_with_an_unrelated_arrival_is_not_replaced(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        running, published = running_on(log)
        await running.handle(message((spending(1, 7),)))
        await running.handle(message((spending(2, 8, value=1),), removed=(1,)))
    assert told(published) == [("alert", 1, "")]


async def test_a_whale_that_spends_the_coin_of_another_one_replaces_it_across_a_gap(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        running, published = running_on(log)
        await running.handle(message((spending(1, 5, 7),)))
        await running.handle(message((spending(2, 7, 8),)))
        await running.handle(message((spending(3, 9),)))
    assert told(published) == [("alert", 1, ""), ("alert", 2, ""), ("replaced", 1, 2), ("alert", 3, "")]
    assert [event.whale.alert.replaces for event in published.events if event.update is None] == [None, txid(1), None]


async def test_of_two_that_spend_the_same_the_mined_one_has_replaced_the_other(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        running, published = running_on(log)
        await running.handle(message((spending(1, 7),)))
        await running.handle(message((spending(2, 7),)))
        await running.handle(message(mined=(1,)))
    assert told(published)[2:] == [("replaced", 1, 2), ("confirmed", 1, "b1"), ("replaced", 2, 1)]


async def test_a_confirmed_whale_is_not_replaced_by_one_that_spends_the_same(tmp_path: Path) -> None:
    """The death of its block takes it back first."""
    async with opened(tmp_path) as log:
        running, published = running_on(log)
        await running.handle(message((spending(1, 7),)))
        await running.handle(message(mined=(1,)))
        await running.handle(message((spending(2, 7),)))
    assert told(published) == [("alert", 1, ""), ("confirmed", 1, "b1"), ("alert", 2, "")]


async def test_a_whale_replaces_the_current_spender_and_not_one_replaced_before(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        running, published = running_on(log)
        for each in (spending(1, 5, 8), spending(2, 5), spending(3, 6), spending(4, 6, 8), spending(5, 8)):
            await running.handle(message((each,)))
    assert [each for each in told(published) if each[0] == "replaced"] == [
        ("replaced", 1, 2),
        ("replaced", 3, 4),
        ("replaced", 4, 5),
    ]
    replaces = [event.whale.alert.replaces for event in published.events if event.update is None]
    assert replaces == [None, txid(1), None, txid(3), txid(4)]


async def test_a_whale_does_not_replace_one_that_was_replaced_before_it_came(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        running, published = running_on(log)
        for each in (spending(1, 5, 8), spending(2, 5), spending(3, 8)):
            await running.handle(message((each,)))
    assert [event.whale.alert.replaces for event in published.events if event.update is None] == [None, txid(1), None]


async def test_a_whale_does_not_wait_for_readers_of_the_log(tmp_path: Path) -> None:
    """A search through all events takes a tenth of a second for 200,000 of them."""
    async with opened(tmp_path) as log:
        running, published = running_on(log)
        await running.handle(message((spending(1, 7),)))
        release = Event()
        for thread in (log._threads.search_thread, log._threads.page_thread, log._threads.time_thread):
            thread.submit(release.wait)
        try:
            async with asyncio.timeout(10):
                await running.handle(message((spending(2, 7),), removed=(1,)))
        finally:
            release.set()
    assert told(published) == [("alert", 1, ""), ("alert", 2, ""), ("replaced", 1, 2)]


async def test_no_whale_is_replaced_by_itself(tmp_path: Path) -> None:
    delta = {"sequence": 1, "replaced": [{"replaced": txid(1), "by": spending(1, 7)}]}
    async with opened(tmp_path) as log:
        running, published = running_on(log)
        await running.handle(received(encode({"mempool-transactions": delta}), NOW))
    assert told(published) == [("alert", 1, "")]
    assert published.events[0].whale.alert.replaces is None


async def test_a_rival_that_retention_removes_meanwhile_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as log:
        running, _ = running_on(log)
        await running.handle(message((spending(1, 7),)))
        spenders = queries.spenders

        def then_pruned(rows: Rows, outpoints: Sequence[str]) -> dict[str, list[str]]:
            found = spenders(rows, outpoints)
            log._threads.write_thread.submit(log._threads.writer.prune, 99).result()
            return found

        monkeypatch.setattr(queries, "spenders", then_pruned)
        draft = lifecycle.alerted(replace(alert_draft(2).whale, outpoints=(f"{txid(1007)}:0",)), NOW)
        rivals = await log.read_each(queries.rivals, present([draft]).items())
        assert await log.read_each(queries.whales, [txid(1)]) == {}
        assert linked([draft], rivals) == [draft]


async def test_each_of_several_replacements_is_reported(tmp_path: Path) -> None:
    """Replacement cycling: the first comes back each time."""
    async with opened(tmp_path) as log:
        running, published = running_on(log)
        for number in (1, 2, 3):
            await running.handle(message((spending(number, 7),)))
        assert told(published)[-1] == ("replaced", 2, 3)
        outpoints = await log.read_each(queries.outpoints, [txid(1), txid(3), txid(9)])
        assert outpoints == {key: [f"{txid(1007)}:0"] for key in (txid(1), txid(3))}
        assert await log.read_each(queries.spenders, [f"{txid(1007)}:0", "elsewhere:0"]) == {
            f"{txid(1007)}:0": [txid(1), txid(2), txid(3)]
        }


async def test_a_backend_that_names_an_outpoint_twice_ends_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        running, published = running_on(log)
        await running.handle(message((spending(1, 7, 7),)))
    assert told(published) == [("alert", 1, "")]


async def test_the_outpoints_of_a_pruned_whale_are_removed_with_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as log:
        running, _ = running_on(log)
        await running.handle(message((spending(1, 7),)))
        assert await log.prune(NOW + 365 * 86_400, follows_blocks=False) == 1
        assert await log.read_each(queries.spenders, [f"{txid(1007)}:0"]) == {}
        await running.handle(message((spending(2, 7),)))
        assert await log.read_each(queries.spenders, [f"{txid(1007)}:0"]) == {f"{txid(1007)}:0": [txid(2)]}


def test_the_spenders_in_a_message_are_found_despite_odd_parts() -> None:
    odd = spending(3, 9) | {"fee": "?"}
    broken = {"txid": 7, "vin": [{}]}
    pair = {"replaced": txid(8), "by": spending(4, 6)}
    delta = {"sequence": 1, "added": [spending(1, 7), broken, odd], "replaced": [pair]}
    read = decode(encode({"mempool-transactions": delta})).delta
    assert read is not None
    wanted = {f"{txid(1000 + coin)}:0" for coin in (5, 6, 7, 9)}
    assert read.spending(wanted) == {
        f"{txid(1007)}:0": txid(1),
        f"{txid(1009)}:0": txid(3),
        f"{txid(1006)}:0": txid(4),
    }
    assert read.spending(()) == {}
