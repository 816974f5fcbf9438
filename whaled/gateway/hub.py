"""Who is here, grouped by filter. `publish` is a plain def: nothing awaits while members are iterated.

The kernel's send is nine tenths of what a delivery costs (docs/performance.md), so all that is ours stays out of the
loop over members: a frame is encoded once, a filter is evaluated once per group, and a member whose socket has
nothing unsent is written to directly.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from whaled.gateway import wire
from whaled.gateway.deflate import Deflater
from whaled.gateway.interest import Interest, Later
from whaled.model import Event, Kind, Position, UpstreamState
from whaled.whales.filters import EVERYTHING, Filter, Subject

# One publication evaluates about so many filters, for each event anew, at 0.5 us each. So many events are published
# together in any case: to evaluate a filter for them takes as long as one send, and to send them one by one is longer.
EVALUATIONS_AT_ONCE = 20_000
EVENTS_TOGETHER = 32
# Frames that one publication keeps for groups that get the same: an event's, and those with the addresses that matched.
SHARED_FRAMES = 1000

# A frame of one filter alone, since it names addresses of it, is compressed for this many members: for fewer it takes
# longer than sending them the frame, and there may be thousands of such filters.
WORTH_COMPRESSING = 5


class Member(Protocol):
    """A connection as the hub sees it.

    `fd` is the socket's descriptor while a frame may be written to it directly, else -1: TLS, bytes unsent, closing.
    """

    fd: int
    # Whether it takes compressed frames.
    takes_deflate: bool

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

    def compressed(self, size_bytes: int, saved_bytes: int) -> None:
        """The part of these bytes that went to members that take compressed frames, and what that saved."""
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


class OffsetGapError(Exception):
    """Events were published out of order, a bug: the daemon ends, and its clients resume from the log."""


class Group:
    """The live members of one filter, by the frames they take. `announced` is the newest offset sent to all of them."""

    __slots__ = ("announced", "compressed", "filter", "plain")

    def __init__(self, chosen: Filter, announced: int) -> None:
        self.filter = chosen
        self.plain: dict[Member, None] = {}  # an ordered set
        self.compressed: dict[Member, None] = {}
        self.announced = announced

    def __len__(self) -> int:
        return len(self.plain) + len(self.compressed)

    def add(self, member: Member) -> None:
        """Let a member be one of them."""
        (self.compressed if member.takes_deflate else self.plain)[member] = None

    def discard(self, member: Member) -> None:
        """Let it be one no more. It need not have been one."""
        (self.compressed if member.takes_deflate else self.plain).pop(member, None)


class Slice(NamedTuple):
    """Frames joined for one write: how many of each kind, the newest offset in it; for frames that are compressed their
    size without.
    """

    data: bytes
    alerts: int
    updates: int
    newest: int
    plain_bytes: int


class Delivered:
    """What a publication came to, for all members together."""

    __slots__ = ("alerts", "compressed_bytes", "saved_bytes", "size_bytes", "updates")

    def __init__(self) -> None:
        self.alerts = self.updates = self.size_bytes = 0
        self.compressed_bytes = self.saved_bytes = 0


class Hub:
    """Delivers events to live members. `head` is the newest offset published; the log may be ahead of it."""

    def __init__(self, *, epoch: str, head: int, meter: HubMeter, slice_bytes: int, later: Later | None = None) -> None:
        """`later` runs what need not be done within a publication."""
        self.epoch = epoch
        self.head = head
        self.slice_bytes = slice_bytes
        self.alerts_published = 0
        self.deflater = Deflater()
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
        group.add(member)
        self._group_of[member] = group

    def leave(self, member: Member) -> None:
        """Deliver nothing more to a member. It need not be live."""
        group = self._group_of.pop(member, None)
        if group is None:
            return
        group.discard(member)
        if not group:
            del self._groups[group.filter]
            self._interest.discard(group)

    def publish(self, events: Sequence[Event]) -> None:
        """Deliver committed events in the order of their offsets. Several for one client go out in one write, up to the
        bytes a client may have unsent.

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
        done = self._deliver(*self._concerned(events), cursor)
        self._meter.delivered(done.alerts, done.updates, done.size_bytes)
        if done.compressed_bytes:
            self._meter.compressed(done.compressed_bytes, done.saved_bytes)

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
        self._rehearsal.add(member)

    def rehearse_no_more(self, member: Member) -> None:
        """Let this member hear no canaries. It need not have heard any."""
        self._rehearsal.discard(member)

    def _deliver(self, groups: Sequence[Group], judged: Sequence[tuple[Event, Subject]], cursor: int) -> Delivered:
        """Write every event to the members whose filter it passes. They have everything up to `cursor`."""
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
                self._pass_on(group.plain, slices(matching, self.slice_bytes), cursor, done)
            if group.compressed:
                for event, frame in matching:
                    is_shared = frame is frames.get((event.offset, ())) or len(group.compressed) >= WORTH_COMPRESSING
                    if is_shared and frame not in smaller:
                        smaller[frame] = self.deflater.frame(frame)
                self._pass_on(group.compressed, slices(matching, self.slice_bytes, smaller), cursor, done)
            group.announced = matching[-1][0].offset
        return done

    def _frame(self, event: Event, matched: tuple[str, ...], frames: dict[tuple[int, tuple[str, ...]], bytes]) -> bytes:
        """The frame of an event for filters of which these addresses matched. `frames` has those that were made."""
        key = event.offset, matched
        frame = frames.get(key)
        if frame is None:
            frame = wire.event_frame(event, self.epoch, matched)
            if not matched or len(frames) < SHARED_FRAMES:
                frames[key] = frame
        return frame

    def _pass_on(self, members: dict[Member, None], joined: Iterable[Slice], cursor: int, done: Delivered) -> None:
        """Write slices to members who have everything up to `cursor`, and add up what came of it."""
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
            self._let_fall_behind(behind, cursor)
            cursor = part.newest

    def publish_positions(self) -> None:
        """Send `position` to live members that have not heard of the head, so that their resume point advances."""
        behind_head = [group for group in self._groups.values() if group.announced < self.head]
        self._broadcast(behind_head, wire.Sent.POSITION, wire.position_frame(self.position))
        for group in behind_head:
            group.announced = self.head

    def publish_upstream_state(self, state: UpstreamState, since: float) -> None:
        """Send `status` to live members. Those who are behind hear the next one."""
        self._broadcast(self._groups.values(), wire.Sent.STATUS, wire.status_frame(state, since))

    def _broadcast(self, groups: Iterable[Group], kind: wire.Sent, frame: bytes) -> None:
        behind: list[Member] = []
        count = 0
        for group in groups:
            count += len(group) - self._write(group.plain, frame, behind) - self._write(group.compressed, frame, behind)
        self._let_fall_behind(behind, self.head)
        self._meter.sent(kind, count, count * len(frame))

    def delivered(self, alerts: int, updates: int, size_bytes: int, saved_bytes: int | None = None) -> None:
        """Count what a replay wrote to one member. `saved_bytes` is what compression saved, None for plain frames."""
        self._meter.delivered(alerts, updates, size_bytes)
        if saved_bytes is not None:
            self._meter.compressed(size_bytes, saved_bytes)

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


def slices(
    frames: Iterable[tuple[Event, bytes]], limit: int, smaller: Mapping[bytes, bytes] | None = None
) -> Iterator[Slice]:
    """Frames, each with its event, joined up to `limit` bytes. `smaller` has the compressed ones."""
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
