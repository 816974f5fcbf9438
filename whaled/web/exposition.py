"""The rendered metrics, shared by all requests.

Rendering blocks the event loop for some milliseconds, so it happens at most once per interval.
"""

import gzip
from collections.abc import Callable, Iterator
from enum import StrEnum

from msgspec import Struct

from whaled.web.meters import HttpMeter

# Level 1 takes a fifth of the time of level 9, for output that is a tenth larger.
GZIP_LEVEL = 1


class Format(StrEnum):
    """The text formats of Prometheus, by their content types."""

    PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
    OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class _Rendering(Struct):
    body: bytes
    at: float
    compressed: bytes | None = None


class Exposition:
    """The latest rendering in each format. `render` makes it; `clock` returns monotonic seconds."""

    def __init__(self, render: Callable[[Format], bytes], meter: HttpMeter, *, clock: Callable[[], float]) -> None:
        self._render = render
        self._meter = meter
        self._clock = clock
        self._latest: dict[Format, _Rendering] = {}

    def body(self, chosen: Format, interval_s: float, *, is_compressed: bool) -> bytes:
        """Return the metrics in a format, at most `interval_s` old."""
        now = self._clock()
        latest = self._latest.get(chosen)
        if latest is None or not now - latest.at < interval_s:
            latest = self._latest[chosen] = _Rendering(self._render(chosen), now)
            self._meter.rendered()
        if not is_compressed:
            return latest.body
        if latest.compressed is None:
            latest.compressed = gzip.compress(latest.body, GZIP_LEVEL, mtime=0)
        return latest.compressed

    def render_anew(self) -> None:
        """Render the metrics again for the next request."""
        self._latest.clear()


def accepted_format(accept: str) -> Format:
    """Return the format for an Accept header (RFC 9110, 12.5.1).

    It is OpenMetrics 1.0.0 if the header accepts it and does not prefer plain text.
    """
    openmetrics = text = 0.0
    for name, parameters, quality in _preferences(accept):
        if name == "application/openmetrics-text" and parameters.get("version", "1.0.0") == "1.0.0":
            openmetrics = max(openmetrics, quality)
        elif name == "text/plain":
            text = max(text, quality)
    return Format.OPENMETRICS if openmetrics and openmetrics >= text else Format.PROMETHEUS


def accepts_gzip(accept_encoding: str) -> bool:
    """Return whether an Accept-Encoding header (RFC 9110, 12.5.3) accepts gzip."""
    qualities = {name: quality for name, _, quality in _preferences(accept_encoding)}
    return qualities.get("gzip", qualities.get("x-gzip", qualities.get("*", 0.0))) > 0


def _preferences(header: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield the elements of a header of preferences in lower case: name, parameters, quality (0 if invalid)."""
    for element in header.lower().split(","):
        name, *rest = (part.strip() for part in element.split(";"))
        parameters = {
            key.strip(): value.strip().strip('"') for key, _, value in (part.partition("=") for part in rest) if value
        }
        try:
            quality = float(parameters.pop("q", "1"))
        except ValueError:
            quality = 0.0
        yield name, parameters, quality if 0 <= quality <= 1 else 0.0
