"""How the event loop's time is shared: live alerts first, then what clients ask for, in slices.

All work that clients can cause runs here as small jobs, not in the callbacks of their sockets. Each turn of the loop
runs jobs for one slice at most, and then lets the loop see to the backend, the log and the delivery of alerts. While an
alert is on its way (`hold`) jobs wait, though not longer than HOLD_S at a time: a busy backend must not shut clients
out. So an alert waits for a few slices, however much clients ask for.

The slice is divided between lanes by weight. A lane that has nothing to do leaves its part to the others.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Protocol, TypeVar

# A turn of the loop spends this long on jobs. It is what an alert may meet on its way, a few times over.
SLICE_S = 0.001
# While alerts are on their way, jobs get a slice at least this often.
HOLD_S = 0.004
# While alerts flow, which is for so long after one that took so long, replays get this part of the time at most: the
# next alert finds the loop, the reader thread and the processor free more often than not.
FLOW_S = 1.0
ALERT_S = 0.0005
REPLAY_PART = 0.25
# What took long because the machine was busy is no reason to stand still.
REST_LIMIT_S = 0.05


class Lane(StrEnum):
    """A kind of work (a metric label)."""

    ACCEPT = "accept"
    STRANGER = "stranger"  # handshakes, TLS, credentials
    KNOWN = "known"  # messages of clients that have authenticated
    REPLAY = "replay"


WEIGHTS = {Lane.ACCEPT: 3.0, Lane.STRANGER: 4.0, Lane.KNOWN: 4.0, Lane.REPLAY: 2.0}


T = TypeVar("T")


class ShareMeter(Protocol):
    """What is counted of the shares."""

    def worked(self, lane: Lane, seconds: float) -> None:
        """Jobs of a lane took so much of a slice."""
        ...


# Returns whether there is more to do: then the job runs again after the others of its lane.
Job = Callable[[], bool]


class _Queue:
    """The jobs of a lane: a queue per source, served in turn, so that a source with many jobs delays itself."""

    __slots__ = ("_by_source", "used", "weight")

    def __init__(self, weight: float) -> None:
        self._by_source: dict[Hashable, deque[Job]] = {}
        self.weight = weight
        self.used = 0.0  # seconds by weight: the lane with the least runs next

    def __len__(self) -> int:
        return len(self._by_source)

    def add(self, source: Hashable, job: Job, *, is_next: bool = False) -> None:
        jobs = self._by_source.get(source)
        if jobs is None:
            jobs = self._by_source[source] = deque()
        if is_next:
            jobs.appendleft(job)
        else:
            jobs.append(job)

    def run_one(self) -> None:
        """Run the first job of the first source. The source goes to the end."""
        source = next(iter(self._by_source))
        jobs = self._by_source.pop(source)
        job = jobs.popleft()
        if jobs:
            self._by_source[source] = jobs
        if job():
            self.add(source, job)


class LoopShare:
    """Runs jobs in slices on the running event loop. A job must not raise."""

    def __init__(
        self,
        meter: ShareMeter,
        *,
        slice_s: float = SLICE_S,
        hold_s: float = HOLD_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._meter = meter
        self._clock = clock
        self._slice_s = slice_s
        self._hold_s = hold_s
        self._lanes = {lane: _Queue(WEIGHTS[lane]) for lane in Lane}
        self._holds = 0
        self._alerted_at = -FLOW_S
        self._replay_at = 0.0  # replays rest until then
        self._is_resting = False
        self._scheduled: asyncio.Handle | None = None

    def add(self, lane: Lane, job: Job, source: Hashable = None, *, is_next: bool = False) -> None:
        """Run a job when it is its turn: sources take turns, jobs of one source run in order, one `is_next` first."""
        queue = self._lanes[lane]
        if not queue:
            # What it did not use while it had nothing to do is not saved up.
            queue.used = max(queue.used, min((each.used for each in self._lanes.values() if each), default=0.0))
        queue.add(source, job, is_next=is_next)
        self._schedule()

    async def run(self, lane: Lane, work: Callable[[], T], source: Hashable = None) -> T:
        """The result of `work`, which runs as a job. What it raises is raised here."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def job() -> bool:
            if not done.done():  # the caller may be gone
                try:
                    done.set_result(work())
                except Exception as error:  # noqa: BLE001 - raised in the caller
                    done.set_exception(error)
            return False

        self.add(lane, job, source)
        return await done

    @contextmanager
    def hold(self) -> Iterator[None]:
        """An alert is on its way: let jobs wait, up to `hold_s` at a time."""
        self._holds += 1
        began = self._clock()
        try:
            yield
        finally:
            self._holds -= 1
            now = self._clock()
            if now - began >= ALERT_S:
                self._alerted_at = now
            if not self._holds and self._scheduled is not None:
                self._scheduled.cancel()
                self._scheduled = None
                self._schedule()

    def worked_elsewhere(self, lane: Lane, seconds: float) -> None:
        """A thread worked for a lane: it counts like work of the loop."""
        self._spend(lane, seconds, self._clock())
        self._meter.worked(lane, seconds)

    def waiting(self, lane: Lane) -> int:
        """Sources of a lane that have jobs."""
        return len(self._lanes[lane])

    def _schedule(self) -> None:
        if self._scheduled is not None and self._is_resting and self._next(0.0) is not None:
            self._scheduled.cancel()
            self._scheduled = None
        if self._scheduled is not None:
            return
        loop = asyncio.get_running_loop()
        now = self._clock()
        self._is_resting = self._next(now) is None
        if self._is_resting:
            self._scheduled = loop.call_later(self._replay_at - now, self._slice)
        elif self._holds:
            self._scheduled = loop.call_later(self._hold_s, self._slice)
        else:
            self._scheduled = loop.call_soon(self._slice)

    def _slice(self) -> None:
        self._scheduled = None
        now = self._clock()
        ends = now + self._slice_s
        spent: dict[Lane, float] = {}
        while now < ends:
            lane = self._next(now)
            if lane is None:
                break
            queue = self._lanes[lane]
            queue.run_one()
            began, now = now, self._clock()
            self._spend(lane, now - began, now)
            spent[lane] = spent.get(lane, 0.0) + now - began
        for lane, seconds in spent.items():
            self._meter.worked(lane, seconds)
        if any(self._lanes.values()):
            self._schedule()

    def _next(self, now: float) -> Lane | None:
        """The lane whose turn it is, if one has work and need not rest."""
        lanes = [lane for lane, queue in self._lanes.items() if queue]
        if now < self._replay_at and Lane.REPLAY in lanes:
            lanes.remove(Lane.REPLAY)
        return min(lanes, key=self._used, default=None)

    def _spend(self, lane: Lane, seconds: float, now: float) -> None:
        self._lanes[lane].used += seconds / self._lanes[lane].weight
        if lane is Lane.REPLAY and now - self._alerted_at < FLOW_S:
            self._replay_at = max(now, self._replay_at) + min(REST_LIMIT_S, seconds * (1 / REPLAY_PART - 1))

    def _used(self, lane: Lane) -> float:
        return self._lanes[lane].used
