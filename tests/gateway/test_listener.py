"""For how long more connections have arrived than can be accepted, how many wait, and which have left again."""

import socket
from contextlib import ExitStack

import pytest

from whaled.gateway.listener import (
    BEHIND_AGAIN_S,
    BEHIND_S,
    DEEP_PART,
    FLOOD_RATE,
    FORGOTTEN_S,
    REMEMBERED_S,
    Backlog,
    has_left,
    waiting_part,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def flood(backlog: Backlog, clock: Clock, seconds: float, rate: float = 2 * FLOOD_RATE) -> None:
    backlog.filled()
    for _ in range(int(seconds * rate)):
        backlog.accepted()
    clock.now += seconds


def test_a_queue_that_is_empty_or_was_lately_is_not_behind(clock: Clock) -> None:
    backlog = Backlog(clock)
    assert backlog.behind_s == 0
    flood(backlog, clock, BEHIND_S)
    assert backlog.behind_s == 0


def test_few_connections_that_wait_for_long_are_no_flood(clock: Clock) -> None:
    backlog = Backlog(clock)
    flood(backlog, clock, 5.0, rate=FLOOD_RATE)
    assert backlog.behind_s == 0


def test_a_flood_that_comes_again_soon_is_met_as_the_last_one_was_left(clock: Clock) -> None:
    backlog = Backlog(clock)
    flood(backlog, clock, 1.0)
    assert backlog.behind_s == pytest.approx(1.0)
    for _ in range(3):
        backlog.emptied()
        assert backlog.behind_s == 0
        flood(backlog, clock, 2 * BEHIND_AGAIN_S)
        assert backlog.behind_s > 1.0


def test_the_memory_of_a_flood_is_bounded_and_expires(clock: Clock) -> None:
    backlog = Backlog(clock)
    flood(backlog, clock, 60.0)
    backlog.emptied()
    flood(backlog, clock, 0.5)
    assert backlog.behind_s == pytest.approx(REMEMBERED_S + 0.5)
    backlog.emptied()
    clock.now += 1.0
    flood(backlog, clock, 0.5)
    assert backlog.behind_s == pytest.approx(REMEMBERED_S - FORGOTTEN_S + 0.5)
    backlog.emptied()
    clock.now += REMEMBERED_S / FORGOTTEN_S
    flood(backlog, clock, 0.5)
    assert backlog.behind_s == pytest.approx(0.5)


def test_a_deep_queue_is_behind_at_once_and_until_it_is_empty(clock: Clock) -> None:
    backlog = Backlog(clock)
    flood(backlog, clock, BEHIND_S / 2)
    backlog.measured(DEEP_PART * 0.99)
    assert (backlog.is_deep, backlog.behind_s) == (False, 0.0)
    backlog.measured(DEEP_PART)
    assert backlog.is_deep
    assert backlog.behind_s == pytest.approx(BEHIND_S / 2)
    backlog.emptied()
    assert (backlog.is_deep, backlog.behind_s) == (False, 0.0)
    backlog.filled()
    assert not backlog.is_deep


def test_the_kernel_reports_how_full_the_accept_queue_is() -> None:
    with ExitStack() as open_sockets:
        listening = open_sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=8))
        assert waiting_part(listening) == 0
        for _ in range(4):
            open_sockets.enter_context(socket.create_connection(listening.getsockname()))
        assert waiting_part(listening) == pytest.approx(4 / 8)
        listening.accept()[0].close()
        assert waiting_part(listening) == pytest.approx(3 / 8)


def test_a_peer_that_closed_or_reset_its_connection_has_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        stays, closes, resets = (socket.create_connection(listening.getsockname()) for _ in range(3))
        with stays, closes, resets:
            accepted = [listening.accept()[0] for _ in range(3)]
            assert [has_left(sock) for sock in accepted] == [False, False, False]
            closes.sendall(b"GET / HTTP/1.1\r\n")
            closes.close()
            resets.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            resets.close()
            assert [has_left(sock) for sock in accepted] == [False, True, True]
            for sock in accepted:
                sock.close()


def test_a_unix_socket_has_no_queue_to_report() -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        assert waiting_part(listening) == 0
        assert not has_left(listening)
