"""Core dumps of the daemon, which would contain its keys and the tokens of clients."""

import contextlib
import ctypes
import resource

# The option of prctl that says whether a process may be dumped.
PR_SET_DUMPABLE = 4


def forbid() -> None:
    """Forbid core dumps of this process, whatever started it.

    The limit alone is not enough: the kernel ignores a limit of 0 if core_pattern names a program (core(5)). A process
    that is not dumpable is also closed to debuggers, and its /proc/PID/environ and mem to other processes, of the same
    user; root may still look. A program that it starts has the limit, and is dumpable again.
    """
    with contextlib.suppress(OSError, ValueError):  # a sandbox may refuse it; then the limit is the sandbox's
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
