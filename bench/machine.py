"""A description of the machine that measured, and its limit of descriptors."""

import os
import platform
import resource
import sqlite3
import ssl
import sys
from importlib.metadata import version
from pathlib import Path

# Descriptors that a server needs in addition to its clients': log, listeners, epoll, pipes.
RESERVED = 100


def kind() -> str:
    """Return processor, cores, memory, kernel, Python and the relevant libraries, in one line."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return ", ".join(
        (
            f"{_processor()}, {os.cpu_count()} cores{_virtual()}",
            f"{pages / 2**30:.0f} GiB",
            f"{platform.system()} {platform.release()} {platform.machine()}",
            f"Python {platform.python_version()}",
            f"websockets {version('websockets')}",
            f"msgspec {version('msgspec')}",
            f"SQLite {sqlite3.sqlite_version}",
            ssl.OPENSSL_VERSION.rsplit(" ", 3)[0],
        )
    )


def busy() -> str:
    """Return the load average of the last minute: other work on the machine affects every number."""
    return f"{os.getloadavg()[0]:.1f}"


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _virtual() -> str:
    return " (virtual)" if "hypervisor" in _cpuinfo("flags").split() else ""


def _cpuinfo(key: str) -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def clients_possible(wanted: int) -> int:
    """Raise the soft limit of descriptors, and return how many of `wanted` clients it allows per process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    possible = wanted if soft == resource.RLIM_INFINITY else min(wanted, soft - RESERVED)
    if possible < wanted:
        print(f"only {possible} clients instead of {wanted}: the hard limit of descriptors is {hard}", file=sys.stderr)
    return possible
