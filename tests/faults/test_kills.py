"""kill -9 at random moments; after each kill the log and the clients are compared with the ground truth."""

import asyncio
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from faults.rig import Rig, rigged

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]

# The worlds of a test run concurrently: most of the time they wait for whaled to be up to date.
GROUPS, WORLDS, KILLS = 8, 3, 9
PACE_S = 0.04
# The longest wait for events before a kill: a block interval may pass without a whale.
EVENTS_WITHIN_S = 3.0


async def live(rig: Rig, is_over: asyncio.Event) -> None:
    while not is_over.is_set():
        await rig.go(pace_s=PACE_S)


async def moment(rig: Rig, rng: Random) -> None:
    """Wait until the kill is due: during the start, some time later, or after a number of events."""
    match rng.randrange(4):
        case 0:
            await asyncio.sleep(rng.uniform(0, 0.6))
        case 1:
            await rig.ready()
            await asyncio.sleep(rng.uniform(0, 1.0))
        case _:
            await rig.ready()
            with suppress(TimeoutError):
                async with asyncio.timeout(EVENTS_WITHIN_S):
                    await rig.plain.has(len(rig.plain.received) + rng.randint(1, 60))


async def killed(rig: Rig, rng: Random) -> None:
    """Kill the daemon once, and check the log and the clients after the next start."""
    is_over = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(live(rig, is_over))
        if rig.daemon is None:
            await rig.start(wait=False)
        await moment(rig, rng)
        await rig.kill()
        is_over.set()
    for client in (rig.plain, rig.picky):
        if rng.random() < 0.3:
            await client.renew()
    await rig.go(rng.choice((0, 0, 1, 3, 8)))
    await rig.start()
    await rig.settle()
    if rng.random() < 0.5:
        await rig.kill()  # the next kill then hits the start, or comes soon after it


async def world(directory: Path, number: int) -> int:
    async with rigged(directory, "kill -9", seed=number, rate=15.0, database=bool(number % 2)) as rig:
        await rig.go(5)
        for each in range(KILLS):
            await killed(rig, Random(1000 * number + each))
        if rig.daemon is None:
            await rig.start()
        return (await rig.finish()).kills


@pytest.mark.parametrize("group", range(GROUPS))
async def test_a_kill_at_any_moment_neither_loses_nor_repeats_an_event(tmp_path: Path, group: int) -> None:
    async with asyncio.TaskGroup() as tasks:
        worlds = [
            tasks.create_task(world(tmp_path / str(number), WORLDS * group + number + 1)) for number in range(WORLDS)
        ]
    assert sum(each.result() for each in worlds) >= WORLDS * KILLS
