"""A wait whose length a reload may change while it lasts."""

import asyncio
import time
from collections.abc import Callable


class Pause:
    """The waits of one component between two rounds of its work, by lengths of its settings."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Have every wait compute its length anew: the settings have changed."""
        self._changed.set()
        self._changed.clear()

    async def interval(self, length_s: Callable[[], float]) -> None:
        """Wait for an interval that begins now and has the length that `length_s` returns."""
        began = time.monotonic()
        await self.wait(lambda: began + length_s() - time.monotonic())

    async def wait(self, left_s: Callable[[], float]) -> None:
        """Wait until no time is left; `left_s` returns the seconds that are left now."""
        while True:
            try:
                async with asyncio.timeout(left_s()):
                    await self._changed.wait()
            except TimeoutError:
                return
