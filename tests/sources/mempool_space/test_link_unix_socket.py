"""The backend behind a Unix socket: the daemon has no network of its own (egress split)."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kit import daemon
from kit.daemon import busy_simulator
from kit.gateway import receive_type
from whaled.config.loading import load
from whaled.config.sections import UpstreamSettings
from whaled.errors import ConfigError
from whaled.metrics import Metrics
from whaled.registry import Registry
from whaled.sources.mempool_space.http import RestError, RestFailure
from whaled.sources.mempool_space.link import Link
from whaled.sources.mempool_space.link_errors import LinkLostError, LossReason
from whaled.sources.mempool_space.link_state import FeedMeter
from whaled.sources.mempool_space.rest import Rest

pytestmark = pytest.mark.slow


@asynccontextmanager
async def relay(path: Path, port: int) -> AsyncIterator[list[bytes]]:
    """What systemd-socket-proxyd does: bytes to one port, and back. Yields how each connection began."""
    beginnings: list[bytes] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if first:
                    beginnings.append(data)
                    first = False
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, there_writer, True), pump(there_reader, writer, False))

    async with await asyncio.start_unix_server(serve, path):
        yield beginnings


async def test_both_stream_and_rest_go_through_the_socket_and_name_the_host_of_the_url(tmp_path: Path) -> None:
    # Without inputs in its stream the backend is asked for them over REST.
    async with busy_simulator() as simulator:
        port = int(simulator.url.partition("//")[2].partition("/")[0].rpartition(":")[2])
        way = tmp_path / "egress.sock"
        async with relay(way, port) as beginnings:
            url = "ws://backend.invalid/api/v1/ws"
            config = daemon.write_config(tmp_path, url, upstream={"url": url, "unix_socket": str(way)})
            async with daemon.running(config) as whaled, whaled.connect() as client, asyncio.timeout(20):
                alert = await receive_type(client, "whale_alert")
                assert alert["data"]["value_sat"] == simulator.truth[alert["data"]["transaction_id"]].out_sat
                assert alert["data"]["moved_sat"] is not None
        requests = [beginning.split(b"\r\n")[0].split()[:2] for beginning in beginnings]
        assert [b"GET", b"/api/v1/ws"] in requests
        assert any(b"/api/" in path and path != b"/api/v1/ws" for _, path in requests)
        assert all(b"host: backend.invalid" in beginning.lower() for beginning in beginnings)


async def test_a_socket_that_is_not_there_is_an_absent_backend(tmp_path: Path) -> None:
    url = "ws://backend.invalid/api/v1/ws"
    config = daemon.write_config(
        tmp_path, url, upstream={"url": url, "unix_socket": str(tmp_path / "none.sock"), "reconnect_max": "600ms"}
    )
    async with daemon.running(config) as whaled:
        lost = await whaled.logged("upstream_link_lost")
        assert "none.sock" in str(lost)


@asynccontextmanager
async def dead_end(path: Path, *, reads_first: bool) -> AsyncIterator[None]:
    """What systemd-socket-proxyd does while nothing listens where it leads to: accept and close."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if reads_first:
            await reader.read(65536)
        writer.close()

    async with await asyncio.start_unix_server(serve, path):
        yield


@pytest.mark.parametrize("scheme", ["ws", "wss"])
@pytest.mark.parametrize("reads_first", [False, True])
async def test_a_dead_backend_behind_the_socket_is_distinguished_from_a_wrong_one(
    tmp_path: Path, scheme: str, reads_first: bool
) -> None:
    way = str(tmp_path / "egress.sock")
    settings = UpstreamSettings(url=f"{scheme}://backend.invalid/api/v1/ws", unix_socket=way)
    metrics = Metrics()
    async with dead_end(tmp_path / "egress.sock", reads_first=reads_first):
        with pytest.raises(LinkLostError) as caught:
            await anext(Link(settings, metrics.feed).messages(1))
        async with Rest.open(settings, metrics.rest) as rest:
            with pytest.raises(RestError) as unreachable:
                await rest.tip_height()
    assert caught.value.reason is LossReason.REFUSED
    assert caught.value.detail == (
        f"connected to {way} (upstream.unix_socket), and the connection ended without an answer: what serves the "
        "socket did not reach the mempool backend. Is the backend running? In the egress split, "
        "`journalctl -u whaled-egress` has the reason, and `systemctl cat whaled-egress` the host and port"
    )
    assert unreachable.value.reason is RestFailure.UNREACHABLE
    assert f"through {way} (upstream.unix_socket); is the backend running" in str(unreachable.value)


async def test_the_error_of_a_wrong_server_behind_the_socket_suggests_a_check(tmp_path: Path) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        writer.close()

    settings = UpstreamSettings(url="ws://backend.invalid/api/v1/ws", unix_socket=str(tmp_path / "egress.sock"))
    async with await asyncio.start_unix_server(greet, tmp_path / "egress.sock"):
        with pytest.raises(LinkLostError, match=r"is upstream\.url a mempool backend\?"):
            await anext(Link(settings, FeedMeter(Registry())).messages(1))


def test_a_socket_and_a_proxy_exclude_each_other(tmp_path: Path) -> None:
    config = tmp_path / "w.yaml"
    config.write_text("upstream: {unix_socket: /run/x.sock, proxy: 'http://127.0.0.1:3128'}\n")
    with pytest.raises(ConfigError, match=r"unix_socket.*proxy"):
        load(config, environ={}, flags={})
