"""The outbox of a connection, over a socket in memory."""

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from whaled.config.sections import GatewaySettings
from whaled.errors import Close
from whaled.gateway.outbox import Outbox, Settled

LIMIT = 100


class Kernel:
    """A socket in memory. The kernel takes `room` bytes."""

    fd = 5

    def __init__(self, *, room: int = 0, is_plain: bool = True) -> None:
        self.room = room
        self.is_plain = is_plain
        self.queued = bytearray()
        self.sent = bytearray()

    @property
    def unsent(self) -> int:
        return len(self.queued)

    def write(self, data: bytes) -> None:
        taken = 0 if self.queued else min(self.room, len(data))
        self.room -= taken
        self.sent += data[:taken]
        self.queued += data[taken:]


class Owner:
    """The connection."""

    def __init__(self) -> None:
        self.closes: list[Close] = []
        self.cursors: list[int] = []

    def close(self, close: Close) -> None:
        self.closes.append(close)

    def fell_behind(self, cursor: int) -> None:
        self.cursors.append(cursor)


def opened(kernel: Kernel) -> tuple[Outbox, Owner]:
    owner = Owner()
    outbox = Outbox(owner, cast("Settled", SimpleNamespace(settings=GatewaySettings(max_unsent=LIMIT))))
    outbox.open(kernel, takes_deflate=False)
    return outbox, owner


@pytest.mark.parametrize(("is_plain", "fd"), [(True, 5), (False, -1)])
def test_frames_go_to_the_descriptor_without_tls_only(is_plain: bool, fd: int) -> None:
    assert opened(Kernel(is_plain=is_plain))[0].fd == fd


def test_the_descriptor_is_given_while_nothing_is_unsent() -> None:
    kernel = Kernel()
    outbox, _ = opened(kernel)
    kernel.write(b"x")
    outbox.filled()
    assert outbox.fd == -1
    kernel.queued.clear()
    outbox.emptied()
    assert outbox.fd == 5
    outbox.shut()
    outbox.emptied()
    assert outbox.fd == -1


def test_deliveries_stay_within_the_limit_but_one_of_any_size_goes_to_an_empty_queue() -> None:
    kernel = Kernel()
    outbox, owner = opened(kernel)
    assert outbox.write_behind(b"x" * 3 * LIMIT)
    assert not outbox.write_behind(b"y")
    kernel.queued.clear()
    assert outbox.write_behind(b"x" * (LIMIT - 1))
    assert outbox.write_behind(b"y")
    assert not outbox.write_behind(b"z")
    assert (bytes(kernel.queued), owner.closes) == (b"x" * (LIMIT - 1) + b"y", [])


def test_a_client_that_does_not_read_its_answers_is_closed_at_twice_the_limit() -> None:
    outbox, owner = opened(Kernel())
    outbox.write(b"x" * 2 * LIMIT)
    assert owner.closes == []
    outbox.write(b"x")
    assert owner.closes == [Close.TOO_SLOW]


def test_a_shut_outbox_ignores_frames_and_asks_for_no_replay() -> None:
    kernel = Kernel()
    outbox, owner = opened(kernel)
    outbox.write(b"x")
    outbox.shut()
    outbox.write(b"y" * 3 * LIMIT)
    assert outbox.write_behind(b"y" * 3 * LIMIT)
    assert (bytes(kernel.queued), owner.closes) == (b"x", [])


def test_the_rest_of_a_frame_is_queued_whatever_its_size() -> None:
    kernel = Kernel()
    outbox, owner = opened(kernel)
    outbox.write_rest(b"x" * 5 * LIMIT)
    assert (outbox.unsent, owner.closes) == (5 * LIMIT, [])


@pytest.mark.parametrize("way", ["emptied", "lost"])
async def test_waiting_ends_when_the_queue_is_empty_or_the_socket_is_lost(way: str) -> None:
    kernel = Kernel()
    outbox, _ = opened(kernel)
    await outbox.drained()
    outbox.write(b"x")
    waiting = asyncio.create_task(outbox.drained())
    await asyncio.sleep(0)
    assert not waiting.done()
    if way == "emptied":
        kernel.queued.clear()
        outbox.emptied()
    else:
        outbox.lost()
    await waiting


def test_a_client_that_fell_behind_continues_from_the_log() -> None:
    outbox, owner = opened(Kernel())
    outbox.fell_behind(7)
    outbox.lost()
    outbox.fell_behind(8)  # after the end of the socket nobody continues
    assert owner.cursors == [7]
