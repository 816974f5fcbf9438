"""Delivers events to the live connections, grouped by filter. `publish` never awaits while it iterates over members.

The kernel's send is nine tenths of the cost of a delivery (docs/performance.md), so the loop over members does little
else: each frame is encoded once, each filter is evaluated once per group, and a member whose socket has nothing unsent
is written to directly.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from whaled.gateway import messages
from whaled.gateway.deflate import Deflater
from whaled.gateway.framing import text_frame
from whaled.gateway.interest import Interest, Later, at_once
from whaled.gateway.meters import GatewayMeter
from whaled.model import Event, Kind, Position, UpstreamState
from whaled.whales.filters import Filter, Subject

# One publication evaluates about this many filters, counted once per event, at 0.5 us each. It always takes at least
# EVENTS_TOGETHER events: evaluating a filter for that many takes as long as one send, and one send per event is slower.
EVALUATIONS_AT_ONCE = 20_000
EVENTS_TOGETHER = 32
# At most this many frames with matched addresses are kept during a publication, for other groups that need the same.
# An event's frame without matched addresses is always kept.
SHARED_FRAMES = 1000

# A frame that names the addresses of one filter is compressed only for a group of at least this many members. For
# fewer, compressing takes longer than sending the plain frame, and there may be thousands of such filters.
WORTH_COMPRESSING = 5
# One slice of positions goes to about this many members, at 7 us each.
POSITIONS_AT_ONCE = 64


class Member(Protocol):
    """A connection as the hub sees it.

    `fd` is the socket's descriptor while a frame may be written to it directly. It is -1 under TLS, while bytes are
    unsent, and once the connection is closing. `takes_deflate` is True if the client accepts compressed frames.
    """

    fd: int
    takes_deflate: bool

    def write_behind(self, data: bytes) -> bool:
        """Queue data behind the unsent bytes. Return False, queueing nothing, if it would exceed the client's limit."""
        ...

    def write_rest(self, rest: bytes) -> None:
        """Queue the rest of a frame whose first bytes the kernel has already taken."""
        ...

    def fell_behind(self, cursor: int) -> None:
        """Continue from the event log after `cursor`. The hub has removed the member from its group."""
        ...


class OffsetGapError(Exception):
    """Events were published out of order, a bug: the daemon ends, and its clients resume from the log."""


class Group:
    """The live members of one filter, split by compression. `announced` is the newest offset sent to all of them."""

    __slots__ = ("announced", "compressed", "filter", "plain")

    def __init__(self, chosen: Filter, announced: int) -> None:
        self.filter = chosen
        self.plain: dict[Member, None] = {}  # an ordered set
        self.compressed: dict[Member, None] = {}
        self.announced = announced

    def __len__(self) -> int:
        return len(self.plain) + len(self.compressed)

    def add(self, member: Member) -> None:
        """Add a member."""
        (self.compressed if member.takes_deflate else self.plain)[member] = None

    def discard(self, member: Member) -> None:
        """Remove a member, if it is in the group."""
        (self.compressed if member.takes_deflate else self.plain).pop(member, None)


class Slice(NamedTuple):
    """Frames joined for one write, with the number of alerts and updates among them and the newest offset.

    `plain_bytes` is the size of the same frames without compression, 0 in a slice for members without it.
    """

    data: bytes
    alerts: int
    updates: int
    newest: int
    plain_bytes: int


class Delivered:
    """The totals of a publication over all members."""

    __slots__ = ("alerts", "compressed_bytes", "saved_bytes", "size_bytes", "updates")

    def __init__(self) -> None:
        self.alerts = self.updates = self.size_bytes = 0
        self.compressed_bytes = self.saved_bytes = 0


class Hub:
    """Delivers events to live members. `head` is the newest offset published; the log may be ahead of it."""

    def __init__(self, *, epoch: str, head: int, meter: GatewayMeter, slice_bytes: int, later: Later = at_once) -> None:
        """Create a hub without members. `later` runs the work that can wait until after a publication."""
        self.epoch = epoch
        self.head = head
        self.slice_bytes = slice_bytes
        self.alerts_published = 0
        self.deflater = Deflater()
        self._meter = meter
        self._groups: dict[Filter, Group] = {}
        self._group_of: dict[Member, Group] = {}
        self._later = later
        self._interest = Interest[Group](later)
        meter.live.set_function(lambda: len(self._group_of))
        meter.filters.set_function(lambda: len(self._groups))

    @property
    def position(self) -> Position:
        """The position of the newest published event."""
        return Position(self.epoch, self.head)

    @property
    def live_members(self) -> int:
        """The number of members that receive events as they are published."""
        return len(self._group_of)

    @property
    def filter_groups(self) -> int:
        """The number of distinct filters in use."""
        return len(self._groups)

    @property
    def names_indexed(self) -> int:
        """The number of names in the index of groups."""
        return len(self._interest)

    @property
    def at_once(self) -> int:
        """The number of events to pass to `publish` at once.

        It falls with the number of filters, to bound the time that a publication holds the event loop.
        """
        return max(EVENTS_TOGETHER, EVALUATIONS_AT_ONCE // max(1, len(self._groups)))

    def join(self, member: Member, chosen: Filter) -> None:
        """Make a member live. It must have received everything up to `head`."""
        self.leave(member)
        group = self._groups.get(chosen)
        if group is None:
            group = self._groups[chosen] = Group(chosen, self.head)
            self._interest.add(group)
        group.add(member)
        self._group_of[member] = group

    def leave(self, member: Member) -> None:
        """Stop delivery to a member, if it is live."""
        group = self._group_of.pop(member, None)
        if group is None:
            return
        group.discard(member)
        if not group:
            del self._groups[group.filter]
            self._interest.discard(group)

    def publish(self, events: Sequence[Event]) -> None:
        """Deliver committed events in order. A client's events are joined into writes of at most `slice_bytes`.

        Raises OffsetGapError unless they follow `head` without a gap: clients would miss events and never learn of it.
        """
        if not events:
            return
        if events[0].offset != self.head + 1 or events[-1].offset != self.head + len(events):
            raise OffsetGapError(
                f"events {events[0].offset} to {events[-1].offset} ({len(events)} of them) cannot follow {self.head}"
            )
        cursor, self.head = self.head, events[-1].offset
        alerts = sum(event.kind is Kind.ALERT for event in events)
        self.alerts_published += alerts
        self._meter.published(len(events), alerts)
        done = self._deliver(*self._groups_for(events), cursor)
        self._meter.delivered(done.alerts, done.updates, done.size_bytes)
        if done.compressed_bytes:
            self._meter.compressed(done.compressed_bytes, done.saved_bytes)

    def rehearse(self, event: Event, rehearsal: Group) -> None:
        """Deliver a canary's event to the members of `rehearsal` only, after evaluating the filters as for a whale.

        The event is not in the event log. The members are no clients: they are not counted and receive nothing else.
        """
        groups, judged = self._groups_for([event])
        for group in groups:
            group.filter.passes(judged[0][1])
        self._deliver([rehearsal], judged, self.head)

    def _groups_for(self, events: Sequence[Event]) -> tuple[list[Group], list[tuple[Event, Subject]]]:
        """Return the groups that may match one of these events, and each event with its subject for filters."""
        judged = [(event, Subject(event)) for event in events]
        return self._interest.groups([subject for _, subject in judged]), judged

    def _deliver(self, groups: Sequence[Group], judged: Sequence[tuple[Event, Subject]], cursor: int) -> Delivered:
        """Write every event to the members whose filter it passes. They have received everything up to `cursor`."""
        frames: dict[tuple[int, tuple[str, ...]], bytes] = {}
        smaller: dict[bytes, bytes] = {}
        done = Delivered()
        for group in groups:
            matching: list[tuple[Event, bytes]] = []
            for event, subject in judged:
                if not group.filter.passes(subject):
                    continue
                matching.append((event, self._frame(event, group.filter.matched_in(subject), frames)))
            if not matching:
                continue
            if group.plain:
                self._send_slices(group.plain, slices(matching, self.slice_bytes), cursor, done)
            if group.compressed:
                for event, frame in matching:
                    is_shared = frame is frames.get((event.offset, ())) or len(group.compressed) >= WORTH_COMPRESSING
                    if is_shared and frame not in smaller:
                        smaller[frame] = self.deflater.frame(frame)
                self._send_slices(group.compressed, slices(matching, self.slice_bytes, smaller), cursor, done)
            group.announced = matching[-1][0].offset
        return done

    def _frame(self, event: Event, matched: tuple[str, ...], frames: dict[tuple[int, tuple[str, ...]], bytes]) -> bytes:
        """Return an event's frame for filters with these matched addresses. `frames` caches frames already encoded."""
        key = event.offset, matched
        frame = frames.get(key)
        if frame is None:
            frame = text_frame(messages.event(event, self.epoch, matched))
            if not matched or len(frames) < SHARED_FRAMES:
                frames[key] = frame
        return frame

    def _send_slices(self, members: dict[Member, None], joined: Iterable[Slice], cursor: int, done: Delivered) -> None:
        """Write slices to members that have received everything up to `cursor`, and add the totals to `done`."""
        for part in joined:
            behind: list[Member] = []
            count = len(members) - self._write(members, part.data, behind)
            size_bytes = count * len(part.data)
            done.alerts += count * part.alerts
            done.updates += count * part.updates
            done.size_bytes += size_bytes
            if part.plain_bytes:
                done.compressed_bytes += size_bytes
                done.saved_bytes += count * part.plain_bytes - size_bytes
            self._switch_to_replay(behind, cursor)
            cursor = part.newest

    def publish_positions(self) -> None:
        """Send `position` to the groups that were sent nothing at the head, so that their resume point advances.

        With thousands of filters this takes far longer than a publication may be delayed, so it is done in slices.
        """
        waiting = [group for group in self._groups.values() if group.announced < self.head]

        def send_some() -> bool:
            some: list[Group] = []
            members = 0
            while waiting and members < POSITIONS_AT_ONCE:
                group = waiting.pop()
                if group.announced < self.head:  # it may have been sent an event meanwhile
                    some.append(group)
                    members += len(group)
            self._broadcast(some, messages.Sent.POSITION, text_frame(messages.position(self.position)))
            for group in some:
                group.announced = self.head
            return bool(waiting)

        if waiting:
            self._later(send_some)

    def publish_upstream_state(self, state: UpstreamState, since: float) -> None:
        """Send `status` to live members. A client in replay gets the current state when it goes live."""
        self._broadcast(self._groups.values(), messages.Sent.STATUS, text_frame(messages.status(state, since)))

    def _broadcast(self, groups: Iterable[Group], kind: messages.Sent, frame: bytes) -> None:
        behind: list[Member] = []
        count = 0
        for group in groups:
            count += len(group) - self._write(group.plain, frame, behind) - self._write(group.compressed, frame, behind)
        self._switch_to_replay(behind, self.head)
        self._meter.sent(kind, count, count * len(frame))

    def delivered(self, alerts: int, updates: int, size_bytes: int, saved_bytes: int | None = None) -> None:
        """Count what a replay wrote to one member. `saved_bytes` is what compression saved; None for plain frames."""
        self._meter.delivered(alerts, updates, size_bytes)
        if saved_bytes is not None:
            self._meter.compressed(size_bytes, saved_bytes)

    def _switch_to_replay(self, members: list[Member], cursor: int) -> None:
        for member in members:
            self.leave(member)
            member.fell_behind(cursor)
        if members:
            self._meter.lagging(len(members))

    @staticmethod
    def _write(members: Iterable[Member], data: bytes, behind: list[Member]) -> int:
        """Write to every member. Add those over their limit of unsent bytes to `behind`; return how many were added."""
        write = os.write
        size = len(data)
        already = len(behind)
        for member in members:
            fd = member.fd
            if fd >= 0:
                try:
                    written = write(fd, data)
                except BlockingIOError:
                    written = 0
                except OSError:
                    # The connection is broken. Its transport notices at its next read or write, and reports it.
                    written = 0
                if written == size:
                    continue
                if written:
                    member.write_rest(data[written:])
                elif not member.write_behind(data):
                    behind.append(member)
            elif not member.write_behind(data):
                behind.append(member)
        return len(behind) - already


def slices(
    frames: Iterable[tuple[Event, bytes]], limit: int, smaller: Mapping[bytes, bytes] | None = None
) -> Iterator[Slice]:
    """Yield slices of at most `limit` bytes, or of one larger frame, from pairs of an event and its frame.

    `smaller` maps a frame to its compressed form.
    """
    joined: list[bytes] = []
    size = alerts = newest = plain_bytes = 0
    for event, plain in frames:
        frame = plain if smaller is None else smaller.get(plain, plain)
        if joined and size + len(frame) > limit:
            yield Slice(b"".join(joined), alerts, len(joined) - alerts, newest, plain_bytes)
            joined, size, alerts, plain_bytes = [], 0, 0, 0
        joined.append(frame)
        size += len(frame)
        alerts += event.kind is Kind.ALERT
        newest = event.offset
        if smaller is not None:
            plain_bytes += len(plain)
    if joined:
        yield Slice(b"".join(joined), alerts, len(joined) - alerts, newest, plain_bytes)
