import asyncio
from pathlib import Path
from typing import TypeVar

import pytest
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from kit.whales import NOW
from whaled.auth import register
from whaled.auth.ledger import NoteQueue
from whaled.auth.meters import AccessMeter
from whaled.auth.revocations import Kind, Revocation
from whaled.auth.store import Direct, Work, open_directly
from whaled.errors import AccessError
from whaled.model import Grant
from whaled.registry import Registry

T = TypeVar("T")
END = Revocation(Kind.ENDED, "c1\nt1", NOW, NOW + 60)


def grant(number: int) -> Grant:
    return Grant(
        client_id="c1", permissions=frozenset(), issued_at=NOW, expires_at=NOW + 60, token_id=f"t{number:04}",
        family="t1", key_id="k1",
    )  # fmt: skip


class Broken:
    """A database that cannot be written."""

    async def read(self, work: Work[T]) -> T:
        raise AccessError("broken")

    async def write(self, work: Work[T]) -> T:
        raise AccessError("broken")


def queue(limit: int = 10_000) -> tuple[NoteQueue, Registry]:
    registry = Registry()
    return NoteQueue(AccessMeter(registry), limit), registry


async def test_all_notes_are_stored_in_a_few_transactions(tmp_path: Path) -> None:
    notes, _ = queue()
    for number in range(1_200):
        notes.refreshed(grant(number))
    notes.ended(END)
    with open_directly(tmp_path / "a.db") as database:
        await notes.store(Direct(database))
        tokens = database.read(lambda c: register.listed(c, client_id=None, now=NOW))
        ends = database.read(lambda c: register.revocations_after(c, 0))[1]
    assert [token.jti for token, _ in tokens] == [f"t{number:04}" for number in range(1_200)]
    assert {token.issued_by for token, _ in tokens} == {"refresh"}
    assert ends == [END]
    assert notes.waiting == 0


async def test_notes_of_a_failed_transaction_wait_in_their_order(tmp_path: Path) -> None:
    notes, _ = queue()
    for number in range(3):
        notes.refreshed(grant(number))
    with pytest.raises(AccessError):
        await notes.store(Broken())
    assert notes.waiting == 3
    with open_directly(tmp_path / "a.db") as database:
        await notes.store(Direct(database))
        assert len(database.read(lambda c: register.listed(c, client_id=None, now=NOW))) == 3


async def test_notes_beyond_the_limit_are_lost_counted_and_logged_once() -> None:
    notes, registry = queue(limit=2)
    with capture_logs() as lines:
        for number in range(5):
            notes.refreshed(grant(number))
    assert notes.waiting == 2
    assert b"whaled_token_register_lost_total 3.0" in generate_latest(registry.collectors)
    assert [line["event"] for line in lines] == ["token_register_full"]


async def test_a_waiter_wakes_up_for_a_note_and_for_one_that_was_there_before() -> None:
    notes, _ = queue()
    waiter = asyncio.ensure_future(notes.added())
    await asyncio.sleep(0)
    assert not waiter.done()
    notes.ended(END)
    async with asyncio.timeout(30):
        await waiter
        await notes.added()
