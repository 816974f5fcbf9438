"""One attacking process: `python -m bench.attack.assaults ORDER`, where ORDER is JSON. Prints a result in JSON.

It uses plain sockets and one epoll, so that a single process can open more connections per second than the daemon can
serve. `Strangers` have no session, `Clients` authenticate. It only attacks loopback.
"""

import contextlib
import json
import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.attack.payloads import FRAMES, LOOPBACK, PAYLOADS, request

# From linux/in.h; the socket module lacks it. The port is chosen at connect: one address has 28,000 per target.
IP_BIND_ADDRESS_NO_PORT = 24
# Connections opened before replies are read again.
TURN = 64
POLL_S = 0.005
OPEN_LIMIT_S = 3.0
# The attack starts after this time even if not all clients are accepted.
ALL_OPEN_LIMIT_S = 20.0
RECEIVE_BYTES = 1 << 18
# Interval at which closed clients reconnect.
REOPEN_S = 0.05
# Part of the frame that refuses a token.
REFUSAL = b'"type":"error"'
# SO_LINGER with time 0: close() resets the connection, which leaves no TIME_WAIT.
RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Order:
    """The task of one process.

    `payload` is what a stranger sends (a key of PAYLOADS). `opening` and `message` are what a client sends first and
    every `every_s` seconds (keys of FRAMES). `finish` is when a stranger disconnects: "at once", at the first "reply",
    when it is "refused", or never ("held": when the daemon closes the connection, another one is opened). The time of
    clients begins when all are connected.
    """

    who: str
    port: int = 0
    seconds: float = 1.0
    index: int = 0
    tls: bool = False
    tokens: str = ""
    count: int = 1
    rate: float = 0.0
    addresses: int = 250
    first_address: int = 0
    payload: str = ""
    finish: str = "held"
    reads: bool = True
    receive_buffer: int = 0
    drip: str = ""
    drip_s: float = 1.0
    burst_s: float = 0.0
    opening: str = ""
    message: str = ""
    every_s: float = 1.0
    reopens: bool = True
    one_client: bool = False
    target: str = "clients"

    def source(self, number: int) -> str:
        """Return the source address of a connection: 250 in each /24, and a separate /16 for each process."""
        place = self.first_address + number % self.addresses
        return f"127.{1 + self.index}.{place // 250 % 250}.{1 + place % 250}"


@dataclass
class Did:
    """The counts of what a process actually did, so that an attack that did not happen is not reported as survived."""

    opened: int = 0
    at_once: int = 0
    replies: int = 0
    refused: int = 0
    closed: int = 0
    failed: int = 0
    sent: int = 0
    seconds: float = 0.0
    error: str = ""


def dial(order: Order, number: int) -> socket.socket:
    """Start a non-blocking connection."""
    made = socket.socket()
    try:
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        if order.receive_buffer:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, order.receive_buffer)
        made.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        made.bind((order.source(number), 0))
        with contextlib.suppress(BlockingIOError):
            made.connect((LOOPBACK, order.port))
    except OSError:
        made.close()
        raise
    return made


@dataclass(slots=True)
class Link:
    """A stranger's connection, with its unsent bytes."""

    socket: socket.socket
    unsent: bytes = b""
    dripped_at: float = 0.0


class Strangers:
    """Connections without a session: at most `count` at a time, `rate` new ones per second (0: as fast as possible)."""

    def __init__(self, order: Order, tokens: Sequence[str]) -> None:
        self.did = Did()
        self._order = order
        self._payload = PAYLOADS[order.payload](tokens[0] if tokens else "")
        self._links: dict[int, Link] = {}
        self._poll = select.epoll()
        self._began = time.monotonic()

    def run(self) -> None:
        """Attack until the time has passed."""
        order = self._order
        end = self._began + order.seconds
        while (now := time.monotonic()) < end:
            if order.burst_s:
                self._burst(end)
                continue
            self._open(now)
            wait_s = 0.0 if not order.rate and len(self._links) < order.count else POLL_S
            for descriptor, events in self._poll.poll(wait_s, 1024):
                self._serve(self._links[descriptor], events)
            if order.drip:
                self._drip(now)
        for link in list(self._links.values()):
            self._drop(link)

    def _open(self, now: float) -> None:
        order, did = self._order, self.did
        for _ in range(TURN):
            if len(self._links) >= order.count or (order.rate and did.opened >= order.rate * (now - self._began)):
                return
            try:
                made = dial(order, did.opened)
            except OSError as error:
                did.failed += 1
                did.error = str(error)
                return
            did.opened += 1
            if order.finish == "at once":
                # On loopback the connection is already established, unless the daemon's accept queue is full.
                with contextlib.suppress(OSError):
                    made.send(self._payload)
                made.close()
                continue
            # EPOLLRDHUP is always needed, to detect the end; EPOLLOUT only while there are unsent bytes.
            interest = select.EPOLLIN | select.EPOLLRDHUP if order.reads else select.EPOLLRDHUP
            self._poll.register(made.fileno(), interest | (select.EPOLLOUT if self._payload else 0))
            self._links[made.fileno()] = Link(made, self._payload, now)

    def _serve(self, link: Link, events: int) -> None:
        order, did = self._order, self.did
        try:
            if events & select.EPOLLOUT and link.unsent:
                sent = link.socket.send(link.unsent)
                link.unsent = link.unsent[sent:]
                did.sent += sent
                if not link.unsent:
                    interest = select.EPOLLIN | select.EPOLLRDHUP if order.reads else select.EPOLLRDHUP
                    self._poll.modify(link.socket.fileno(), interest)
            if events & select.EPOLLIN:
                received = link.socket.recv(RECEIVE_BYTES)
                did.refused += received[9:12] in (b"503", b"429", b"403")
                if received and order.finish == "reply":
                    did.replies += 1
                    self._drop(link)
                    return
                if not received or (order.finish == "refused" and REFUSAL in received):
                    raise ConnectionResetError
            elif events & (select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP):
                raise ConnectionResetError
        except BlockingIOError:
            return
        except OSError:
            did.closed += 1
            self._drop(link)

    def _drip(self, now: float) -> None:
        piece = self._order.drip.encode()
        for link in list(self._links.values()):
            if now - link.dripped_at >= self._order.drip_s:
                link.dripped_at = now
                with contextlib.suppress(OSError):
                    link.socket.send(piece)
                    self.did.sent += len(piece)

    def _burst(self, end: float) -> None:
        """Open `count` connections at once, hold them for `burst_s`, and close them together."""
        burst = []
        for _ in range(self._order.count):
            with contextlib.suppress(OSError):
                burst.append(dial(self._order, self.did.opened))
                self.did.opened += 1
                if self._payload:
                    burst[-1].send(self._payload)
        time.sleep(max(0.0, min(self._order.burst_s, end - time.monotonic())))
        for made in burst:
            made.close()

    def _drop(self, link: Link) -> None:
        self._poll.unregister(link.socket.fileno())
        del self._links[link.socket.fileno()]
        link.socket.close()


@dataclass(slots=True)
class Session:
    """An authenticated connection of an attacker."""

    number: int
    socket: socket.socket
    turn: int = 0


@dataclass(slots=True)
class Clients:
    """`count` connections with valid tokens that each send `message` every `every_s` (0: as fast as possible)."""

    order: Order
    tokens: Sequence[str]
    did: Did = field(default_factory=Did)
    sessions: list[Session] = field(default_factory=list)
    # The certificate is a test certificate.
    context: ssl.SSLContext = field(default_factory=ssl._create_unverified_context)  # noqa: SLF001
    end: float = 0.0

    def run(self) -> None:
        """Open all connections, then send and receive until the time has passed."""
        order = self.order
        self.end = time.monotonic() + ALL_OPEN_LIMIT_S
        missing = self._open(range(order.count))
        self.end = time.monotonic() + order.seconds
        reopen_at = 0.0
        while (now := time.monotonic()) < self.end:
            if missing and now >= reopen_at:
                missing, reopen_at = self._open(missing), now + REOPEN_S
            for session in list(self.sessions):
                if not self._turn(session):
                    self.sessions.remove(session)
                    session.socket.close()
                    self.did.closed += 1
                    if order.reopens:
                        missing.append(session.number)
            if order.every_s:
                time.sleep(max(0.0, min(order.every_s, self.end - now) - (time.monotonic() - now)))
            elif not self.sessions:
                time.sleep(POLL_S)

    def _open(self, numbers: Sequence[int]) -> list[int]:
        """Open connections, and return the numbers of those that failed. After a failure the others are not tried."""
        failed: list[int] = []
        for number in numbers:
            if failed or time.monotonic() >= self.end:
                failed.append(number)
                continue
            try:
                session = Session(number, self._enter(number))
                session.socket.sendall(FRAMES[self.order.opening](self.order.index * self.order.count + number, 0))
            except OSError as error:
                self.did.failed += 1
                self.did.error = str(error)
                failed.append(number)
            else:
                session.socket.setblocking(False)
                self.sessions.append(session)
                self.did.opened += 1
        return failed

    def _enter(self, number: int) -> socket.socket:
        order = self.order
        made = dial(order, number)
        try:
            within_s = min(OPEN_LIMIT_S, max(0.05, self.end - time.monotonic()))
            poll = select.poll()  # select.select supports only descriptors up to 1,023
            poll.register(made, select.POLLOUT)
            if not poll.poll(1000 * within_s):
                raise TimeoutError("not accepted")
            made.settimeout(within_s)
            if order.tls:
                made = self.context.wrap_socket(made)
            token = self.tokens[0 if order.one_client else (order.index * order.count + number) % len(self.tokens)]
            made.sendall(request(token, deflates=True))  # compression costs the daemon more, if anything
            reply = b""
            while b"welcome" not in reply:
                received = made.recv(4096)
                if not received:
                    raise ConnectionResetError(f"refused: {reply[-80:]!r}")
                reply += received
        except OSError:
            made.close()
            raise
        return made

    def _turn(self, session: Session) -> bool:
        """Send a message and receive available data. Return False if the connection has ended."""
        order = self.order
        try:
            if order.message:
                with contextlib.suppress(BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    number = order.index * order.count + session.number
                    session.socket.send(FRAMES[order.message](number, session.turn))
                    session.turn += 1
                    self.did.sent += 1
            with contextlib.suppress(BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                while True:
                    received = session.socket.recv(RECEIVE_BYTES if order.reads else 1)
                    if not received:
                        return False
                    if not order.reads or len(received) < RECEIVE_BYTES:
                        break
        except OSError:
            return False
        return True


def main() -> None:
    """Carry out the order, and print the counts."""
    order = Order(**json.loads(sys.argv[1]))
    tokens = json.loads(Path(order.tokens).read_text(encoding="utf-8")) if order.tokens else []
    attacker = Strangers(order, tokens) if order.who == "strangers" else Clients(order, tokens)
    began = time.monotonic()
    attacker.run()
    attacker.did.seconds = time.monotonic() - began
    print(json.dumps(asdict(attacker.did)), flush=True)


if __name__ == "__main__":
    main()
