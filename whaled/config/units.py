"""Parsing and formatting of durations and sizes with their units. Pure."""

import math
import re

DURATION_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIZE_UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)")


def duration(text: object) -> float:
    """Parse a duration like "500ms", "30s", "5m", "2h", "90d" into seconds. Raises ValueError with what is allowed."""
    return _quantity(text, DURATION_UNITS_S, 'a duration with its unit, like "500ms", "30s", "5m", "2h" or "90d"')


def size(text: object) -> int:
    """Parse a size like "512B", "16KiB", "1MiB", "2GiB" into bytes. Raises ValueError with what is allowed."""
    value = _quantity(text, SIZE_UNITS, 'a size with its unit, like "512B", "16KiB", "1MiB" or "2GiB"')
    if not value.is_integer():
        raise ValueError("expected a whole number of bytes")
    return int(value)


def _quantity(text: object, units: "dict[str, float] | dict[str, int]", allowed: str) -> float:
    match = _QUANTITY.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or match[2] not in units:
        raise ValueError(f"expected {allowed}")
    value = float(match[1]) * units[match[2]]
    if not math.isfinite(value):
        raise ValueError(f"expected {allowed}, but smaller")
    return value


def show_duration(seconds: float) -> str:
    """Return the shortest form of a duration that `duration` parses back to the same value."""
    for unit in ("d", "h", "m", "s"):
        if seconds >= DURATION_UNITS_S[unit] and seconds % DURATION_UNITS_S[unit] == 0:
            return f"{seconds / DURATION_UNITS_S[unit]:.15g}{unit}"
    return f"{seconds * 1000:.15g}ms" if seconds < 1 else f"{seconds:.15g}s"


def show_size(size_bytes: int) -> str:
    """Return the shortest form of a size that `size` parses back to the same value."""
    for unit in ("GiB", "MiB", "KiB"):
        if size_bytes >= SIZE_UNITS[unit] and size_bytes % SIZE_UNITS[unit] == 0:
            return f"{size_bytes // SIZE_UNITS[unit]}{unit}"
    return f"{size_bytes}B"
