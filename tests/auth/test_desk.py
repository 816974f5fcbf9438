from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.tokens import AUTH, RING, issued
from kit.whales import NOW
from whaled.auth import audit, register
from whaled.auth.audit import Act
from whaled.auth.desk import Target, TokenDesk
from whaled.auth.gate import Gate
from whaled.auth.revocations import Revocations
from whaled.auth.store import Database, Direct, open_directly
from whaled.auth.tokens import TokenAuthenticator
from whaled.errors import AccessError, TokenError

WHO = {"actor": "uid 0 (root)", "origin": "socket"}


class Lab:
    """A desk on a database, and what the gate of a daemon says after it has read the database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.slept: list[float] = []
        self.told = 0
        self.desk = TokenDesk(Direct(database), revoked=self._revoked, clock=lambda: NOW + 0.25, sleep=self._sleep)
        self.ring = TokenAuthenticator(RING, AUTH, new_token_id=lambda: "r1")

    async def _revoked(self) -> None:
        self.told += 1

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def accepts(self, token: str) -> bool:
        revocations = Revocations()
        for revocation in self.database.read(lambda c: register.revocations_after(c, 0))[1]:
            revocations.add(revocation)
        try:
            Gate(ring=self.ring, revocations=revocations).verify(token, NOW + 1)
        except TokenError:
            return False
        return True

    def acts(self) -> list[Act]:
        return [entry.act for entry in self.database.read(lambda c: audit.newest(c, 100))]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with open_directly(tmp_path / "a.db") as database:
        yield Lab(database)


async def test_a_revoked_token_is_refused_with_all_that_was_refreshed_from_it_and_no_other(lab: Lab) -> None:
    first = lab.ring.verify(issued(), NOW)
    token, refreshed = lab.ring.refresh(first, NOW)
    for grant in (first, refreshed):
        await lab.desk.register(grant, **WHO)
    revoked = await lab.desk.revoke(Target.TOKEN, "r1", **WHO)  # the refreshed one
    assert (revoked.tokens, lab.told) == (2, 1)
    assert not lab.accepts(issued())
    assert not lab.accepts(token)
    assert lab.accepts(issued(token_id="t9"))
    assert [listed.is_revoked for listed in await lab.desk.list()] == [True, True]


async def test_a_token_that_is_not_registered_is_revoked_too(lab: Lab) -> None:
    token, _ = lab.ring.refresh(lab.ring.verify(issued(), NOW), NOW)
    revoked = await lab.desk.revoke(Target.TOKEN, "t1", **WHO)
    assert revoked.tokens == 0
    assert not lab.accepts(issued())
    assert not lab.accepts(token)


async def test_a_revoked_client_waits_for_the_next_second_so_that_its_next_token_is_accepted(lab: Lab) -> None:
    await lab.desk.revoke(Target.CLIENT, "c1", **WHO)
    assert lab.slept == [0.75]
    assert not lab.accepts(issued())
    assert lab.accepts(issued(client_id="c2"))


async def test_a_revoked_key_ends_every_token_signed_with_it(lab: Lab) -> None:
    await lab.desk.revoke(Target.KEY, "new", **WHO)
    assert not lab.accepts(issued())
    assert not lab.accepts(issued(client_id="c2", token_id="t2"))
    assert lab.slept == []


async def test_every_act_is_in_the_audit_log(lab: Lab) -> None:
    await lab.desk.register(lab.ring.verify(issued(), NOW), **WHO)
    await lab.desk.revoke(Target.TOKEN, "t1", **WHO)
    assert [(act.act, act.target, act.outcome, act.detail) for act in lab.acts()] == [
        ("token revoked", "jti t1", "done", "1 tokens"),
        ("token issued", "jti t1", "done", "client c1, permissions read"),
    ]
    assert {(act.actor, act.origin, act.at) for act in lab.acts()} == {("uid 0 (root)", "socket", NOW + 0.25)}


async def test_an_act_that_cannot_be_stored_leaves_no_record_and_reports_no_success(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(register, "MAX_REVOCATIONS", 1)
    with pytest.raises(AccessError):
        await lab.desk.revoke(Target.TOKEN, "t1", **WHO)
    assert (lab.told, lab.acts()) == (0, [])
    assert lab.accepts(issued())


@pytest.mark.parametrize(
    ("target", "name", "problem"),
    [
        (Target.TOKEN, issued(), "found a token, expected its id"),
        (Target.TOKEN, "", "1 to 128 printable"),
        (Target.TOKEN, "x" * 129, "1 to 128 printable"),
        (Target.KEY, "k\n1", "1 to 128 printable"),
        (Target.CLIENT, "x" * 257, "1 to 256 printable"),
        (Target.CLIENT, "c\x1b[2J", "1 to 256 printable"),
        (Target.CLIENT, "c\ud800", "1 to 256 printable"),
    ],
)
async def test_a_name_that_nothing_can_have_is_refused(lab: Lab, target: Target, name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        await lab.desk.revoke(target, name, **WHO)
    assert lab.acts() == []


async def test_tokens_are_listed_by_client(lab: Lab) -> None:
    for client_id, token_id in (("c1", "t1"), ("c2", "t2")):
        await lab.desk.register(lab.ring.verify(issued(client_id=client_id, token_id=token_id), NOW), **WHO)
    assert [listed.token.jti for listed in await lab.desk.list("c2")] == ["t2"]
    assert len(await lab.desk.list()) == 2
