"""Claims of access tokens as the configuration names them: a path to a claim, and the value that it must have. Pure.

`realm_access.roles=whale-reader` names the value `whale-reader` of the claim `roles` in the claim `realm_access`. A
name with other characters than letters, digits, `_`, `-`, `:` is in double quotes: `"https://example.org/roles"=reader`.
"""

import re

from msgspec import Struct

# Keycloak's `resource_access.<client>.roles` has three names; more than this number are not a claim.
MAX_NAMES = 8
_NAME = re.compile(r'"([^"]+)"|([A-Za-z0-9_:-]+)')


class ClaimRule(Struct, frozen=True):
    """A value that a claim must have: as a text, as a word of `scope` or `scp`, in a list, or as true."""

    path: tuple[str, ...]
    value: str


def claim_path(text: str) -> tuple[str, ...]:
    """Return the names on the path to a claim. Raises ValueError with what is allowed."""
    path, end = _path(text)
    if end != len(text):
        raise ValueError(_misread(text, end))
    return path


def claim_rule(text: str) -> ClaimRule:
    """Return the claim and the value that a text names. Raises ValueError with what is allowed."""
    path, end = _path(text)
    if text[end : end + 1] != "=":
        raise ValueError(_misread(text, end) if end != len(text) else "expected claim=value, such as scope=whales:read")
    value = text[end + 1 :]
    if not value or value != value.strip():
        raise ValueError("expected a value directly behind the `=`, without spaces around it")
    return ClaimRule(path, value)


def _path(text: str) -> tuple[tuple[str, ...], int]:
    """Return the names at the beginning of a text, and where they end."""
    names: list[str] = []
    end = 0
    while found := _NAME.match(text, end):
        names.append(found[1] or found[2])
        end = found.end()
        if text[end : end + 1] != ".":
            break
        end += 1
    if not names or text[end - 1] == "." or len(names) > MAX_NAMES:
        raise ValueError(_misread(text, end))
    return tuple(names), end


def _misread(text: str, end: int) -> str:
    if len(_NAME.findall(text)) > MAX_NAMES:
        return f"expected at most {MAX_NAMES} names of claims with dots between"
    odd = text[end : end + 1]
    found = f", not {odd!r}" if odd else ""
    return f"expected names of claims with dots between{found}; a name with other characters needs double quotes"
