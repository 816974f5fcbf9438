"""A daemon in its own process, with TLS, authentication and a scripted backend, whose configuration a test reloads.

Everything here blocks: a test changes a key, sends SIGHUP, and observes the daemon from outside.
"""

import asyncio
import base64
import http.client
import json
import os
import re
import secrets
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jwt
import trustme
import yaml
from msgspec.json import decode, encode
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from kit.gateway import SMALL_SEGMENT
from whaled.auth.keys import generate, read, ring_of
from whaled.auth.tokens import issue
from whaled.config.sections import AuthSettings
from whaled.model import SAT_PER_BTC, Permission
from whaled.sources.mempool_space.canary_frame import canary_frame

# The limit for something that the daemon does at once, on a machine that runs other tests too.
SOON_S = 10.0
# Two addresses with valid checksums.
PAYER = "bc1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq9e75rs"
PAYEE = "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4"
BINARY, CLOSE, PING, PONG = 2, 8, 9, 10
Sections = Mapping[str, Mapping[str, object]]


def until(condition: Callable[[], bool], within_s: float = SOON_S) -> None:
    """Wait until a condition holds."""
    ends = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > ends:
            raise TimeoutError
        time.sleep(0.01)


class Backend:
    """A backend in a thread: it sends one init object, and then the transactions of the test."""

    def __init__(self) -> None:
        self.port = 0
        self._sequence = 0
        self._peer: ServerConnection | None = None
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()
        assert self._up.wait(SOON_S)

    async def _serve(self) -> None:
        async with serve(self._converse, "127.0.0.1", 0, ping_interval=None) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            self._up.set()
            await self._ended.wait()

    async def _converse(self, peer: ServerConnection) -> None:
        with suppress(ConnectionClosed):
            async for message in peer:
                if message == '{"action":"ping"}':
                    await peer.send('{"pong":true}')
                if message == '{"action":"init"}':
                    prices = {"time": int(time.time()) - 60, "USD": 50_000}
                    backend = {"hostname": "scripted", "version": "3.2.1", "gitCommit": "0" * 7, "backend": "esplora"}
                    await peer.send(encode({"backendInfo": backend, "da": {}, "conversions": prices}).decode())
                    self._sequence = 0
                    self._peer = peer

    def send(self, *transactions: Mapping[str, object]) -> None:
        """Send transactions in one message."""
        until(lambda: self._peer is not None)
        assert self._peer is not None
        self._sequence += 1
        delta = {"sequence": self._sequence, "added": transactions, "removed": [], "mined": [], "replaced": []}
        text = encode({"mempool-transactions": delta}).decode()
        asyncio.run_coroutine_threadsafe(self._peer.send(text), self._loop).result(SOON_S)

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(SOON_S)
        self._loop.close()


def payment(**outputs_btc: float) -> dict[str, Any]:
    """Return a transaction from PAYER: the keyword is an address, its value the amount in BTC."""
    total = sum(outputs_btc.values())
    made: dict[str, Any] = decode(canary_frame(secrets.token_hex(32), round(total * SAT_PER_BTC)))
    found: dict[str, Any] = made["mempool-transactions"]["added"][0]
    (output,) = found["vout"]
    paid = found["vin"][0]["prevout"]
    found["vout"] = [
        {**output, "scriptpubkey": f"0014{number:040x}", "scriptpubkey_address": to, "value": round(btc * SAT_PER_BTC)}
        if to != PAYER
        else {**paid, "value": round(btc * SAT_PER_BTC)}
        for number, (to, btc) in enumerate(outputs_btc.items(), start=1)
    ]
    return found


def plain_socket(source: str, *, is_small: bool) -> socket.socket:
    """Return a socket bound to a local address. With `is_small`, the kernel holds little of what is not read."""
    sock = socket.socket()
    if is_small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT)
    sock.bind((source, 0))
    sock.settimeout(SOON_S)
    return sock


class Ended(Exception):  # noqa: N818 - it is no error
    """The daemon has closed the socket."""


class Client:
    """A WebSocket client that does nothing by itself: it answers no ping and no close."""

    def __init__(
        self,
        rig: "ReloadRig",
        token: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        source: str = "127.0.0.1",
        is_small: bool = False,
    ) -> None:
        lines = {
            "Host": f"localhost:{rig.port}",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
            "Sec-WebSocket-Version": "13",
            **({"Authorization": f"Bearer {token}"} if token is not None else {}),
            **(headers or {}),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._buffer = b""
        self.head = ""
        self.sock = rig.trust.wrap_socket(
            plain_socket(source, is_small=is_small), server_hostname="localhost", do_handshake_on_connect=False
        )
        try:
            self.sock.connect(("127.0.0.1", rig.port))
            self.sock.do_handshake()
            self.sock.sendall(f"GET / HTTP/1.1\r\n{head}\r\n".encode())
            while b"\r\n\r\n" not in self._buffer:
                self._more()
            answer, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
            self.head = answer.decode()
            if token is not None and self.status == 101:
                self.message("welcome", "error")
        except BaseException:
            self.sock.close()
            raise

    @property
    def status(self) -> int:
        """The status of the answer to the handshake."""
        return int(self.head.split()[1])

    def _more(self) -> int:
        try:
            data = self.sock.recv(65536)
        except (ConnectionError, ssl.SSLEOFError):
            data = b""
        if not data:
            raise Ended
        self._buffer += data
        return len(data)

    def send(self, **message: object) -> None:
        """Send a command."""
        data = json.dumps(message).encode()
        size = bytes((0x80 | len(data),)) if len(data) < 126 else b"\xfe" + struct.pack("!H", len(data))
        self.sock.sendall(b"\x81" + size + b"\0\0\0\0" + data)  # masked with zeros

    def frame(self, within_s: float = SOON_S) -> tuple[int, bytes]:
        """Return the next frame: its opcode and its data. Raises Ended, TimeoutError."""
        self.sock.settimeout(within_s)
        while (found := self._parsed()) is None:
            self._more()
        return found

    def _parsed(self) -> tuple[int, bytes] | None:
        if len(self._buffer) < 2:
            return None
        size, begin = self._buffer[1], 2
        for mark, form in ((126, "!H"), (127, "!Q")):
            if size == mark:
                begin = 2 + struct.calcsize(form)
                if len(self._buffer) < begin:
                    return None
                (size,) = struct.unpack(form, self._buffer[2:begin])
                break
        if len(self._buffer) < begin + size:
            return None
        opcode, data = self._buffer[0] & 0xF, self._buffer[begin : begin + size]
        self._buffer = self._buffer[begin + size :]
        return opcode, data

    def message(self, *kinds: str, within_s: float = SOON_S) -> dict[str, Any]:
        """Return the next message of one of these types; others are skipped. Raises Ended, TimeoutError."""
        ends = time.monotonic() + within_s
        while True:
            opcode, data = self.frame(max(0.001, ends - time.monotonic()))
            if opcode == CLOSE:
                raise Ended(data)
            if opcode == 1:
                found: dict[str, Any] = json.loads(data)
                if found["type"] in kinds:
                    return found

    def ask(self, *kinds: str, **message: object) -> dict[str, Any]:
        """Send a command and return the answer of one of these types, or the error."""
        self.send(**message)
        return self.message("error", *kinds)

    def is_limited(self) -> bool:
        """Return whether a ping is refused for its rate."""
        answer = self.ask("pong", type="ping")
        assert answer["type"] == "pong" or answer["code"] == "rate_limited", answer
        return bool(answer["type"] == "error")

    def close_code(self, within_s: float = SOON_S) -> int:
        """Wait for the close frame and return its code; 1006 if the socket ends without one."""
        ends = time.monotonic() + within_s
        with suppress(Ended):
            while True:
                opcode, data = self.frame(max(0.001, ends - time.monotonic()))
                if opcode == CLOSE:
                    return int(struct.unpack("!H", data[:2])[0])
        return 1006

    def has_ended(self, within_s: float) -> bool:
        """Return whether the daemon closes the socket within this time."""
        ends = time.monotonic() + within_s
        try:
            while True:
                self.frame(max(0.001, ends - time.monotonic()))
        except TimeoutError:
            return False
        except Ended:
            return True

    def sizes_of_records(self, until_bytes: int) -> list[int]:
        """Read at least this many bytes. Return how many each TLS record has: the daemon wrote them at once."""
        sizes: list[int] = []
        while sum(sizes) < until_bytes:
            sizes.append(self._more())
        return sizes

    def close(self) -> None:
        """Reset the connection."""
        if self.sock.fileno() >= 0:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.sock.close()


class ReloadRig:
    """The daemon and what surrounds it. `reload` gives it another configuration."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.backend = Backend()
        self.authority = trustme.CA()
        self.trust = ssl.create_default_context()
        self.authority.configure_trust(self.trust)
        self.port = 0
        self._clients: list[Client] = []
        self._sections: Sections = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._lines = directory / "stderr"
        self._config = directory / "whaled.yaml"
        generate(directory / "keys.json", time.time())
        self.ring = ring_of(read(directory / "keys.json"), directory / "keys.json")
        self.certificate, self.key = self.issue_certificate("first")
        self._base: dict[str, dict[str, object]] = {
            "upstream": {"url": f"ws://127.0.0.1:{self.backend.port}", "reconnect_initial": "50ms"},
            "detection": {"fetch_inputs": False},
            "backfill": {"enabled": False},
            "eventlog": {"path": str(directory / "whaled.db")},
            "gateway": {
                "port": 0,
                "tls": {"certificate": str(self.certificate), "private_key": str(self.key)},
                "position_interval": "1h",
                "drain_window": "1h",
                "close_timeout": "1h",
                "slow_timeout": "1h",
                "max_unsent": "1GiB",
            },
            "auth": {"key_ring": str(directory / "keys.json"), "token_ttl": "1h"},
            "http": {"port": 0, "render_interval": "1ms", "requests_per_second": 10_000},
            "canary": {"interval": "1h"},
            "memory": {"limit": "1024GiB", "shed_at": 1},
            "log": {"format": "json"},
        }

    # --- the process ---

    def start(self) -> None:
        """Start the daemon with the first configuration, unless it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        self._write({})
        self._lines.write_bytes(b"")
        with self._lines.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "whaled", "run", "--config", str(self._config)],
                stdin=subprocess.DEVNULL, stderr=stderr, cwd=self.directory, env={"PATH": os.environ["PATH"]},
            )  # fmt: skip
        until(
            lambda: self._process is None or self._process.poll() is not None or bool(self.logged("daemon_ready")), 60.0
        )
        (ready,) = self.logged("daemon_ready")
        self.port = int(ready["listen"].rpartition(":")[2])
        self._http = int(ready["metrics"].rpartition(":")[2].removesuffix("/metrics"))
        until(lambda: self.metric("whaled_upstream_state", state="connected") == 1)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def ended(self, within_s: float = SOON_S) -> int:
        """Wait for the end of the process and return its exit status."""
        assert self._process is not None
        return self._process.wait(within_s)

    def close(self) -> None:
        """End everything."""
        self.close_clients()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self.backend.close()

    # --- the configuration ---

    def _write(self, sections: Sections) -> None:
        self._sections = sections
        merged: dict[str, dict[str, object]] = {name: dict(keys) for name, keys in self._base.items()}
        for name, keys in sections.items():
            merged.setdefault(name, {}).update(keys)
        self._config.write_text(yaml.safe_dump(merged))

    def reload(self, **sections: Mapping[str, object]) -> str | None:
        """Reload the first configuration with these keys. Return why it was refused, None if it was applied."""
        self._write(sections)
        path = self.directory / "whaled.db.last-reload.json"
        path.unlink(missing_ok=True)
        self.signal(signal.SIGHUP)
        until(path.exists)
        problem = json.loads(path.read_text())["problem"]
        assert problem is None or isinstance(problem, str)
        return problem

    def apply(self, **sections: Mapping[str, object]) -> None:
        """Reload, which must succeed."""
        assert self.reload(**sections) is None

    def reset(self) -> None:
        """Close all clients, and apply the first configuration again."""
        self.close_clients()
        if self._sections:
            self.apply()
        until(lambda: self.metric("whaled_connections") == 0 and self.metric("whaled_memory_shedding") == 0)

    # --- what surrounds it ---

    def issue_certificate(self, name: str) -> tuple[Path, Path]:
        """Make a certificate for this machine, and its key."""
        issued = self.authority.issue_cert("localhost", "127.0.0.1")
        chain, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        for pem in issued.cert_chain_pems:
            pem.write_to_path(str(chain), append=True)
        issued.private_key_pem.write_to_path(str(key))
        return chain, key

    def book(self, *owners: tuple[str, str]) -> str:
        """Write an address book of exchanges, each an address and its label. Return its path."""
        path = self.directory / "book.csv"
        path.write_text("".join(f"{label},{address},exchange\n" for address, label in owners))
        return str(path)

    def token(self, client_id: str | None = None, *, ttl_s: float = 3600.0, age_s: float = 0.0, **claims: Any) -> str:
        """Return a token that was issued `age_s` ago. Without a `client_id` it is of a new client."""
        return issue(
            self.ring, client_id=client_id or secrets.token_hex(8), permissions=[Permission.READ], ttl_s=ttl_s,
            now=time.time() - age_s, token_id=secrets.token_hex(8), settings=AuthSettings(**claims),
        )[0]  # fmt: skip

    def client(self, token: str | None = None, **options: Any) -> Client:
        """Connect an authenticated client; it is closed at the end of the test."""
        return self.connection(token or self.token(), **options)

    def connection(self, token: str | None = None, **options: Any) -> Client:
        """Connect a client that sends no token of its own."""
        client = Client(self, token, **options)
        self._clients.append(client)
        return client

    def close_clients(self) -> None:
        """Reset all connections."""
        for client in self._clients:
            client.close()
        self._clients.clear()

    def refusal(self, token: str, *, source: str = "127.0.0.1") -> str:
        """Return the message that a token is refused with; empty if it is accepted."""
        client = self.connection(source=source)
        answer = client.ask("auth_success", type="auth", token=token)
        client.close()
        return str(answer.get("message", "")) if answer["type"] == "error" else ""

    def alert(self, **outputs_btc: float) -> dict[str, Any] | None:
        """Send a transaction. Return the data of its alert, None if it is not a whale."""
        client = self.client()
        sent, last = payment(**outputs_btc), payment(**{PAYEE: 1_000_000.0})
        self.backend.send(sent)
        self.backend.send(last)
        found = None
        while True:
            data: dict[str, Any] = client.message("whale_alert")["data"]
            if data["transaction_id"] == sent["txid"]:
                found = data
            if data["transaction_id"] == last["txid"]:
                client.close()
                return found

    def alerts(self, count: int) -> None:
        """Have the daemon commit this many alerts."""
        before = self.metric("whaled_eventlog_head_offset")
        self.backend.send(*(payment(**{PAYEE: 1_000.0}) for _ in range(count)))
        until(lambda: self.metric("whaled_eventlog_head_offset") == before + count)

    # --- what it shows ---

    def http(self, *, source: str = "127.0.0.1", is_small: bool = False) -> socket.socket:
        """Connect to the HTTP server. With `is_small`, the kernel holds little of what the client does not read."""
        sock = plain_socket(source, is_small=is_small)
        sock.connect(("127.0.0.1", self._http))
        return sock

    def get(self, path: str, host: str = "localhost", within_s: float = SOON_S) -> tuple[int, str]:
        """Return status and body of a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self._http, timeout=within_s)
        try:
            connection.request("GET", path, headers={"Host": host})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of a metric; 0 if there is none."""
        _, text = self.get("/metrics")
        wanted = ",".join(f'{label}="{value}"' for label, value in labels.items())
        found = re.search(rf"^{name}{re.escape('{' + wanted + '}' if wanted else '')} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found is not None else 0.0

    def text(self) -> str:
        """Return everything that the daemon has logged."""
        return self._lines.read_text()

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the log lines of an event."""
        lines = [json.loads(line) for line in self.text().splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in lines if line["event"] == event]


def claims(token: str) -> dict[str, Any]:
    """Return the claims of a token, unverified."""
    found: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return found


def wrong_token(claimant: str) -> str:
    """Return a token that names a client and has no valid signature."""
    parts = ({"alg": "HS256", "typ": "JWT"}, {"client_id": claimant, "exp": 4_000_000_000, "permissions": ["read"]})
    texts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*texts, "A" * 43])
