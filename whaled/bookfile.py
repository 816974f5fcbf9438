"""The address book's file, read line by line, and the process that reads a large one for the daemon.

Half a minute of work for a million addresses must not be the event loop's, and a thread would take turns with it at the
interpreter. The process hands the finished table back through its standard output.
"""

import contextlib
import os
import resource
import stat
import struct
import sys
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path

import msgspec

from whaled.errors import ConfigError, Fault
from whaled.whales import owners
from whaled.whales.owners import Owners

KEY = "detection.address_book"
# A label, an address and a type have 200 characters; a file without line breaks must not be read into memory whole.
MAX_LINE = 1_000
# What comes back: a table, or why there is none.
TABLE, FAULTS = b"T", b"F"
HEAD = struct.Struct("=cQ")
MAX_BODY = 4 * 1024**3
# The process takes this much by itself, and this for each address allowed, where each has an owner of its own.
OWN_BYTES, ADDRESS_BYTES = 256 * 1024**2, 600
# Live delivery comes first where there is one core.
NICENESS = 10


class LineError(Exception):
    """A line that is longer than any can be."""


def read(path: Path, limit: int) -> Owners:
    """The owners in an address book of at most `limit` addresses. Raises ConfigError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError((Fault(KEY, f"{path} is no regular file"),))
        return owners.parse(lambda: _lines(path), str(path), limit=limit)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError((Fault(KEY, f"cannot read {path}: {error}"),)) from error
    except LineError as error:
        raise ConfigError((Fault(KEY, f"{path}: {error}; expected label,address,type"),)) from error


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise LineError(f"line {number} has more than {MAX_LINE} characters")
            yield line


def main(path: str, limit: str) -> None:
    """Read a book and write its table to standard output, or its faults."""
    with contextlib.suppress(OSError):  # the unit's sandbox may not allow it
        os.nice(NICENESS)
    with contextlib.suppress(OSError, ValueError):
        most = OWN_BYTES + ADDRESS_BYTES * int(limit)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    kind = TABLE
    body: bytes | bytearray
    try:
        body = read(Path(path), int(limit)).to_bytes()
    except ConfigError as error:
        faults = [(fault.where, fault.problem, fault.source) for fault in error.faults]
        kind, body = FAULTS, msgspec.json.encode(faults)
    except MemoryError:
        problem = f"{path}: reading it takes more memory than detection.max_book_addresses ({limit}) allows for"
        kind, body = FAULTS, msgspec.json.encode([(KEY, problem, "")])
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        sys.stdout.buffer.write(HEAD.pack(kind, len(body)))
        sys.stdout.buffer.write(body)
        sys.stdout.buffer.flush()


def taken(stream: RawIOBase) -> Owners:
    """The owners that `main` writes to a stream. Raises ConfigError as `read` does; ValueError for anything else."""
    kind, size = HEAD.unpack(_exactly(stream, HEAD.size))
    if kind not in {TABLE, FAULTS} or size > MAX_BODY:
        raise ValueError("no answer of this version")
    body = _exactly(stream, size)
    if kind == FAULTS:
        try:
            faults = msgspec.json.decode(body, type=list[tuple[str, str, str]])
        except msgspec.MsgspecError as error:
            raise ValueError("no answer of this version") from error
        raise ConfigError(tuple(Fault(*fault) for fault in faults))
    return Owners(body)


def _exactly(stream: RawIOBase, size: int) -> bytearray:
    """Into one piece of memory of this size, which is the table."""
    body = bytearray(size)
    rest = memoryview(body)
    while rest:
        got = stream.readinto(rest)
        if not got:
            raise ValueError("the answer ended early")
        rest = rest[got:]
    return body
