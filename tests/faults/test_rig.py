"""The rig can fail: whatever is taken away, doubled or bent is found."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from faults.kit import Rig, rigged
from faults.net import Frames, text_frame
from faults.verdict import Row, read

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
    "strangers": lambda rows: [replace(rows[0], txid="f" * 64), *rows[1:]],
    "wrong_amounts": lambda rows: [bent(rows[0], value_sat=rows[0].alert["value_sat"] + 1), *rows[1:]],
    "wrong_fates": lambda rows: [
        row if place != last_of(rows, "confirmed") else replace(row, kind="dropped", ref="")
        for place, row in enumerate(rows)
    ],
}


async def test_a_verdict_finds_what_is_wrong(tmp_path: Path) -> None:
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
        await a_client_that_lost_doubled_or_swapped_something_is_found(rig, rows)
        await rig.finish()


async def a_client_that_lost_doubled_or_swapped_something_is_found(rig: Rig, rows: list[Row]) -> None:
    whole = list(rig.plain.heard)
    for heard in (whole[:-1], [*whole, whole[-1]], [whole[1], whole[0], *whole[2:]]):
        rig.plain.heard = heard
        assert rig.verdict(rows).client_faults == 1
    rig.plain.heard = whole


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_frames_are_told_apart_however_the_bytes_come(step: int) -> None:
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
