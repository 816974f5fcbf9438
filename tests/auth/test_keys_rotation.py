"""The key ring's file with EdDSA keys and rotations: what a rotation changes, and what is refused."""

import builtins
import json
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.tokens import AUTH
from kit.whales import NOW
from whaled.auth.keys import ROTATION_MARGIN_S, generate, public_keys, read, retire, ring_of, rotate
from whaled.auth.tokens import issue, verify
from whaled.config.fields import MAX_LEEWAY_S
from whaled.errors import KeyRingError, TokenError
from whaled.model import Permission

LONGEST_S = 90 * 86400.0
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another algorithm": ({"alg": "RS256"}, "algorithm 'RS256', only HS256 and EdDSA are known"),
    "a longer seed": ({"secret": "A" * 4 + "bCdEfGhIjKlMnOpQrStUvWxYz0123456789-_AbC"}, "an EdDSA key has 32"),
    "a short seed": ({"secret": "AAAA"}, "at least 32 are needed"),
    "a weak seed": ({"secret": "A" * 43}, "too weak"),
    "no base64url": ({"secret": "+" * 43}, "not base64url"),
    "an end before the beginning": ({"verifies_until": int(NOW) - 1}, "`verifies_until` is before `created_at`"),
    "an end in text": ({"verifies_until": "soon"}, "is not a key ring: Expected `int | null`, got `str`"),
    "a negative end": ({"verifies_until": -1}, "is not a key ring: Expected `int` >= 0"),
    "an end that is a fraction": ({"verifies_until": 1.5}, "is not a key ring"),
    "an end beyond all dates": ({"verifies_until": 10**12}, "is not a key ring"),
    "a public key beside it": ({"public": "AAAA"}, "unknown field `public`"),
    "a key id with a line break": ({"kid": "k1\n"}, "is not a key ring"),
    "no algorithm at all": ({"alg": None}, "is not a key ring"),
    "rotated out, and none after it": ({"verifies_until": int(NOW) + 9}, "no key that signs"),
}


@pytest.fixture
def ring_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    generate(path, NOW)
    return path


def token_of(path: Path, ttl_s: float, now: float) -> str:
    ring = ring_of(read(path), path)
    return issue(
        ring, client_id="c1", permissions=[Permission.READ], ttl_s=ttl_s, now=now, token_id="t", settings=AUTH
    )[0]


def test_an_eddsa_key_signs_tokens_that_its_published_key_verifies(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = generate(path, NOW, algorithm="EdDSA")
    token = token_of(path, 60, NOW)
    (published,) = json.loads(public_keys(read(path), path, NOW))["keys"]
    assert published == {
        "kty": "OKP", "crv": "Ed25519", "x": published["x"], "kid": key.kid, "alg": "EdDSA", "use": "sig",
    }  # fmt: skip
    claims = jwt.decode(
        token, jwt.PyJWK.from_dict(published), algorithms=["EdDSA"],
        options={"verify_exp": False, "verify_iat": False},
    )  # fmt: skip
    assert claims["client_id"] == "c1"


def test_published_keys_are_those_that_verify_and_hold_no_secret(ring_file: Path) -> None:
    first = generate(ring_file, NOW, algorithm="EdDSA")
    gone = generate(ring_file, NOW, algorithm="EdDSA")
    retire(ring_file, gone.kid, NOW)
    second, _ = rotate(ring_file, NOW, longest_s=LONGEST_S)
    file = read(ring_file)

    def published(now: float) -> list[str]:
        text = public_keys(file, ring_file, now).decode()
        assert not [key.kid for key in file.keys if key.secret in text]
        assert '"d"' not in text
        return [key["kid"] for key in json.loads(text)["keys"]]

    assert published(NOW) == [first.kid, second.kid]
    assert published(NOW + LONGEST_S + 3600) == [second.kid]


def test_a_ring_without_an_eddsa_key_publishes_none(ring_file: Path) -> None:
    assert json.loads(public_keys(read(ring_file), ring_file, NOW)) == {"keys": []}


def test_the_longest_token_of_a_rotated_key_is_accepted_to_its_end(ring_file: Path) -> None:
    token = token_of(ring_file, LONGEST_S, NOW)  # by a command, at the moment of the rotation
    old = read(ring_file).keys[0]
    new, others = rotate(ring_file, NOW, longest_s=LONGEST_S)
    assert [(key.kid, key.verifies_until) for key in others] == [
        (old.kid, int(NOW + LONGEST_S + MAX_LEEWAY_S + ROTATION_MARGIN_S))
    ]
    ring = ring_of(read(ring_file), ring_file)
    assert ring.signing.kid == new.kid
    assert verify(ring, token, NOW + LONGEST_S + AUTH.leeway - 1, AUTH).key_id == old.kid
    after = NOW + LONGEST_S + 3600
    assert [key.kid for key in ring.at(after).verifying] == [new.kid]
    with pytest.raises(TokenError):
        verify(ring, token, after, AUTH)


def test_a_rotation_keeps_algorithm_and_earlier_ends_and_removes_keys_that_have_ended(ring_file: Path) -> None:
    first = read(ring_file).keys[0].kid
    second, _ = rotate(ring_file, NOW, longest_s=60, algorithm="EdDSA")
    ends = {key.kid: key.verifies_until for key in read(ring_file).keys}
    third, others = rotate(ring_file, NOW + 100, longest_s=60)
    assert (second.alg, third.alg) == ("EdDSA", "EdDSA")
    assert [key.kid for key in others] == [first, second.kid]
    assert others[0].verifies_until == ends[first]
    fourth, others = rotate(ring_file, NOW + 750, longest_s=60)
    assert [key.kid for key in others] == [second.kid, third.kid]
    assert [key.kid for key in read(ring_file).keys] == [second.kid, third.kid, fourth.kid]


def test_a_key_that_only_verifies_is_retired_without_force_and_the_one_that_signs_is_not(ring_file: Path) -> None:
    first = read(ring_file).keys[0].kid
    new, _ = rotate(ring_file, NOW, longest_s=60)
    with pytest.raises(KeyRingError, match="last one that signs"):
        retire(ring_file, new.kid, NOW)
    retire(ring_file, first, NOW)
    assert [read(ring_file).state(key, NOW) for key in read(ring_file).keys] == ["retired", "signs"]


def test_a_clock_that_is_behind_rotates_nothing(ring_file: Path) -> None:
    before = ring_file.read_bytes()
    with pytest.raises(KeyRingError, match="set the clock first"):
        rotate(ring_file, NOW - 3600, longest_s=LONGEST_S)
    assert ring_file.read_bytes() == before


def test_without_the_library_no_eddsa_key_is_written(ring_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, before = builtins.__import__, ring_file.read_bytes()

    def missing(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError(name)
        return found(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    for change in (
        lambda: generate(ring_file, NOW, algorithm="EdDSA"),
        lambda: rotate(ring_file, NOW, longest_s=60, algorithm="EdDSA"),
    ):
        with pytest.raises(KeyRingError, match="make install EXTRAS=eddsa"):
            change()
    assert ring_file.read_bytes() == before
    ring_of(read(ring_file), ring_file)  # a ring of HS256 keys needs no library


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_key_is_one_clear_error_without_the_secret(tmp_path: Path, name: str) -> None:
    path = tmp_path / "keys.json"
    generate(path, NOW, algorithm="EdDSA")
    changed, problem = WRONG[name]
    ring = json.loads(path.read_text())
    secret = ring["keys"][0]["secret"]
    ring["keys"][0].update(changed)
    path.write_text(json.dumps(ring))
    with pytest.raises(KeyRingError) as caught:
        ring_of(read(path), path)
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert secret not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(["HS256", "EdDSA"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("kid", "alg", "secret", "created_at", "retired_at", "verifies_until")
GOOD_KEY = {"kid": "k1", "alg": "EdDSA", "secret": "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8", "created_at": 5}


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), st.sampled_from([1, 2, None, "1"]), st.booleans())
def test_any_ring_is_a_ring_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], version: Any, is_twice: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    key = {**GOOD_KEY, **fields}
    path.write_text(json.dumps({"version": version, "keys": [key, key] if is_twice else [key]}))
    path.chmod(0o600)
    try:
        ring = ring_of(read(path), path)
    except KeyRingError as error:
        problem = str(error)
    else:
        assert version == 1
        assert ring.signing.secret
        problem = ""
    assert "\n" not in problem
