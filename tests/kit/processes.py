"""Children of a process, found in /proc."""

import asyncio
from pathlib import Path


def _children(parent: int, words: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and words in (entry / "cmdline").read_text():
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == parent:
                    found.append(int(entry.name))
        except OSError:
            continue
    return found


def is_there(process: int) -> bool:
    """Return whether the process exists, also as a zombie."""
    return Path(f"/proc/{process}").exists()


async def child_of(parent: int, words: str) -> int:
    """Wait for a child with these words in its command line, and return its process id."""
    async with asyncio.timeout(60):
        while not (found := _children(parent, words)):  # noqa: ASYNC110 - the kernel sends no notification
            await asyncio.sleep(0.005)
    return found[0]
