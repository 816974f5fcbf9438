"""Metrics over HTTP: their format, compression and renderings that requests share."""

import asyncio
import gzip

import pytest
from prometheus_client.openmetrics import parser as openmetrics

from kit.web import serving
from whaled.config.sections import HttpSettings
from whaled.registry import Registry
from whaled.web.exposition import Exposition, Format, accepted_format, accepts_gzip
from whaled.web.meters import HttpMeter


async def test_openmetrics_and_gzip_are_negotiated() -> None:
    async with serving() as rig, rig.visitor() as visitor:
        answer = await visitor.ask(
            "/metrics",
            "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5",
            "Accept-Encoding: deflate, gzip;q=0.8",
        )
        assert answer.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.headers["vary"] == "Accept, Accept-Encoding"
        text = gzip.decompress(answer.body).decode()
        assert len(answer.body) < len(text) / 4
        assert text.endswith("# EOF\n")
        families = openmetrics.text_string_to_metric_families(text)  # type: ignore[no-untyped-call]  # of the library
        assert "whaled_http_requests" in {family.name for family in families}


PROMETHEUS_ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;"
    "q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", Format.PROMETHEUS),
        ("*/*", Format.PROMETHEUS),
        (PROMETHEUS_ACCEPT, Format.OPENMETRICS),
        ("Application/OpenMetrics-Text; version=\"1.0.0\"", Format.OPENMETRICS),
        ("application/openmetrics-text", Format.OPENMETRICS),
        ("application/openmetrics-text;version=0.0.1", Format.PROMETHEUS),
        ("application/openmetrics-text;version=1.0.0;q=0", Format.PROMETHEUS),
        ("application/openmetrics-text;q=0.2,text/plain;q=0.5", Format.PROMETHEUS),
        ("application/openmetrics-text;q=nan", Format.PROMETHEUS),
        ("application/openmetrics-text;q=1e400", Format.PROMETHEUS),
        (",;=,;q=;q,", Format.PROMETHEUS),
    ],
)  # fmt: skip
def test_the_format_follows_the_accept_header(accept: str, chosen: Format) -> None:
    assert accepted_format(accept) is chosen


@pytest.mark.parametrize(
    ("header", "is_accepted"),
    [("", False), ("gzip", True), ("GZIP", True), ("x-gzip", True), ("*", True), ("gzip;q=0", False),
     ("*, gzip;q=0", False), ("br, deflate", False), ("gzip;q=0.001", True)],
)  # fmt: skip
def test_gzip_follows_the_accept_encoding_header(header: str, is_accepted: bool) -> None:
    assert accepts_gzip(header) is is_accepted


async def test_a_rendering_is_shared_by_all_requests_of_its_interval() -> None:
    rendered: list[Format] = []

    def render(chosen: Format) -> bytes:
        rendered.append(chosen)
        return b"metrics"

    async with serving(render, render_interval=3600.0) as rig, rig.visitor() as one, rig.visitor() as two:
        for visitor in (one, two, one, two):
            assert (await visitor.ask("/metrics")).body == b"metrics"
            answer = await visitor.ask("/metrics", "Accept-Encoding: gzip")
            assert gzip.decompress(answer.body) == b"metrics"
        assert rendered == [Format.PROMETHEUS]
        assert rig.value("whaled_http_renderings_total") == 1
        rig.server.reconfigure(HttpSettings(render_interval=0.001))
        await asyncio.sleep(0.002)
        await one.ask("/metrics")
        assert len(rendered) == 2


def test_bytes_are_compressed_once_and_an_old_rendering_is_not_served() -> None:
    now = 100.0
    bodies = iter([b"first", b"second", b"third"])
    exposition = Exposition(lambda _: next(bodies), HttpMeter(Registry()), clock=lambda: now)
    first = exposition.body(Format.PROMETHEUS, 1.0, is_compressed=True)
    assert exposition.body(Format.PROMETHEUS, 1.0, is_compressed=True) is first
    now = 100.99
    assert exposition.body(Format.PROMETHEUS, 1.0, is_compressed=False) == b"first"
    assert exposition.body(Format.OPENMETRICS, 1.0, is_compressed=False) == b"second"
    now = 101.0
    assert exposition.body(Format.PROMETHEUS, 1.0, is_compressed=False) == b"third"
