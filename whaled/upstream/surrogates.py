"""Repairs JSON in which a string holds half of a surrogate pair. Pure.

JavaScript strings may hold one: a backend that cuts a miner's tag in the middle of an emoji writes `"\\ud83d"`, which
is valid JSON by RFC 8259, section 7, and which strict parsers refuse together with everything around it.
"""

import re

# An escape at a time, so that the backslash of `\\\\ud83d` (a backslash and five letters) is not taken for another one.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|[^\x00])"
)
REPLACEMENT = rb"\ufffd"


def repaired(raw: bytes) -> bytes:
    """The same JSON with U+FFFD in place of each half of a pair; `raw` itself where there is none."""
    if b"\\ud" not in raw and b"\\uD" not in raw:
        return raw
    return _ESCAPE.sub(lambda found: found[0] if found[1] is None else REPLACEMENT, raw)
