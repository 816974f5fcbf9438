"""TLS of the gateway: real clients' handshakes, and clients that make much of it."""

import asyncio
import contextlib
import shutil
import socket
import ssl
from pathlib import Path

import pytest
from websockets.asyncio.client import connect

from kit.gateway import receive_type, running_gateway
from kit.tls import Certificate, server_context
from whaled.gateway.tls import HANDSHAKE_BYTES, IDLE_BYTES, READ_BYTES, Tls, TlsError


class Client:
    """The client's end of a connection without a socket."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")

    def agree(self, server: Tls, piece: int) -> None:
        """Both handshakes, in pieces of so many bytes."""
        for _ in range(4):
            with contextlib.suppress(ssl.SSLWantReadError):
                self.tls.do_handshake()
            while sent := self.outgoing.read(piece):
                server.feed(sent)
                if not server.is_agreed:
                    server.agree()
                self.incoming.write(server.output())


@pytest.fixture
def ends(certificate: Certificate) -> tuple[Client, Tls]:
    return Client(certificate[2]), Tls(server_context(certificate))


@pytest.mark.slow
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("piece", [1, 7, READ_BYTES])
def test_bytes_come_in_pieces_of_any_size(certificate: Certificate, version: ssl.TLSVersion, piece: int) -> None:
    context = server_context(certificate)
    context.minimum_version = context.maximum_version = version
    client, server = Client(certificate[2]), Tls(context)
    client.agree(server, piece)
    assert server.is_agreed
    message = bytes(range(256)) * 200
    sent = 0
    while sent < len(message):
        sent += client.tls.write(message[sent:])
    got = b""
    while fed := client.outgoing.read(piece):
        server.feed(fed)
        while data := server.read():
            assert len(data) <= READ_BYTES
            got += data
        assert not server.has_more
    assert got == message
    client.incoming.write(server.encrypt(message))
    answer = b""
    with contextlib.suppress(ssl.SSLWantReadError):
        while data := client.tls.read(1 << 20):
            answer += data
    assert answer == message


def test_output_of_one_connection_never_gets_into_another(certificate: Certificate) -> None:
    """A broken client leaves an alert."""
    broken, healthy = Tls(server_context(certificate)), Tls(server_context(certificate))
    client = Client(certificate[2])
    broken.feed(b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00")
    with pytest.raises(TlsError):
        broken.agree()
    client.agree(healthy, READ_BYTES)
    client.outgoing.write(b"\x17\x03\x03\x00\x20" + bytes(32))
    healthy.feed(client.outgoing.read())
    with pytest.raises(TlsError):
        healthy.read()
    other = Tls(server_context(certificate))
    assert other.output() == b""
    assert broken.output()[:1] == b"\x15"


def test_a_handshake_has_a_bound(ends: tuple[Client, Tls]) -> None:
    _, server = ends
    server.feed(b"\x16\x03\x01\x40\x00\x01\x00\xff\xff" + bytes(READ_BYTES - 9))
    for _ in range(HANDSHAKE_BYTES // READ_BYTES - 1):
        assert not server.agree()
        server.feed(bytes(READ_BYTES))
    with pytest.raises(TlsError, match="too_many_bytes"):
        server.feed(bytes(1))


def test_bytes_without_data_have_a_bound(ends: tuple[Client, Tls]) -> None:
    client, server = ends
    client.agree(server, READ_BYTES)
    client.tls.write(b"x" * 16_384)
    server.feed(client.outgoing.read())
    assert server.read() == b"x" * READ_BYTES  # the largest record passes
    for _ in range(IDLE_BYTES // READ_BYTES):
        server.feed(bytes(READ_BYTES))
    with pytest.raises(TlsError, match="too_many_bytes"):
        server.feed(bytes(1))


def update_keys(commands: socket.socket) -> None:
    """Have openssl update its keys, and ask the other end to do so, until the connection is closed."""
    with contextlib.suppress(OSError):
        for _ in range(3 * IDLE_BYTES // 27):
            commands.send(b"K\n")
    commands.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl s_client sends the key updates")
async def test_a_flood_of_key_updates_ends_its_connection_and_delays_no_other(
    tmp_path: Path, certificate: Certificate
) -> None:
    async with running_gateway(tmp_path, tls=server_context(certificate)) as rig:
        _, port = rig.url.removeprefix("wss://").rsplit(":", 1)
        # It takes one command from each read, and a packet is one read.
        commands, stdin = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with commands, stdin:
            flood = await asyncio.create_subprocess_exec(
                "openssl", "s_client", "-tls1_3", "-connect", f"127.0.0.1:{port}",
                stdin=stdin.fileno(), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            stdin.close()
            async with connect(rig.url, ssl=certificate[2], server_hostname="localhost", proxy=None) as client:
                await receive_type(client, "welcome")
                await asyncio.to_thread(update_keys, commands)
                await rig.alerts(1)
                await receive_type(client, "whale_alert")
            async with asyncio.timeout(20):
                await flood.wait()
        assert rig.value("whaled_tls_failures_total", reason="too_many_bytes") == 1
