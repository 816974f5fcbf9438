"""Who is here, grouped by filter. `publish` is a plain def: nothing awaits while members are iterated.

The kernel's send is nine tenths of what a delivery costs (docs/performance.md), so all that is ours stays out of the
loop over members: a frame is encoded once, a filter is evaluated once per group, and a member whose socket has
nothing unsent is written to directly.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from whaled.gateway import wire
from whaled.gateway.interest import Interest, Later
from whaled.model import Event, Kind, Position, UpstreamState
from whaled.whales.filters import EVERYTHING, Filter, Subject

# One publication evaluates about so many filters, for each event anew, at 0.5 us each. So many events are published
# together in any case: to evaluate a filter for them takes as long as one send, and to send them one by one is longer.
EVALUATIONS_AT_ONCE = 20_000
EVENTS_TOGETHER = 32


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

    def delivered(self, alerts: int, updates: int, size_bytes: int) -> None:
        """Event frames handed to the kernel or queued, for all members together."""
        ...

    def sent(self, kind: wire.Sent, frames: int, size_bytes: int) -> None:
        """Other frames, for all who got them together."""
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


class Slice(NamedTuple):
    """Frames joined for one write: how many of each kind, and the newest offset in it."""

    data: bytes
    alerts: int
    updates: int
    newest: int


class Delivered(NamedTuple):
    """What a publication came to, for all members together."""

    alerts: int
    updates: int
    size_bytes: int


class Hub:
    """Delivers events to live members. `head` is the newest offset published; the log may be ahead of it."""

    def __init__(self, *, epoch: str, head: int, meter: HubMeter, slice_bytes: int, later: Later | None = None) -> None:
        """`later` runs what need not be done within a publication."""
        self.epoch = epoch
        self.head = head
        self.slice_bytes = slice_bytes
        self.alerts_published = 0
        self._meter = meter
        self._groups: dict[Filter, Group] = {}
        self._group_of: dict[Member, Group] = {}
        self._interest = Interest[Group](later)
        self._rehearsal = Group(EVERYTHING, head)

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

    @property
    def names_indexed(self) -> int:
        """Names by which groups are found."""
        return len(self._interest)

    @property
    def at_once(self) -> int:
        """How many events `publish` should be given at once: with many filters fewer, so that the loop is let go."""
        return max(EVENTS_TOGETHER, EVALUATIONS_AT_ONCE // max(1, len(self._groups)))

    def join(self, member: Member, chosen: Filter) -> None:
        """Make a member live. It must have everything up to `head`."""
        self.leave(member)
        group = self._groups.get(chosen)
        if group is None:
            group = self._groups[chosen] = Group(chosen, self.head)
            self._interest.add(group)
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
            self._interest.discard(group)

    def publish(self, events: Sequence[Event]) -> None:
        """Deliver events that are committed, in order. Several for one client go out in one write, up to the bytes a
        client may have unsent.
        """
        if not events:
            return
        cursor, self.head = self.head, events[-1].offset
        alerts = sum(event.kind is Kind.ALERT for event in events)
        self.alerts_published += alerts
        self._meter.published(len(events), alerts)
        self._meter.delivered(*self._deliver(*self._concerned(events), cursor))

    def rehearse(self, event: Event) -> None:
        """Deliver the event of a canary, which is in no log, to nobody but the rehearsal's members, after every filter
        was evaluated as for a whale.
        """
        groups, judged = self._concerned([event])
        for group in groups:
            group.filter.passes(judged[0][1])
        self._deliver([self._rehearsal], judged, self.head)

    def _concerned(self, events: Sequence[Event]) -> tuple[list[Group], list[tuple[Event, Subject]]]:
        """The groups that may want one of these events, and the events as filters look at them."""
        judged = [(event, Subject(event)) for event in events]
        return self._interest.groups([subject for _, subject in judged]), judged

    def rehearse_to(self, member: Member) -> None:
        """Let this member hear canaries. It is no client: it is in no count and hears nothing else."""
        self._rehearsal.members[member] = None

    def rehearse_no_more(self, member: Member) -> None:
        """Let this member hear no canaries. It need not have heard any."""
        self._rehearsal.members.pop(member, None)

    def _deliver(self, groups: Sequence[Group], judged: Sequence[tuple[Event, Subject]], cursor: int) -> "Delivered":
        """Write every event to the members whose filter it passes. They have everything up to `cursor`."""
        frames: dict[int, bytes] = {}
        alerts = updates = size_bytes = 0
        for group in groups:
            matching: list[tuple[Event, bytes]] = []
            for event, subject in judged:
                if not group.filter.passes(subject):
                    continue
                frame = frames.get(event.offset)
                if frame is None:
                    frame = frames[event.offset] = wire.event_frame(event, self.epoch)
                matching.append((event, frame))
            has = cursor
            for joined in slices(matching, self.slice_bytes):
                behind: list[Member] = []
                members = len(group.members) - self._write(group.members, joined.data, behind)
                alerts += members * joined.alerts
                updates += members * joined.updates
                size_bytes += members * len(joined.data)
                self._let_fall_behind(behind, has)
                has = group.told = joined.newest
        return Delivered(alerts, updates, size_bytes)

    def tell_positions(self) -> None:
        """Send `position` to live members that have not heard of the head, so that their resume point advances."""
        behind_head = [group for group in self._groups.values() if group.told < self.head]
        self._tell(behind_head, wire.Sent.POSITION, wire.position_frame(self.position))
        for group in behind_head:
            group.told = self.head

    def tell_upstream(self, state: UpstreamState, since: float) -> None:
        """Send `status` to live members. Those who are behind hear the next one."""
        self._tell(self._groups.values(), wire.Sent.STATUS, wire.status_frame(state, since))

    def _tell(self, groups: Iterable[Group], kind: wire.Sent, frame: bytes) -> None:
        behind: list[Member] = []
        told = 0
        for group in groups:
            told += len(group.members) - self._write(group.members, frame, behind)
        self._let_fall_behind(behind, self.head)
        self._meter.sent(kind, told, told * len(frame))

    def delivered(self, alerts: int, updates: int, size_bytes: int) -> None:
        """Count what somebody else wrote to one member (a replay)."""
        self._meter.delivered(alerts, updates, size_bytes)

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


def slices(frames: Iterable[tuple[Event, bytes]], limit: int) -> Iterator[Slice]:
    """Frames, each with its event, joined up to `limit` bytes."""
    joined: list[bytes] = []
    size = alerts = newest = 0
    for event, frame in frames:
        if joined and size + len(frame) > limit:
            yield Slice(b"".join(joined), alerts, len(joined) - alerts, newest)
            joined, size, alerts = [], 0, 0
        joined.append(frame)
        size += len(frame)
        alerts += event.kind is Kind.ALERT
        newest = event.offset
    if joined:
        yield Slice(b"".join(joined), alerts, len(joined) - alerts, newest)
