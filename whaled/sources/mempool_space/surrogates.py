r"""Repair of JSON in which a string contains half of a surrogate pair. Pure.

JavaScript strings may contain one: a backend that cuts a miner's tag in the middle of an emoji sends `"\ud83d"`. That
is valid JSON by RFC 8259, section 7, but strict parsers reject it together with the rest of the document.
"""

import re

# Matches one escape at a time, so that the second backslash of `\\ud83d` (an escaped backslash and five letters) is not
# taken for the start of another escape.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|[^\x00])"
)
REPLACEMENT = rb"\ufffd"


def repaired(raw: bytes) -> bytes:
    """Return the same JSON with U+FFFD in place of each half of a pair; `raw` itself if there is none."""
    if b"\\ud" not in raw and b"\\uD" not in raw:
        return raw
    return _ESCAPE.sub(lambda found: found[0] if found[1] is None else REPLACEMENT, raw)
