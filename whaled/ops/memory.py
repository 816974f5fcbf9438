"""The memory that this process uses and may use, and settings of the allocator and the garbage collector.

If the cgroup has a limit, the measure is the one the kernel applies before it kills the process: the cgroup's working
set, which is everything charged to it (including socket buffers) except file pages that can be dropped at once. Without
a limit it is resident memory.
"""

import contextlib
import ctypes
import gc
import math
import os
import weakref
from pathlib import Path

from msgspec import Struct

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
M_MMAP_THRESHOLD = -3  # from malloc.h
M_ARENA_MAX = -8
NEVER = 1_000_000_000
LARGE_BYTES = 128 * 1024  # the initial threshold of glibc


class Memory(Struct, frozen=True):
    """Used memory and its limit, and the part of resident memory that no file backs.

    `limit_bytes` is infinite without a limit.
    """

    used_bytes: int
    limit_bytes: float
    anonymous_bytes: int


class Gauge:
    """The reader of the kernel's memory figures. `proc` and `cgroups` are the directories they are read from."""

    def __init__(self, proc: Path = Path("/proc/self"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        """Open the files and keep them open: when memory is short, descriptors may be short too."""
        self._statm = _Kept(proc / "statm")
        cgroup = _cgroup(proc / "cgroup", cgroups)
        self._limits = [_Kept(cgroup / name) for name in ("memory.max", "memory.high")] if cgroup else []
        self._current = _Kept(cgroup / "memory.current") if cgroup else None
        self._stat = _Kept(cgroup / "memory.stat") if cgroup else None

    def read(self, limit_bytes: int | None) -> Memory:
        """Return the used memory, and the lower of `limit_bytes` (None: no limit) and the limit of the cgroup."""
        cgroup_limit = self._cgroup_limit()
        statm = self._statm.read().split()
        resident, of_files = (int(pages) * PAGE_BYTES for pages in statm[1:3]) if len(statm) > 2 else (0, 0)
        working_set = self._working_set() if math.isfinite(cgroup_limit) else None
        used = resident if working_set is None else max(resident, working_set)
        limit = min(cgroup_limit, limit_bytes if limit_bytes is not None else math.inf)
        return Memory(used, limit, resident - of_files)

    def _cgroup_limit(self) -> float:
        """Return the lower of memory.max and memory.high, infinite without either.

        Above memory.high the kernel throttles the process until it hangs.
        """
        limits = [file.number() for file in self._limits]
        return min((limit for limit in limits if limit is not None), default=math.inf)

    def _working_set(self) -> int | None:
        current = self._current.number() if self._current is not None else None
        if current is None or self._stat is None:
            return current
        for line in self._stat.read().splitlines():
            name, _, value = line.partition(" ")
            if name == "inactive_file" and value.isdecimal():
                current -= int(value)
        return current


def give_back() -> None:
    """Have the C library return its free memory to the kernel. Only glibc supports this."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_large_apart() -> None:
    """Have the C library map each large block separately, so that the kernel gets it back when it is freed.

    Whenever glibc frees such a block, it raises the threshold of size for separate mapping, up to 32 MiB (mallopt(3)).
    Messages of megabytes are then allocated in the heap, and leave holes that are never returned. Setting the threshold
    disables that adjustment.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def share_heap() -> None:
    """Have all threads allocate from one heap. Call this before other threads start.

    glibc gives threads separate heaps, up to eight per core, so that they do not wait for each other. Python's threads
    wait for the interpreter lock anyway, and each heap keeps the maximum that its thread ever needed.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def set_modules_apart() -> None:
    """Exclude all existing objects, mainly of modules, from future garbage collections.

    They are tens of thousands of permanent objects. Examining them blocked the event loop for 42 ms each time.
    """
    gc.freeze()


def collect_all_seldom() -> None:
    """Limit automatic garbage collections to young objects. `collect_all` collects the others.

    By default the interpreter collects all objects whenever their number has grown by a quarter. With 9,000 clients
    that blocks the event loop for 170 ms. It happened four times while they connected, and found almost nothing.
    """
    gc.set_threshold(*gc.get_threshold()[:2], NEVER)


def collect_all() -> None:
    """Run a full garbage collection."""
    gc.collect()


def _cgroup(file: Path, cgroups: Path) -> Path | None:
    """Return the directory of this process's cgroup (version 2); None if there is none or it cannot be read."""
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith("0::"):
                found = cgroups / line.removeprefix("0::").lstrip("/")
                return found if (found / "memory.current").exists() else None
    return None


class _Kept:
    """A small kernel file that is kept open and read repeatedly. A missing or unreadable file counts as empty."""

    READ_BYTES = 64 * 1024

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)

    def read(self) -> str:
        """Return the current content of the file."""
        if self._descriptor is None:
            return ""
        try:
            return os.pread(self._descriptor, self.READ_BYTES, 0).decode()
        except OSError:
            return ""

    def number(self) -> int | None:
        """Return the number in the file; None for `max` or a missing file."""
        text = self.read().strip()
        return int(text) if text.isdecimal() else None
