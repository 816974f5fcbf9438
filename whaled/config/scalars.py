"""Differences between scalars as people write them and as YAML 1.1 reads them. Pure.

PyYAML follows YAML 1.1: 0100 is octal (64), 1:40 is base 60 (100), and 1e3 is a string.
"""

import re

from msgspec import Struct

_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_SIXTIES = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")
_GROUPED = re.compile(r"[0-9]{1,3}(?:([,_' \u00a0\u202f])[0-9]{3})(?:\1[0-9]{3})*(\.[0-9]+)?")
_DECIMAL = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")


class Scalar(Struct, frozen=True):
    """A scalar as it was written. `is_plain` is True if it has no quotes."""

    text: str
    is_plain: bool


class Misreading(Struct, frozen=True):
    """A number that YAML reads differently from people: YAML's reading, and what to write instead."""

    reading: str
    remedy: str


def misread(text: str, value: object) -> Misreading | None:
    """Return how YAML misreads a number; None if people read the same number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if _SIXTIES.fullmatch(text):
        return Misreading(f"YAML reads {text} as {value:.15g} (base 60)", f"write {value:.15g} if that is meant")
    if _OCTAL.fullmatch(text):
        decimal = int(text.replace("_", ""))
        if decimal != value:
            return Misreading(f"YAML reads {text} as {value} (octal)", f"did you mean {decimal}?")
    return None


def number_meant(text: str) -> float | None:
    """Return the number meant by a text that YAML does not read as a number; None if there is none."""
    text = text.strip()
    if _GROUPED.fullmatch(text):
        text = re.sub(r"[,_' \u00a0\u202f]", "", text)
    if re.fullmatch(r"0[oO][0-7]+", text):
        return int(text, 8)
    return float(text) if text.isascii() and _DECIMAL.fullmatch(text) else None
