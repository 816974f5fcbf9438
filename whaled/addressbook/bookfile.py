"""Reading of the address book's files, and the process that reads large ones for the daemon.

A million addresses take half a minute, which must not block the event loop, and a thread would compete with it for the
interpreter. So a separate process reads the files and returns the finished table through its standard output.
"""

import codecs
import contextlib
import os
import resource
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from io import RawIOBase
from pathlib import Path

import msgspec

from whaled.errors import BookError, BookFailure, Fault, why_unreadable
from whaled.whales import filekinds
from whaled.whales.books import Reading
from whaled.whales.owners import Owners

KEY = "detection.address_book"
# Maximum length of a line. A label, a script, a type and the source have 1,300 characters; a file without line breaks
# must not be read into memory as a whole.
MAX_LINE = 2_000
# Number of bytes by which the kind of a file is recognised.
HEAD_BYTES = 4_096
# The kinds of result of the process: a table, or the faults.
TABLE, FAULTS = b"T", b"F"
HEAD = struct.Struct("=cQ")
MAX_BODY = 4 * 1024**3
# Memory limit of the process: a base, and an amount for each allowed address, enough if each has an owner of its own.
OWN_BYTES, ADDRESS_BYTES = 256 * 1024**2, 600
# The process yields to live delivery on a machine with one core.
NICENESS = 10

# Longer marks come first: the mark of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class LineError(Exception):
    """A line that is longer than any valid one."""


def read(paths: Sequence[str], limit: int) -> Owners:
    """Return the owners in the files of an address book, which may have at most `limit` addresses in total.

    Raises BookError. If there are several files, the fault of one names the index of its path in the list
    (`detection.address_book[1]`).
    """
    reading = Reading(limit)
    for index, path in enumerate(paths):
        _add(Path(path), reading, f"{KEY}[{index}]" if len(paths) > 1 else KEY)
    return reading.owners()


def _add(path: Path, reading: Reading, key: str) -> None:
    """Read one file. Raises BookError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise _refused(key, f"{path} is not a regular file", BookFailure.UNREADABLE)
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            encoding = _encoding(key, path, file.read(HEAD_BYTES))
            has_content = reading.add(str(path), _lines(path, encoding))
            after = os.fstat(file.fileno())
    except (OSError, UnicodeError) as error:
        raise _refused(key, f"cannot read {path}: {why_unreadable(error)}", BookFailure.UNREADABLE) from error
    except LineError as error:
        raise _refused(key, f"{path}: {error}; expected label,address,type", BookFailure.NOT_A_BOOK) from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise _refused(
            key,
            f"{path} changed while it was read: write a new file next to it and rename that (mv NEW {path})",
            BookFailure.UNREADABLE,
        )
    if not has_content:
        raise _refused(
            key,
            f"{path} has no address ({before.st_size} bytes): did its download fail? To run without labels set {KEY} "
            "to null",
            BookFailure.EMPTY,
        )


def _refused(key: str, problem: str, reason: BookFailure) -> BookError:
    return BookError((Fault(key, problem),), reason=reason)


def _encoding(key: str, path: Path, head: bytes) -> str:
    """Return the encoding of a file by its first bytes. Raises BookError if it is not CSV."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    what = filekinds.binary(head) or filekinds.text(head.decode("utf-8", "replace"))
    if what is not None:
        raise _refused(key, f"{path} is not an address book but {what}", BookFailure.NOT_A_BOOK)
    evens, odds = head[0::2].count(0), head[1::2].count(0)
    if not evens and not odds:
        return "utf-8-sig"
    # UTF-16 without a mark: for ASCII text, every second byte is 0.
    for name, here, there in (("utf-16-le", odds, evens), ("utf-16-be", evens, odds)):
        if here > len(head) // 3 and there == 0:
            return name
    raise _refused(key, f"{path} is not text: it has NUL bytes", BookFailure.NOT_A_BOOK)


def lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file that `read` accepts."""
    with path.open("rb") as file:
        encoding = _encoding(KEY, path, file.read(HEAD_BYTES))
    yield from _lines(path, encoding)


def _lines(path: Path, encoding: str) -> Iterator[str]:
    # Invalid UTF-8 is decoded as surrogates, so that it is reported as a fault of its line.
    with path.open(encoding=encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "strict") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise LineError(f"line {number} has more than {MAX_LINE} characters")
            yield line


def main(limit: str, *paths: str) -> None:
    """Read a book and write its table, or its faults, to standard output."""
    with contextlib.suppress(OSError):  # the unit's sandbox may forbid it
        os.nice(NICENESS)
    with contextlib.suppress(OSError, ValueError):
        most = OWN_BYTES + ADDRESS_BYTES * int(limit)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    kind = TABLE
    body: bytes | bytearray
    try:
        body = read(paths, int(limit)).to_bytes()
    except BookError as error:
        kind, body = FAULTS, _Refusal.of(error).encoded()
    except MemoryError:
        names = ", ".join(paths)
        problem = f"{names}: reading takes more memory than detection.max_book_addresses ({limit}) allows for"
        kind, body = FAULTS, _Refusal.of(_refused(KEY, problem, BookFailure.TOO_LARGE)).encoded()
    with contextlib.suppress(BrokenPipeError):  # the daemon no longer waits for the result
        sys.stdout.buffer.write(HEAD.pack(kind, len(body)))
        sys.stdout.buffer.write(body)
        sys.stdout.buffer.flush()


class _Refusal(msgspec.Struct, frozen=True):
    """The wire form of a BookError between the processes."""

    reason: BookFailure
    faults: list[tuple[str, str, str]]
    lines: int

    @classmethod
    def of(cls, error: BookError) -> "_Refusal":
        return cls(error.reason, [(fault.where, fault.problem, fault.source) for fault in error.faults], error.lines)

    def encoded(self) -> bytes:
        return msgspec.json.encode(self)


def taken(stream: RawIOBase) -> Owners:
    """Read the result of `main` from a stream. Raises BookError as `read` does, ValueError for invalid data."""
    kind, size = HEAD.unpack(_exactly(stream, HEAD.size))
    if kind not in {TABLE, FAULTS} or size > MAX_BODY:
        raise ValueError("no result of this version")
    body = _exactly(stream, size)
    if kind == FAULTS:
        try:
            refusal = msgspec.json.decode(body, type=_Refusal)
        except msgspec.MsgspecError as error:
            raise ValueError("no result of this version") from error
        raise BookError(tuple(Fault(*fault) for fault in refusal.faults), reason=refusal.reason, lines=refusal.lines)
    return Owners(body)


def _exactly(stream: RawIOBase, size: int) -> bytearray:
    """Read exactly `size` bytes into one contiguous buffer, which becomes the table."""
    body = bytearray(size)
    rest = memoryview(body)
    while rest:
        got = stream.readinto(rest)
        if not got:
            raise ValueError("the result ended early")
        rest = rest[got:]
    return body
