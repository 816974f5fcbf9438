"""Background tasks of the backfill: requests that take longer than their turn."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager


class Background:
    """Runs tasks while `running` is entered. `on_change` is called whenever one of them ends."""

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None
        self.on_change: Callable[[], None] = lambda: None

    @asynccontextmanager
    async def running(self, on_change: Callable[[], None]) -> AsyncIterator[None]:
        """Accept tasks until the block exits. Tasks that are still running when it is cancelled are cancelled too."""
        async with asyncio.TaskGroup() as group:
            self._group, self.on_change = group, on_change
            try:
                yield
            finally:
                self._group = None

    def start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Start a task. `running` must be entered."""
        assert self._group is not None, "background tasks start within running()"
        return self._group.create_task(work)
