from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kit.whales import NOW
from whaled.auth import register
from whaled.auth.revocations import Kind, Revocation, Revocations
from whaled.auth.store import Database, open_directly
from whaled.errors import AccessError
from whaled.model import Grant, Permission

HOUR_S = 3600.0


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with open_directly(tmp_path / "a.db") as opened:
        yield opened


def grant(jti: str = "t1", *, client_id: str = "c1", family: str | None = None, life_s: float = HOUR_S) -> Grant:
    return Grant(
        client_id=client_id, permissions=frozenset({Permission.READ, Permission.ADMIN}), issued_at=NOW,
        authenticated_at=NOW, expires_at=NOW + life_s, token_id=jti, family=family or jti, key_id="k1", key_mark="m",
    )  # fmt: skip


def add(database: Database, *grants: Grant, by: str = "command line uid 0") -> None:
    for one in grants:
        database.write(partial(register.add, grant=one, issued_by=by))


def revoke(database: Database, kind: Kind, name: str, *, at: float = NOW, until: float = NOW + HOUR_S) -> None:
    database.write(lambda c: register.revoke(c, Revocation(kind, name, at, until)))


def listed(database: Database, client_id: str | None = None, now: float = NOW) -> dict[str, bool]:
    rows = database.read(lambda c: register.listed(c, client_id=client_id, now=now))
    return {token.jti: is_revoked for token, is_revoked in rows}


def test_the_register_has_what_identifies_a_token(database: Database) -> None:
    add(database, grant("t2", family="t1"))
    ((token, is_revoked),) = database.read(lambda c: register.listed(c, client_id=None, now=NOW))
    assert token == register.Issued(
        jti="t2", family="t1", client_id="c1", permissions="admin,read", issued_at=NOW, expires_at=NOW + HOUR_S,
        kid="k1", issued_by="command line uid 0",
    )  # fmt: skip
    assert not is_revoked


def test_tokens_are_listed_by_client_until_they_expire(database: Database) -> None:
    add(database, grant("t1"), grant("t2", client_id="c2"), grant("t3", life_s=60))
    assert set(listed(database)) == {"t1", "t2", "t3"}
    assert set(listed(database, "c1")) == {"t1", "t3"}
    assert set(listed(database, "c1", NOW + 60)) == {"t1"}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Kind.TOKEN, "t2"), (Kind.FAMILY, "t1"), (Kind.ENDED, "c1\nt1"), (Kind.CLIENT, "c1"), (Kind.KEY, "k1")],
)
def test_the_list_agrees_with_the_verifier_about_what_is_revoked(database: Database, kind: Kind, name: str) -> None:
    grants = [grant("t1"), grant("t2", family="t1"), grant("t3", client_id="c2", family="t1"), grant("t4")]
    add(database, *grants)
    revoke(database, kind, name)
    revocations = Revocations()
    for revocation in database.read(lambda c: register.revocations_after(c, 0))[1]:
        revocations.add(revocation)
    verdicts = {one.token_id: revocations.cover(one, NOW + 1) for one in grants}
    assert listed(database, now=NOW + 1) == verdicts
    assert any(verdicts.values())


def test_a_token_issued_after_its_client_was_revoked_is_listed_as_valid(database: Database) -> None:
    revoke(database, Kind.CLIENT, "c1", at=NOW - 1)
    add(database, grant("t1"))
    assert listed(database) == {"t1": False}
    revoke(database, Kind.CLIENT, "c1", at=NOW)
    assert listed(database) == {"t1": True}


def test_revocations_are_read_from_where_the_reader_was(database: Database) -> None:
    revoke(database, Kind.CLIENT, "c1", at=NOW)
    revoke(database, Kind.TOKEN, "t1")
    seq, found = database.read(lambda c: register.revocations_after(c, 0))
    assert [revocation.name for revocation in found] == ["c1", "t1"]
    assert database.read(lambda c: register.revocations_after(c, seq)) == (seq, [])
    revoke(database, Kind.CLIENT, "c1", at=NOW + 5)  # known, and new again because it covers more
    _, found = database.read(lambda c: register.revocations_after(c, seq))
    assert found == [Revocation(Kind.CLIENT, "c1", NOW + 5, NOW + HOUR_S)]


def test_a_later_revocation_never_shortens_an_earlier_one(database: Database) -> None:
    revoke(database, Kind.CLIENT, "c1", at=NOW, until=NOW + 100)
    revoke(database, Kind.CLIENT, "c1", at=NOW - 50, until=NOW + 10)
    assert database.read(lambda c: register.revocations_after(c, 0))[1] == [
        Revocation(Kind.CLIENT, "c1", NOW, NOW + 100)
    ]


def test_a_kind_of_revocation_of_a_newer_whaled_is_skipped(database: Database) -> None:
    database.write(lambda c: c.execute("INSERT INTO revocations (kind, name, at, until) VALUES ('moon', 'x', 1, 2)"))
    assert database.read(lambda c: register.revocations_after(c, 0)) == (1, [])


def test_revocations_beyond_the_limit_are_refused_and_an_earlier_one_can_still_be_extended(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(register, "MAX_REVOCATIONS", 2)
    revoke(database, Kind.TOKEN, "t1")
    revoke(database, Kind.TOKEN, "t2")
    with pytest.raises(AccessError, match="retire the signing key"):
        revoke(database, Kind.TOKEN, "t3")
    revoke(database, Kind.TOKEN, "t2", until=NOW + 2 * HOUR_S)
    assert len(database.read(lambda c: register.revocations_after(c, 0))[1]) == 2


def test_a_revoked_family_stays_revoked_until_its_last_token_has_expired(database: Database) -> None:
    add(database, grant("t1", life_s=5 * HOUR_S), grant("t2", family="t1", life_s=HOUR_S))
    ends = database.read(lambda c: register.last_expiry(c, "t1", NOW + HOUR_S))
    # At that moment another daemon may refresh the first token: the new one lives as long as the first.
    assert NOW + HOUR_S + 5 * HOUR_S < ends < NOW + 10 * HOUR_S
    unknown = database.read(lambda c: register.last_expiry(c, "t9", NOW))
    assert unknown == NOW + register.LONGEST_S


def test_of_a_family_whose_first_token_is_unknown_nobody_knows_the_end(database: Database) -> None:
    add(database, grant("t2", family="t1", life_s=60))
    assert database.read(lambda c: register.last_expiry(c, "t1", NOW)) == NOW + register.LONGEST_S


def test_expired_tokens_and_revocations_are_removed(database: Database) -> None:
    add(database, grant("t1"), grant("t2", life_s=60))
    revoke(database, Kind.TOKEN, "t1", until=NOW + 10 * HOUR_S)
    revoke(database, Kind.TOKEN, "t2", until=NOW + HOUR_S)
    at = NOW + HOUR_S + 61
    assert database.write(lambda c: register.prune(c, at)) == 0
    assert database.read(lambda c: [jti for (jti,) in c.execute("SELECT jti FROM issued")]) == ["t1"]
    assert [found.name for found in database.read(lambda c: register.revocations_after(c, 0))[1]] == ["t1"]


def test_beyond_the_limit_refreshed_tokens_go_first_and_are_counted(database: Database) -> None:
    add(database, grant("first", life_s=60))
    add(database, grant("r1", life_s=100), grant("r2", life_s=200), by=register.BY_REFRESH)
    assert database.write(lambda c: register.prune(c, NOW, limit=2)) == 1
    assert set(listed(database)) == {"first", "r2"}
    assert database.write(lambda c: register.prune(c, NOW, limit=0)) == 2
    assert listed(database) == {}
