"""A gateway behind trusted proxies: PROXY headers before TLS, and headers of the request."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from kit.gateway import Rig, ask, receive_type, running_gateway, until
from kit.tls import Certificate, server_context
from kit.tokens import Tokens
from whaled.config.sections import AddressHeader, AuthSettings, ProxyProtocol

HEADER = b"PROXY TCP4 192.0.2.%d 127.0.0.1 4711 8765\r\n"
OTHER_PROXY = "127.0.7.2"


def proxied(rig: Rig, header: bytes, *, source: str = "127.0.0.1", pieces: int = 1) -> socket.socket:
    """Connect and send a header, in so many segments."""
    host, port = rig.url.rpartition("/")[2].split(":")
    sock = socket.create_connection((host, int(port)), source_address=(source, 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    size = max(1, len(header) // pieces)
    for at in range(0, len(header), size):
        sock.sendall(header[at : at + size])
    return sock


@asynccontextmanager
async def client(
    rig: Rig, header: bytes = b"", *, source: str = "127.0.0.1", tls: Any = None, pieces: int = 1, **options: Any
) -> AsyncIterator[ClientConnection]:
    sock = proxied(rig, header, source=source, pieces=pieces)
    name = {"ssl": tls, "server_hostname": "localhost"} if tls is not None else {}
    async with connect(rig.url, sock=sock, proxy=None, compression=None, **name, **options) as found:
        yield found


def forwarded(address: str) -> dict[str, Any]:
    return {"additional_headers": {"X-Forwarded-For": address}}


def sources(rig: Rig) -> set[str]:
    return {connection.address for connection in rig.gateway.roster.all()}


async def refused(found: Any) -> int:
    with pytest.raises(InvalidStatus) as caught:
        await found.__aenter__()
    return caught.value.response.status_code


@pytest.mark.parametrize("is_tls", [False, True])
async def test_a_proxy_header_names_the_client_before_tls(
    tmp_path: Path, certificate: Certificate, *, is_tls: bool
) -> None:
    tls = server_context(certificate) if is_tls else None
    settings: dict[str, Any] = {"trusted_proxies": ("127.0.0.1",), "proxy_protocol": ProxyProtocol.REQUIRED}
    async with (
        running_gateway(tmp_path, tls=tls, **settings) as rig,
        client(rig, HEADER % 7, pieces=20, tls=certificate[2] if is_tls else None) as found,
    ):
        await receive_type(found, "welcome")
        assert sources(rig) == {"192.0.2.7"}


async def test_the_limit_per_address_is_that_of_the_client_and_not_of_the_proxy(tmp_path: Path) -> None:
    async with running_gateway(
        tmp_path,
        trusted_proxies=("127.0.0.0/24",),
        proxy_protocol=ProxyProtocol.OPTIONAL,
        max_connections_per_address=1,
    ) as rig:
        async with client(rig, HEADER % 1), client(rig, HEADER % 2), client(rig, **forwarded("192.0.2.3")):
            assert sources(rig) == {"192.0.2.1", "192.0.2.2", "192.0.2.3"}
            assert await refused(client(rig, HEADER % 1)) == 429
            assert await refused(client(rig, **forwarded("192.0.2.3"))) == 429
            async with client(rig), client(rig):  # the proxy itself
                assert rig.gateway.connections == 5
        await until(lambda: not rig.gateway.connections)
        assert rig.value("whaled_connections_refused_total", reason="address_cap") == 2
        async with client(rig, HEADER % 1):
            pass


async def test_headers_of_others_are_ignored_or_refused(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, trusted_proxies=("127.0.0.1",), proxy_protocol=ProxyProtocol.REQUIRED) as rig:
        async with client(rig, source=OTHER_PROXY, **forwarded("192.0.2.9")):
            assert sources(rig) == {OTHER_PROXY}
        with proxied(rig, HEADER % 1 + b"\r\n\r\n", source=OTHER_PROXY) as sock:
            reader, writer = await asyncio.open_connection(sock=sock)
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
            writer.close()
            await writer.wait_closed()
        assert rig.value("whaled_connections_refused_total", reason="bad_handshake") == 1


@pytest.mark.parametrize("sent", [b"PROXY TCP4 nonsense\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_a_bad_or_missing_proxy_header_closes_the_connection(tmp_path: Path, sent: bytes) -> None:
    async with running_gateway(tmp_path, trusted_proxies=("127.0.0.1",), proxy_protocol=ProxyProtocol.REQUIRED) as rig:
        with capture_logs() as lines, proxied(rig, sent) as sock:
            reader, writer = await asyncio.open_connection(sock=sock)
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
        assert rig.value("whaled_connections_refused_total", reason="proxy_protocol") == 1
        assert [line["event"] for line in lines] == ["proxy_header_refused"]
        await until(lambda: not rig.gateway.connections)


async def test_an_unreadable_forwarded_header_receives_400(tmp_path: Path) -> None:
    async with running_gateway(
        tmp_path, trusted_proxies=("127.0.0.1",), client_address_header=AddressHeader.FORWARDED
    ) as rig:
        assert await refused(client(rig, additional_headers={"Forwarded": 'for="'})) == 400
        assert rig.value("whaled_connections_refused_total", reason="forwarded") == 1
        async with client(rig, additional_headers={"Forwarded": 'for="[2001:db8::7]:1"'}):
            assert sources(rig) == {"2001:db8::7"}


async def test_a_chain_of_a_proxy_header_and_a_request_header_names_the_client(tmp_path: Path) -> None:
    async with (
        running_gateway(
            tmp_path, trusted_proxies=("127.0.0.1", "192.0.2.7"), proxy_protocol=ProxyProtocol.REQUIRED
        ) as rig,
        client(rig, HEADER % 7, **forwarded("198.51.100.1")),
        client(rig, HEADER % 8, **forwarded("198.51.100.2")),
    ):
        assert sources(rig) == {"198.51.100.1", "192.0.2.8"}


async def test_a_silent_proxy_connection_ends_at_the_handshake_timeout(tmp_path: Path) -> None:
    async with running_gateway(
        tmp_path, trusted_proxies=("127.0.0.1",), proxy_protocol=ProxyProtocol.REQUIRED, handshake_timeout=0.05
    ) as rig:
        with proxied(rig, b"PROXY ") as sock:
            reader, writer = await asyncio.open_connection(sock=sock)
            assert await reader.read() == b""
            writer.close()
        assert rig.value("whaled_connections_refused_total", reason="handshake_timeout") == 1


async def test_bad_tokens_of_one_client_do_not_lock_out_another_behind_the_same_proxy(tmp_path: Path) -> None:
    async with running_gateway(
        tmp_path,
        authenticator=Tokens(expires_at=4e9),
        auth=AuthSettings(failure_burst=2),
        trusted_proxies=("127.0.0.1",),
    ) as rig:
        for number in range(60):
            async with client(rig, **forwarded("192.0.2.66")) as found:
                await ask(found, type="auth", token=f"bad {number}")
                await receive_type(found, "error")
        assert rig.value("whaled_authentications_total", outcome="rate_limited") > 0
        async with client(rig, **forwarded("192.0.2.1")) as found:
            await ask(found, type="auth", token="good")
            await receive_type(found, "auth_success")
