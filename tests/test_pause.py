"""Intervals that change while they last."""

import asyncio
import time

from whaled.pause import Pause


async def test_an_interval_ends_when_its_new_length_is_over() -> None:
    pause, lengths_s = Pause(), [3600.0]
    waits = [asyncio.ensure_future(pause.interval(lambda: lengths_s[0])) for _ in range(2)]
    await asyncio.sleep(0.01)
    assert not any(wait.done() for wait in waits)
    pause.changed()  # by nothing that concerns them
    await asyncio.sleep(0.01)
    assert not any(wait.done() for wait in waits)
    lengths_s[0] = 0.001
    pause.changed()
    async with asyncio.timeout(5):
        await asyncio.gather(*waits)


async def test_a_longer_interval_counts_from_its_beginning() -> None:
    pause, lengths_s = Pause(), [0.05]
    began = time.monotonic()
    wait = asyncio.ensure_future(pause.interval(lambda: lengths_s[0]))
    await asyncio.sleep(0.02)
    lengths_s[0] = 0.1
    pause.changed()
    async with asyncio.timeout(5):
        await wait
    assert time.monotonic() - began >= 0.1
