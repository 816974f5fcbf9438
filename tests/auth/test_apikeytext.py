import re
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whaled.auth.apikeytext import DIGITS, PATTERN, digest_of, is_key, key_of

SECRETS = st.binary(min_size=32, max_size=32)


@given(SECRETS)
def test_every_secret_has_a_key_of_one_form(secret: bytes) -> None:
    key = key_of(secret)
    assert re.fullmatch(PATTERN, key)
    assert len(key) == len("whk_") + 43 + 6
    assert is_key(key)


@given(SECRETS, SECRETS)
def test_different_secrets_have_different_keys(one: bytes, other: bytes) -> None:
    assert (key_of(one) == key_of(other)) is (one == other)
    assert (digest_of(key_of(one)) == digest_of(key_of(other))) is (one == other)


@given(SECRETS, st.integers(min_value=4, max_value=52), st.sampled_from(DIGITS))
def test_a_key_with_one_other_character_is_none(secret: bytes, place: int, digit: str) -> None:
    key = key_of(secret)
    other = key[:place] + digit + key[place + 1 :]
    assert is_key(other) is (other == key)


@given(st.text(max_size=80))
def test_any_other_text_is_refused_in_peace(text: str) -> None:
    assert not is_key(text)
    assert not is_key(f"whk_{text}")
    assert len(digest_of(text)) == 32


def test_the_form_never_changes() -> None:
    """Clients and searches for leaked keys know it, so these texts stay valid."""
    assert key_of(bytes(32)) == "whk_" + "0" * 43 + "2CZclj"
    assert key_of(bytes(range(32))).startswith("whk_0")
    assert is_key(key_of(b"\xff" * 32))


def test_a_number_above_256_bits_is_no_key_although_its_checksum_is_right() -> None:
    body, number, check = "z" * 43, zlib.crc32(b"z" * 43), ""
    for _ in range(6):
        number, digit = divmod(number, 62)
        check = DIGITS[digit] + check
    assert re.fullmatch(PATTERN, f"whk_{body}{check}")
    assert not is_key(f"whk_{body}{check}")


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_secret_has_256_bits(size: int) -> None:
    with pytest.raises(ValueError, match="expected 32"):
        key_of(bytes(size))
