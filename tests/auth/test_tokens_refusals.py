"""Every refusal of a token: the same answer after the same work, and nothing forged gets in."""

from collections import Counter
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.calls import work
from kit.tokens import AUTH, CLAIMS, FIRST, FORGED, GOOD, NEW, OLD, RING, WIDE, head, issued, part, signed, token_of
from kit.whales import NOW
from whaled.auth.signature import claimant
from whaled.auth.tokens import KeyRing, SigningKey, TokenAuthenticator, verify
from whaled.config.sections import AuthSettings
from whaled.errors import TokenError, TokenRefusal


def judge() -> TokenAuthenticator:
    return TokenAuthenticator(RING, AUTH, new_token_id=lambda: "t2")


# --- the same work ----------------------------------------------------------------------------------------------------


REFUSALS: dict[str, tuple[str, TokenRefusal]] = {
    "unknown key": (signed(CLAIMS, SigningKey("gone", b"g" * 32)), TokenRefusal.UNKNOWN_KEY),
    "bad signature": (signed(CLAIMS, SigningKey("new", b"x" * 32)), TokenRefusal.BAD_SIGNATURE),
    "another algorithm": (token_of(head(alg="HS384")), TokenRefusal.BAD_SIGNATURE),
    "expired": (signed({**CLAIMS, "iat": NOW - 60, "exp": NOW - 31}), TokenRefusal.EXPIRED),
    "garbage": ("garbage", TokenRefusal.MALFORMED),
    "too large": ("x" * 9000, TokenRefusal.MALFORMED),
    "no header": (f"AAAA.{part(CLAIMS)}.{'A' * 43}", TokenRefusal.MALFORMED),
    "an API key": ("whk_0123456789", TokenRefusal.MALFORMED),
}


def refuse(token: str) -> TokenRefusal:
    with pytest.raises(TokenError) as caught:
        verify(RING, token, NOW, AUTH)
    return caught.value.reason


def checked(token: str) -> list[str]:
    """The work of one refusal, without pytest's."""

    def call() -> None:
        try:
            verify(RING, token, NOW, AUTH)
        except TokenError:
            return
        raise AssertionError

    return work(call)


@pytest.mark.parametrize("name", REFUSALS)
def test_every_refusal_takes_the_steps_of_an_expired_token(name: str) -> None:
    token, reason = REFUSALS[name]
    assert refuse(token) is reason
    usual, found = Counter(checked(REFUSALS["expired"][0])), Counter(checked(token))
    assert found["hmac_digest"] == usual["hmac_digest"] == 1
    assert found["compare_digest"] == usual["compare_digest"] == 1
    difference = (found - usual) + (usual - found)
    assert sum(difference.values()) <= sum(usual.values()) // 5, difference
    # What costs most is the same: the HMAC, base64, reading JSON, judging claims.
    dear = {"hmac_digest", "b64encode", "b64decode", "Decoder.decode", "decode", "_grant", "_judge"}
    assert not dear & difference.keys(), difference


def test_a_refusal_reason_specific_to_our_tokens_needs_no_second_check() -> None:
    settings = AuthSettings(issuer="me")
    for claims in ({**CLAIMS, "nbf": NOW + 9}, {**CLAIMS, "exp": NOW + 1e9}, {**CLAIMS, "permissions": 3}, CLAIMS):
        token = signed(claims)

        def call(token: str = token) -> None:
            with pytest.raises(TokenError):
                verify(RING, token, NOW, settings)

        assert "PyJWT.decode" not in work(call)


def test_a_revoked_family_is_refused_before_the_second_check() -> None:
    ours = judge()
    token = issued()
    grant = ours.verify(token, NOW)
    ours.refresh(grant, NOW)
    with pytest.raises(TokenError):
        ours.refresh(grant, NOW)

    def call() -> None:
        with pytest.raises(TokenError):
            ours.verify(token, NOW)

    assert "PyJWT.decode" not in work(call)


# --- nothing forged gets in -------------------------------------------------------------------------------------------


def test_the_token_that_is_forged_here_is_good_itself() -> None:
    assert judge().verify(GOOD, NOW).client_id == "c1"


@pytest.mark.parametrize("name", FORGED)
def test_forged_tokens_are_refused(name: str) -> None:
    with pytest.raises(TokenError):
        judge().verify(FORGED[name], NOW)


@given(st.binary(max_size=200), st.binary(max_size=200), st.binary(max_size=40))
def test_three_parts_of_any_bytes_are_refused_in_peace(first: bytes, second: bytes, third: bytes) -> None:
    with pytest.raises(TokenError):
        judge().verify(f"{part(first)}.{part(second)}.{part(third)}", NOW)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@given(
    st.dictionaries(
        st.sampled_from(["client_id", "exp", "iat", "nbf", "permissions", "jti", "family", "auth_time"]), JSON
    ),
    st.dictionaries(st.sampled_from(["alg", "kid", "crit", "b64", "typ", "zip"]), JSON),
)
def test_the_library_accepts_every_accepted_token_of_a_trusted_signer(claims: Any, header: Any) -> None:
    token = token_of({**head(), **header}, {**CLAIMS, **claims})
    try:
        grant = judge().verify(token, NOW)
    except TokenError:
        return
    unchecked: Any = dict.fromkeys(
        ("verify_exp", "verify_iat", "verify_nbf", "verify_sub", "verify_jti", "verify_aud"), False
    )
    read = jwt.decode(token, NEW.secret, algorithms=["HS256"], options=unchecked)
    assert (read["client_id"], float(read["exp"])) == (grant.client_id, grant.expires_at)


# --- how long a token may live ----------------------------------------------------------------------------------------

DAY = 86400.0


@pytest.mark.parametrize(
    ("iat", "exp", "reason"),
    [
        (NOW, NOW + 90 * DAY, None),
        (NOW, NOW + 90 * DAY + 1, TokenRefusal.TOO_LONG),
        (NOW - 80 * DAY, NOW + 20 * DAY, TokenRefusal.TOO_LONG),
        (None, NOW + 90 * DAY, None),
        (None, NOW + 90 * DAY + 31, TokenRefusal.TOO_LONG),
        (NOW + 30, NOW + 30 + 90 * DAY, None),  # the issuer's clock is ahead by half a minute
        (NOW + 31, NOW + 31 + 90 * DAY, TokenRefusal.NOT_YET_VALID),
        (NOW + 80 * DAY, NOW + 100 * DAY, TokenRefusal.NOT_YET_VALID),
    ],
)
def test_no_token_lives_longer_than_max_token_ttl(iat: float | None, exp: float, reason: TokenRefusal | None) -> None:
    times = {"exp": exp} if iat is None else {"iat": iat, "exp": exp}
    token = signed({"client_id": "c", **times})
    if reason is None:
        assert verify(RING, token, NOW, AUTH).expires_at == exp
    else:
        assert refuse(token) is reason


@pytest.mark.parametrize("longest_s", [0.5, 1.5, 90.0])
def test_a_token_of_the_longest_ttl_and_its_refreshes_are_accepted(longest_s: float) -> None:
    settings = AuthSettings(max_token_ttl=longest_s, token_ttl=longest_s)
    ours = TokenAuthenticator(RING, settings, new_token_id=lambda: "t2")
    grant = ours.verify(issued(ttl_s=longest_s, settings=settings), NOW)
    assert grant.expires_at is not None
    if longest_s > 2:
        ours.verify(ours.refresh(grant, NOW + 0.1)[0], NOW + 0.1)


def test_a_first_token_issued_in_the_future_does_not_extend_its_chain() -> None:
    token = signed({"client_id": "c", "iat": NOW + 20, "exp": NOW + 1 * DAY})
    grant = judge().verify(token, NOW)
    assert judge().refresh(grant, NOW)[1].authenticated_at == NOW


# --- whose failure it is ----------------------------------------------------------------------------------------------


def test_a_claimant_is_exactly_the_key_and_the_client() -> None:
    one = claimant(signed(CLAIMS, SigningKey("new", b"x" * 32)))
    assert one == claimant(signed({**CLAIMS, "jti": "another", "exp": 3}, SigningKey("new", b"y" * 32)))
    assert one != claimant(signed({**CLAIMS, "client_id": "c2"}, SigningKey("new", b"x" * 32)))
    assert one != claimant(signed(CLAIMS, SigningKey("old", b"x" * 32)))
    assert len(one) == 16


@pytest.mark.parametrize(
    "token", ["", "garbage", "a.b.c", "x" * 9000, f"{FIRST}.{part([])}.AA", f"{FIRST}.{part(b'[' * WIDE)}.A"]
)
def test_a_token_without_a_readable_claim_has_no_claimant(token: str) -> None:
    assert claimant(token) == ""


def test_a_refusal_carries_its_claimant() -> None:
    token = signed(CLAIMS, SigningKey("new", b"x" * 32))
    with pytest.raises(TokenError) as caught:
        judge().verify(token, NOW)
    assert caught.value.claimant == claimant(token)


# --- keys that were replaced ------------------------------------------------------------------------------------------


def test_a_session_ends_with_its_key_also_where_another_takes_its_name() -> None:
    ours = judge()
    old, new = ours.verify(token_of(head(kid="old"), secret=OLD.secret), NOW), ours.verify(GOOD, NOW)
    ours.replace_ring(KeyRing(NEW, (SigningKey("old", b"another".ljust(32)), NEW)), AUTH)
    assert not ours.is_in_force(old, NOW)
    assert ours.is_in_force(new, NOW)
    with pytest.raises(TokenError):
        ours.refresh(old, NOW)
