"""Several backend of one sort at a time, for the length of a turn; one that takes long holds up no other."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from whaled.backfill.tools import GENERAL, Tools
from whaled.backoff import Backoff
from whaled.upstream.http import RestError

# After so long the next sort of question has its turn. What has not been answered by then goes on meanwhile.
TURN_S = 2.0
# Requests that fail one after the other: the cause is not the single request.
FAILURES_IN_A_ROW = 3


class Turns:
    """At most `limit` backend of one sort are under way, over all turns."""

    def __init__(self, tools: Tools, backoff: Backoff, limit: int) -> None:
        self._tools = tools
        self._backoff = backoff
        self._limit = limit
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failures = 0
        self._problem: RestError | None = None

    def is_asking(self, key: str) -> bool:
        """Whether a question is under way."""
        return key in self._tasks

    async def take(self, keys: Iterable[str], ask: Callable[[str], Awaitable[None]]) -> bool:
        """Ask about each key of which no question is under way, in their order, until the turn is over.

        A question that fails waits (`backoff`), unless several did in a row, which ends the turn. False if there are
        keys left. Raises RestError where every other question would fail as well, now or since the last turn.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + TURN_S
        waiting = iter([key for key in keys if key not in self._tasks])
        started: set[asyncio.Task[None]] = set()
        self._failures = 0
        is_exhausted = False
        while self._problem is None:
            while len(self._tasks) < self._limit and self._failures < FAILURES_IN_A_ROW and loop.time() < until:
                key = next(waiting, None)
                if key is None:
                    is_exhausted = True
                    break
                started.add(self._start(key, ask))
            pending = [task for task in self._tasks.values() if not is_exhausted or task in started]
            left_s = until - loop.time()
            if not pending or left_s <= 0 or self._failures >= FAILURES_IN_A_ROW:
                break
            await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        problem, self._problem = self._problem, None
        if problem is not None:
            try:
                raise problem
            finally:
                del problem  # its traceback holds this frame: they would keep each other, and the answer that was read
        return is_exhausted

    def _start(self, key: str, ask: Callable[[str], Awaitable[None]]) -> asyncio.Task[None]:
        task = self._tasks[key] = self._tools.background.start(self._one(key, ask))
        return task

    async def _one(self, key: str, ask: Callable[[str], Awaitable[None]]) -> None:
        try:
            await ask(key)
        except RestError as error:
            if error.reason in GENERAL:
                self._problem = error
            else:
                self._failures += 1
                self._tools.complain(error, self._backoff.failed(key, error.retry_after_s))
        else:
            self._failures = 0
            self._backoff.forget(key)
        finally:
            del self._tasks[key]
            self._tools.background.changed()
