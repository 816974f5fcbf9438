from typing import cast

import pytest

from kit.tokens import AUTH, READ, RING, issued
from kit.whales import NOW
from whaled.auth.gate import Gate
from whaled.auth.revocations import Kind, Revocation, Revocations
from whaled.auth.tokens import TokenAuthenticator
from whaled.errors import TokenError, TokenRefusal
from whaled.model import CredentialKind, Grant

LATER = NOW + 1_000_000


class Notes:
    def __init__(self) -> None:
        self.refreshes: list[Grant] = []
        self.ends: list[Revocation] = []

    def refreshed(self, grant: Grant) -> None:
        self.refreshes.append(grant)

    def ended(self, revocation: Revocation) -> None:
        self.ends.append(revocation)


class Other:
    """A verifier of another kind, which accepts everything."""

    def __init__(self, kind: str) -> None:
        self.grant = Grant(client_id="c1", permissions=READ, kind=cast("CredentialKind", kind), issued_at=NOW)
        self.is_valid = True

    def verify(self, credential: str, now: float) -> Grant:
        return self.grant

    def is_in_force(self, grant: Grant, now: float) -> bool:
        return self.is_valid

    def knows(self, issuer: str) -> bool:
        return issuer == "https://login.example"

    def owns(self, client_id: str) -> bool:
        return False


def ring() -> TokenAuthenticator:
    ids = iter(f"r{number}" for number in range(100))
    return TokenAuthenticator(RING, AUTH, new_token_id=lambda: next(ids))


def revoked(kind: Kind, name: str) -> Revocation:
    return Revocation(kind, name, NOW, LATER)


def test_a_revoked_token_is_refused_and_its_session_no_longer_in_force() -> None:
    revocations = Revocations()
    gate = Gate(ring=ring(), revocations=revocations)
    grant = gate.verify(issued(), NOW)
    assert gate.is_in_force(grant, NOW)
    revocations.add(revoked(Kind.TOKEN, "t1"))
    assert not gate.is_in_force(grant, NOW)
    with pytest.raises(TokenError) as refused:
        gate.verify(issued(), NOW)
    assert (refused.value.reason, refused.value.client_id) == (TokenRefusal.REVOKED, "c1")
    assert gate.verify(issued(token_id="t2"), NOW).token_id == "t2"


def test_a_refresh_keeps_what_the_ring_allows_and_is_noted() -> None:
    notes = Notes()
    gate = Gate(ring=ring(), revocations=Revocations(), ledger=notes)
    token, refreshed = gate.refresh(gate.verify(issued(), NOW), NOW + 5)
    assert gate.verify(token, NOW + 5) == refreshed == notes.refreshes[0]
    assert (refreshed.family, notes.ends) == ("t1", [])


@pytest.mark.parametrize(
    ("kind", "name"), [(Kind.TOKEN, "t1"), (Kind.FAMILY, "t1"), (Kind.CLIENT, "c1"), (Kind.KEY, "new")]
)
def test_a_revoked_token_cannot_be_refreshed_and_this_is_not_taken_for_a_theft(kind: Kind, name: str) -> None:
    notes, revocations = Notes(), Revocations()
    gate = Gate(ring=ring(), revocations=revocations, ledger=notes)
    grant = gate.verify(issued(), NOW)
    revocations.add(revoked(kind, name))
    with pytest.raises(TokenError) as refused:
        gate.refresh(grant, NOW)
    assert refused.value.reason is not TokenRefusal.REVOKED  # which ends the family and raises an alert
    assert (notes.refreshes, notes.ends) == ([], [])


def test_a_token_refreshed_before_the_daemon_noticed_the_revocation_is_revoked_too() -> None:
    for kind, name in ((Kind.FAMILY, "t1"), (Kind.CLIENT, "c1")):
        revocations = Revocations()
        gate = Gate(ring=ring(), revocations=revocations)
        token, refreshed = gate.refresh(gate.verify(issued(), NOW), NOW + 2)
        revocations.add(revoked(kind, name))
        assert not gate.is_in_force(refreshed, NOW + 3)
        with pytest.raises(TokenError, match="revoked"):
            gate.verify(token, NOW + 3)


def test_a_family_that_ended_stays_ended_after_a_restart() -> None:
    notes = Notes()
    gate = Gate(ring=ring(), revocations=Revocations(), ledger=notes)
    grant = gate.verify(issued(), NOW)
    token, _ = gate.refresh(grant, NOW)
    with pytest.raises(TokenError) as ended:
        gate.refresh(grant, NOW)
    assert ended.value.reason is TokenRefusal.REVOKED
    (end,) = notes.ends
    assert grant.expires_at is not None
    assert end.until >= grant.expires_at + AUTH.leeway

    revocations = Revocations()
    revocations.add(end)
    restarted = Gate(ring=ring(), revocations=revocations)
    for one in (issued(), token):
        with pytest.raises(TokenError, match="revoked"):
            restarted.verify(one, NOW + 1)
    assert restarted.verify(issued(client_id="c2"), NOW).client_id == "c2"  # the same ids, of another client


def test_each_credential_goes_to_the_verifier_of_its_kind() -> None:
    keys, issuers = Other("api_key"), Other("oidc")
    gate = Gate(ring=ring(), revocations=Revocations(), api_keys=keys, issuers=issuers)
    foreign = issued(settings=type(AUTH)(issuer="https://login.example"))
    assert gate.verify("whk_abc", NOW) is keys.grant
    assert gate.verify(foreign, NOW) is issuers.grant
    assert gate.verify(issued(), NOW).kind == "token"
    for odd in ("", ".", "..", "a.b.c", "\0", "whk", foreign + ".x", "x" * 100_000):
        with pytest.raises(TokenError):
            gate.verify(odd, NOW)


def test_without_a_verifier_of_its_kind_a_credential_is_refused_like_any_other() -> None:
    gate = Gate(ring=ring(), revocations=Revocations())
    with pytest.raises(TokenError) as refused:
        gate.verify("whk_abc", NOW)
    assert refused.value.reason is TokenRefusal.MALFORMED
    for kind in ("api_key", "oidc", "other"):
        assert not gate.is_in_force(Other(kind).grant, NOW)


def test_a_session_of_another_kind_is_in_force_as_long_as_its_verifier_says_so_and_cannot_refresh() -> None:
    for name in ("api_key", "oidc"):
        other = Other(name)
        gate = Gate(
            ring=ring(),
            revocations=Revocations(),
            api_keys=other if name == "api_key" else None,
            issuers=other if name == "oidc" else None,
        )
        assert gate.is_in_force(other.grant, NOW)
        with pytest.raises(TokenError):
            gate.refresh(other.grant, NOW)
        other.is_valid = False
        assert not gate.is_in_force(other.grant, NOW)


def test_the_tokens_of_another_issuer_are_revoked_with_their_client_and_api_keys_are_not() -> None:
    revocations = Revocations()
    revocations.add(revoked(Kind.CLIENT, "c1"))
    keys, issuers = Other("api_key"), Other("oidc")
    gate = Gate(ring=ring(), revocations=revocations, api_keys=keys, issuers=issuers)
    assert gate.verify("whk_abc", NOW) is keys.grant
    assert gate.is_in_force(keys.grant, NOW)
    assert not gate.is_in_force(issuers.grant, NOW)
    with pytest.raises(TokenError, match="revoked"):
        gate.verify(issued(settings=type(AUTH)(issuer="https://login.example")), NOW)


def test_the_answer_that_was_lost_allows_one_more_refresh() -> None:
    gate = Gate(ring=ring(), revocations=Revocations())
    parent = gate.verify(issued(), NOW)
    _, child = gate.refresh(parent, NOW)
    gate.answer_lost(parent, child)
    assert gate.refresh(parent, NOW)[1].family == "t1"
