"""EdDSA keys beside HS256 keys: what is accepted, what is refused, and the work of a refusal."""

import base64
import builtins
from collections import Counter
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.steps import work
from kit.tokens import AUTH, CLAIMS, FORGED, GOOD, NEW, OLD, RING, head, mac, part, signed, token_of
from kit.whales import NOW
from whaled.auth.eddsa import KeyPair
from whaled.auth.ring import KeyRing, SigningKey
from whaled.auth.signature import STAND_IN_SECRET
from whaled.auth.tokens import TokenAuthenticator, issue, verify
from whaled.errors import KeyRingError, TokenError, TokenRefusal
from whaled.model import Permission

SEED = bytes(range(32))
CURVE = SigningKey("curve", SEED, pair=KeyPair(SEED))
OTHER = SigningKey("other", SEED[::-1], pair=KeyPair(SEED[::-1]))
MIXED = KeyRing(CURVE, (OLD, NEW, CURVE))


def token_by(key: SigningKey, claims: object = CLAIMS, **header: object) -> str:
    """A token signed with an EdDSA key, whatever its header says."""
    assert key.pair is not None
    text = f"{part({'alg': 'EdDSA', 'typ': 'JWT', 'kid': key.kid, **header})}.{part(claims)}"
    return f"{text}.{part(key.pair.private.sign(text.encode()))}"


GENUINE = token_by(CURVE)
BEGIN, END = GENUINE.rsplit(".", maxsplit=1)
PUBLIC = CURVE.pair.public_bytes if CURVE.pair is not None else b""
FORGERIES = {
    "the public key as a shared secret": token_of(head(kid="curve"), secret=PUBLIC),
    "the private key as a shared secret": token_of(head(kid="curve"), secret=SEED),
    "the stand-in's secret under its name": token_of(head(kid="curve"), secret=STAND_IN_SECRET),
    "HS256 in the header, signed by the pair": token_by(CURVE, alg="HS256"),
    "EdDSA in the header, a shared secret": token_of(head(alg="EdDSA")),
    "EdDSA under the name of an HS256 key": token_by(CURVE, kid="new"),
    "an HS256 token under the name of the pair": signed(CLAIMS, SigningKey("curve", NEW.secret)),
    "another pair": token_by(OTHER, kid="curve"),
    "an unknown name": token_by(OTHER),
    "no name": token_by(CURVE, kid=None),
    "Ed25519 as the algorithm": token_by(CURVE, alg="Ed25519"),
    "no algorithm": token_by(CURVE, alg="none"),
    "its own key in the header": token_by(OTHER, kid="curve", jwk={"kty": "OKP", "crv": "Ed25519"}),
    "a critical extension": token_by(CURVE, crit=["exp"]),
    "other claims": f"{part(head(alg='EdDSA', kid='curve'))}.{part({**CLAIMS, 'client_id': 'c2'})}.{END}",
    "no signature": f"{BEGIN}.",
    "half a signature": f"{GENUINE[:-43]}",
    "more signature": f"{GENUINE}A",
    "another text of the same bytes": GENUINE[:-1] + chr(ord(GENUINE[-1]) + 1),
    "zeros": f"{BEGIN}.{'A' * 86}",
    "an HMAC of 64 bytes": f"{BEGIN}.{mac(NEW.secret, BEGIN, 'sha512')}",
}


def test_a_token_of_an_eddsa_key_is_accepted_and_the_library_agrees() -> None:
    token, grant = issue(
        MIXED, client_id="c1", permissions=[Permission.READ], ttl_s=60, now=NOW, token_id="t", settings=AUTH
    )
    assert jwt.get_unverified_header(token)["alg"] == "EdDSA"
    assert verify(MIXED, token, NOW, AUTH) == grant
    assert (grant.key_id, verify(MIXED, GENUINE, NOW, AUTH).client_id) == ("curve", "c1")
    assert verify(MIXED, GOOD, NOW, AUTH).key_id == "new"  # an HS256 key of the same ring


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_token_is_refused(name: str) -> None:
    with pytest.raises(TokenError):
        verify(MIXED, FORGERIES[name], NOW, AUTH)


@pytest.mark.parametrize("name", FORGED)
def test_what_an_hs256_ring_refuses_a_mixed_ring_refuses(name: str) -> None:
    with pytest.raises(TokenError) as usual:
        verify(RING, FORGED[name], NOW, AUTH)
    with pytest.raises(TokenError) as caught:
        verify(MIXED, FORGED[name], NOW, AUTH)
    assert caught.value.reason is usual.value.reason


@given(st.integers(0, len(GENUINE) - 1), st.characters(codec="ascii"))
def test_no_changed_token_is_accepted(place: int, letter: str) -> None:
    changed = GENUINE[:place] + letter + GENUINE[place + 1 :]
    if changed != GENUINE:
        with pytest.raises(TokenError):
            verify(MIXED, changed, NOW, AUTH)


@given(st.binary(max_size=100))
def test_any_signature_is_refused_in_peace(raw: bytes) -> None:
    text = base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
    with pytest.raises(TokenError):
        verify(MIXED, f"{BEGIN}.{text}", NOW, AUTH)


def test_a_session_of_an_eddsa_key_is_refreshed_and_ends_with_its_key() -> None:
    judge = TokenAuthenticator(MIXED, AUTH, new_token_id=lambda: "t2")
    grant = judge.verify(GENUINE, NOW)
    renewed, after = judge.refresh(grant, NOW + 1)
    assert judge.verify(renewed, NOW + 1) == after
    assert judge.is_in_force(after, NOW + 1)
    same_name = SigningKey("curve", SEED[::-1], pair=KeyPair(SEED[::-1]))
    judge.replace_ring(KeyRing(NEW, (NEW, same_name)), AUTH)
    assert not judge.is_in_force(after, NOW + 1)


# --- the same work ----------------------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[str, TokenRefusal]] = {
    "unknown key": (signed(CLAIMS, SigningKey("gone", b"g" * 32)), TokenRefusal.UNKNOWN_KEY),
    "unknown EdDSA key": (token_by(OTHER), TokenRefusal.UNKNOWN_KEY),
    "bad signature": (signed(CLAIMS, SigningKey("new", b"x" * 32)), TokenRefusal.BAD_SIGNATURE),
    "bad EdDSA signature": (token_by(OTHER, kid="curve"), TokenRefusal.BAD_SIGNATURE),
    "expired": (signed({**CLAIMS, "iat": NOW - 60, "exp": NOW - 31}), TokenRefusal.EXPIRED),
    "expired EdDSA": (token_by(CURVE, {**CLAIMS, "iat": NOW - 60, "exp": NOW - 31}), TokenRefusal.EXPIRED),
    "garbage": ("garbage", TokenRefusal.MALFORMED),
    "too large": ("x" * 9000, TokenRefusal.MALFORMED),
}


def refuse(ring: KeyRing, token: str) -> Callable[[], None]:
    def call() -> None:
        try:
            verify(ring, token, NOW, AUTH)
        except TokenError:
            return
        raise AssertionError

    return call


@pytest.mark.parametrize("name", REFUSALS)
def test_every_refusal_checks_one_hmac_and_one_curve_signature(name: str) -> None:
    token, reason = REFUSALS[name]
    with pytest.raises(TokenError) as caught:
        verify(MIXED, token, NOW, AUTH)
    assert caught.value.reason is reason
    steps = Counter(work(refuse(MIXED, token)))
    assert (steps["hmac_digest"], steps["KeyPair.is_signed"]) == (1, 1)
    assert steps["Ed25519PublicKey.verify"] == 1, steps


def test_a_ring_without_an_eddsa_key_does_nothing_for_one() -> None:
    for token in (GOOD, GENUINE):
        call = refuse(RING, token) if token is GENUINE else lambda: verify(RING, GOOD, NOW, AUTH)
        steps = Counter(work(call))
        assert not [step for step in steps if "KeyPair" in step or "Ed25519" in step or step.endswith("pair_of")]


# --- rings that change by themselves ----------------------------------------------------------------------------------


def test_a_rotated_key_is_dropped_by_itself_and_comes_back_with_the_clock() -> None:
    old = SigningKey("old", OLD.secret, verifies_until=NOW + 10)
    judge = TokenAuthenticator(KeyRing(NEW, (old, NEW)), AUTH, new_token_id=lambda: "t2")
    token = signed(CLAIMS, old)
    grant = judge.verify(token, NOW + 9.9)
    with pytest.raises(TokenError) as caught:
        judge.verify(token, NOW + 10)
    assert caught.value.reason is TokenRefusal.UNKNOWN_KEY
    assert (judge.is_in_force(grant, NOW + 9.9), judge.is_in_force(grant, NOW + 10)) == (True, False)
    assert judge.verify(token, NOW).key_id == "old"  # a clock that jumped ahead and was set back
    assert judge.verify(GOOD, NOW + 10).key_id == "new"


def test_a_session_of_a_rotated_key_refreshes_with_the_new_one() -> None:
    judge = TokenAuthenticator(KeyRing(OLD, (OLD,)), AUTH, new_token_id=lambda: "t2")
    grant = judge.verify(signed(CLAIMS, OLD), NOW)
    until = SigningKey("old", OLD.secret, verifies_until=NOW + 1000)
    judge.replace_ring(KeyRing(CURVE, (until, CURVE)), AUTH)
    assert judge.is_in_force(grant, NOW)
    token, _ = judge.refresh(grant, NOW + 1)
    assert jwt.get_unverified_header(token)["kid"] == "curve"


def test_without_the_library_an_eddsa_key_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def missing(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(f"No module named {name!r}")
        return found(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(KeyRingError, match=r"pip install 'whaled\[eddsa\]'"):
        KeyPair(SEED)


def test_a_pair_is_not_shown() -> None:
    for text in (repr(CURVE), repr(MIXED), repr(CURVE.pair), str(MIXED)):
        assert SEED.hex() not in text
        assert part(SEED) not in text
        assert repr(SEED) not in text
