"""The phases of a connection: their table, and connections without a socket that are driven through it in any order."""

from collections.abc import Callable
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.tokens import Tokens
from whaled.config.sections import GatewaySettings
from whaled.errors import Close
from whaled.gateway.actions import Concern
from whaled.gateway.admission import Source
from whaled.gateway.clients import Clients
from whaled.gateway.connection import Connection
from whaled.gateway.limits import FailureLimit, Refusal, SessionLimits
from whaled.gateway.messages import Counters
from whaled.gateway.origins import Origins
from whaled.gateway.phase import TABLE, Phase, PhaseError, Step, after
from whaled.gateway.proxies import Proxies
from whaled.gateway.records import Records
from whaled.gateway.session import Session
from whaled.gateway.share import Lane
from whaled.gateway.transport import ClientSocket
from whaled.model import Position

LIMITS = SessionLimits(messages_per_second=10.0, message_burst=20.0, max_addresses=10, expiry_grace_s=25.0)
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def text(body: bytes) -> bytes:
    """Return a client's text frame. The mask is zeros."""
    return bytes((0x81, 0x80 | len(body))) + bytes(4) + body


def test_phases_pass_in_their_order_and_never_return() -> None:
    assert all(following > phase for (phase, _), following in TABLE.items())
    assert {phase for phase, _ in TABLE} == set(Phase) - {Phase.CLOSED}


def test_every_open_phase_may_end_or_be_lost_and_a_closed_one_allows_nothing() -> None:
    for phase in Phase:
        for step in Step:
            is_possible = (phase, step) in TABLE
            if step is Step.LOST:
                assert is_possible == (phase is not Phase.CLOSED)
            if step is Step.ENDED:
                assert is_possible == (phase < Phase.CLOSING)
            if not is_possible:
                with pytest.raises(PhaseError, match=f"{step.name} in {phase.name}"):
                    after(phase, step)


def test_a_client_is_admitted_only_after_the_upgrade_and_upgraded_only_after_tls() -> None:
    assert [phase for phase in Phase if (phase, Step.AGREED) in TABLE] == [Phase.AGREEING]
    assert [phase for phase in Phase if (phase, Step.UPGRADED) in TABLE] == [Phase.REQUESTING]
    assert [phase for phase in Phase if (phase, Step.ADMITTED) in TABLE] == [Phase.AUTHENTICATING]


class Socket:
    """A socket in memory. The kernel takes everything while `takes`."""

    fd = 7
    is_plain = True
    is_agreed = True
    is_waiting = False
    lane = Lane.STRANGER
    source: object = None

    def __init__(self) -> None:
        self.owner: Connection | None = None
        self.takes = True
        self.unsent = 0
        self.is_aborted = self.has_ended = self.reads_no_more = False

    def start(self) -> None:
        assert self.owner is not None
        self.owner.connection_made()

    def write(self, data: bytes) -> None:
        if self.is_aborted or self.takes or not data:
            return
        was_empty = not self.unsent
        self.unsent += len(data)
        if was_empty and self.owner is not None:
            self.owner.pause_writing()

    def end(self) -> None:
        self.has_ended = True

    def abort(self) -> None:
        self.is_aborted = True
        self.unsent = 0

    def favour(self, jobs: int) -> None:
        pass

    def pause_reading(self) -> None:
        pass


class Failures(Records):
    """Records that remember bugs and refusals."""

    def __init__(self) -> None:
        self.bugs = 0
        self.refusals: list[Refusal] = []

    def failed(self, address: str) -> None:
        self.bugs += 1
        raise  # noqa: PLE0704 - it is called while the exception is handled

    def turned_away(self, reason: Refusal, network: str) -> None:
        self.refusals.append(reason)


class Owner:
    """A gateway that performs nothing."""

    def __init__(self, *, authenticates: bool, max_unsent: int = 1000) -> None:
        self.settings = GatewaySettings(max_unsent=max_unsent)
        self.origins = Origins.of(("*",), needs_token=authenticates)
        self.proxies = Proxies(GatewaySettings())
        self.failures = Failures()
        self.records: Records = self.failures
        self.is_draining = False
        self.now: Callable[[], float] = lambda: 1.0
        self.tokens = Tokens(expires_at=4e9) if authenticates else None
        self.performed: list[Concern] = []
        self.lost: list[Connection] = []

    def new_session(self, connection: Connection) -> Session:
        clients = Clients(max_connections=3, rate=100.0, burst=400.0)
        return Session(
            limits=LIMITS, authenticator=self.tokens, house=self, failures=FailureLimit(0.1, 3), clients=clients,
            address=connection.address, now=1.0,
        )  # fmt: skip

    def opened(self, connection: Connection) -> None:
        if self.is_draining:
            connection.send_away(Close.RESTART, 1.0)

    def perform(self, connection: Connection, action: Concern) -> None:
        self.performed.append(action)

    def fell_behind(self, connection: Connection, cursor: int) -> None:
        pass

    def client_named(self, connection: Connection, address: str, *, is_last: bool) -> Refusal | None:
        return None

    def disconnected(self, connection: Connection) -> None:
        self.lost.append(connection)

    def position(self) -> Position:
        return Position("e", 0)

    def counters(self) -> Counters:
        return Counters(0, 0, 0, 0)


def connected(owner: Owner, verdict: Refusal | None = None) -> tuple[Connection, Socket]:
    """Return a connection that has just been accepted, with its socket."""
    connection, socket = Connection(owner, "192.0.2.1", Source("192.0.2.1", "192.0.2.0/24"), 0), Socket()
    socket.owner = connection
    connection.start(cast("ClientSocket", socket), verdict)
    return connection, socket


async def test_a_connection_passes_through_all_its_phases() -> None:
    connection, socket = connected(Owner(authenticates=True))
    phases = [connection.phase]
    for data in (UPGRADE, text(b'{"type":"auth","token":"good"}'), b"\x88\x80" + bytes(4)):
        connection.data_received(data)
        phases.append(connection.phase)
    assert socket.has_ended
    connection.connection_lost()
    assert [*phases, connection.phase] == list(Phase)[1:]


async def test_frames_are_written_directly_only_while_the_websocket_is_open_and_nothing_is_unsent() -> None:
    connection, socket = connected(Owner(authenticates=False))
    assert connection.outbox.fd == -1
    connection.data_received(UPGRADE)
    assert connection.outbox.fd == socket.fd
    socket.takes = False
    connection.outbox.write(b"x")
    assert connection.outbox.fd == -1
    socket.unsent = 0
    connection.resume_writing()
    assert connection.outbox.fd == socket.fd
    connection.close(Close.GOING_AWAY)
    assert connection.outbox.fd == -1


@pytest.mark.parametrize(
    ("verdict", "request_sent", "counted"),
    [
        (None, UPGRADE, []),
        (None, b"nonsense\r\n\r\n", [Refusal.BAD_HANDSHAKE]),
        (Refusal.GLOBAL_CAP, UPGRADE, [Refusal.GLOBAL_CAP]),
        (Refusal.GLOBAL_CAP, b"", []),
        (Refusal.GLOBAL_CAP, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", [Refusal.NO_UPGRADE]),
        (None, b"", [Refusal.BAD_HANDSHAKE]),
    ],
)
async def test_the_reason_for_no_session_is_counted_once_and_a_verdict_only_when_it_is_sent(
    verdict: Refusal | None, request_sent: bytes, counted: list[Refusal]
) -> None:
    owner = Owner(authenticates=False)
    connection, _ = connected(owner, verdict)
    if request_sent:
        connection.data_received(request_sent)
    connection.connection_lost()
    assert owner.failures.refusals == counted
    assert owner.lost == [connection]


Do = Callable[[Connection, Socket], object]
MESSAGES = (
    b'{"type":"auth","token":"good"}', b'{"type":"auth","token":"bad"}', b'{"type":"ping"}', b'{"type":"subscribe"}',
    b"{", b'{"type":"refresh"}',
)  # fmt: skip


def end_of_stream(connection: Connection, socket: Socket) -> None:
    socket.reads_no_more = True
    connection.eof_received()


def read_everything(connection: Connection, socket: Socket) -> None:
    socket.unsent = 0
    connection.resume_writing()


WHAT_CLIENTS_DO: dict[str, Do] = {
    "request": lambda connection, _: connection.data_received(UPGRADE),
    "half a request": lambda connection, _: connection.data_received(UPGRADE[:40]),
    "its other half": lambda connection, _: connection.data_received(UPGRADE[40:]),
    "garbage": lambda connection, _: connection.data_received(b"\x00\xff\r\n\r\n"),
    "health check": lambda connection, _: connection.data_received(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
    **{
        message.decode(): lambda connection, _, message=message: connection.data_received(text(message))  # type: ignore[misc]
        for message in MESSAGES
    },
    "close": lambda connection, _: connection.data_received(b"\x88\x82" + bytes(4) + b"\x03\xe8"),
    "ping frame": lambda connection, _: connection.data_received(b"\x89\x80" + bytes(4)),
    "broken frame": lambda connection, _: connection.data_received(b"\xff\xff"),
    "flood": lambda connection, _: connection.data_received(text(b"x" * 100) * 700),
    "end of stream": end_of_stream,
    "reads nothing": lambda _, socket: setattr(socket, "takes", False),
    "reads": read_everything,
}
WHAT_WHALED_DOES: dict[str, Do] = {
    "displace": lambda connection, _: connection.displace() if not connection.is_client else None,
    "close": lambda connection, _: connection.close(Close.GOING_AWAY),
    "send away": lambda connection, _: connection.send_away(Close.RESTART, 1.0) if connection.session else None,
    "handshake timeout": lambda connection, _: (
        connection._handshake_timed_out() if connection.phase < Phase.AUTHENTICATING else None
    ),
    "authentication timeout": lambda connection, _: (
        connection._auth_timed_out() if connection.phase is Phase.AUTHENTICATING else None
    ),
    "keepalive": lambda connection, _: connection.keepalive(1e9),
    "recheck": lambda connection, _: connection.recheck(),
    "deliver": lambda connection, _: connection.outbox.write_behind(b"x" * 600),
    "answer": lambda connection, _: connection.answer(b"x" * 600),
    "exceed": lambda connection, _: connection.outbox.write_rest(b"x" * 3000),
}


@settings(deadline=None, max_examples=300)
@given(
    st.booleans(),
    st.sampled_from([None, Refusal.GLOBAL_CAP, Refusal.MEMORY]),
    st.booleans(),
    st.lists(st.sampled_from([*WHAT_CLIENTS_DO.values(), *WHAT_WHALED_DOES.values()]), max_size=25),
)
async def test_nothing_a_client_does_leads_to_an_impossible_step(
    authenticates: bool, verdict: Refusal | None, drains: bool, steps: list[Do]
) -> None:
    owner = Owner(authenticates=authenticates)
    owner.is_draining = drains
    connection, socket = connected(owner, verdict)
    for do in steps:
        before = connection.phase
        if socket.is_aborted:
            break
        if socket.reads_no_more and do in WHAT_CLIENTS_DO.values():
            continue  # nothing is read after the end of the stream
        do(connection, socket)
        assert connection.phase >= before
        is_open = connection.phase in (Phase.AUTHENTICATING, Phase.READY)
        assert not is_open or connection.session is not None
        assert (connection.outbox.fd >= 0) == (is_open and not socket.unsent)
        assert connection.is_client or connection.phase is not Phase.READY
    connection.connection_lost()
    assert connection.phase is Phase.CLOSED
    assert owner.failures.bugs == 0
    assert len(owner.failures.refusals) <= 1
    assert owner.lost == [connection]


async def test_a_bug_closes_the_connection_with_1011(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner(authenticates=False)
    monkeypatch.setattr(owner.failures, "failed", lambda _: setattr(owner.failures, "bugs", 1))
    connection, _ = connected(owner)
    connection.data_received(UPGRADE)

    def fail(*_: Any) -> None:
        raise PhaseError("ADMITTED in READY")

    monkeypatch.setattr(Session, "received", fail)
    connection.data_received(text(b"{}"))
    assert owner.failures.bugs == 1
    assert connection.phase is Phase.CLOSING
    assert connection._ws.close_sent is not None
    assert connection._ws.close_sent.code == 1011
