import base64
import json
import math
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kit.tokens import AUTH, NEW, OLD, RING, issued, signed
from kit.whales import NOW
from whaled.auth.ring import KeyRing, SigningKey
from whaled.auth.tokens import TokenAuthenticator, issue, verify
from whaled.config.sections import AuthSettings
from whaled.errors import TokenError, TokenRefusal
from whaled.model import Permission

LONE = KeyRing(SigningKey(None, b"s" * 40), (SigningKey(None, b"s" * 40),))
READ = frozenset({Permission.READ})


def refusal(token: str, ring: KeyRing = RING, now: float = NOW, settings: AuthSettings = AUTH) -> TokenRefusal:
    with pytest.raises(TokenError) as caught:
        verify(ring, token, now, settings)
    return caught.value.reason


def test_an_issued_token_is_accepted_with_its_claims() -> None:
    grant = verify(RING, issued(), NOW + 1, AUTH)
    assert (grant.client_id, grant.permissions, grant.key_id) == ("c1", READ, "new")
    assert (grant.issued_at, grant.expires_at, grant.token_id) == (NOW, NOW + 3600, "t1")


def test_the_newest_key_signs_and_older_ones_still_verify() -> None:
    assert jwt.get_unverified_header(issued())["kid"] == "new"
    assert verify(RING, issued(KeyRing(OLD, (OLD,))), NOW, AUTH).key_id == "old"


def test_a_single_secret_accepts_tokens_without_key_id_only() -> None:
    assert "kid" not in jwt.get_unverified_header(issued(LONE))
    assert verify(LONE, issued(LONE), NOW, AUTH).key_id is None
    assert refusal(issued(), LONE) is TokenRefusal.UNKNOWN_KEY
    assert refusal(issued(LONE)) is TokenRefusal.UNKNOWN_KEY


STRICT = AuthSettings(leeway=0.0)
LENIENT = AuthSettings(leeway=30.0)


def test_a_token_ends_by_the_clock_it_is_given() -> None:
    token = issued(ttl_s=10)
    verify(RING, token, NOW + 9.9, STRICT)
    assert refusal(token, now=NOW + 10, settings=STRICT) is TokenRefusal.EXPIRED


@pytest.mark.parametrize("settings", [STRICT, AUTH, LENIENT])
def test_a_clock_may_differ_by_the_leeway_in_both_directions_and_no_further(settings: AuthSettings) -> None:
    leeway_s = settings.leeway
    issued = signed({"client_id": "c", "iat": NOW, "exp": NOW + 60})
    not_before = signed({"client_id": "c", "nbf": NOW, "exp": NOW + 60})
    for token in (issued, not_before):  # our clock is behind that of the issuer
        verify(RING, token, NOW - leeway_s, settings)
        assert refusal(token, now=NOW - leeway_s - 0.01, settings=settings) is TokenRefusal.NOT_YET_VALID
    for token in (issued, not_before):  # it is ahead
        verify(RING, token, NOW + 60 + leeway_s - 0.01, settings)
        assert refusal(token, now=NOW + 60 + leeway_s, settings=settings) is TokenRefusal.EXPIRED


def test_a_refusal_for_its_time_names_the_difference_of_the_clocks() -> None:
    token = signed({"client_id": "c", "iat": NOW, "nbf": NOW, "exp": NOW + 60})
    for now, detail in ((NOW - 90, "`nbf` is 90 s ahead of this clock"), (NOW + 180, "`exp` was 120 s ago")):
        with pytest.raises(TokenError, match=detail):
            verify(RING, token, now, AUTH)


def test_the_leeway_adds_nothing_to_the_longest_life() -> None:
    longest = AUTH.max_token_ttl
    assert refusal(signed({"client_id": "c", "iat": NOW, "exp": NOW + longest + 1})) is TokenRefusal.TOO_LONG


def test_times_may_be_floats_and_unknown_permissions_grant_nothing() -> None:
    token = signed({"client_id": "c", "iat": NOW - 0.5, "exp": NOW + 0.5, "permissions": ["read", "fly", 7]})
    grant = verify(RING, token, NOW, AUTH)
    assert (grant.expires_at, grant.permissions) == (NOW + 0.5, READ)


def test_missing_permissions_grant_nothing() -> None:
    assert verify(RING, signed({"client_id": "c", "exp": NOW + 9}), NOW, AUTH).permissions == frozenset()


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": NOW + 9},
        {"client_id": "", "exp": NOW + 9},
        {"client_id": 7, "exp": NOW + 9},
        {"client_id": "c"},
        {"client_id": "c", "exp": "tomorrow"},
        {"client_id": "c", "exp": True},
        {"client_id": "c", "exp": 1e300},
        {"client_id": "c", "exp": NOW + 9, "permissions": "read"},
        {"client_id": "c", "exp": 10**400},
        {"client_id": "c", "exp": NOW + 9, "nbf": "soon"},
        {"client_id": "c", "exp": NOW + 9, "iat": "then"},
        {"client_id": "c", "exp": NOW + 9, "auth_time": None},
        {"client_id": "c" * 257, "exp": NOW + 9},
        {"client_id": "c\nforged log line", "exp": NOW + 9},
    ],
)
def test_invalid_claims_are_refused(claims: dict[str, Any]) -> None:
    assert refusal(signed(claims)) is TokenRefusal.BAD_CLAIMS


def test_claims_that_are_no_json_are_malformed() -> None:
    assert refusal(signed({"client_id": "c", "exp": NOW + 9, "nbf": math.nan})) is TokenRefusal.MALFORMED


def test_not_before_is_honoured() -> None:
    assert (
        refusal(signed({"client_id": "c", "exp": NOW + 9, "nbf": NOW + 5}), settings=STRICT)
        is TokenRefusal.NOT_YET_VALID
    )


def test_issuer_and_audience_are_checked_where_configured() -> None:
    settings = AuthSettings(issuer="me", audience="bots")
    verify(RING, issued(settings=settings), NOW, settings)
    assert refusal(issued(), settings=settings) is TokenRefusal.BAD_CLAIMS
    both = signed({"client_id": "c", "exp": NOW + 9, "iss": "me", "aud": ["others", "bots"]})
    verify(RING, both, NOW, settings)


def unsigned(header: dict[str, Any]) -> str:
    parts = (header, {"client_id": "c", "exp": NOW + 9})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts) + "."


@pytest.mark.parametrize("algorithm", ["none", "None", "HS512", "RS256", ""])
def test_the_algorithm_of_the_token_is_not_believed(algorithm: str) -> None:
    assert refusal(unsigned({"alg": algorithm, "kid": "new"})) in {TokenRefusal.BAD_SIGNATURE, TokenRefusal.MALFORMED}


def test_a_stronger_algorithm_with_the_right_key_is_refused_too() -> None:
    token = jwt.encode({"client_id": "c", "exp": NOW + 9}, b"n" * 64, algorithm="HS512", headers={"kid": "new"})
    key = SigningKey("new", b"n" * 64)
    assert refusal(token, KeyRing(key, (key,))) is TokenRefusal.BAD_SIGNATURE


def test_another_key_under_a_known_name_is_refused() -> None:
    assert (
        refusal(signed({"client_id": "c", "exp": NOW + 9}, SigningKey("new", b"x" * 32))) is TokenRefusal.BAD_SIGNATURE
    )


@pytest.mark.parametrize("token", ["", "a", "a.b.c", "....", "x" * 9000, "é.ü.ß", "\x00", "\ud800.a.b"])
def test_garbage_is_malformed(token: str) -> None:
    assert refusal(token) in {TokenRefusal.MALFORMED, TokenRefusal.UNKNOWN_KEY}


@given(st.integers(0, 10_000), st.characters())
def test_no_changed_token_is_accepted(place: int, letter: str) -> None:
    token = issued()
    index = place % len(token)
    changed = token[:index] + letter + token[index + 1 :]
    try:
        grant = verify(RING, changed, NOW, AUTH)
    except TokenError:
        return
    # base64 has unused bits at its end: a changed last letter may stand for the same bytes.
    assert grant == verify(RING, token, NOW, AUTH)


def test_a_token_that_could_not_be_verified_is_not_issued() -> None:
    with pytest.raises(ValueError, match="max_token_ttl"):
        issued(ttl_s=91 * 86400)
    with pytest.raises(ValueError, match="client id"):
        issue(RING, client_id="", permissions=[], ttl_s=5, now=NOW, token_id="t", settings=AUTH)
    with pytest.raises(ValueError, match="client id"):
        issue(RING, client_id="a\nb", permissions=[], ttl_s=5, now=NOW, token_id="t", settings=AUTH)


def test_a_secret_is_not_shown() -> None:
    assert "nnnn" not in repr(RING)


def authenticator(ring: KeyRing = RING) -> TokenAuthenticator:
    return TokenAuthenticator(ring, AUTH, new_token_id=lambda: "t2")


def test_a_refreshed_token_has_the_same_client_and_permissions_and_a_new_end() -> None:
    grant = authenticator().verify(issued(), NOW)
    token, refreshed = authenticator().refresh(grant, NOW + 3000)
    assert (refreshed.client_id, refreshed.permissions, refreshed.token_id) == ("c1", grant.permissions, "t2")
    assert refreshed.expires_at == NOW + 3000 + 3600
    assert authenticator().verify(token, NOW + 4000) == refreshed


def test_refreshing_again_and_again_makes_no_token_longer() -> None:
    grant = verify(RING, issued(ttl_s=60), NOW, AUTH)
    for turn in range(1, 100):
        _, grant = authenticator().refresh(grant, NOW + turn * 50.3)
        assert grant.issued_at is not None
        assert grant.expires_at == grant.issued_at + 60


def test_a_chain_of_refreshed_tokens_ends_with_the_longest_life_of_one() -> None:
    settings = AuthSettings(token_ttl=3600, max_token_ttl=7200)
    judge = TokenAuthenticator(RING, settings, new_token_id=lambda: "t2")
    first, _ = judge.refresh(judge.verify(issued(settings=settings), NOW + 3000), NOW + 3000)
    token, grant = judge.refresh(judge.verify(first, NOW + 6000), NOW + 6000)
    assert grant.expires_at == NOW + 7200
    with pytest.raises(TokenError):
        judge.refresh(judge.verify(token, NOW + 7199.5), NOW + 7199.5)


def test_a_token_without_iat_starts_its_chain_at_the_first_refresh() -> None:
    grant = verify(RING, signed({"client_id": "c", "exp": NOW + 9}), NOW, AUTH)
    assert authenticator().refresh(grant, NOW)[1].authenticated_at == NOW


def test_a_new_ring_counts_for_grants_given_before_and_carries_none_over_from_a_retired_key() -> None:
    judge = authenticator(KeyRing(OLD, (OLD,)))
    grant = judge.verify(issued(KeyRing(OLD, (OLD,))), NOW)
    judge.replace_ring(RING, AUTH)
    assert judge.refresh(grant, NOW + 1)[1].key_id == "new"
    judge.replace_ring(KeyRing(NEW, (NEW,)), AUTH)
    with pytest.raises(TokenError) as caught:
        judge.refresh(grant, NOW + 2)
    assert caught.value.reason is TokenRefusal.UNKNOWN_KEY


def test_a_weak_secret_makes_no_key() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        SigningKey("short", b"s" * 31)


def test_a_header_nested_without_end_is_malformed() -> None:
    header = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":' + b"[" * 5000).rstrip(b"=").decode()
    assert refusal(f"{header}.e30.x") is TokenRefusal.MALFORMED


def test_a_token_that_has_ended_cannot_be_refreshed() -> None:
    grant = authenticator().verify(issued(), NOW)
    with pytest.raises(TokenError):
        authenticator().refresh(grant, NOW + 3600 + AUTH.expiry_grace)


def test_an_ended_family_is_remembered_while_its_tokens_may_be_accepted() -> None:
    judge = TokenAuthenticator(RING, AuthSettings(leeway=0.0, expiry_grace=0.001), new_token_id=lambda: "t2")
    token = issued()
    grant = judge.verify(token, NOW)
    judge.refresh(grant, NOW + 1)
    judge.refresh(replace(grant, token_id="t2", family="t1"), NOW + 2)
    with pytest.raises(TokenError):
        judge.refresh(grant, NOW + 3)
    judge.replace_ring(RING, LENIENT)  # a reload
    with pytest.raises(TokenError) as caught:
        judge.verify(token, NOW + 3600 + 29)
    assert caught.value.reason is TokenRefusal.REVOKED


def test_an_api_key_is_refused() -> None:
    with pytest.raises(TokenError):
        authenticator().verify("whk_abc", NOW)
