"""The queries that the backfill asks of the log: histories, what is confirmed, gone or scanned."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from kit.whales import NOW, alert_draft, txid, whale
from whaled.backfill.coverage import Cover, Sighting, scan_of
from whaled.config.sections import EventLogSettings
from whaled.errors import EventLogError
from whaled.eventlog import notes, queries
from whaled.eventlog.meters import EventLogMeter
from whaled.eventlog.store import EventLog
from whaled.model import Block, Kind, Whale
from whaled.registry import Registry
from whaled.whales import lifecycle
from whaled.whales.lifecycle import Origin, Step, next_event

A, B = "aa" * 32, "bb" * 32


def block(block_hash: str, height: int = 800_000) -> Block:
    return Block(height=height, hash=block_hash, previous_hash="00" * 32, timestamp=int(NOW))


def ids(whales: Iterable[Whale]) -> list[str]:
    return [each.alert.transaction_id for each in whales]


async def test_the_log_returns_histories_and_confirmed_gone_and_scanned(tmp_path: Path) -> None:
    settings = EventLogSettings(path=str(tmp_path / "w.db"))
    async with EventLog.open(settings, EventLogMeter(Registry())) as log:
        await log.append([alert_draft(number, at=NOW) for number in range(4)])
        await log.append(
            [
                lifecycle.confirmed(whale(0), block(A), NOW + 1),
                lifecycle.replaced(whale(1), txid(9), NOW + 2),
                lifecycle.dropped(whale(2), NOW + 3),
            ]
        )
        histories = await log.read_each(queries.histories, [txid(0), txid(3), txid(7)])
        assert histories == {txid(0): [Step(Kind.ALERT), Step(Kind.CONFIRMED, A)], txid(3): [Step(Kind.ALERT)]}

        assert ids(await log.read(queries.confirmed_in, A)) == [txid(0)]
        assert ids(await log.read(queries.confirmed_in, B)) == []
        assert list((await log.read(queries.gone_since, NOW, 10)).items()) == [(txid(2), 2), (txid(1), 2)]
        assert await log.read(queries.gone_since, NOW + 3, 10) == {txid(2): 2}
        assert await log.read(queries.gone_since, NOW, 1) == {txid(2): 2}
        await log.append(
            [lifecycle.pending_again(whale(0), A, NOW + 4), lifecycle.pending_again(whale(2), "", NOW + 4)]
        )
        assert ids(await log.read(queries.confirmed_in, A)) == []
        assert await log.read(queries.gone_since, NOW, 10) == {txid(1): 2}
        history = (await log.read_each(queries.histories, [txid(0)]))[txid(0)]
        again = next_event(lifecycle.confirmed(whale(0), block(A), NOW), history, Origin.POLLED)
        assert again is not None
        await log.append([again])
        assert (await log.read_each(queries.histories, [txid(0)]))[txid(0)] == [*history, Step(Kind.CONFIRMED, A, 2)]
        assert ids(await log.read(queries.confirmed_in, A)) == [txid(0)]
        rows = [scan_of(height, f"{height:064x}", NOW, NOW, [Sighting(1.5)], Cover.GAP) for height in (3, 1, 2)]
        for row in rows:
            await log.write(notes.put_scan, row)
        assert await log.read(queries.scans, 1, 2) == [rows[1], rows[2]]
        await log.write(notes.put_scan, scan_of(2, A, NOW, NOW, [], Cover.GAP))
        await log.write(notes.forget_scan, 1)
        await log.write(notes.forget_scan, 1)
        assert [(scan.height, scan.hash) for scan in await log.read(queries.scans, 0, 9)] == [(2, A), (3, rows[0].hash)]
        assert (await log.read(queries.scans, 3, 3))[0].lead_s == 1.5
    with pytest.raises(EventLogError):
        await log.read(queries.scans, 0, 1)
