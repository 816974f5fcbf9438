"""The text of an API key: `whk_`, 256 random bits in base62, and a checksum of six characters. Pure.

The prefix and the checksum are for programs that search repositories and logs for leaked secrets: a text of this form
with a correct checksum is a key of whaled, and one in 57 billion others looks like it.
"""

import hashlib
import re
import zlib
from typing import Final

from whaled.auth.tokentext import API_KEY_PREFIX

SECRET_BYTES: Final = 32
DIGITS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# 62**43 is the smallest power of 62 above 2**256, and 62**6 is above 2**32.
SECRET_CHARACTERS: Final = 43
CHECK_CHARACTERS: Final = 6
# For searches; `is_key` also compares the checksum.
PATTERN: Final = rf"{API_KEY_PREFIX}[0-9A-Za-z]{{{SECRET_CHARACTERS + CHECK_CHARACTERS}}}"
_SHAPE: Final = re.compile(PATTERN)


def key_of(secret: bytes) -> str:
    """Return the key with these SECRET_BYTES of randomness."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes; expected {SECRET_BYTES}")
    body = _base62(int.from_bytes(secret), SECRET_CHARACTERS)
    return API_KEY_PREFIX + body + _checksum(body)


def is_key(text: str) -> bool:
    """Return whether a text has the form of a key and the right checksum. Any other text takes as long."""
    is_shaped = _SHAPE.fullmatch(text) is not None
    if not is_shaped:
        text = STAND_IN
    body, check = text[len(API_KEY_PREFIX) : -CHECK_CHARACTERS], text[-CHECK_CHARACTERS:]
    # The digits are in ASCII order, so texts compare like the numbers that they stand for.
    return check == _checksum(body) and body <= _LAST and is_shaped


def digest_of(key: str) -> bytes:
    """Return the SHA-256 of a key, under which it is stored.

    A slow hash protects passwords, which are guessed. Nobody can guess 256 random bits, whatever the speed of the hash,
    and a slow one would hold the event loop for each attempt of a stranger.
    """
    return hashlib.sha256(key.encode(errors="replace")).digest()


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode("ascii")), CHECK_CHARACTERS)


def _base62(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, digit = divmod(number, len(DIGITS))
        digits.append(DIGITS[digit])
    return "".join(reversed(digits))


_LAST: Final = _base62(2 ** (8 * SECRET_BYTES) - 1, SECRET_CHARACTERS)
# Checked in place of a text that is no key. It is one itself, but of no stored secret.
STAND_IN: Final = key_of(bytes(SECRET_BYTES))
