"""Who is here, grouped by filter. `publish` is a plain def: nothing awaits while members are iterated.

The kernel's send is nine tenths of what a delivery costs (docs/performance.md), so all that is ours stays out of the
loop over members: a frame is encoded once, a filter is evaluated once per group, and a member whose socket has
nothing unsent is written to directly.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from whaled.gateway import wire
from whaled.model import Event, Kind, Position, UpstreamState
from whaled.whales.filters import Filter


class Member(Protocol):
    """A connection as the hub sees it.

    `fd` is the socket's descriptor while a frame may be written to it directly, else -1: TLS, bytes unsent, closing.
    """

    fd: int

    def write_behind(self, data: bytes) -> bool:
        """Queue data behind what is unsent. False if that is more than a client may have unsent: nothing was queued."""
        ...

    def write_rest(self, rest: bytes) -> None:
        """Queue the rest of a frame whose beginning is in the socket already."""
        ...

    def fell_behind(self, cursor: int) -> None:
        """This member is out of its group and has everything up to `cursor`; it goes on from the log."""
        ...


class HubMeter(Protocol):
    """What the hub counts."""

    def delivered(self, frames: int, size_bytes: int) -> None:
        """Frames handed to the kernel or queued, for all members together."""
        ...

    def published(self, events: int, alerts: int) -> None:
        """Events published."""
        ...

    def lagging(self, members: int) -> None:
        """Members that were switched to replay."""
        ...


class Group:
    """The live members of one filter. `told` is the newest offset all of them know of."""

    __slots__ = ("filter", "members", "told")

    def __init__(self, chosen: Filter, told: int) -> None:
        self.filter = chosen
        self.members: dict[Member, None] = {}  # an ordered set
        self.told = told


class Hub:
    """Delivers events to live members. `head` is the newest offset published; the log may be ahead of it."""

    def __init__(self, *, epoch: str, head: int, meter: HubMeter, slice_bytes: int) -> None:
        self.epoch = epoch
        self.head = head
        self.slice_bytes = slice_bytes
        self.alerts_published = 0
        self._meter = meter
        self._groups: dict[Filter, Group] = {}
        self._group_of: dict[Member, Group] = {}

    @property
    def position(self) -> Position:
        """The newest event published."""
        return Position(self.epoch, self.head)

    @property
    def live_members(self) -> int:
        """Members that get events as they are published."""
        return len(self._group_of)

    @property
    def filter_groups(self) -> int:
        """Distinct filters in use."""
        return len(self._groups)

    def join(self, member: Member, chosen: Filter) -> None:
        """Make a member live. It must have everything up to `head`."""
        self.leave(member)
        group = self._groups.get(chosen)
        if group is None:
            group = self._groups[chosen] = Group(chosen, self.head)
        group.members[member] = None
        self._group_of[member] = group

    def leave(self, member: Member) -> None:
        """Deliver nothing more to a member. It need not be live."""
        group = self._group_of.pop(member, None)
        if group is None:
            return
        del group.members[member]
        if not group.members:
            del self._groups[group.filter]

    def publish(self, events: Sequence[Event]) -> None:
        """Deliver events that are committed, in order. Several for one client go out in one write, up to the bytes a
        client may have unsent.
        """
        if not events:
            return
        cursor, self.head = self.head, events[-1].offset
        frames: dict[int, bytes] = {}
        sent_frames = sent_bytes = 0
        for group in list(self._groups.values()):
            matching = []
            for event in events:
                if not group.filter.matches(event):
                    continue
                frame = frames.get(event.offset)
                if frame is None:
                    frame = frames[event.offset] = wire.event_frame(event, self.epoch)
                matching.append((event.offset, frame))
            has = cursor
            for data, count, newest in slices(matching, self.slice_bytes):
                behind: list[Member] = []
                members = len(group.members) - self._write(group.members, data, behind)
                sent_frames += members * count
                sent_bytes += members * len(data)
                self._let_fall_behind(behind, has)
                has = group.told = newest
        alerts = sum(event.kind is Kind.ALERT for event in events)
        self.alerts_published += alerts
        self._meter.published(len(events), alerts)
        self._meter.delivered(sent_frames, sent_bytes)

    def tell_positions(self) -> None:
        """Send `position` to live members that have not heard of the head, so that their resume point advances."""
        frame = wire.position_frame(self.position)
        behind: list[Member] = []
        for group in self._groups.values():
            if group.told < self.head:
                self._write(group.members, frame, behind)
                group.told = self.head
        self._let_fall_behind(behind, self.head)

    def tell_upstream(self, state: UpstreamState, since: float) -> None:
        """Send `status` to live members. Those who are behind hear the next one."""
        frame = wire.status_frame(state, since)
        behind: list[Member] = []
        for group in self._groups.values():
            self._write(group.members, frame, behind)
        self._let_fall_behind(behind, self.head)

    def _let_fall_behind(self, members: list[Member], cursor: int) -> None:
        for member in members:
            self.leave(member)
            member.fell_behind(cursor)
        if members:
            self._meter.lagging(len(members))

    @staticmethod
    def _write(members: Iterable[Member], data: bytes, behind: list[Member]) -> int:
        """Write to every member; those over their bound are added to `behind`. Returns how many that were."""
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
                    # The connection is broken: its transport finds out when it writes or reads, and says so.
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


def slices(frames: Iterable[tuple[int, bytes]], limit: int) -> Iterator[tuple[bytes, int, int]]:
    """Frames, each with its event's offset, joined up to `limit` bytes: the bytes, how many frames, the last offset."""
    joined: list[bytes] = []
    size = newest = 0
    for offset, frame in frames:
        if joined and size + len(frame) > limit:
            yield b"".join(joined), len(joined), newest
            joined, size = [], 0
        joined.append(frame)
        size += len(frame)
        newest = offset
    if joined:
        yield b"".join(joined), len(joined), newest
