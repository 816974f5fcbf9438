import json
from typing import Any

import pytest

from kit.issuers import jwks, public_jwk
from whaled.auth.oidc.keyset import KIND_OF, MAX_KEYS, KeySetError, Kind, read_key_set
from whaled.config.sections import Algorithm

ALL = tuple(Algorithm)


@pytest.mark.parametrize("algorithm", ALL)
def test_a_key_of_every_algorithm_is_read(algorithm: Algorithm) -> None:
    found = read_key_set(jwks(public_jwk(algorithm.value)), [algorithm])
    assert found.left_out == 0
    key = found.find(f"{algorithm.value.lower()}-k1", algorithm)
    assert key is not None
    assert key.kind is KIND_OF[algorithm]


LEFT_OUT: dict[str, dict[str, Any]] = {
    "for encryption": public_jwk(use="enc"),
    "for signing only": public_jwk(key_ops=["sign"]),
    "of another algorithm": public_jwk(alg="RS512"),
    "for HMAC": {"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0", "kid": "h", "alg": "HS256"},
    "with 1024 bits": public_jwk(name="small", bits=1024),
    "with its private part": public_jwk(d="AAAA"),
    "of an unknown kind": {"kty": "AKP", "alg": "ML-DSA-44", "pub": "AAAA"},
    "of another curve": {"kty": "EC", "crv": "secp256k1", "x": "AAAA", "y": "AAAA"},
    "an exponent of 1": public_jwk(e="AQ"),
    "an exponent beyond any use": public_jwk(e="AQAAAAAB"),
    "an even modulus": public_jwk(n="gA" + "A" * 340),
    "a modulus of 16,384 bits": public_jwk(n="_" * 2730 + "w"),
    "numbers that are no base64": public_jwk(n="***"),
    "numbers in numbers": public_jwk(n=5),
    "a kid that is a number": public_jwk(kid=5),
    "a kid with a line break": public_jwk(kid="a\nb"),
    "a kid of 300 characters": public_jwk(kid="k" * 300),
    "an empty object": {},
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_key_that_cannot_verify_is_left_out_and_the_others_are_used(name: str) -> None:
    found = read_key_set(jwks(LEFT_OUT[name], public_jwk()), [Algorithm.RS256])
    assert (sorted(found.kids), found.left_out) == (["rs256-k1"], 1)
    with pytest.raises(KeySetError, match="has no key for RS256 among its 1"):
        read_key_set(jwks(LEFT_OUT[name]), [Algorithm.RS256])


@pytest.mark.parametrize(
    ("algorithm", "change"),
    [
        ("ES256", {"x": "AAAA"}),
        ("ES256", {"y": public_jwk("ES256")["x"]}),  # no point of the curve
        ("ES256", {"crv": "P-384"}),
        ("EdDSA", {"x": "AAAA"}),
        ("EdDSA", {"crv": "Ed448"}),
        ("EdDSA", {"crv": "X25519"}),
    ],
)
def test_a_point_that_is_not_on_its_curve_is_no_key(algorithm: str, change: dict[str, Any]) -> None:
    with pytest.raises(KeySetError):
        read_key_set(jwks(public_jwk(algorithm, **change)), ALL)


@pytest.mark.parametrize("text", [b"", b"<html>", b"[]", b"{}", b'{"keys":{}}', b"\xff", b'{"keys":' + b"[" * 5000])
def test_what_is_no_key_set_is_refused(text: bytes) -> None:
    with pytest.raises(KeySetError, match="is not a JSON object with a list `keys`"):
        read_key_set(text, ALL)


def test_no_more_than_64_keys_are_read() -> None:
    assert len(read_key_set(jwks(*[public_jwk()] * MAX_KEYS), ALL).keys) == MAX_KEYS
    with pytest.raises(KeySetError, match="has 65 keys, at most 64"):
        read_key_set(jwks(*[public_jwk()] * (MAX_KEYS + 1)), ALL)


def test_a_set_of_odd_elements_is_refused_and_not_a_crash() -> None:
    with pytest.raises(KeySetError, match="among its 4"):
        read_key_set(json.dumps({"keys": [None, 1, "x", []]}).encode(), ALL)


def test_a_key_without_an_id_is_found_only_if_no_other_fits() -> None:
    one = read_key_set(jwks(public_jwk(kid=None), public_jwk("ES256", kid=None)), ALL)
    assert one.find(None, Algorithm.RS256) is not None
    assert one.find("any", Algorithm.RS256) is None
    two = read_key_set(jwks(public_jwk(kid=None), public_jwk(name="k2", kid=None)), ALL)
    assert two.find(None, Algorithm.RS256) is None


def test_a_key_fits_its_own_algorithm_and_kind_only() -> None:
    found = read_key_set(jwks(public_jwk(alg="RS256")), ALL)
    assert found.find("rs256-k1", Algorithm.RS256) is not None
    for other in set(ALL) - {Algorithm.RS256}:
        assert found.find("rs256-k1", other) is None
    assert {Kind.RSA} == {key.kind for key in found.keys}
