"""The table "HTTP answers" of docs/protocol.md, clause by clause, against a gateway."""

import re
import ssl
from pathlib import Path
from typing import Any

import pytest

from kit.docs import section
from kit.gateway import Rig, running_gateway
from kit.paths import ROOT
from kit.raw import Raw, raw, request
from kit.tls import server_context

PAGE = section(ROOT / "docs" / "protocol.md", "## HTTP answers")
ROWS = {
    int(status): [clause.strip() for clause in re.split(r";(?![^(]*\))", when)]
    for status, when in re.findall(r"^\| (\d{3})[^|]*\| ([^|]*) \|", PAGE, re.MULTILINE)
}
UPGRADE = "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="


def plain(line: str, *headers: str, host: str = "Host: x\r\n", body: str = "") -> bytes:
    return (f"{line}\r\n{host}" + "".join(f"{header}\r\n" for header in headers) + f"\r\n{body}").encode()


# Status, words of the clause that it belongs to, requests.
CASES: list[tuple[int, str, list[bytes]]] = [
    (101, "it is a WebSocket now", [request(), request("/any", "Authorization: Bearer bad")]),
    (
        200,
        "a health check",
        [
            plain(f"{method} {path} HTTP/{version}", host=host)
            for method in ("GET", "HEAD", "OPTIONS")
            for path in ("/", "/healthz")
            for version, host in (("1.1", "Host: x\r\n"), ("1.0", "Host: x\r\n"), ("1.0", ""))
        ],
    ),
    (200, "such as `h2c`", [plain("GET /healthz HTTP/1.1", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings")]),
    (400, "a token in the URL", [request("/?token=x")]),
    (400, "two `Host` headers", [request("/", "Host: y"), plain("GET / HTTP/1.1", host="")]),
    (400, "two `Host` headers", [plain("GET / HTTP/1.0", "Host: y")]),
    (
        400,
        "neither HTTP/1.1 nor HTTP/1.0",
        [
            b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n" + request(),
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12) + request(),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            plain("GET / HTTP/3"),
            b"SSH-2.0-x\r\n\r\n",
        ],
    ),
    (400, "LF alone", [b"GET /healthz HTTP/1.1\nHost: x\n\n"]),
    (
        400,
        "with a body",
        [
            plain(f"{method} /healthz HTTP/1.1", header, body="hello")
            for method in ("GET", "HEAD", "OPTIONS")
            for header in ("Content-Length: 5", "Transfer-Encoding: chunked")
        ],
    ),
    (400, "a bad WebSocket header", [plain("GET / HTTP/1.1", *UPGRADE), request("/", UPGRADE[2])]),
    (400, "more than 50 items", [request("/", "Sec-WebSocket-Protocol: " + "a," * 60 + "a")]),
    (400, "TLS on a ws:// port", [b"\x16\x03\x01\x02\x00\x01"]),
    (403, "a browser page", [request("/", "Origin: https://evil.example")]),
    (
        403,
        "that is empty",
        [request("/", "Origin:"), request("/", *["Origin: http://x"] * 2), request("/", "Origin: x")],
    ),
    (
        405,
        "a method other than",
        [
            plain(f"{method} /healthz HTTP/1.1", *headers, body=body)
            for method in ("POST", "PUT", "DELETE")
            for headers, body in (
                ((), ""),
                (("Content-Length: 5",), "hello"),
                (("Transfer-Encoding: chunked",), "0\r\n\r\n"),
                (UPGRADE, ""),
            )
        ]
        + [plain("HEAD /other HTTP/1.1")],
    ),
    (414, "2,048 bytes", [request("/" + "a" * size) for size in (2_048, 3_000, 9_000, 20_000)]),
    (426, "on another path", [plain("GET /other HTTP/1.1"), plain("GET /other HTTP/1.1", "Upgrade: h2c")]),
    (426, "other than 13", [request().replace(b"Version: 13", b"Version: 8")]),
    (431, "more than 16 KiB", [request("/", "Cookie: " + "a" * 17_000)]),
    (431, "128 headers", [request("/", *["X: y"] * 125)]),
    (505, "in HTTP/1.0", [request().replace(b"HTTP/1.1", b"HTTP/1.0"), plain("GET / HTTP/1.0", *UPGRADE, host="")]),
]
# By what the gateway is like.
BUSY: list[tuple[int, str, dict[str, Any]]] = [
    (429, "gateway.max_connections_per_address", {"max_connections_per_address": 1}),
    (503, "gateway.max_connections", {"max_connections": 1}),
]
STATES: list[tuple[int, str, str]] = [
    (503, "memory is short", "is_short_of_memory"),
    (503, "whaled stops", "is_draining"),
]
# Tried in test_tls.py and test_server_proxies.py.
APART = [(400, "on a wss:// port"), (400, "address header of a trusted proxy")]


def test_exactly_the_clauses_of_the_table_are_tested() -> None:
    tried = [(status, words) for status, words, _ in [*CASES, *BUSY, *STATES]] + APART
    for status, words in tried:
        assert sum(words in clause for clause in ROWS[status]) == 1, (status, words, ROWS[status])
    for status, clauses in ROWS.items():
        for clause in clauses:
            assert any(words in clause for of, words in tried if of == status) or status in (502, 504), (status, clause)


@pytest.mark.slow
@pytest.mark.parametrize(("status", "words", "requests"), CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
async def test_a_request_is_answered_with_the_status_in_the_table(
    tmp_path: Path, status: int, words: str, requests: list[bytes]
) -> None:
    del words
    async with running_gateway(tmp_path, close_timeout=0.1) as rig:
        for one in requests:
            async with raw(rig, one) as client:
                assert await client.status() == status, one


@pytest.mark.parametrize(("status", "words", "settings"), BUSY)
async def test_a_full_gateway_answers_with_its_documented_status(
    tmp_path: Path, status: int, words: str, settings: dict[str, Any]
) -> None:
    del words
    async with running_gateway(tmp_path, **settings) as rig, raw(rig, request()) as first:
        await first.told("welcome")
        async with raw(rig, request()) as client:
            await expect(client, status)
        async with raw(rig, plain("GET /healthz HTTP/1.1")) as check:
            assert await check.status() == 200


@pytest.mark.parametrize(("status", "words", "state"), STATES)
async def test_a_gateway_that_admits_no_client_answers_with_its_documented_status(
    tmp_path: Path, status: int, words: str, state: str
) -> None:
    del words
    async with running_gateway(tmp_path) as rig:
        setattr(rig.gateway, state, True)
        async with raw(rig, request()) as client:
            await expect(client, status)
        async with raw(rig, plain("GET /healthz HTTP/1.1")) as check:
            assert await check.status() == (503 if state == "is_draining" else 200)


async def expect(client: Raw, status: int) -> None:
    """The answer has this status and says when to come back."""
    answer = await client.rest()
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"\r\nRetry-After: " in answer


async def test_http_on_a_tls_port_is_answered_with_400(
    tmp_path: Path, certificate: tuple[Path, Path, ssl.SSLContext]
) -> None:
    async with running_gateway(tmp_path, tls=server_context(certificate)) as rig:
        bare = Rig(rig.log, rig.gateway, rig.url.replace("wss://", "ws://"), rig.metrics)
        async with raw(bare, request()) as client:
            assert await client.status() == 400


async def test_another_method_is_refused_with_the_allowed_one(tmp_path: Path) -> None:
    for headers in ((), ("Content-Length: 5",)):
        async with running_gateway(tmp_path) as rig, raw(rig, plain("POST / HTTP/1.1", *headers)) as client:
            assert b"\r\nAllow: GET\r\n" in await client.rest()
