import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from whaled.auth import audit
from whaled.auth.audit import Act
from whaled.auth.store import Database, open_directly

DAY_S = 86400.0


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with open_directly(tmp_path / "a.db") as opened:
        yield opened


def act(at: float = 1.0, target: str = "jti t1", **more: str) -> Act:
    return Act(at=at, actor="uid 0 (root)", origin="socket", act="token revoked", target=target, **more)


def _record(one: Act, connection: sqlite3.Connection) -> None:
    audit.record(connection, one)


def record(database: Database, *acts: Act) -> None:
    for one in acts:
        database.write(partial(_record, one))


def targets(database: Database) -> list[str]:
    return [entry.act.target for entry in database.read(lambda connection: audit.newest(connection, 100))]


def test_a_record_is_returned_as_it_was_stored(database: Database) -> None:
    stored = act(outcome="refused", detail="no such client ☃")
    record(database, stored)
    assert [entry.act for entry in database.read(lambda connection: audit.newest(connection, 5))] == [stored]


def test_records_come_in_pages_the_newest_first(database: Database) -> None:
    record(database, *(act(target=str(number)) for number in range(5)))
    first = database.read(lambda connection: audit.newest(connection, 2))
    second = database.read(lambda connection: audit.newest(connection, 2, before=first[-1].id))
    last = database.read(lambda connection: audit.newest(connection, 2, before=second[-1].id))
    assert [[entry.act.target for entry in page] for page in (first, second, last)] == [["4", "3"], ["2", "1"], ["0"]]


def test_a_record_cannot_be_changed(database: Database) -> None:
    record(database, act())
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        database.write(lambda connection: connection.execute("UPDATE audit SET actor = 'nobody'"))
    assert [entry.act for entry in database.read(lambda connection: audit.newest(connection, 5))] == [act()]


def test_long_and_odd_texts_from_outside_are_cut_and_stored(database: Database) -> None:
    record(database, act(target="x" * 5_000), act(target="half \ud800 a pair"), act(target="a\0b\n"))
    assert targets(database) == ["a\0b\n", "half \\ud800 a pair", "x" * audit.MAX_TEXT]


def test_old_records_are_removed_and_the_number_stays_exact(database: Database) -> None:
    record(database, *(act(at=number * DAY_S, target=str(number)) for number in range(5)))
    removed = database.write(lambda c: audit.prune(c, 5 * DAY_S, retention_s=2 * DAY_S, limit=100))
    assert (removed, targets(database)) == (3, ["4", "3"])
    record(database, act(at=5 * DAY_S, target="5"))
    assert database.read(audit.count) == len(targets(database)) == 3


def test_the_oldest_records_beyond_the_limit_are_removed(database: Database) -> None:
    assert database.read(audit.count) == 0
    record(database, *(act(target=str(number)) for number in range(5)))
    database.write(lambda c: audit.prune(c, 2.0, retention_s=DAY_S, limit=2))
    assert (targets(database), database.read(audit.count)) == (["4", "3"], 2)


def test_all_records_are_removed_once_all_are_old(database: Database) -> None:
    record(database, act(), act())
    assert database.write(lambda c: audit.prune(c, 9 * DAY_S, retention_s=DAY_S, limit=100)) == 2
    assert targets(database) == []


def test_a_record_made_while_the_clock_was_wrong_leaves_no_gap(database: Database) -> None:
    record(database, act(at=9 * DAY_S, target="before"), act(at=1.0, target="1970"), act(at=9 * DAY_S, target="after"))
    database.write(lambda c: audit.prune(c, 9 * DAY_S, retention_s=DAY_S, limit=100))
    assert targets(database) == ["after", "1970", "before"]
