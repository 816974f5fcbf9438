"""Delivery from the log, for a client that resumes or fell behind, until it has caught up and goes live."""

import asyncio
import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

from whaled.gateway import wire
from whaled.gateway.hub import Hub, Member
from whaled.gateway.pages import LostError, Page, Pages
from whaled.gateway.share import Lane, LoopShare
from whaled.model import Event, Kind
from whaled.whales.filters import Filter

# What is written at once where it is not known how much the kernel takes (TLS): this much may stay unsent.
UNKNOWN_ROOM_BYTES = 16 * 1024
# One job walks so many addresses of events, at some 0.1 us each for a filter that wants exchanges.
ADDRESSES_AT_ONCE = 5_000
# Compressing an event takes 25 us: so many make a millisecond, which is what a job may take.
COMPRESSED_AT_ONCE = 40


class Receiver(Member, Protocol):
    """A connection that is being replayed to."""

    @property
    def unsent(self) -> int:
        """Bytes the kernel has not taken yet."""
        ...

    def write(self, frame: bytes) -> None:
        """Send complete frames."""
        ...

    async def drained(self) -> None:
        """Wait until nothing is unsent."""
        ...


class Payer(Protocol):
    """Whose work a replay is."""

    @property
    def source(self) -> str:
        """The client, or its address where it is not known."""
        ...

    def charge_replay(self, events: int) -> None:
        """The log was read for this client."""
        ...


class TooSlowError(Exception):
    """The client did not take a page in time."""


class _Part(NamedTuple):
    """What came of a page: how far the log has been read, the newest offset sent (0: none), how many frames, and
    whether the client took less than it could have (`is_slow`), or the job ended for the loop's sake (`is_cut`).
    """

    cursor: int
    delivered: int
    frames: int
    is_slow: bool = False
    is_cut: bool = False


class Replay:
    """Brings clients up to date. Calls of `run` share a lane of the loop's time, and the pages they read."""

    def __init__(self, *, pages: Pages, hub: Hub, share: LoopShare, slow_timeout_s: float) -> None:
        self._pages = pages
        self._hub = hub
        self._share = share
        self.slow_timeout_s = slow_timeout_s

    async def run(self, receiver: Receiver, payer: Payer, chosen: Filter, cursor: int) -> int:
        """Send what passes `chosen` after `cursor`, then join the hub. Returns how many frames were sent.

        No gap and no double: the last look at the head and joining the hub happen without an await between them.

        While a client takes its time nothing is held for it but the rest of a frame: what follows is read again.
        Raises LostError, TooSlowError.
        """
        sent = 0
        delivered = cursor
        # Compressing an event for one client takes longer than sending it: it is done where the link is what is slow.
        is_slow = receiver.unsent > 0
        await self._drain(receiver)
        with self._pages.replaying():
            while cursor < self._hub.head:
                part = await self._pass_on(receiver, payer, chosen, cursor, compresses=is_slow)
                is_slow = is_slow or part.is_slow
                payer.charge_replay(part.cursor - cursor)
                cursor = part.cursor
                delivered = part.delivered or delivered
                sent += part.frames
                self._pages.used(cursor)
                await self._drain(receiver)
        if delivered < self._hub.head:
            # Nothing matched at the end: without this the next resume would read the same events again.
            receiver.write(wire.position_frame(self._hub.position))
        self._hub.join(receiver, chosen)
        return sent

    async def _pass_on(
        self, receiver: Receiver, payer: Payer, chosen: Filter, cursor: int, *, compresses: bool
    ) -> _Part:
        """Send what passes of the page behind `cursor`. A function of its own: when it returns, it holds no page."""
        page = self._pages.kept(cursor) or await self._pages.read(cursor, payer.source)
        whole = _Part(cursor, 0, 0, is_cut=True)
        compresses = compresses and receiver.takes_deflate
        while whole.is_cut:
            send = partial(self._send, receiver, chosen, page, whole.cursor, compresses=compresses)
            part = await self._share.run(Lane.REPLAY, send, payer.source)
            whole = part._replace(delivered=part.delivered or whole.delivered, frames=whole.frames + part.frames)
        return whole

    def _send(self, receiver: Receiver, chosen: Filter, page: Page, cursor: int, *, compresses: bool) -> _Part:
        """Write what passes of a page after `cursor`, as far as the kernel takes it."""
        events = page.events
        first = bisect_right(events, cursor, key=_offset)
        end = _end_of_row(events, first)
        if first == end or events[first].offset != cursor + 1:
            raise LostError
        end_of_row, end = end, _end_of_job(events, first, end)
        is_cut = end < end_of_row
        cursor = events[end - 1].offset
        matches = chosen.matches
        indices = [index for index in range(first, end) if matches(events[index])]
        if not indices:
            return _Part(cursor, 0, 0, is_cut=is_cut)
        epoch, deflater = self._hub.epoch, self._hub.deflater
        if compresses and len(indices) > COMPRESSED_AT_ONCE:
            indices = indices[:COMPRESSED_AT_ONCE]
            cursor = events[indices[-1]].offset
            is_cut = True
        matched = [chosen.matched_addresses(events[index]) for index in indices]
        plain = [page.frame(index, epoch, addresses) for index, addresses in zip(indices, matched, strict=True)]
        frames = plain if not compresses else [
            page.compressed(index, frame, deflater, is_shared=not addresses)
            for index, frame, addresses in zip(indices, plain, matched, strict=True)
        ]  # fmt: skip
        taken = _write(receiver, frames)
        delivered = events[indices[taken - 1]].offset
        if taken < len(frames):
            cursor, is_cut = delivered, False
        alerts = sum(events[index].kind is Kind.ALERT for index in indices[:taken])
        size_bytes = sum(map(len, frames[:taken]))
        saved_bytes = None
        if compresses:
            saved_bytes = sum(map(len, plain[:taken])) - size_bytes
        self._hub.delivered(alerts, taken - alerts, size_bytes, saved_bytes)
        return _Part(cursor, delivered, taken, is_slow=taken < len(frames), is_cut=is_cut and not receiver.unsent)

    async def _drain(self, receiver: Receiver) -> None:
        try:
            async with asyncio.timeout(self.slow_timeout_s):
                await receiver.drained()
        except TimeoutError:
            raise TooSlowError from None


def _offset(event: Event) -> int:
    return event.offset


def _end_of_row(events: Sequence[Event], first: int) -> int:
    """The index behind the last event from `first` on before which none is missing."""
    end = len(events)
    if first < end and events[-1].offset - events[first].offset != end - 1 - first:
        start = events[first].offset
        end = next(index for index in range(first, end) if events[index].offset - start != index - first)
    return end


def _end_of_job(events: Sequence[Event], first: int, end: int) -> int:
    """The index behind the last event that one job looks at; at least one of any."""
    addresses = 0
    for index in range(first, end):
        addresses += len(events[index].whale.addresses)
        if addresses > ADDRESSES_AT_ONCE:
            return max(index, first + 1)
    return end


def _write(receiver: Receiver, frames: Sequence[bytes]) -> int:
    """Write as many frames as the kernel takes, the last one to its end. Returns how many; at least one of any."""
    if receiver.fd < 0:
        return _write_blind(receiver, frames)
    data = b"".join(frames)
    try:
        written = os.write(receiver.fd, data)
    except OSError:
        written = 0  # no room, or broken: what is queued next finds out
    if written == len(data):
        return len(frames)
    for count, frame in enumerate(frames, start=1):
        if written < len(frame):
            receiver.write_rest(frame[written:])
            return count
        written -= len(frame)
    return len(frames)


def _write_blind(receiver: Receiver, frames: Sequence[bytes]) -> int:
    begin = size = 0
    for count, frame in enumerate(frames, start=1):
        size += len(frame)
        if size >= UNKNOWN_ROOM_BYTES or count == len(frames):
            receiver.write(b"".join(frames[begin:count]))
            begin, size = count, 0
            if receiver.unsent:
                return count
    return len(frames)
