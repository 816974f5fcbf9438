"""Reads the rows of a database page by page, without SQLite and without the interior pages of its B-trees.

SQLite reaches a row through the pages above it and stops at the first damaged one. But each leaf holds complete rows,
and each row of the log has a checksum: a leaf is usable whatever the state of the pages above it. The format is
described in https://www.sqlite.org/fileformat.html, sections 1.3 to 1.6 (pages), 2.1 (records) and 4 (write-ahead log).
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from msgspec import Struct

MAGIC = b"SQLite format 3\0"
DEFAULT_PAGE_BYTES = 4096
HEADER_BYTES = 100
WAL_MAGIC = (0x377F0682, 0x377F0683)
WAL_HEADER_BYTES, FRAME_HEADER_BYTES = 32, 24
INTERIOR_INDEX, INTERIOR_TABLE, LEAF_INDEX, LEAF_TABLE = 2, 5, 10, 13
WITH_ROWS = (INTERIOR_INDEX, LEAF_INDEX, LEAF_TABLE)
MAX_COLUMNS = 64  # tables of the log have at most 11
INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}

Value = int | float | bytes | None


class Record(NamedTuple):
    """A stored row: its row number and its values, text as bytes. Rows of an index have no row number."""

    rowid: int | None
    values: tuple[Value, ...]


class Malformed(Exception):  # noqa: N818 - never leaves this module
    """The bytes are not a valid record."""


class RawFile(Struct):
    """An open database file.

    `newer` maps a page to its position in the write-ahead log. `free` holds the free pages, which belong to no tree;
    it is empty if their list is damaged.
    """

    file: BinaryIO
    wal: BinaryIO | None
    page_bytes: int
    pages: int
    newer: dict[int, int]
    free: frozenset[int] = frozenset()

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        """Open the file together with the committed pages of its write-ahead log. Raises OSError."""
        with path.open("rb") as file:
            wal: BinaryIO | None = None
            with suppress(FileNotFoundError):
                wal = path.with_name(path.name + "-wal").open("rb")
            try:
                yield cls._of(file, wal)
            finally:
                if wal is not None:
                    wal.close()

    @classmethod
    def _of(cls, file: BinaryIO, wal: BinaryIO | None) -> Self:
        header = file.read(HEADER_BYTES)
        size = page_bytes_of(header)
        page_bytes = size or DEFAULT_PAGE_BYTES
        newer = {} if wal is None else frames(wal, page_bytes)
        pages = max([file.seek(0, 2) // page_bytes, *newer])
        raw = cls(file, wal, page_bytes, pages, newer)
        if size:
            raw.free = raw._free()
        return raw

    def page(self, number: int) -> bytes:
        """Return the bytes of a page; page numbers start at 1. Raises OSError."""
        position = self.newer.get(number)
        if position is not None and self.wal is not None:
            self.wal.seek(position)
            return self.wal.read(self.page_bytes)
        self.file.seek((number - 1) * self.page_bytes)
        return self.file.read(self.page_bytes)

    def records(self, number: int) -> Iterator[Record]:
        """Yield the readable rows on a page. Raises OSError."""
        page = self.page(number)
        if len(page) < self.page_bytes or page[0] not in WITH_ROWS:
            return
        kind = page[0]
        begin = 12 if kind == INTERIOR_INDEX else 8
        (cells,) = struct.unpack_from(">H", page, 3)
        for index in range(min(cells, (self.page_bytes - begin) // 2)):
            (at,) = struct.unpack_from(">H", page, begin + 2 * index)
            with suppress(Malformed, IndexError, struct.error):
                yield self._cell(page, at, kind)

    def _cell(self, page: bytes, at: int, kind: int) -> Record:
        rowid = None
        if kind == INTERIOR_INDEX:
            at += 4
        size, at = varint(page, at)
        if kind == LEAF_TABLE:
            rowid, at = varint(page, at)
            rowid -= (rowid >> 63) << 64
        return Record(rowid, decoded(self._payload(page, at, size, kind)))

    def _payload(self, page: bytes, at: int, size: int, kind: int) -> bytes:
        usable = self.page_bytes
        local_limit = usable - 35 if kind == LEAF_TABLE else (usable - 12) * 64 // 255 - 23
        if size <= local_limit:
            local = size
        else:
            least = (usable - 12) * 32 // 255 - 23
            local = least + (size - least) % (usable - 4)
            local = local if local <= local_limit else least
        payload = page[at : at + local]
        if len(payload) < local or size > self.pages * usable:
            raise Malformed
        if size == local:
            return payload
        (following,) = struct.unpack_from(">I", page, at + local)
        parts, rest = [payload], size - local
        while rest:
            if not 1 < following <= self.pages:
                raise Malformed
            page = self.page(following)
            (following,) = struct.unpack_from(">I", page)
            parts.append(page[4 : 4 + min(rest, usable - 4)])
            rest -= min(rest, usable - 4)
        return b"".join(parts)

    def _free(self) -> frozenset[int]:
        header = self.page(1)
        trunk, count = struct.unpack_from(">II", header, 32)
        found: set[int] = set()
        while trunk:
            if not 1 < trunk <= self.pages or trunk in found or len(found) > count:
                return frozenset()
            page = self.page(trunk)
            trunk_leaves = page[: self.page_bytes]
            following, leaves = struct.unpack_from(">II", trunk_leaves)
            if leaves > self.page_bytes // 4 - 2:
                return frozenset()
            found.add(trunk)
            found.update(struct.unpack_from(f">{leaves}I", trunk_leaves, 8))
            trunk = following
        return frozenset(found) if len(found) == count else frozenset()


def page_bytes_of(header: bytes) -> int:
    """Return the page size from the first bytes of a file; 0 if they are not the header of a database."""
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
        return 0
    (size,) = struct.unpack_from(">H", header, 16)
    size = 65_536 if size == 1 else size
    return size if size >= 512 and size & (size - 1) == 0 else 0


def frames(wal: BinaryIO, page_bytes: int) -> dict[int, int]:
    """Return, by page number, the position of the newest committed version of the page in a write-ahead log.

    The checksums of the frames are not verified, because rows have their own.
    """
    wal_bytes = wal.seek(0, 2)
    wal.seek(0)
    header = wal.read(WAL_HEADER_BYTES)
    if len(header) < WAL_HEADER_BYTES:
        return {}
    magic, _, size, _, *salts, _, _ = struct.unpack(">8I", header)
    if magic not in WAL_MAGIC or size != page_bytes:
        return {}
    newest: dict[int, int] = {}
    waiting: dict[int, int] = {}
    position = WAL_HEADER_BYTES
    while len(frame := wal.read(FRAME_HEADER_BYTES)) == FRAME_HEADER_BYTES:
        number, commit, *of_frame, _, _ = struct.unpack(">6I", frame)
        end = position + FRAME_HEADER_BYTES + page_bytes
        if of_frame != salts or not number or end > wal_bytes:
            break
        wal.seek(end)
        waiting[number] = position + FRAME_HEADER_BYTES
        position = end
        if commit:
            newest.update(waiting)
            waiting.clear()
    return newest


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Decode a variable-length integer of up to 9 bytes. Return its value and the index after it."""
    value = 0
    for index in range(at, at + 8):
        byte = data[index]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, index + 1
    return value << 8 | data[at + 8], at + 9


def decoded(payload: bytes) -> tuple[Value, ...]:
    """Decode the values of a record. Raises Malformed, IndexError or struct.error."""
    header_end, at = varint(payload, 0)
    length = len(payload)
    if header_end > length:
        raise Malformed
    body = header_end
    values: list[Value] = []
    while at < header_end:
        kind = payload[at]
        at += 1
        if kind >= 0x80:
            kind, at = varint(payload, at - 1)
        if kind >= 12:
            end = body + (kind - 12) // 2
            values.append(payload[body:end])
            body = end
        else:
            value, size = _number(payload, body, kind)
            values.append(value)
            body += size
    if at != header_end or body != length or len(values) > MAX_COLUMNS:
        raise Malformed
    return tuple(values)


def _number(payload: bytes, at: int, kind: int) -> tuple[int | float | None, int]:
    if kind == 0:
        return None, 0
    if kind == 7:
        return struct.unpack_from(">d", payload, at)[0], 8
    if kind in {8, 9}:
        return kind - 8, 0
    if kind not in INTEGER_BYTES:
        raise Malformed
    size = INTEGER_BYTES[kind]
    return int.from_bytes(payload[at : at + size], "big", signed=True), size
