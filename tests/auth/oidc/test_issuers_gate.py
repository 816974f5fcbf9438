"""Issuers behind the gate: which credential is whose, and that nobody can speak for the client of another."""

import pytest

from kit.issuers import access_token, claims, issuer_settings, key_set
from kit.tokens import AUTH, RING, issued
from kit.whales import NOW
from whaled.auth.gate import Gate
from whaled.auth.oidc.issuers import Issuers
from whaled.auth.oidc.meters import IssuerMeter
from whaled.auth.revocations import Kind, Revocation, Revocations
from whaled.auth.tokens import TokenAuthenticator
from whaled.config.sections import AuthSettings, IssuerSettings
from whaled.errors import TokenError, TokenRefusal
from whaled.registry import Registry


def issuers_of(*settings: IssuerSettings) -> Issuers:
    issuers = Issuers(AuthSettings(issuers=settings), IssuerMeter(Registry()))
    for keeper in issuers._keepers.values():
        keeper.keys = key_set()
    return issuers


def gate_of(issuers: Issuers, revocations: Revocations | None = None) -> Gate:
    ring = TokenAuthenticator(RING, AUTH, new_token_id=lambda: "r1")
    return Gate(ring=ring, revocations=revocations or Revocations(), issuers=issuers)


def refusal(gate: Gate, token: str) -> TokenRefusal:
    with pytest.raises(TokenError) as caught:
        gate.verify(token, NOW)
    return caught.value.reason


def test_tokens_go_to_the_issuer_that_they_state_and_all_others_to_the_ring() -> None:
    gate = gate_of(issuers_of(issuer_settings()))
    assert gate.verify(access_token(), NOW).client_id == "corp:bot"
    assert gate.verify(issued(), NOW).client_id == "c1"
    assert refusal(gate, access_token(claims(iss="https://evil.example"))) is TokenRefusal.UNKNOWN_KEY
    assert refusal(gate_of(issuers_of()), access_token()) is TokenRefusal.UNKNOWN_KEY


def test_no_token_of_the_ring_speaks_for_the_client_of_an_issuer() -> None:
    issuers = issuers_of()
    gate = gate_of(issuers)
    foreign, own = issued(client_id="corp:bot"), issued(client_id="corp")
    grant = gate.verify(foreign, NOW)
    assert gate.is_in_force(grant, NOW)
    issuers.reconfigure(AuthSettings(issuers=(issuer_settings(),)))
    assert refusal(gate, foreign) is TokenRefusal.BAD_CLAIMS
    assert not gate.is_in_force(grant, NOW)
    assert gate.verify(own, NOW).client_id == "corp"


def test_a_grant_of_an_issuer_is_not_refreshed_and_can_be_revoked_by_client() -> None:
    revocations = Revocations()
    gate = gate_of(issuers_of(issuer_settings()), revocations)
    grant = gate.verify(access_token(), NOW)
    assert gate.is_in_force(grant, NOW)
    with pytest.raises(TokenError) as caught:
        gate.refresh(grant, NOW)
    assert caught.value.reason is not TokenRefusal.REVOKED
    revocations.add(Revocation(Kind.CLIENT, "corp:bot", NOW + 1, NOW + 1e6))
    assert not gate.is_in_force(grant, NOW)
    assert refusal(gate, access_token()) is TokenRefusal.REVOKED


def test_an_issuer_is_ignored_without_authentication() -> None:
    issuers = Issuers(AuthSettings(enabled=False, issuers=(issuer_settings(),)), IssuerMeter(Registry()))
    assert not issuers.knows(issuer_settings().issuer)
