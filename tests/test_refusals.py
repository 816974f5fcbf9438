"""Every refusal of a token: the same answer after the same work, and nothing forged gets in."""

import base64
import hashlib
import hmac
import json
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from test_tokens import AUTH, NEW, NOW, OLD, RING, make, signed
from whaled.auth.signature import STAND_IN_SECRET, claimant
from whaled.auth.tokens import KeyRing, SigningKey, TokenAuthenticator, verify
from whaled.config.sections import AuthSettings
from whaled.errors import TokenError, TokenRefusal

CLAIMS = {"client_id": "c1", "permissions": ["read"], "iat": NOW, "exp": NOW + 60, "jti": "t1"}


def part(value: object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def mac(secret: bytes, text: str, digest: Any = hashlib.sha256) -> str:
    return part(hmac.digest(secret, text.encode(), digest))


def token_of(header: object, claims: object = CLAIMS, secret: bytes = NEW.secret) -> str:
    text = f"{part(header)}.{part(claims)}"
    return f"{text}.{mac(secret, text)}"


def head(**more: object) -> dict[str, object]:
    return {"alg": "HS256", "typ": "JWT", "kid": "new", **more}


def judge() -> TokenAuthenticator:
    return TokenAuthenticator(RING, AUTH, new_token_id=lambda: "t2")


# --- the same work ----------------------------------------------------------------------------------------------------


def work(call: Callable[[], object]) -> list[str]:
    """Every function that is called, ours and those written in C, in order."""
    seen: list[str] = []

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            seen.append(frame.f_code.co_qualname)
        elif event == "c_call":
            seen.append(str(getattr(argument, "__qualname__", argument)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return seen


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
    token = make()
    grant = ours.verify(token, NOW)
    ours.refresh(grant, NOW)
    with pytest.raises(TokenError):
        ours.refresh(grant, NOW)

    def call() -> None:
        with pytest.raises(TokenError):
            ours.verify(token, NOW)

    assert "PyJWT.decode" not in work(call)


# --- nothing forged gets in -------------------------------------------------------------------------------------------

GOOD = token_of(head())
FIRST, SECOND, LAST = GOOD.split(".")
ADMIN = part({**CLAIMS, "permissions": ["read", "write", "admin"]})
WIDE = 4_000

FORGED: dict[str, str] = {
    "no algorithm": token_of({"kid": "new"}),
    "none, unsigned": f"{part(head(alg='none'))}.{SECOND}.",
    "none, signed": token_of(head(alg="none")),
    "None in other letters": token_of(head(alg="nOnE")),
    "lower case algorithm": token_of(head(alg="hs256")),
    "algorithm null": token_of(head(alg=None)),
    "algorithms in a list": token_of(head(alg=["HS256"])),
    "HS384 by its own digest": f"{part(head(alg='HS384'))}.{SECOND}."
    + mac(NEW.secret, f"{part(head(alg='HS384'))}.{SECOND}", hashlib.sha384),
    "HS512 with the right key": jwt.encode(CLAIMS, NEW.secret * 2, algorithm="HS512", headers={"kid": "new"}),
    "RS256 with the secret as key": token_of(head(alg="RS256")),
    "a key in the header": token_of(head(jwk={"kty": "oct", "k": part(b"j" * 32)}), secret=b"j" * 32),
    "a key to fetch": token_of(head(jku="https://example.org/k", x5u="https://example.org/k"), secret=b"j" * 32),
    "an empty key": token_of(head(), secret=b""),
    "the stand-in's key under an unknown name": token_of(head(kid="gone"), secret=STAND_IN_SECRET),
    "the stand-in's key and name": token_of(head(kid="stand-in-0000"), secret=STAND_IN_SECRET),
    "the stand-in's key under a known name": token_of(head(), secret=STAND_IN_SECRET),
    "a key of the ring under another's name": token_of(head(kid="old")),
    "a name that is a path": token_of(head(kid="../../etc/hostname")),
    "a name that is a number": token_of(head(kid=0)),
    "a name that is a list": token_of(head(kid=["new"])),
    "a name in other letters": token_of(head(kid="NEW")),
    "a name with a zero byte": token_of(head(kid="new\0")),
    "no name": token_of({"alg": "HS256"}),
    "a null name": token_of(head(kid=None)),
    "other claims": f"{FIRST}.{ADMIN}.{LAST}",
    "another header": f"{part(head(typ='at+jwt'))}.{SECOND}.{LAST}",
    "no signature": f"{FIRST}.{SECOND}.",
    "half a signature": f"{FIRST}.{SECOND}.{LAST[:21]}",
    "more signature": f"{GOOD}A",
    "a padded signature": f"{GOOD}=",
    "a padded payload": f"{FIRST}.{SECOND}==.{LAST}",
    "a signature of zeros": f"{FIRST}.{SECOND}.{'A' * 43}",
    "the other last letter of the same bytes": GOOD[:-1] + chr(ord(GOOD[-1]) + 1),
    "white space before": f" {GOOD}",
    "white space behind": f"{GOOD}\n",
    "a dot too many": f"{GOOD}.",
    "a dot before": f".{GOOD}",
    "two parts": f"{FIRST}.{SECOND}",
    "empty parts": "..",
    "an encrypted token's five parts": f"{FIRST}.{SECOND}.{LAST}.{SECOND}.{LAST}",
    "a critical extension": token_of(head(crit=["exp"])),
    "an empty list of extensions": token_of(head(crit=[])),
    "a payload that is not base64": token_of(head(b64=False, crit=["b64"])),
    "b64 alone": token_of(head(b64=True)),
    "a token within a token": token_of(head(cty="JWT"), GOOD.encode()),
    "claims in a list": token_of(head(), [CLAIMS]),
    "no claims": token_of(head(), b""),
    "claims that are nothing": token_of(head(), b"null"),
    "an end of NaN": token_of(head(), b'{"client_id":"c1","exp":NaN}'),
    "an end of Infinity": token_of(head(), b'{"client_id":"c1","exp":Infinity}'),
    "an end of 1e999": token_of(head(), b'{"client_id":"c1","exp":1e999}'),
    "an end in text": token_of(head(), {**CLAIMS, "exp": str(NOW + 60)}),
    "an end that is true": token_of(head(), {**CLAIMS, "exp": True}),
    "a second end that has passed": token_of(head(), b'{"client_id":"c1","exp":1800000060,"exp":1}'),
    "no end": token_of(head(), {"client_id": "c1"}),
    "an end in a hundred years": token_of(head(), {**CLAIMS, "exp": NOW + 100 * 365 * 86400}),
    "issued in the future, to live longer": token_of(head(), {**CLAIMS, "iat": NOW + 1e9, "exp": NOW + 1e9 + 60}),
    "claims nested without end": token_of(head(), b'{"client_id":"c1","exp":1800000060,"a":' + b"[" * WIDE),
    "a header nested without end": f"{part(b'[' * WIDE)}.{SECOND}.{LAST}",
    "claims with bytes that are no text": token_of(head(), b'{"client_id":"\xff","exp":1800000060}'),
    "claims with half a surrogate pair": token_of(head(), b'{"client_id":"c\\ud800","exp":1800000060}'),
    "claims with a byte order mark": token_of(head(), b"\xef\xbb\xbf" + json.dumps(CLAIMS).encode()),
    "claims in UTF-16": token_of(head(), json.dumps(CLAIMS).encode("utf-16")),
    "something behind the claims": token_of(head(), json.dumps(CLAIMS).encode() + b"{}"),
    "letters that only look alike": GOOD.replace("e", "\u0435", 1),
    "the scheme with it": f"Bearer {GOOD}",
}


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
    grant = ours.verify(make(ttl_s=longest_s, settings=settings), NOW)
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
