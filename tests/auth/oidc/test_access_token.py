import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kit.issuers import (
    AUDIENCE,
    ISSUER,
    access_token,
    claims,
    issuer_settings,
    jwks,
    key_set,
    private_key,
    public_jwk,
    unsigned_part,
)
from kit.tokens import mac
from kit.whales import NOW
from whaled.auth.oidc.access_token import Policy, UnknownKeyError, stated_issuer, verified
from whaled.auth.oidc.keyset import read_key_set
from whaled.config.sections import Algorithm
from whaled.errors import TokenError, TokenRefusal
from whaled.model import Permission

DAY_S = 86400.0
KEYS = key_set()
POLICY = Policy.of(issuer_settings(), 90 * DAY_S)


def refusal(token: str, policy: Policy = POLICY, now: float = NOW) -> TokenError:
    with pytest.raises(TokenError) as caught:
        verified(token, policy, KEYS, now)
    return caught.value


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_a_good_token_of_every_algorithm_is_a_grant(algorithm: Algorithm) -> None:
    policy = Policy.of(issuer_settings(algorithms=(algorithm,)), 90 * DAY_S)
    grant = verified(access_token(algorithm=algorithm.value), policy, key_set(algorithm), NOW)
    assert (grant.client_id, [*grant.permissions]) == ("corp:bot", [Permission.READ])
    assert (grant.kind, grant.issuer) == ("oidc", ISSUER)
    assert (grant.issued_at, grant.expires_at, grant.token_id) == (NOW, NOW + 300, "j1")


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_a_signature_changed_in_one_place_is_refused(algorithm: Algorithm) -> None:
    policy = Policy.of(issuer_settings(algorithms=(algorithm,)), 90 * DAY_S)
    first, payload, signature = access_token(algorithm=algorithm.value).split(".")
    other = signature[:20] + ("A" if signature[20] != "A" else "B") + signature[21:]
    for token in (f"{first}.{payload}.{other}", f"{first}.{unsigned_part(claims(scope='x'))}.{signature}"):
        with pytest.raises(TokenError) as caught:
            verified(token, policy, key_set(algorithm), NOW)
        assert caught.value.reason is TokenRefusal.BAD_SIGNATURE
        assert caught.value.client_id == ""


REFUSED: dict[str, tuple[dict[str, Any], TokenRefusal]] = {
    "another issuer": ({"iss": ISSUER + "/"}, TokenRefusal.BAD_CLAIMS),
    "no issuer": ({"iss": None}, TokenRefusal.BAD_CLAIMS),
    "an issuer in a list": ({"iss": [ISSUER]}, TokenRefusal.BAD_CLAIMS),
    "another audience": ({"aud": "account"}, TokenRefusal.BAD_CLAIMS),
    "no audience": ({"aud": None}, TokenRefusal.BAD_CLAIMS),
    "an audience that only contains it": ({"aud": f"{AUDIENCE}-test"}, TokenRefusal.BAD_CLAIMS),
    "an audience in an object": ({"aud": {AUDIENCE: 1}}, TokenRefusal.BAD_CLAIMS),
    "no end": ({"exp": None}, TokenRefusal.BAD_CLAIMS),
    "an end in text": ({"exp": str(NOW + 300)}, TokenRefusal.BAD_CLAIMS),
    "an end that is true": ({"exp": True}, TokenRefusal.BAD_CLAIMS),
    "an end that was": ({"exp": NOW - 30}, TokenRefusal.EXPIRED),
    "an end in a hundred years": ({"exp": NOW + 36_500 * DAY_S}, TokenRefusal.TOO_LONG),
    "an end without end": ({"exp": 1e300}, TokenRefusal.BAD_CLAIMS),
    "not before tomorrow": ({"nbf": NOW + DAY_S}, TokenRefusal.NOT_YET_VALID),
    "issued tomorrow": ({"iat": NOW + DAY_S}, TokenRefusal.NOT_YET_VALID),
    "a time in text": ({"nbf": "0"}, TokenRefusal.BAD_CLAIMS),
    "no client": ({"client_id": None}, TokenRefusal.BAD_CLAIMS),
    "an empty client": ({"client_id": ""}, TokenRefusal.BAD_CLAIMS),
    "a client of two lines": ({"client_id": "a\nb"}, TokenRefusal.BAD_CLAIMS),
    "a client of 252 characters": ({"client_id": "c" * 252}, TokenRefusal.BAD_CLAIMS),
    "a client that is a number": ({"client_id": 7}, TokenRefusal.BAD_CLAIMS),
    "bound to a key of its client": ({"cnf": {"jkt": "x"}}, TokenRefusal.BAD_CLAIMS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_claims_that_do_not_fit_are_refused(name: str) -> None:
    change, reason = REFUSED[name]
    assert refusal(access_token(claims(**change))).reason is reason


def test_a_token_is_valid_up_to_the_leeway_on_both_sides() -> None:
    for change in ({"exp": NOW - 29}, {"nbf": NOW + 30}, {"iat": NOW + 30}, {"exp": NOW + 90 * DAY_S}):
        assert verified(access_token(claims(**change)), POLICY, KEYS, NOW).client_id == "corp:bot"
    strict = Policy.of(issuer_settings(leeway=0.0), 90 * DAY_S)
    assert refusal(access_token(claims(exp=NOW)), strict).reason is TokenRefusal.EXPIRED
    assert refusal(access_token(claims(nbf=NOW + 1)), strict).reason is TokenRefusal.NOT_YET_VALID


PUBLIC = private_key("RS256").public_key()
PEM = PUBLIC.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def hmac_with_the_public_key(header: dict[str, object]) -> str:
    """The classic: HMAC with the public key as its secret."""
    text = f"{unsigned_part(header)}.{unsigned_part(claims())}"
    return f"{text}.{mac(PEM, text)}"


FORGED = {
    "none": (f"{unsigned_part({'alg': 'none', 'kid': 'rs256-k1'})}.{unsigned_part(claims())}.AA"),
    "none in other letters": (f"{unsigned_part({'alg': 'NoNe', 'kid': 'rs256-k1'})}.{unsigned_part(claims())}.AA"),
    "HMAC with the public key": hmac_with_the_public_key({"alg": "HS256", "kid": "rs256-k1"}),
    "HMAC with the public key as RS256": hmac_with_the_public_key({"alg": "RS256", "kid": "rs256-k1"}),
    "an algorithm that is not allowed": jwt.encode(
        claims(), private_key("RS256"), algorithm="PS256", headers={"kid": "rs256-k1"}
    ),
    "another key of the same algorithm": jwt.encode(
        claims(), private_key("RS256", "other"), algorithm="RS256", headers={"kid": "rs256-k1"}
    ),
    "a key in the header": jwt.encode(
        claims(),
        private_key("RS256", "other"),
        algorithm="RS256",
        headers={"kid": "rs256-k1", "jwk": public_jwk(name="other"), "jku": "https://evil.example/jwks"},
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_token_has_a_bad_signature(name: str) -> None:
    assert refusal(FORGED[name]).reason is TokenRefusal.BAD_SIGNATURE


GOOD = access_token()
FIRST, PAYLOAD, SIGNATURE = GOOD.split(".")
ODD = {
    "nothing": "",
    "two parts": f"{FIRST}.{PAYLOAD}",
    "no signature": f"{FIRST}.{PAYLOAD}.",
    "five parts": f"{GOOD}.A.A",
    "padding": f"{GOOD}=",
    "a line break": f"{GOOD}\n",
    "more than 8 KiB": access_token(claims(groups=["g" * 100] * 90)),
    "a header that is a list": f"{unsigned_part([])}.{PAYLOAD}.{SIGNATURE}",
    "a header without end": f"{unsigned_part(b'[' * 3000)}.{PAYLOAD}.{SIGNATURE}",
    "one letter of base64": f"A.{PAYLOAD}.{SIGNATURE}",
    "an ID of a logout": access_token(typ="logout+jwt"),
    "a DPoP proof": access_token(typ="dpop+jwt"),
    "a critical extension": access_token(crit=["b64"], b64=True),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_access_token_is_malformed(name: str) -> None:
    assert refusal(ODD[name]).reason is TokenRefusal.MALFORMED


@pytest.mark.parametrize("typ", ["at+jwt", "AT+JWT", "JWT", "application/at+jwt", None])
def test_types_of_access_tokens_are_accepted(typ: str | None) -> None:
    assert verified(access_token(typ=typ), POLICY, KEYS, NOW).client_id == "corp:bot"


@pytest.mark.parametrize("payload", [b"[]", b"null", b"{", b"\xff\xfe", b"[" * 3000])
def test_claims_that_are_no_object_are_malformed_although_they_are_signed(payload: bytes) -> None:
    token = jwt.PyJWS().encode(payload, private_key("RS256"), algorithm="RS256", headers={"kid": "rs256-k1"})
    assert refusal(token).reason is TokenRefusal.MALFORMED


def test_an_unknown_key_is_told_apart_because_a_newer_set_may_have_it() -> None:
    for keys, token in ((KEYS, access_token(name="new")), (None, GOOD), (KEYS, access_token(kid="x\n" * 100))):
        with pytest.raises(UnknownKeyError) as caught:
            verified(token, POLICY, keys, NOW)
        assert caught.value.reason is TokenRefusal.UNKNOWN_KEY
        assert caught.value.claimant


def test_a_token_without_a_key_id_is_verified_if_the_issuer_has_a_single_key() -> None:
    assert verified(access_token(kid=None), POLICY, KEYS, NOW).client_id == "corp:bot"
    two = read_key_set(jwks(public_jwk(), public_jwk(name="k2")), [Algorithm.RS256])
    with pytest.raises(UnknownKeyError):
        verified(access_token(kid=None), POLICY, two, NOW)


def test_failures_are_counted_by_the_identity_that_a_token_claims() -> None:
    def claimant(**more: Any) -> str:
        return refusal(access_token(claims(aud="x", **more))).claimant

    assert claimant() == claimant(scope="y")
    assert len({claimant(), claimant(sub="other"), claimant(client_id="other")}) == 3
    assert refusal(access_token(claims(aud="x"))).client_id == "corp:bot"  # the signature is valid


GRANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "a word of scope": ("scope=whales:read", {"scope": "a whales:read b"}, True),
    "a part of a word of scope": ("scope=whales:read", {"scope": "whales:reader"}, False),
    "a word of scp": ("scp=Whales.Read", {"scp": "Files.Read Whales.Read"}, True),
    "an element of a list": ("roles=Whale.Read", {"roles": ["Other", "Whale.Read"]}, True),
    "a role with a space": ("roles=Whale Readers", {"roles": ["Whale Readers"]}, True),
    "a word of a text that is no list of words": ("dept=Whale", {"dept": "Whale Watch"}, False),
    "a whole text": ("dept=Whale Watch", {"dept": "Whale Watch"}, True),
    "a claim in claims": ("realm_access.roles=reader", {"realm_access": {"roles": ["reader"]}}, True),
    "a claim that has a dot": ("realm_access.roles=reader", {"realm_access.roles": ["reader"]}, False),
    "a name that is a URL": ('"https://x.example/roles"=r', {"https://x.example/roles": ["r"]}, True),
    "a flag": ("trusted=true", {"trusted": True}, True),
    "a flag that is not set": ("trusted=false", {"trusted": False}, False),
    "a number": ("level=1", {"level": 1}, False),
    "an object": ("roles=reader", {"roles": {"reader": True}}, False),
    "a list in a list": ("roles=reader", {"roles": [["reader"]]}, False),
    "nothing": ("roles=reader", {}, False),
    "a path through a text": ("scope.a=b", {"scope": "a"}, False),
}


@pytest.mark.parametrize("name", GRANTS)
def test_a_claim_grants_a_permission_only_with_the_whole_value(name: str) -> None:
    rule, change, is_granted = GRANTS[name]
    policy = Policy.of(issuer_settings(read=(rule,)), 90 * DAY_S)
    grant = verified(access_token(claims(**{"scope": None} | change)), policy, KEYS, NOW)
    assert (Permission.READ in grant.permissions) is is_granted


def test_each_permission_has_its_own_claims() -> None:
    policy = Policy.of(issuer_settings(read=("scope=r", "scope=a"), write=("scope=w",), admin=("scope=a",)), 90 * DAY_S)
    for scope, granted in (("r", "read"), ("w", "write"), ("a", "admin read"), ("r w a", "admin read write"), ("", "")):
        grant = verified(access_token(claims(scope=scope)), policy, KEYS, NOW)
        assert " ".join(sorted(grant.permissions)) == granted


def test_the_client_is_any_claim_that_the_operator_chooses() -> None:
    policy = Policy.of(issuer_settings(client_id_claim="ext.app"), 90 * DAY_S)
    assert verified(access_token(claims(ext={"app": "a b"})), policy, KEYS, NOW).client_id == "corp:a b"
    assert verified(access_token(claims(client_id="c" * 251)), POLICY, KEYS, NOW).client_id == f"corp:{'c' * 251}"


def test_the_issuer_of_anything_is_read_without_an_error() -> None:
    assert stated_issuer(GOOD) == ISSUER
    for text in (*ODD.values(), "whk_abc", "\ud800.a.b", f"a.{unsigned_part({'iss': 5})}.b", f"a.{'x' * 9000}.b"):
        assert stated_issuer(text) in {None, ISSUER}


def test_the_mark_changes_with_what_decides_about_a_grant_and_with_nothing_else() -> None:
    for change in ({"audience": "x"}, {"read": ()}, {"algorithms": (Algorithm.ES256,)}, {"client_id_claim": "sub"}):
        assert Policy.of(issuer_settings(**change), DAY_S).mark != POLICY.mark
    assert Policy.of(issuer_settings(leeway=1.0, timeout=1.0, refresh_interval=60.0), DAY_S).mark == POLICY.mark


def test_a_verification_does_not_hold_the_event_loop() -> None:
    """RS256 takes about 0.1 ms; the smallest of many rounds, because other programs run too."""
    smallest_s = 1.0
    for _ in range(50):
        began_s = time.perf_counter()
        verified(GOOD, POLICY, KEYS, NOW)
        smallest_s = min(smallest_s, time.perf_counter() - began_s)
    assert smallest_s < 0.001
