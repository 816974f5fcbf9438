"""The processes of an attack: their cores, priorities, memory and descriptors."""

import contextlib
import os
import resource
import sys
from pathlib import Path

DAEMON_NICE, RIG_NICE = -10, -15
# Nice value of the attackers.
NICER = 15


def peak_kib(pid: int) -> int:
    """Return the peak resident memory (VmHWM), 0 if the process has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0


def open_descriptors(pid: int) -> int:
    """Return the number of open descriptors, 0 if the process has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
    except OSError:
        return 0


def pin(pid: int, *, daemon: bool) -> None:
    """Pin the daemon to the first core and other processes to the rest, if there are several cores."""
    cores = sorted(usable_cores())
    if len(cores) > 1:
        os.sched_setaffinity(pid, cores[:1] if daemon else cores[1:])


def usable_cores() -> set[int]:
    """Return the cores of init, since this process may already be pinned."""
    try:
        return os.sched_getaffinity(1)
    except OSError:
        return os.sched_getaffinity(0)


def renice(pid: int, nice: int) -> None:
    """Set a nice value, if permitted."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, nice)


def nice_command() -> tuple[str, ...]:
    """Return the command that runs a Python module with the attackers' priority."""
    return ("nice", "-n", str(NICER), sys.executable, "-m")


def settle_priorities() -> None:
    """Set core, priority and descriptor limit of this process, which runs the backend."""
    pin(0, daemon=False)
    renice(0, RIG_NICE)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
