"""Shares the event loop's time: live alerts first, then the work that clients cause, in slices.

All work that clients can cause runs here as small jobs, not in the callbacks of their sockets. Each iteration of the
loop runs jobs for at most one slice, and then leaves the loop to the backend, the event log and the delivery of alerts.
While an alert is being processed (`hold`), jobs wait, but at most HOLD_S at a time, so that a busy backend does not
shut clients out. An alert therefore waits for a few slices at most, however much work clients cause.

Lanes share a slice by weight. The part of an idle lane goes to the others.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TypeVar

# The time that one iteration of the loop spends on jobs. An alert may wait for a few of these.
SLICE_S = 0.001
# While alerts are being processed, jobs get a slice at least this often.
HOLD_S = 0.004
# For FLOW_S after an alert that took at least ALERT_S, replays get at most REPLAY_PART of the time, so that the next
# alert usually finds the loop, the reader thread and the processor free.
FLOW_S = 1.0
ALERT_S = 0.0005
REPLAY_PART = 0.25
# The longest rest after one job. A job may have taken long only because the machine was busy.
REST_LIMIT_S = 0.05


class Lane(StrEnum):
    """A kind of work (a metric label)."""

    ACCEPT = "accept"
    STRANGER = "stranger"  # unauthenticated connections: TLS, handshakes, credentials
    KNOWN = "known"  # messages of authenticated clients
    REPLAY = "replay"


WEIGHTS = {Lane.ACCEPT: 3.0, Lane.STRANGER: 4.0, Lane.KNOWN: 4.0, Lane.REPLAY: 2.0}


T = TypeVar("T")


# A job returns whether there is more to do. If so, it runs again after the others of its lane.
Job = Callable[[], bool]


class _Queue:
    """The jobs of a lane: one queue per source, served in turn, so that a source with many jobs delays only itself."""

    __slots__ = ("_by_source", "used", "weight")

    def __init__(self, weight: float) -> None:
        self._by_source: dict[Hashable, deque[Job]] = {}
        self.weight = weight
        self.used = 0.0  # seconds divided by the weight; the lane with the least runs next

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
        """Run the first job of the first source, and move that source to the end."""
        source = next(iter(self._by_source))
        jobs = self._by_source.pop(source)
        job = jobs.popleft()
        if jobs:
            self._by_source[source] = jobs
        if job():
            self.add(source, job)


class LoopShare:
    """The scheduler of jobs in slices on the running event loop. A job must not raise.

    `worked` is called with the seconds that jobs of a lane took.
    """

    def __init__(
        self,
        worked: Callable[[Lane, float], None],
        *,
        slice_s: float = SLICE_S,
        hold_s: float = HOLD_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._worked = worked
        self._clock = clock
        self._slice_s = slice_s
        self._hold_s = hold_s
        self._lanes = {lane: _Queue(WEIGHTS[lane]) for lane in Lane}
        self._holds = 0
        self._alerted_at = -FLOW_S
        self._replay_at = 0.0  # replays rest until this time
        self._is_resting = False
        self._scheduled: asyncio.Handle | None = None

    def add(self, lane: Lane, job: Job, source: Hashable = None, *, is_next: bool = False) -> None:
        """Queue a job. Sources take turns; jobs of one source run in order, except that an `is_next` job goes first."""
        queue = self._lanes[lane]
        if not queue:
            # Time that an idle lane did not use is not saved up.
            queue.used = max(queue.used, min((each.used for each in self._lanes.values() if each), default=0.0))
        queue.add(source, job, is_next=is_next)
        self._schedule()

    async def run(self, lane: Lane, work: Callable[[], T], source: Hashable = None) -> T:
        """Run `work` as a job and return its result. An exception of `work` is raised here."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def job() -> bool:
            if not done.done():  # the caller may have been cancelled
                try:
                    done.set_result(work())
                except Exception as error:  # noqa: BLE001 - raised in the caller
                    done.set_exception(error)
            return False

        self.add(lane, job, source)
        return await done

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Delay jobs while the body processes an alert, up to `hold_s` at a time."""
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
        """Charge a lane for work of a thread, as if the loop had done it."""
        self._spend(lane, seconds, self._clock())
        self._worked(lane, seconds)

    def waiting(self, lane: Lane) -> int:
        """Return the number of sources with jobs in a lane."""
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
            self._worked(lane, seconds)
        if any(self._lanes.values()):
            self._schedule()

    def _next(self, now: float) -> Lane | None:
        """Return the lane to run next; None if no lane has work, or only replays that must rest."""
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
