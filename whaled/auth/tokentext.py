"""Extraction of tokens from texts: with a byte order mark, in quotes, after `Bearer`, in an environment file. Pure.

Everything around a token is removed; a text that cannot be a token is refused with the reason. No reason quotes the
text, because it may be a secret. Signatures are not checked here, because that requires the key.
"""

import base64
import binascii
import re
from typing import Any

import msgspec

from whaled import times
from whaled.auth.signature import ALGORITHM, MAC_CHARACTERS, MAX_TOKEN_BYTES

API_KEY_PREFIX = "whk_"
# Spaces and invisible characters, as copied from a web page or a chat.
_BLANKS = " \t\r\n\v\f\0\u00a0\u200b\u2060\ufeff"
_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u2018": "\u2019", "\u201e": "\u201c", "<": ">"}
_ASSIGNED = re.compile(r"(?:export\s+|set\s+|\$env:)?(?!whk_)([A-Za-z_][A-Za-z0-9_.-]*)\s*=\s*(.*?);?", re.IGNORECASE)
_BEARER = re.compile(r"(?:(?:proxy-)?authorization\s*:\s*)?bearer(?:\s+|\s*:\s*)", re.IGNORECASE)
# Names of variables and JSON fields that contain a token, the most specific first.
_NAMES = ("whaled_token", "token", "access_token", "api_key", "jwt")
# A quoted assignment after `export` has three wrappings; more than this number are not removed.
_MAX_WRAPPINGS = 6
_PRINTABLE = re.compile(r"[\x21-\x7e]+")
_BASE64URL = re.compile(r"[A-Za-z0-9_-]+")
# Later times are not dates: `datetime` ends with the year 9999.
_LATEST = 253_402_300_800
_SPANS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))

NO_TOKEN = "holds no token: expected a JWT (three parts with dots between) or an API key (whk_...)"  # noqa: S105 - a text


def text_of(raw: bytes) -> str:
    """Decode the bytes of a file.

    Raises ValueError whose text is a predicate, such as `is not text`, to follow the name of the file.
    """
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"  # written by PowerShell
    elif b"\0" in raw:
        raise ValueError("holds NUL bytes: write the token as plain text, UTF-8")
    else:
        encoding = "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        raise ValueError("is not text: write the token as plain text, UTF-8") from None


def token_in(text: str, *, may_be_opaque: bool = False) -> str:
    """Return the token in a text. Raises ValueError as `text_of`, also for a token that whaled would always refuse.

    `may_be_opaque` is for clients whose server may be newer, so that any word may be a valid token.
    """
    token = unwrapped(text)
    if may_be_opaque and is_opaque(token):
        _check_characters(token)
    else:
        check(token)
    return token


def is_opaque(token: str) -> bool:
    """Return whether a token has no known structure: it is neither a JWT nor an API key."""
    return "." not in token and not token.startswith(API_KEY_PREFIX)


def unwrapped(text: str) -> str:
    """Remove everything that may surround a token from a text. Raises ValueError as `text_of`."""
    text = text.strip(_BLANKS)
    if text.startswith("{"):
        token = _of_json(text)
    elif text.startswith("-----BEGIN"):
        raise ValueError("holds a certificate or a key in PEM form, not a token")
    else:
        lines = [line for line in (line.strip(_BLANKS) for line in text.splitlines()) if line and line[0] != "#"]
        token = _unwrapped(lines[0]) if len(lines) == 1 else _of_lines(lines)
    if not token:
        raise ValueError(NO_TOKEN)
    return token


def check(token: str) -> None:
    """Raise ValueError, as `text_of`, for a token that whaled refuses whatever the key is."""
    _check_characters(token)
    if not token.startswith(API_KEY_PREFIX):
        _check_parts(token.split("."))


def time_problem(token: str, now: float, tolerance_s: float = 0.0) -> str | None:
    """Return the reason why a token is invalid at a time: it has expired, or is not valid yet. None if it may be valid.

    `tolerance_s` is the possible difference between this clock and that of the server.
    """
    claims = claims_of(token)
    ends, begins = _time(claims.get("exp")), _time(claims.get("nbf"))
    if ends is not None and now >= ends + tolerance_s:
        return f"it expired at {times.text_of(ends)}, {_span(now - ends)} ago by the clock of this machine"
    if begins is not None and now < begins - tolerance_s:
        return f"it is not valid before {times.text_of(begins)}, in {_span(begins - now)} by the clock of this machine"
    return None


def claims_of(token: str) -> dict[str, Any]:
    """Return the claims of a token, unverified; empty if they cannot be read."""
    parts = token.split(".")
    return (_object(parts[1]) or {}) if len(parts) == 3 else {}


# --- removing what surrounds a token ----------------------------------------------------------------------------------


def _of_json(text: str) -> str:
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("begins like JSON but is not valid JSON") from None
    if "keys" in found:
        raise ValueError(
            "is a key ring, which signs tokens and belongs to the server only; make a token with `whaled token issue`"
        )
    if "claims" in found and "header" in found:
        raise ValueError("is what `whaled token inspect` prints, not the token")
    fields = {str(name).lower(): value for name, value in found.items()}
    for name in _NAMES:
        if isinstance(fields.get(name), str):
            return _unwrapped(fields[name])
    raise ValueError("is JSON without a field `token`")


def _of_lines(lines: list[str]) -> str:
    assigned = {found[1].lower(): found[2] for line in lines if (found := _ASSIGNED.fullmatch(line))}
    for name in _NAMES:
        if name in assigned:
            return _unwrapped(assigned[name])
    if lines and all(re.fullmatch(r"[A-Za-z0-9_.-]+", line) for line in lines) and "".join(lines).count(".") == 2:
        raise ValueError(f"holds a token that is broken over {len(lines)} lines: put it into one")
    if lines:
        raise ValueError(
            f"holds {len(lines)} lines: expected one with the token, or one that begins with WHALED_TOKEN="
        )
    return ""


def _unwrapped(text: str) -> str:
    for _ in range(_MAX_WRAPPINGS):
        before = text
        text = text.strip(_BLANKS)
        if found := _ASSIGNED.fullmatch(text):
            text = found[2]
        text = text[found.end() :] if (found := _BEARER.match(text)) else text
        if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
            text = text[1:-1]
        if text == before:
            break
    return text


# --- checks of the token itself ---------------------------------------------------------------------------------------


def _check_characters(token: str) -> None:
    if not _PRINTABLE.fullmatch(token):
        odd = next(character for character in token if not _PRINTABLE.fullmatch(character))
        hint = {"…": ": it was shortened when it was copied", "\ufffd": ": it was damaged when it was copied"}.get(
            odd, ""
        )
        name = "a space" if odd in " \t" else "a line break" if odd in "\r\n" else f"the character U+{ord(odd):04X}"
        raise ValueError(f"holds no token: {name} is in it{hint}")
    if len(token) > MAX_TOKEN_BYTES:
        raise ValueError(f"holds no token: it has {len(token)} characters, a token at most {MAX_TOKEN_BYTES}")


def _check_parts(parts: list[str]) -> None:
    if len(parts) == 1:
        raise ValueError(f"{NO_TOKEN}. A signing key is not one")
    if len(parts) == 5:
        raise ValueError("holds an encrypted token (JWE, five parts); whaled takes signed ones (JWT, three parts)")
    if len(parts) != 3:
        raise ValueError(f"holds no token: a JWT has three parts with dots between, this has {len(parts)}")
    first, payload, signature = parts
    header = _object(first)
    for part, name in ((header, "first"), (_object(payload), "second")):
        if part is None:
            raise ValueError(f"holds a damaged token: its {name} part is not JSON in base64url")
    if not signature:
        raise ValueError("holds a token that is not signed: its third part is missing")
    if not _BASE64URL.fullmatch(signature):
        raise ValueError("holds a damaged token: its third part is not base64url")
    if header is not None and header.get("alg") == ALGORITHM and len(signature) != MAC_CHARACTERS:
        raise ValueError(
            f"holds a damaged token: its signature has {len(signature)} characters, not {MAC_CHARACTERS}; "
            "was it copied whole?"
        )


def _object(part: str) -> dict[str, Any] | None:
    if not _BASE64URL.fullmatch(part):
        return None
    try:
        found = msgspec.json.decode(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, binascii.Error, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _time(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _LATEST:
        return float(value)
    return None


def _span(seconds: float) -> str:
    size, unit = next((span for span in _SPANS if seconds >= 2 * span[0]), _SPANS[-1])
    return f"{seconds / size:.0f} {unit}"
