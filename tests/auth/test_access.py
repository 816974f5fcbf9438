import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from kit.gateway import until
from kit.whales import NOW
from whaled.auth import access, audit, register
from whaled.auth.access import AccessKeeper
from whaled.auth.audit import Act
from whaled.auth.ledger import NoteQueue
from whaled.auth.meters import AccessMeter
from whaled.auth.revocations import Kind, Revocation, Revocations
from whaled.auth.store import AccessStore, Work, open_directly
from whaled.config.sections import AuthSettings
from whaled.errors import AccessError
from whaled.model import Grant
from whaled.registry import Registry

T = TypeVar("T")
FAR = 4e9
GRANT = Grant(client_id="c1", permissions=frozenset(), issued_at=NOW, expires_at=FAR, token_id="t1", family="t1")


class Parts(NamedTuple):
    keeper: AccessKeeper
    revocations: Revocations
    notes: NoteQueue
    registry: Registry

    def metric(self, line: str) -> bool:
        return line.encode() in generate_latest(self.registry.collectors).splitlines()


@asynccontextmanager
async def opened(path: Path, settings: AuthSettings | None = None) -> AsyncIterator[Parts]:
    registry = Registry()
    meter, revocations = AccessMeter(registry), Revocations()
    notes = NoteQueue(meter)
    async with AccessKeeper.opened(
        path, revocations, notes, meter, settings=lambda: settings or AuthSettings()
    ) as keeper:
        yield Parts(keeper, revocations, notes, registry)


@asynccontextmanager
async def watching(parts: Parts) -> AsyncIterator[asyncio.Event]:
    revoked = asyncio.Event()
    task = asyncio.create_task(parts.keeper.watch(revoked.set))
    try:
        yield revoked
    finally:
        task.cancel()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "whaled.access.db"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "LOOK_S", 0.001)
    monkeypatch.setattr(access, "RETRY_S", 0.001)


def revoke(path: Path, name: str = "t1", ends: float = FAR) -> None:
    with open_directly(path) as other:
        other.write(lambda c: register.revoke(c, Revocation(Kind.TOKEN, name, NOW, ends)))


def record(act: Act, connection: sqlite3.Connection) -> None:
    audit.record(connection, act)


def delete(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def hide(path: Path) -> Path:
    """Give the database another name, and its name to something that is no database."""
    moved = path.rename(path.with_name("moved.db"))
    path.mkdir()
    return moved


def show(path: Path, moved: Path) -> None:
    path.rmdir()
    moved.rename(path)


def damage(path: Path) -> None:
    path.write_bytes(b"\xff" * 8192)
    path.chmod(0o600)


async def test_revocations_are_in_force_when_the_database_is_open(path: Path) -> None:
    revoke(path)
    async with opened(path) as parts:
        assert parts.revocations.cover(GRANT, NOW)
        assert parts.metric("whaled_token_revocations 1.0")


async def test_many_revocations_are_loaded_without_holding_the_loop(path: Path) -> None:
    with open_directly(path) as other:
        rows = [("jti", f"t{number}", NOW, FAR) for number in range(2_300)]
        insert = "INSERT INTO revocations (kind, name, at, until) VALUES (?, ?, ?, ?)"
        other.write(lambda c: c.executemany(insert, rows))
    async with opened(path) as parts:
        assert parts.revocations.size == 2_300


async def test_a_revocation_of_another_process_is_noticed(path: Path) -> None:
    async with opened(path) as parts, watching(parts) as revoked:
        revoke(path)
        async with asyncio.timeout(30):
            await revoked.wait()
        assert parts.revocations.cover(GRANT, NOW)


class Flaky(AccessStore):
    """A database of which one read fails when it is told to."""

    fails = False

    async def read(self, work: Work[T]) -> T:
        if self.fails:
            self.fails = False
            raise AccessError("broken")
        return await super().read(work)


async def test_a_revocation_is_noticed_even_if_the_first_read_after_it_fails(path: Path) -> None:
    meter, revocations = AccessMeter(Registry()), Revocations()
    async with Flaky.open(path) as store:
        assert isinstance(store, Flaky)
        keeper = AccessKeeper(store, revocations, NoteQueue(meter), meter, settings=AuthSettings)
        await keeper.prune()
        revoke(path)
        store.fails = True
        async with watching(Parts(keeper, revocations, NoteQueue(meter), Registry())) as revoked:
            async with asyncio.timeout(30):
                await revoked.wait()
        assert not store.fails
        assert revocations.cover(GRANT, NOW)


async def test_a_write_that_revokes_nothing_does_not_have_every_session_checked(path: Path) -> None:
    async with opened(path) as parts:
        with open_directly(path) as other:
            other.write(lambda c: audit.record(c, Act(at=NOW, actor="a", origin="o", act="b", target="t")))
        assert not await parts.keeper.load()
        assert parts.metric("whaled_audit_records 1.0")


async def test_revocations_stay_in_force_if_the_database_is_deleted(path: Path) -> None:
    revoke(path)
    async with opened(path) as parts, watching(parts) as revoked:
        delete(path)
        await until(path.exists)
        revoke(path, "t2")
        async with asyncio.timeout(30):
            await revoked.wait()
        assert parts.revocations.size == 2
        assert parts.revocations.cover(GRANT, NOW)


async def test_expired_revocations_leave_memory_and_the_database(path: Path) -> None:
    revoke(path, ends=1.0)
    revoke(path, "t2")
    async with opened(path) as parts, watching(parts):
        await until(lambda: parts.revocations.size == 1)
        await parts.keeper.prune()
        _, left = await parts.keeper.store.read(lambda c: register.revocations_after(c, 0))
        assert [revocation.name for revocation in left] == ["t2"]


async def test_the_audit_log_is_cut_to_the_limits_in_force(path: Path) -> None:
    async with opened(path, AuthSettings(audit_limit=3)) as parts:
        with open_directly(path) as other:
            for at in (0.0, FAR, FAR, FAR, FAR):
                other.write(partial(record, Act(at=at, actor="a", origin="o", act="b", target="t")))
        await parts.keeper.prune()
        assert parts.metric("whaled_audit_records 3.0")


async def test_a_database_that_cannot_be_read_is_reported_once_and_its_recovery_too(path: Path) -> None:
    revoke(path)
    with capture_logs() as lines:
        async with opened(path) as parts, watching(parts):
            moved = hide(path)
            await until(lambda: not parts.metric("whaled_access_failures_total 0.0"))
            await until(lambda: not parts.metric("whaled_access_failures_total 1.0"))
            assert parts.revocations.cover(GRANT, NOW)
            show(path, moved)
            await until(lambda: any(line["event"] == "access_database_recovered" for line in lines))
    assert [line["event"] for line in lines] == ["access_database_failed", "access_database_recovered"]


async def test_notes_are_stored_as_they_come(path: Path) -> None:
    async with opened(path) as parts:
        task = asyncio.create_task(parts.keeper.store_notes())
        parts.notes.refreshed(GRANT)
        async with asyncio.timeout(30):
            while not await parts.keeper.store.read(lambda c: register.listed(c, client_id=None, now=NOW)):
                pass
        task.cancel()


async def test_the_last_notes_are_stored_at_the_end(path: Path) -> None:
    async with opened(path) as parts:
        parts.notes.refreshed(GRANT)
        parts.notes.ended(Revocation(Kind.ENDED, "c1\nt1", NOW, FAR))
    async with opened(path) as again:
        assert again.revocations.cover(GRANT, NOW)
        (listed,) = await again.keeper.store.read(lambda c: register.listed(c, client_id=None, now=NOW))
        assert listed[0].jti == "t1"


async def test_a_damaged_database_fails_the_start(path: Path) -> None:
    damage(path)
    with pytest.raises(AccessError, match="retire the signing keys"):
        async with opened(path):
            pass
