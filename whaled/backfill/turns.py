"""Concurrent requests of one kind within a turn of limited length: a slow request delays no other kind."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from whaled.backfill.context import Context
from whaled.backoff import Backoff
from whaled.source import BackendError

# After this time the next kind of request has its turn. Requests without a response by then continue in the background.
TURN_S = 2.0
# After this many failures in a row the cause is probably not the single request.
FAILURES_IN_A_ROW = 3


class Turns:
    """At most `limit` requests of one kind at a time, counted across turns."""

    def __init__(self, context: Context, backoff: Backoff, limit: int) -> None:
        self._context = context
        self._backoff = backoff
        self._limit = limit
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failures = 0
        self._problem: BackendError | None = None

    def is_running(self, key: str) -> bool:
        """Return whether a request for this key is running."""
        return key in self._tasks

    async def take(self, keys: Iterable[str], request: Callable[[str], Awaitable[None]]) -> bool:
        """Call `request` for each key that has no running request, in their order, until the turn ends.

        A key whose request fails waits for its `backoff`. Several failures in a row end the turn. Returns False if
        keys are left. Raises BackendError if a request failed for a backend-wide cause during or since the last turn.
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
                started.add(self._start(key, request))
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
                del problem  # its traceback refers to this frame: the cycle would keep the response in memory
        return is_exhausted

    def _start(self, key: str, request: Callable[[str], Awaitable[None]]) -> asyncio.Task[None]:
        task = self._tasks[key] = self._context.background.start(self._run(key, request))
        return task

    async def _run(self, key: str, request: Callable[[str], Awaitable[None]]) -> None:
        try:
            await request(key)
        except BackendError as error:
            if error.is_backend_wide:
                self._problem = error
            else:
                self._failures += 1
                self._context.report_failure(error, self._backoff.failed(key, error.retry_after_s))
        else:
            self._failures = 0
            self._backoff.forget(key)
        finally:
            del self._tasks[key]
            self._context.background.on_change()
