"""The shares of the event loop."""

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from whaled.gateway.share import Lane, LoopShare


class Meter:
    def __init__(self) -> None:
        self.seconds = dict.fromkeys(Lane, 0.0)

    def worked(self, lane: Lane, seconds: float) -> None:
        self.seconds[lane] += seconds


class Work:
    """Jobs that take some time, on a clock that only they move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done: Counter[str] = Counter()
        self.is_over = False

    def clock(self) -> float:
        return self.now

    def job(self, name: str, seconds: float = 0.0001) -> Callable[[], bool]:
        def run() -> bool:
            self.now += seconds
            self.done[name] += 1
            return not self.is_over

        return run


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_turn_of_the_loop_spends_one_slice_on_jobs() -> None:
    work = Work()
    share = LoopShare(Meter().worked, slice_s=0.001, clock=work.clock)
    for number in range(1000):
        share.add(Lane.KNOWN, work.job(f"{number}"))
    await turns(10)
    assert 0.009 <= work.now <= 0.011  # of 0.1 s that all of them take
    work.is_over = True
    await turns(500)


async def test_lanes_share_by_weight_and_a_lane_without_work_leaves_its_part() -> None:
    meter, work = Meter(), Work()
    share = LoopShare(meter.worked, slice_s=0.001, clock=work.clock)
    share.add(Lane.KNOWN, work.job("known"))
    await turns(50)
    alone_s = meter.seconds[Lane.KNOWN]
    assert alone_s == pytest.approx(0.05, rel=0.05)  # the whole slice of each turn
    share.add(Lane.REPLAY, work.job("replay"))
    await turns(200)
    work.is_over = True
    await turns(10)
    known_s = meter.seconds[Lane.KNOWN] - alone_s
    assert known_s / meter.seconds[Lane.REPLAY] == pytest.approx(2.0, rel=0.05)  # nothing was saved up meanwhile


async def test_sources_take_turns_however_many_jobs_one_has() -> None:
    share, done = LoopShare(Meter().worked), list[str]()

    def job(name: str) -> Callable[[], bool]:
        def append() -> bool:
            done.append(name)
            return False

        return append

    for _ in range(100):
        share.add(Lane.STRANGER, job("greedy"), source="greedy")
    share.add(Lane.STRANGER, job("modest"), source="modest")
    await turns(200)
    assert done.index("modest") <= 1
    assert len(done) == 101
    assert share.waiting(Lane.STRANGER) == 0


async def test_jobs_wait_while_an_alert_is_on_its_way_but_not_for_ever() -> None:
    share, ran = LoopShare(Meter().worked, hold_s=0.05), asyncio.Event()

    def job() -> bool:
        ran.set()
        return False

    with share.hold():
        share.add(Lane.KNOWN, job)
        await turns(20)
        assert not ran.is_set()
        async with asyncio.timeout(5):
            await ran.wait()
        ran.clear()
        share.add(Lane.KNOWN, job)
    await turns(3)  # released: at once, not after `hold_s`
    assert ran.is_set()


async def test_the_result_or_the_error_of_work_reaches_its_caller() -> None:
    share = LoopShare(Meter().worked)
    assert await share.run(Lane.REPLAY, lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        await share.run(Lane.REPLAY, lambda: 1 // 0)
    waiting = asyncio.create_task(share.run(Lane.REPLAY, lambda: 43))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await turns(5)


async def test_replays_pause_three_quarters_of_the_time_during_alerts_and_delay_no_other_work() -> None:
    now, ran = 100.0, asyncio.Queue[str]()

    def job(name: str) -> Callable[[], bool]:
        def work() -> bool:
            nonlocal now
            now += 0.002
            ran.put_nowait(name)
            return name == "replay"

        return work

    share = LoopShare(Meter().worked, clock=lambda: now)
    with share.hold():
        now += 0.001  # an alert
    share.add(Lane.REPLAY, job("replay"))
    async with asyncio.timeout(10):
        await ran.get()
        now += 0.0059
        await turns(100)
        assert ran.empty()
        share.add(Lane.KNOWN, job("known"))
        await turns(3)
        assert ran.get_nowait() == "known"  # at once, not after the rest
        assert await ran.get() == "replay"
        share.worked_elsewhere(Lane.REPLAY, 60.0)  # a machine that stood still: a short rest all the same
        now += 0.056
        assert await ran.get() == "replay"
        now += 1.0  # no alert for a while
        assert [await ran.get() for _ in range(20)] == ["replay"] * 20


async def test_replays_without_alerts_use_all_the_time() -> None:
    meter, work = Meter(), Work()
    share = LoopShare(meter.worked, slice_s=0.001, clock=work.clock)
    with share.hold():
        pass  # a message of the backend without a whale
    share.add(Lane.REPLAY, work.job("replay"))
    await turns(100)
    assert meter.seconds[Lane.REPLAY] == pytest.approx(0.1, rel=0.05)
    work.is_over = True
    await turns(10)
