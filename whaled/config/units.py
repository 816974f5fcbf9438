"""Durations and sizes with their unit, as people write them."""

import math
import re

DURATION_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIZE_UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)")


def duration(text: object) -> float:
    """Seconds of "500ms", "30s", "5m", "2h", "90d". Raises ValueError that says what is allowed."""
    return _quantity(text, DURATION_UNITS_S, 'a duration with its unit, like "500ms", "30s", "5m", "2h" or "90d"')


def size(text: object) -> int:
    """Bytes of "512B", "16KiB", "1MiB", "2GiB". Raises ValueError that says what is allowed."""
    value = _quantity(text, SIZE_UNITS, 'a size with its unit, like "512B", "16KiB", "1MiB" or "2GiB"')
    if not value.is_integer():
        raise ValueError("expected whole bytes")
    return int(value)


def _quantity(text: object, units: "dict[str, float] | dict[str, int]", allowed: str) -> float:
    match = _QUANTITY.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or match[2] not in units:
        raise ValueError(f"expected {allowed}")
    value = float(match[1]) * units[match[2]]
    if not math.isfinite(value):
        raise ValueError(f"expected {allowed}, and not as large")
    return value


def show_duration(seconds: float) -> str:
    """The shortest way to write a duration that `duration` reads back."""
    for unit in ("d", "h", "m", "s"):
        if seconds >= DURATION_UNITS_S[unit] and seconds % DURATION_UNITS_S[unit] == 0:
            return f"{seconds / DURATION_UNITS_S[unit]:.15g}{unit}"
    return f"{seconds * 1000:.15g}ms" if seconds < 1 else f"{seconds:.15g}s"


def show_size(size_bytes: int) -> str:
    """The shortest way to write a size that `size` reads back."""
    for unit in ("GiB", "MiB", "KiB"):
        if size_bytes >= SIZE_UNITS[unit] and size_bytes % SIZE_UNITS[unit] == 0:
            return f"{size_bytes // SIZE_UNITS[unit]}{unit}"
    return f"{size_bytes}B"
