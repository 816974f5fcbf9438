"""How much memory this process may use, and uses.

Where its cgroup has a limit, what counts is what the kernel counts before it kills: the cgroup's working set, that is
everything charged to it (socket buffers too) but file pages that can be dropped at once. Elsewhere resident memory.
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
M_MMAP_THRESHOLD = -3  # of malloc.h
M_ARENA_MAX = -8
NEVER = 1_000_000_000
LARGE_BYTES = 128 * 1024  # what glibc begins with


class Memory(Struct, frozen=True):
    """`limit_bytes` is infinite where nothing limits."""

    used_bytes: int
    limit_bytes: float


class Gauge:
    """Reads the kernel's numbers. `proc` and `cgroups` are where they stand, below /proc/self and /sys/fs/cgroup."""

    def __init__(self, proc: Path = Path("/proc/self"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        """Opens what it reads and keeps it open: when it matters most there may be no descriptor left."""
        self._statm = _Kept(proc / "statm")
        cgroup = _cgroup(proc / "cgroup", cgroups)
        self._limits = [_Kept(cgroup / name) for name in ("memory.max", "memory.high")] if cgroup else []
        self._current = _Kept(cgroup / "memory.current") if cgroup else None
        self._stat = _Kept(cgroup / "memory.stat") if cgroup else None

    def read(self, limit_bytes: int | None) -> Memory:
        """What is used of `limit_bytes`, or of what the cgroup allows if that is less or nothing is given."""
        cgroup_limit = self._cgroup_limit()
        statm = self._statm.read().split()
        resident = int(statm[1]) * PAGE_BYTES if len(statm) > 1 else 0
        working_set = self._working_set() if math.isfinite(cgroup_limit) else None
        used = resident if working_set is None else max(resident, working_set)
        return Memory(used, min(cgroup_limit, limit_bytes if limit_bytes is not None else math.inf))

    def _cgroup_limit(self) -> float:
        """memory.high counts: beyond it the kernel slows the process down until it hangs."""
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
    """Let the C library return what it holds free to the kernel. Only glibc can."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_large_apart() -> None:
    """Have the C library map each large block by itself, so that it goes back to the kernel when it is freed.

    Whenever glibc frees one it raises the size from which on it does so (to 32 MiB at most, mallopt(3)); messages of
    megabytes then lie in the heap and leave holes that are never given back. With the size fixed it leaves it alone.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def share_heap() -> None:
    """Have all threads allocate from one heap. To be called before there are others.

    glibc gives each thread a heap of its own, up to eight for each core, so that they need not wait for each other.
    Those of Python wait for the interpreter anyway, and each heap keeps the most that its thread ever needed.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def set_modules_apart() -> None:
    """Leave everything there is until now, modules above all, out of garbage collections from now on.

    They are tens of thousands of objects that stay for ever; looking through them took 42 ms each time, in which the
    event loop stands still.
    """
    gc.freeze()


def collect_all_seldom() -> None:
    """Have the interpreter look by itself only through what is young for garbage; `collect_all` is for the rest.

    It looks through everything whenever that has grown by a quarter. With 9,000 clients that takes 170 ms, in which the
    event loop stands still, and happened four times while they came. It found next to nothing.
    """
    gc.set_threshold(*gc.get_threshold()[:2], NEVER)


def collect_all() -> None:
    """Look through everything for garbage."""
    gc.collect()


def _cgroup(file: Path, cgroups: Path) -> Path | None:
    """The directory of this process's cgroup (version 2), None if there is none or it cannot be read."""
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith("0::"):
                found = cgroups / line.removeprefix("0::").lstrip("/")
                return found if (found / "memory.current").exists() else None
    return None


class _Kept:
    """A small file of the kernel's, read again and again. A file that is not there, or cannot be read, is empty."""

    READ_BYTES = 64 * 1024

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = None
        with contextlib.suppress(OSError):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)

    def read(self) -> str:
        """The whole file as it is now."""
        if self._descriptor is None:
            return ""
        try:
            return os.pread(self._descriptor, self.READ_BYTES, 0).decode()
        except OSError:
            return ""

    def number(self) -> int | None:
        """None for `max`, and where there is no such file."""
        text = self.read().strip()
        return int(text) if text.isdecimal() else None
