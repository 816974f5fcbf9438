"""Tests of the rig itself: it detects events that are missing, repeated or altered."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from faults.net import Frames, text_frame
from faults.rig import Rig, complaints, rigged
from faults.verdict import Row, read
from whaled.eventlog.schema import put_state
from whaled.model import SAT_PER_BTC

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]


def bent(row: Row, **alert: object) -> Row:
    return replace(row, alert={**row.alert, **alert})


def last_of(rows: list[Row], kind: str) -> int:
    return max(place for place, row in enumerate(rows) if row.kind == kind)


def without_a_whale(rows: list[Row]) -> list[Row]:
    txid = rows[last_of(rows, "confirmed")].txid
    kept = [row for row in rows if row.txid != txid]
    return [replace(row, offset=place) for place, row in enumerate(kept, 1)]


BENDS: dict[str, Callable[[list[Row]], list[Row]]] = {
    "missing": without_a_whale,
    "holes": lambda rows: [*rows[:5], *rows[6:]],
    "double": lambda rows: [*rows, replace(rows[0], offset=len(rows) + 1)],
    "unknown_whales": lambda rows: [replace(rows[0], txid="f" * 64), *rows[1:]],
    "wrong_amounts": lambda rows: [bent(rows[0], value_sat=rows[0].alert["value_sat"] + 1), *rows[1:]],
    "wrong_outcomes": lambda rows: [
        row if place != last_of(rows, "confirmed") else replace(row, kind="dropped", ref="")
        for place, row in enumerate(rows)
    ],
}


def with_body(row: Row, **body: object) -> Row:
    return replace(row, body={**(row.body or {}), **body})


def at_last(kind: str, bend: Callable[[Row], Row]) -> Callable[[list[Row]], list[Row]]:
    """Return a function that changes the last event of a kind."""
    return lambda rows: [bend(row) if place == last_of(rows, kind) else row for place, row in enumerate(rows)]


def before_last(kind: str, made: Callable[[Row], Row], *, after: int = 0) -> Callable[[list[Row]], list[Row]]:
    """Return a function that inserts an event of the same whale before (or after) the last event of a kind."""

    def bend(rows: list[Row]) -> list[Row]:
        place = last_of(rows, kind)
        kept = [*rows[: place + after], made(rows[place]), *rows[place + after :]]
        return [replace(row, offset=number) for number, row in enumerate(kept, 1)]

    return bend


def update(row: Row, kind: str, ref: str = "") -> Row:
    """Return a well-formed update of the whale of a row."""
    body = {"transaction_id": row.txid, "status": kind, "btc_value": row.alert["btc_value"]}
    return replace(row, kind=kind, ref=ref, body=body)


# Events that are false although each whale's last event is correct.
SUBTLE: dict[str, tuple[str, Callable[[list[Row]], list[Row]]]] = {
    "dropped while it was in the mempool until its block": (
        "wrong_outcomes", before_last("confirmed", lambda row: update(row, "dropped")),
    ),
    "confirmed in the same block twice": (
        "double", before_last("confirmed", lambda row: replace(row, repeat=2), after=1),
    ),
    "pending right after its alert": ("wrong_outcomes", before_last("confirmed", lambda row: update(row, "pending"))),
    "pending because of a block that is still in the chain": (
        "wrong_outcomes", before_last("confirmed", lambda row: update(row, "pending", row.ref)),
    ),
    "replaced by itself": (
        "wrong_outcomes", at_last("replaced", lambda row: with_body(replace(row, ref=row.txid), replaced_by=row.txid)),
    ),
    "replaced by another transaction than its ref": (
        "wrong_outcomes", at_last("replaced", lambda row: with_body(row, replaced_by="0" * 64)),
    ),
    "replaced by an unknown transaction": (
        "wrong_outcomes", at_last("replaced", lambda row: with_body(replace(row, ref="0" * 64), replaced_by="0" * 64)),
    ),
    "confirmed at another height": ("wrong_outcomes", at_last("confirmed", lambda row: with_body(row, block_height=1))),
    "an update of another amount": ("wrong_outcomes", at_last("confirmed", lambda row: with_body(row, btc_value=1.0))),
    "a wrong fee": ("wrong_amounts", at_last("alert", lambda row: bent(row, fee_sat=1))),
    "a wrong amount moved": ("wrong_amounts", at_last("alert", lambda row: bent(row, moved_sat=1))),
}  # fmt: skip


async def test_a_verdict_finds_every_kind_of_fault(tmp_path: Path) -> None:
    async with rigged(tmp_path, "the rig itself") as rig:
        await rig.go(10)
        await rig.start()
        await rig.go(30)
        await rig.settle()
        rows = read(rig.database)
        assert rig.verdict(rows).is_clean
        for what, bend in BENDS.items():
            found = msgspec.to_builtins(rig.verdict(bend(rows)))
            assert found[what] >= 1, what
        for how, (what, bend) in SUBTLE.items():
            found = msgspec.to_builtins(rig.verdict(bend(rows)))
            assert found[what] >= 1, how
        assert rig.verdict(rows).are_inputs_known
        assert not rig.verdict([bent(row, moved_sat=None) for row in rows]).are_inputs_known
        check_that_altered_frames_are_found(rig, rows)
        check_that_lost_repeated_and_swapped_events_are_found(rig, rows)
        await rig.finish()


def check_that_altered_frames_are_found(rig: Rig, rows: list[Row]) -> None:
    whole = list(rig.raw.frames)
    doubled = replace(whole[0], data={**whole[0].data, "btc_value": 2 * whole[0].data["btc_value"]})
    for frames in (
        whole[:-1], [*whole[:9], *whole[4:]], [*whole[:9], *whole[10:]], whole[1:], [doubled, *whole[1:]],
        [replace(whole[0], type="whale_update"), *whole[1:]], [replace(whole[0], timestamp=""), *whole[1:]],
    ):  # fmt: skip
        rig.raw.frames = frames
        assert rig.verdict(rows).client_faults == 1
    rig.raw.frames = whole


def check_that_lost_repeated_and_swapped_events_are_found(rig: Rig, rows: list[Row]) -> None:
    whole = list(rig.plain.received)
    for received in (whole[:-1], [*whole, whole[-1]], [whole[1], whole[0], *whole[2:]]):
        rig.plain.received = received
        assert rig.verdict(rows).client_faults == 1
    rig.plain.received = whole


async def test_a_daemon_that_moves_its_first_block_is_found(tmp_path: Path) -> None:
    async with rigged(tmp_path, "the rig itself, blocks excused", block_interval=0) as rig:
        await rig.start()
        await rig.settle()
        with closing(sqlite3.connect(rig.database, isolation_level=None, timeout=10)) as db:
            put_state(db, "first_block", str(rig.sim.world.chain.tip.height + 2))
        rig.sim.world.mine([rig.sim.world.pay(150 * SAT_PER_BTC, relay=False)])
        await rig.go()
        with pytest.raises(AssertionError, match="missing: "):
            await rig.settle(within_s=8)


async def test_a_daemon_that_skips_a_block_is_found(tmp_path: Path) -> None:
    few = {"backfill": {"max_blocks": 2}}
    async with rigged(tmp_path, "the rig itself, blocks skipped", block_interval=0, sections=few) as rig:
        await rig.start()
        await rig.settle()
        await rig.kill()
        for _ in range(4):
            rig.sim.world.mine()
        await rig.start()
        with pytest.raises(AssertionError, match="blocks were skipped"):
            await rig.settle()


def test_errors_and_tracebacks_in_the_log_are_found() -> None:
    fine = ['{"event":"daemon_ready","level":"info"}', '{"event":"upstream_link_lost","level":"warning"}']
    for line in ('{"event":"canary_failed","level":"error"}', "Traceback (most recent call last):"):
        assert complaints([*fine, line]) == [line]
    assert complaints(fine) == []


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_frames_are_separated_however_the_bytes_arrive(step: int) -> None:
    head = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
    sent = [head, b"\x81\x02{}", text_frame(b"x" * 300), b"\x81\x7e\x00\x80" + b"y" * 128, b"\x81\x82abcd12"]
    stream, frames = b"".join(sent), Frames()
    got: dict[int, bytes] = {}
    ends = []
    for start in range(0, len(stream), step):
        for piece in frames.split(stream[start : start + step]):
            got[piece.frame] = got.get(piece.frame, b"") + piece.data
            ends += [piece.frame] if piece.is_last else []
    assert [got[index] for index in range(len(sent))] == sent
    assert ends == list(range(len(sent)))
