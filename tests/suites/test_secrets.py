"""A daemon at debug level under hostile input shows no secret and no token, wherever an onlooker may look."""

import asyncio
import contextlib
import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import WebSocketException

from kit import daemon
from kit.tokens import FORGED
from whaled.auth.keys import KeyFile, generate, read, ring_of
from whaled.auth.ring import KeyRing
from whaled.auth.tokens import issue
from whaled.config.sections import AuthSettings
from whaled.model import Permission

pytestmark = pytest.mark.slow

# Messages with a token in the place of %s, where a program with a bug may have put it.
MESSAGES = (
    '{"type":"auth","token":%s', '{"type":"auth","token":[%s]}', '{"token":%s,"type":7}', '{"type":%s}',
    '{"type":"subscribe","filter":{"labels":[%s]}}', '{"type":"subscribe","cursor":{"epoch":%s}}', "%s", "[%s]",
)  # fmt: skip
HEADERS = (
    "Authorization: Bearer {}",
    "Authorization: Basic {}",
    "Sec-WebSocket-Protocol: whaled, {}",
    "Origin: {}",
    "{}: x",
)
PING = '{"type":"ping"}'
ANSWER_S = 5.0
LEAST_SECRET = 40  # characters of a text that is searched for; shorter ones appear by chance


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    generate(path, 1.0)
    generate(path, 2.0, algorithm="EdDSA")
    return path


def issued(path: Path, now: float) -> Iterator[str]:
    """A valid and an expired token of each key of the ring."""
    for key in ring_of(read(path), path).verifying:
        for age_s in (0, 90_000):
            yield issue(
                KeyRing(key, (key,)), client_id="c1", permissions=[Permission.READ], ttl_s=3600, now=now - age_s,
                token_id=f"t{age_s}", settings=AuthSettings(),
            )[0]  # fmt: skip


def searched(file: KeyFile, tokens: list[str]) -> set[str]:
    """Return the texts that nothing may show: secrets, tokens, and the signature of each token."""
    found = {key.secret for key in file.keys}
    for token in tokens:
        found |= {token, token.rpartition(".")[2]}
    return {text for text in found if len(text) >= LEAST_SECRET}


def auth(token: str) -> str:
    return json.dumps({"type": "auth", "token": token})


async def request(url: str, text: str) -> None:
    """Send a request to a port, and read what comes back."""
    host, port = re.findall(r"//([\d.]+):(\d+)", url)[0]
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(1.0):
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(text.encode())
                await reader.read(4096)
            finally:
                writer.transport.abort()


async def send(whaled: daemon.Daemon, *messages: str) -> list[str]:
    """Send messages on one connection, and read what comes back. Return the tokens that the daemon issued."""
    answers: list[str] = []
    with contextlib.suppress(WebSocketException, OSError, TimeoutError):
        async with whaled.connect() as client, asyncio.timeout(ANSWER_S):
            for message in messages:
                await client.send(message)
            async for answer in client:
                answers.append(str(answer))
                if '"pong"' in str(answer):  # sent last: everything before it is answered
                    break
    return re.findall(r'"token":"([^"]+)"', "".join(answers))


async def hostility(whaled: daemon.Daemon, tokens: list[str]) -> list[str]:
    """Present each token in every odd place. Return the tokens that the daemon issued meanwhile."""
    valid = auth(tokens[0])
    odd = [form % json.dumps(token) for token in tokens[:4] for form in MESSAGES]
    new: list[str] = []
    for token in tokens:
        new += await send(whaled, auth(token), '{"type":"refresh"}', PING)
    for message in odd:
        await send(whaled, message, PING)
        await send(whaled, valid, message, PING)
    for url in (whaled.url, whaled.http):
        for token in tokens[:4]:
            await request(url, f"GET /?token={token} HTTP/1.1\r\nHost: {token}\r\n\r\n")
            await request(url, f"{token} / HTTP/1.1\r\n\r\n")
            for header in HEADERS:
                handshake = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                line = header.format(token)
                await request(url, f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n{handshake}{key}{line}\r\n\r\n")
    return new


async def reloaded(whaled: daemon.Daemon, outcome: str) -> None:
    whaled.lines.clear()
    whaled.signal(signal.SIGHUP)
    await whaled.logged(outcome)


async def test_nothing_that_a_daemon_writes_shows_a_secret_or_a_token(ring: Path, tmp_path: Path) -> None:
    good, secret = await asyncio.to_thread(ring.read_bytes), read(ring)
    tokens = [*issued(ring, time.time()), *(token for token in FORGED.values() if token.isprintable())]
    auth_settings = {"enabled": True, "key_ring": str(ring), "failure_burst": 1_000_000}
    config = daemon.write_config(
        tmp_path, "ws://127.0.0.1:1", auth=auth_settings, log={"format": "json", "level": "debug"}
    )
    async with daemon.running(config, env={"PYTHONFAULTHANDLER": "1"}) as whaled:
        new = await hostility(whaled, tokens)
        assert new
        # A ring that is damaged while the daemon runs: each error about it names the fault.
        for body in (good[:-20], good.replace(b'"alg"', b'"algorithm"'), good.replace(b"EdDSA", b"RS256"), b"[" + good):
            await asyncio.to_thread(ring.write_bytes, body)
            await reloaded(whaled, "reload_refused")
        await asyncio.to_thread(ring.write_bytes, good)
        await reloaded(whaled, "reload_finished")
        pages = await daemon.get(whaled.http + "/metrics") + await daemon.get(whaled.http + "/healthz")
        process = Path(f"/proc/{whaled.process.pid}")
        shown = (process / "cmdline").read_bytes().decode()
        with contextlib.suppress(PermissionError):  # without root the environment of the daemon cannot be read
            shown += (process / "environ").read_bytes().decode()
        whaled.signal(signal.SIGABRT)  # the handler of faults prints the stack of each thread
        await whaled.heard_all()
    output = "\n".join([*whaled.raw, pages, shown])
    for expected in ("authentication_refused", "reload_refused", "Fatal Python error: Aborted", "whaled_connections"):
        assert expected in output
    texts = searched(secret, [*tokens, *new])
    assert len(texts) > len(tokens)
    assert [text for text in texts if text in output] == []
