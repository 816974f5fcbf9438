"""Whose an address is, for a million addresses in 21 MB: a table in one piece of memory. Pure.

Read by a process of its own (`whaled.bookfile`), taken over as it is: nothing is parsed or built on the event loop.
"""

import csv
import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from zlib import crc32

from msgspec import Struct

from whaled.errors import ConfigError, Fault
from whaled.model import OwnerType
from whaled.whales import addresses

COLUMNS = ("label", "address", "type")
MAX_LABEL = 64
# Of lines that cannot be used, the first are named and the others counted: the whole text becomes one log line.
MAX_FAULTS = 100
# A table that was written by another version is not taken over: the daemon may be older than the files on the disk.
MAGIC = b"whaled1\n"
# Magic; how many addresses, owners and labels; the bits of a bucket's number; length of the labels' text.
HEADER = struct.Struct("=8sIIIII")
# What was read of an address: checksum, digest, line, owner. The checksum is quick and orders the table; by it alone
# one in 4,300 addresses would be taken for one of a million. With the 96 bits of the digest nobody can aim at that.
RECORD = struct.Struct(">I12sII")
DIGEST_BYTES = 12
# Addresses in a bucket, on average.
BUCKET = 8
TYPES = tuple(OwnerType)


class Owner(Struct, frozen=True):
    """Whose an address is."""

    label: str
    type: OwnerType


class Owners:
    """The owner of each address of a book. `data` is what `packed` or `to_bytes` gave; empty without it.

    Raises ValueError for anything else.
    """

    __slots__ = ("_bits", "_checks", "_data", "_digests", "_ends", "_labels", "_owned", "_starts", "_types", "labels")

    def __init__(self, data: bytes | bytearray = b"") -> None:
        data = data or HEADER.pack(MAGIC, 0, 0, 0, 0, 0) + bytes(8)
        if len(data) < HEADER.size or data[: len(MAGIC)] != MAGIC:
            raise ValueError("no table of owners of this version")
        _, count, owners, self.labels, self._bits, text_bytes = HEADER.unpack_from(data)
        sizes = (4 * (2**self._bits + 1), 4 * count, 4 * count, 4 * owners, DIGEST_BYTES * count, owners, text_bytes)
        if len(data) != HEADER.size + sum(sizes):
            raise ValueError("a table of owners that is not whole")
        parts: list[memoryview] = []
        begin = HEADER.size
        for size in sizes:
            parts.append(memoryview(data)[begin : begin + size])
            begin += size
        self._data = data
        self._starts, self._checks, self._owned, self._ends = (part.cast("I") for part in parts[:4])
        self._digests, self._types, self._labels = parts[4:]

    def __len__(self) -> int:
        """Addresses."""
        return len(self._checks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Owners) and other._data == self._data

    def __hash__(self) -> int:
        return hash(bytes(self._data))

    @property
    def size_bytes(self) -> int:
        """Memory that the table takes."""
        return len(self._data)

    def to_bytes(self) -> bytes | bytearray:
        """The table, for another process of this version on this machine."""
        return self._data

    def get(self, address: str) -> Owner | None:
        """The owner of an address in the form a backend writes, None if it is not in the book."""
        checks = self._checks
        if not checks:
            return None
        raw = address.encode(errors="surrogatepass")
        check = crc32(raw)
        bucket = check >> (32 - self._bits)
        index, end = (
            bisect_left(checks, check, self._starts[bucket], self._starts[bucket + 1]),
            self._starts[bucket + 1],
        )
        while index < end and checks[index] == check:
            if self._digests[DIGEST_BYTES * index : DIGEST_BYTES * (index + 1)] == _digest(raw):
                return self._owner(self._owned[index])
            index += 1
        return None

    def has_label(self, label: str) -> bool:
        """Whether an address has this label."""
        index = bisect_left(range(len(self._ends)), label, key=self._label)
        return index < len(self._ends) and self._label(index) == label

    def each_label(self) -> Iterator[str]:
        """Every label once, in order."""
        before = None
        for index in range(len(self._ends)):
            label = self._label(index)
            if label != before:
                yield label
            before = label

    def _label(self, index: int) -> str:
        begin = self._ends[index - 1] if index else 0
        return str(self._labels[begin : self._ends[index]], "utf-8")

    def _owner(self, index: int) -> Owner:
        return Owner(self._label(index), TYPES[self._types[index]])


def parse(lines: Callable[[], Iterable[str]], source: str, *, limit: int | None = None) -> Owners:
    """The owners in lines of CSV with three columns, `label,address,type`; `lines` gives them anew each time.

    A first line with the names of the columns, empty lines and lines that begin with # are passed over. Raises
    ConfigError with a fault for every line that cannot be used, the first `MAX_FAULTS` of them, or if there are more
    than `limit` addresses; `source` is the file's name in it.
    """
    found = _Reading(limit)
    for number, line in enumerate(lines(), start=1):
        found.take(number, line.removeprefix("\ufeff") if number == 1 else line)
    if limit is not None and found.addresses > limit:
        problem = f"{source} has {found.addresses} addresses, {limit} are allowed: split the book or raise the limit"
        raise ConfigError((Fault("detection.max_book_addresses", problem),))
    records = found.sorted()
    found.compare(records, lines)
    found.raise_faults(source)
    return found.packed(records)


class _Reading:
    """A book as far as it was read. Records are kept by their first byte, so that a few are sorted at a time."""

    def __init__(self, limit: int | None) -> None:
        self.addresses = 0
        self._limit = limit
        self._buckets = [bytearray() for _ in range(256)]
        self._owners: dict[tuple[str, int], int] = {}
        self._faults: dict[int, str] = {}
        self._more_faults = 0
        self._may_be_header = True

    def take(self, number: int, line: str) -> None:
        """A line."""
        line = line.strip()
        if not line or line.startswith("#"):
            return
        if self._limit is not None and self.addresses >= self._limit:
            self.addresses += 1  # only counted
            return
        try:
            cells = _cells(line)
        except csv.Error as error:
            self._blame(number, f"not CSV: {error}")
            return
        if self._may_be_header:
            self._may_be_header = False
            if tuple(cell.lower() for cell in cells) == COLUMNS:
                return
        problem = _fault_in(cells)
        if problem is not None:
            self._blame(number, problem)
            return
        label, address, kind = cells
        owner = self._owners.setdefault((label, TYPES.index(OwnerType(kind.lower()))), len(self._owners))
        raw = addresses.canonical(address).encode()
        record = RECORD.pack(crc32(raw), _digest(raw), number, owner)
        self._buckets[record[0]] += record
        self.addresses += 1

    def _blame(self, number: int, problem: str) -> None:
        self._may_be_header = False
        if len(self._faults) < MAX_FAULTS:
            self._faults[number] = problem
        else:
            self._more_faults += 1

    def sorted(self) -> bytearray:
        """All records in order."""
        found = bytearray()
        for index, bucket in enumerate(self._buckets):
            size = RECORD.size
            found += b"".join(sorted(bytes(bucket[at : at + size]) for at in range(0, len(bucket), size)))
            self._buckets[index] = bytearray()
        return found

    def compare(self, records: bytearray, lines: Callable[[], Iterable[str]]) -> None:
        """Find addresses that have two owners."""
        key_bytes = 4 + DIGEST_BYTES
        twice: dict[int, tuple[int, int, int]] = {}
        before, first, known = b"", 0, 0
        for at in range(0, len(records), RECORD.size):
            key = records[at : at + key_bytes]
            _, _, number, owner = RECORD.unpack_from(records, at)
            if key != before:
                before, first, known = bytes(key), number, owner
            elif owner != known:
                twice[number] = (first, known, owner)
        if not twice:
            return
        names = list(self._owners)
        for number in sorted(twice)[MAX_FAULTS:]:
            del twice[number]
            self._more_faults += 1
        for number, line in enumerate(lines(), start=1):
            if number in twice:
                first, known, owner = twice[number]
                here, there = (f"{label!r} ({TYPES[kind]})" for label, kind in (names[owner], names[known]))
                self._faults[number] = (
                    f"{addresses.canonical(_cells(line.strip())[1])} is {here} here and {there} in line {first}; "
                    "an address has one owner: remove one of the lines"
                )

    def raise_faults(self, source: str) -> None:
        """Raise ConfigError if there are any."""
        if not self._faults:
            return
        named = sorted(self._faults)[:MAX_FAULTS]
        faults = [Fault(f"line {number}", self._faults[number], source) for number in named]
        more = self._more_faults + len(self._faults) - len(named)
        if more:
            faults.append(Fault("", f"{more} more lines cannot be used", source))
        raise ConfigError(tuple(faults))

    def packed(self, records: bytearray) -> Owners:
        """The table of these records. Those of one address and owner are one."""
        names = sorted(self._owners)
        places = array("I", bytes(4 * len(names)))
        for place, name in enumerate(names):
            places[self._owners[name]] = place
        checks, owned, digests = array("I"), array("I"), bytearray()
        before = (-1, b"")
        for check, digest, _, owner in RECORD.iter_unpack(records):
            if (check, digest) != before:
                checks.append(check)
                owned.append(places[owner])
                digests += digest
                before = (check, digest)
        bits = max(0, (len(checks) // BUCKET).bit_length() - 1)
        starts = array("I", (bisect_left(checks, bucket << (32 - bits)) for bucket in range(2**bits)))
        starts.append(len(checks))
        text = bytearray()
        ends = array("I")
        labels, last = 0, ""
        for label, _ in names:
            labels += label != last
            last = label
            text += label.encode()
            ends.append(len(text))
        header = HEADER.pack(MAGIC, len(checks), len(names), labels, bits, len(text))
        kinds = bytes(kind for _, kind in names)
        return Owners(b"".join((header, starts, checks, owned, ends, digests, kinds, text)))


def _digest(raw: bytes) -> bytes:
    return blake2b(raw, digest_size=DIGEST_BYTES).digest()


def _cells(line: str) -> list[str]:
    """The columns of a line. Raises csv.Error."""
    if '"' not in line:  # csv would say the same, slower
        return [cell.strip() for cell in line.split(",")]
    return [cell.strip() for cell in next(csv.reader([line], strict=True, skipinitialspace=True))]


def _fault_in(cells: list[str]) -> str | None:
    """What is wrong with a line, None if nothing is."""
    if len(cells) != len(COLUMNS):
        return f"expected 3 columns, label,address,type, found {len(cells)}; put a label with a comma in quotes"
    label, address, kind = cells
    if not label or len(label) > MAX_LABEL or not label.isprintable():
        return f"label must be 1 to {MAX_LABEL} printable characters, found {label[: MAX_LABEL + 1]!r}"
    problem = addresses.fault_in(address)
    if problem is not None:
        return f"address {address[:100]!r} {problem}"
    if kind.lower() not in TYPES:
        return f"type must be one of {', '.join(OwnerType)}; found {kind[:MAX_LABEL]!r}"
    return None
