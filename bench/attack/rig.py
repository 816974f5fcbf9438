"""The setup of an attack: the daemon as a process, a backend that sends whales, victims, attackers.

If there are several cores, the daemon has one and everything else the others, since an attacker on another machine
would not use the daemon's CPU either. Attackers are niced, so that victims and backend are never late.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from trustme import CA
from websockets.exceptions import ConnectionClosed

from bench.attack import assaults, payloads, victims
from bench.attack.processes import DAEMON_NICE, RIG_NICE, nice_command, open_descriptors, peak_kib, pin, renice
from bench.attack.victims import Gathered
from bench.programs import BrokenError, Program, resident_kib, running
from bench.upstream import CONNECT_LIMIT_S, Relay, relaying
from whaled.auth import keys, tokens
from whaled.config.sections import AuthSettings
from whaled.model import Permission

VICTIMS = 200
ATTACKER_TOKENS = 2_500
RATE = 10.0
START_LIMIT_S = 30.0
STOP_LIMIT_S = 30.0
SEND_LIMIT_S = 5.0
SAMPLE_S = 0.1
READY_LOOK_S = 0.02
# Attackers are killed this long after their time has passed.
LATE_S = 15.0
# The limit of the systemd unit, above which the kernel throttles the daemon, and a little later kills it.
MEMORY_LIMIT = "960MiB"
TOKEN_LIFE_S = 7200.0
PIPE_BYTES = 4096
NOTIFICATION_BYTES = 4096
F_SETPIPE_SZ = 1031


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The setup of an attack, where it differs from the defaults."""

    tls: bool = False
    # Limit of descriptors; 0: this machine's, at most that of the unit.
    descriptors: int = 0
    # Its log goes to a pipe, or its notifications to a socket, that is not read.
    log_pipe: bool = False
    deaf_systemd: bool = False
    # It starts with a long event log.
    history: bool = False
    # New clients connect from the address of the attackers.
    newcomers_beside: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """The files shared by all attacks: keys, tokens, a certificate, a long log."""

    directory: Path
    history: Path | None = None
    victims: int = VICTIMS
    victim_tokens: Sequence[str] = ()

    @property
    def tokens(self) -> Path:
        """Return the file with valid tokens for attackers, each of a different client."""
        return self.directory / "tokens.json"


def prepare(directory: Path, *, victims: int = VICTIMS) -> Place:
    """Create keys, tokens and a certificate."""
    ring = directory / "keys.json"
    keys.generate(ring, time.time())
    loaded, settings = keys.ring_of(keys.read(ring), ring), AuthSettings()

    def token(client: str) -> str:
        return tokens.issue(
            loaded, client_id=client, permissions=[Permission.READ], ttl_s=TOKEN_LIFE_S, now=time.time(),
            token_id=secrets.token_urlsafe(8), settings=settings,
        )[0]  # fmt: skip

    authority = CA()
    issued = authority.issue_cert("localhost", payloads.LOOPBACK)
    for pem in issued.cert_chain_pems:
        pem.write_to_path(str(directory / "chain.pem"), append=True)
    issued.private_key_pem.write_to_path(str(directory / "key.pem"))
    (directory / "key.pem").chmod(0o600)
    place = Place(directory, None, victims, [token("newcomer"), *(token(f"victim-{n}") for n in range(victims))])
    place.tokens.write_text(json.dumps([token(f"attacker-{number}") for number in range(ATTACKER_TOKENS)]))
    return place


def write_config(place: Place, around: Surroundings, relay: Relay) -> Path:
    """Write a configuration with the defaults, except for addresses, files, and the memory limit of the unit."""
    database = place.history if around.history and place.history else place.directory / f"{secrets.token_hex(4)}.db"
    config: dict[str, dict[str, object]] = {
        "upstream": {"url": relay.url, "rest_url": relay.rest_url},
        "eventlog": {"path": str(database)},
        "gateway": {"port": 0},
        "auth": {"key_ring": str(place.directory / "keys.json")},
        "http": {"port": 0},
        "memory": {"limit": MEMORY_LIMIT},
        "log": {"format": "json"},
    }
    if around.tls:
        files = {"certificate": str(place.directory / "chain.pem"), "private_key": str(place.directory / "key.pem")}
        config["gateway"]["tls"] = files
    path = place.directory / "whaled.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


# --- the processes ---


@dataclass
class Daemon:
    """A running daemon, with its number of open descriptors."""

    process: asyncio.subprocess.Process
    log: Path
    port: int
    http_port: int
    pipe: FileIO | None = None
    notify: socket.socket | None = None
    descriptors: int = 0
    most_descriptors: int = 0
    exit_status: int | None = None

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        """Return whether the process is running."""
        return self.process.returncode is None

    def waited_s(self) -> float:
        """Return the seconds that its main thread was ready to run without a core; 0 if it has ended (schedstat)."""
        try:
            return int(Path(f"/proc/{self.pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
        except OSError:
            return 0.0

    def resident_mib(self) -> float:
        """Return its resident memory, 0 if it has ended."""
        try:
            return resident_kib(self.pid) / 1024
        except (BrokenError, OSError):
            return 0.0

    def peak_mib(self) -> float:
        """Return the peak of its resident memory since `forget_peak`."""
        return peak_kib(self.pid) / 1024

    def forget_peak(self) -> None:
        """Reset the kernel's record of the peak (proc(5), clear_refs)."""
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.pid}/clear_refs").write_text("5", encoding="ascii")
        self.most_descriptors = 0

    def deafen(self) -> None:
        """Stop reading the log's pipe, and fill the queue of the socket that replaces systemd's."""
        if self.pipe is not None:
            asyncio.get_running_loop().remove_reader(self.pipe)
        if self.notify is None:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(BlockingIOError):
            sender.setblocking(False)
            while True:
                sender.sendto(b"STATUS=x", self.notify.getsockname())

    def listen(self) -> None:
        """Read the log's pipe and the notifications, if there are any, until `deafen`."""
        loop = asyncio.get_running_loop()
        if self.pipe is not None:
            loop.add_reader(self.pipe, self.pipe.read)
        if self.notify is not None:
            loop.add_reader(self.notify, self.notify.recv, NOTIFICATION_BYTES)

    async def watch(self) -> None:
        """Count descriptors until the process ends or this is cancelled."""
        while self.is_alive:
            self.descriptors = open_descriptors(self.pid)
            self.most_descriptors = max(self.most_descriptors, self.descriptors)
            await asyncio.sleep(SAMPLE_S)


@asynccontextmanager
async def daemon(place: Place, around: Surroundings, config: Path) -> AsyncIterator[Daemon]:
    """Run `whaled run` and yield once it is ready. On exit it is sent SIGTERM, and killed if it does not stop."""
    log = place.directory / "log"
    log.write_bytes(b"")
    with contextlib.ExitStack() as stack:
        environment = {"PATH": os.environ["PATH"]}
        notify = None
        if around.deaf_systemd:
            notify = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            notify.setblocking(False)
            notify.bind(str(place.directory / f"notify-{secrets.token_hex(4)}"))
            environment |= {"NOTIFY_SOCKET": notify.getsockname(), "WATCHDOG_USEC": "4000000"}
        reader, out = open_log(log, around, stack)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "whaled", "run", "--config", str(config),
            stdin=asyncio.subprocess.DEVNULL, stderr=out, cwd=place.directory, env=environment,
        )  # fmt: skip
        os.close(out)
        try:
            pin(process.pid, daemon=True)
            renice(process.pid, DAEMON_NICE)
            if around.descriptors:
                resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (around.descriptors, around.descriptors))
            line = await ready(process, reader)
            pipe = reader if around.log_pipe else None
            started = Daemon(process, log, port_of(line["listen"]), port_of(line["metrics"]), pipe, notify)
            started.descriptors = open_descriptors(process.pid)
            started.listen()
            yield started
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(STOP_LIMIT_S):
                        await process.wait()
            started.exit_status = process.returncode
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            for ended in (notify, reader if around.log_pipe else None):
                if ended is not None:
                    asyncio.get_running_loop().remove_reader(ended)


def open_log(log: Path, around: Surroundings, stack: contextlib.ExitStack) -> tuple[FileIO, int]:
    """Return a file for reading the daemon's log, and the descriptor to which the daemon writes it."""
    if not around.log_pipe:
        return stack.enter_context(log.open("rb", buffering=0)), os.open(log, os.O_WRONLY | os.O_APPEND)
    reading, writing = os.pipe()
    fcntl.fcntl(writing, F_SETPIPE_SZ, PIPE_BYTES)
    os.set_blocking(reading, False)
    return stack.enter_context(os.fdopen(reading, "rb", buffering=0)), writing


def port_of(url: str) -> int:
    """Return the port of a URL that contains one."""
    return int(url.rsplit(":", 1)[1].partition("/")[0])


async def ready(process: asyncio.subprocess.Process, log: FileIO) -> dict[str, Any]:
    """Wait for the event `daemon_ready`, which contains the addresses. Raises BrokenError if there is none in time."""
    lines: list[bytes] = []
    rest = b""
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end and process.returncode is None:
        rest += log.read() or b""
        *whole, rest = rest.split(b"\n")
        for line in whole:
            lines.append(line)
            if line.startswith(b"{") and (read := json.loads(line)).get("event") == "daemon_ready":
                found: dict[str, Any] = read
                return found
        await asyncio.sleep(READY_LOOK_S)
    raise BrokenError("whaled is not ready:\n" + b"\n".join(lines[-20:]).decode(errors="replace"))


class Rig:
    """A daemon with its backend and victims."""

    def __init__(self, place: Place, around: Surroundings, relay: Relay, daemon: Daemon, crowd: Program) -> None:
        self.place = place
        self.around = around
        self.daemon = daemon
        self._relay = relay
        self._crowd = crowd
        # Rigs may share a log, so their whales must not spend the same outputs.
        self._next = time.time_ns() // 1_000
        self.unsent = 0
        self.did: list[assaults.Did] = []

    async def window(self, seconds: float, within_s: float = 10.0) -> Gathered:
        """Send whales for `seconds`, and wait until all victims have received them."""
        first, count = await self.send_during(asyncio.sleep(seconds))
        return await self.gather(first, count, within_s)

    async def send_during(self, work: Coroutine[Any, Any, object]) -> tuple[int, int]:
        """Send a whale every tenth of a second while `work` runs, on time even if earlier ones are delayed.

        Returns the number of the first whale and their count.
        """
        loop = asyncio.get_running_loop()
        first, began = self._next, loop.time()
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(work)
            while not working.done():
                tasks.create_task(self._send_one(self._next))
                self._next += 1
                await asyncio.wait((working,), timeout=max(0.0, began + (self._next - first) / RATE - loop.time()))
        return first, self._next - first

    async def _send_one(self, number: int) -> None:
        try:
            async with asyncio.timeout(SEND_LIMIT_S):
                await self._relay.send_whale(number)
        except TimeoutError:
            pass  # it is buffered, and is sent when the daemon reads
        except (BrokenError, ConnectionClosed, OSError):
            self.unsent += 1

    async def gather(self, first: int, count: int, within_s: float) -> Gathered:
        """Return the deliveries of these whales."""
        return Gathered(**await self._crowd.ask(f"gather {first} {count} {within_s:g}", within_s + LATE_S))

    async def begin_newcomers(self) -> None:
        """Start the arrival of valid new clients."""
        await self._crowd.ask("newcomers")

    async def arrivals(self) -> list[victims.Arrival]:
        """End the arrival of new clients, and return them."""
        response = await self._crowd.ask("arrivals", LATE_S)
        return [victims.Arrival(**each) for each in response["arrivals"]]

    async def attack(self, orders: Sequence[assaults.Order]) -> None:
        """Run the attackers until all have ended, and store their counts in `did`."""
        async with asyncio.TaskGroup() as tasks:
            jobs = [tasks.create_task(self._attacker(order)) for order in orders]
        self.did = [job.result() for job in jobs]

    async def _attacker(self, order: assaults.Order) -> assaults.Did:
        port = self.daemon.http_port if order.target == "metrics" else self.daemon.port
        full = replace(order, port=port, tokens=str(self.place.tokens))
        async with running("attacker", *nice_command(), "bench.attack.assaults", json.dumps(asdict(full))) as program:
            return assaults.Did(**await program.answer(assaults.ALL_OPEN_LIMIT_S + order.seconds + LATE_S))


@asynccontextmanager
async def rig(place: Place, around: Surroundings) -> AsyncIterator[Rig]:
    """Run a daemon, a backend to which it is subscribed, and connected victims."""
    async with relaying() as relay:
        config = write_config(place, around, relay)
        async with daemon(place, around, config) as started:
            order = victims.Order(
                started.port, list(place.victim_tokens), around.tls,
                "127.1.0.1" if around.newcomers_beside else victims.NEWCOMER_ADDRESS,
            )  # fmt: skip
            orders = place.directory / "victims.json"
            orders.write_text(json.dumps(asdict(order)), encoding="utf-8")
            async with running("victims", sys.executable, "-m", "bench.attack.victims", orders) as crowd:
                renice(crowd.pid, RIG_NICE)
                async with asyncio.timeout(CONNECT_LIMIT_S):
                    await relay.subscribed.wait()
                opened = await crowd.ask("open")
                if opened["open"] != place.victims:
                    raise BrokenError(f"{opened['open']} of {place.victims} victims are connected")
                watching = asyncio.create_task(started.watch())
                try:
                    yield Rig(place, around, relay, started, crowd)
                finally:
                    watching.cancel()
