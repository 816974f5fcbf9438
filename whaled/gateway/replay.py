"""Delivery from the event log to a client that resumes or fell behind, until it has caught up and goes live."""

import asyncio
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from whaled.gateway import messages
from whaled.gateway.framing import text_frame
from whaled.gateway.hub import Hub, Member
from whaled.gateway.pages import LostError, Page, Pages
from whaled.gateway.share import Lane, LoopShare
from whaled.model import Event, Kind
from whaled.whales.filters import Filter

# The size of one write where it is not known how much the kernel takes (TLS). This much may remain unsent.
UNKNOWN_ROOM_BYTES = 16 * 1024
# One job evaluates about this many addresses of events, at about 0.1 us each for a filter with exchanges.
ADDRESSES_AT_ONCE = 5_000
# Compressing an event takes 25 us, so this many take a millisecond, the limit of a job.
COMPRESSED_AT_ONCE = 40


class Receiver(Member, Protocol):
    """A connection in replay."""

    @property
    def unsent(self) -> int:
        """The number of bytes that the kernel has not taken yet."""
        ...

    def write(self, frame: bytes) -> None:
        """Send complete frames."""
        ...

    async def drained(self) -> None:
        """Wait until nothing is unsent."""
        ...


class Payer(Protocol):
    """The client that is charged for a replay."""

    @property
    def source(self) -> str:
        """The name that work is attributed to: the client id, or the address without authentication."""
        ...

    def charge_replay(self, events: int) -> None:
        """Charge the client for events that were read from the event log for it."""
        ...


class TooSlowError(Exception):
    """The client did not receive a page in time."""


class _Part(NamedTuple):
    """The result of sending a part of a page.

    `cursor` is the offset up to which events were processed, `delivered` the newest offset sent (0: none), `frames`
    the number of frames sent. `is_slow` is True if the kernel did not take all frames; `is_cut` is True if the job
    stopped early to release the event loop.
    """

    cursor: int
    delivered: int
    frames: int
    is_slow: bool = False
    is_cut: bool = False


class Replay:
    """The replays of all clients. Concurrent calls of `run` share the replay lane and the cached pages."""

    def __init__(self, *, pages: Pages, hub: Hub, share: LoopShare, slow_timeout_s: float) -> None:
        self._pages = pages
        self._hub = hub
        self._share = share
        self.slow_timeout_s = slow_timeout_s

    async def run(
        self,
        receiver: Receiver,
        payer: Payer,
        chosen: Filter,
        cursor: int,
        progressed: Callable[[int], None] = lambda _cursor: None,
    ) -> int:
        """Send the events after `cursor` that pass `chosen`, then join the hub. Return the number of frames sent.

        No event is missed or sent twice, since there is no await between the last comparison with the head and joining
        the hub. While a client is slow, only the rest of one frame is kept for it; the page is read again afterwards.
        `progressed` is called with the cursor after each part. Raises LostError, TooSlowError.
        """
        sent = 0
        delivered = cursor
        # Compressing an event for one client takes longer than sending it, so it is done only for a slow connection.
        is_slow = receiver.unsent > 0
        await self._drain(receiver)
        with self._pages.replaying():
            while cursor < self._hub.head:
                part = await self._send_page(receiver, payer, chosen, cursor, compresses=is_slow)
                is_slow = is_slow or part.is_slow
                payer.charge_replay(part.cursor - cursor)
                cursor = part.cursor
                progressed(cursor)
                delivered = part.delivered or delivered
                sent += part.frames
                self._pages.used(cursor)
                await self._drain(receiver)
        if delivered < self._hub.head:
            # The last events did not match. Without this position the next resume would read them again.
            receiver.write(text_frame(messages.position(self._hub.position)))
        self._hub.join(receiver, chosen)
        return sent

    async def _send_page(
        self, receiver: Receiver, payer: Payer, chosen: Filter, cursor: int, *, compresses: bool
    ) -> _Part:
        """Send the matching events of the page after `cursor`.

        This is a separate function so that no local variable holds the page once it returns.
        """
        page = self._pages.kept(cursor) or await self._pages.read(cursor, payer.source)
        whole = _Part(cursor, 0, 0, is_cut=True)
        compresses = compresses and receiver.takes_deflate
        while whole.is_cut:
            send = partial(self._send, receiver, chosen, page, whole.cursor, compresses=compresses)
            part = await self._share.run(Lane.REPLAY, send, payer.source)
            whole = part._replace(delivered=part.delivered or whole.delivered, frames=whole.frames + part.frames)
        return whole

    def _send(self, receiver: Receiver, chosen: Filter, page: Page, cursor: int, *, compresses: bool) -> _Part:
        """Write the matching events of a page after `cursor`, as far as the kernel takes them. Raises LostError."""
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
    """Return the index after the last event of the run of consecutive offsets that starts at `first`."""
    end = len(events)
    if first < end and events[-1].offset - events[first].offset != end - 1 - first:
        start = events[first].offset
        end = next(index for index in range(first, end) if events[index].offset - start != index - first)
    return end


def _end_of_job(events: Sequence[Event], first: int, end: int) -> int:
    """Return the index after the last event that one job evaluates, at least one if there is any."""
    addresses = 0
    for index in range(first, end):
        addresses += len(events[index].whale.addresses)
        if addresses > ADDRESSES_AT_ONCE:
            return max(index, first + 1)
    return end


def _write(receiver: Receiver, frames: Sequence[bytes]) -> int:
    """Write as many frames as the kernel takes, queueing the rest of the last one. Return their number, at least 1."""
    if receiver.fd < 0:
        return _write_blind(receiver, frames)
    data = b"".join(frames)
    try:
        written = os.write(receiver.fd, data)
    except OSError:
        written = 0  # no room, or broken, which the next write reports
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
