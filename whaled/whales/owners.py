"""Whose an address is, for a million addresses in 21 MB: a table in one piece of memory. Pure.

Read by a process of its own (`whaled.bookfile`), taken over as it is: nothing is parsed or built on the event loop.
"""

import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from zlib import crc32

from msgspec import Struct

from whaled.errors import BookError, BookFailure, Fault
from whaled.model import OwnerType
from whaled.whales.bookkeys import Network
from whaled.whales.booklines import TYPES, LineFaultError, Lines

# Of lines that cannot be used, the first are named and the others counted: the whole text becomes one log line.
MAX_FAULTS = 20
# A table that was written by another version is not taken over: the daemon may be older than the files on the disk.
MAGIC = b"whaled2\n"
# Magic; how many addresses, owners and labels; the bits of a bucket's number; length of the labels' text; how many
# keys of each network.
HEADER = struct.Struct(f"=8sIIIII{len(Network)}I")
# What was read of an address: checksum, digest, line, owner. The checksum is quick and orders the table; by it alone
# one in 4,300 addresses would be taken for one of a million. With the 96 bits of the digest nobody can aim at that.
RECORD = struct.Struct(">I12sII")
DIGEST_BYTES = 12
# Addresses in a bucket, on average.
BUCKET = 8
CUT_SHORT = "; the file ends here, amid a line: was it cut short?"


class Owner(Struct, frozen=True):
    """Whose an address is."""

    label: str
    type: OwnerType


class Owners:
    """The owner of each address of a book. `data` is what `packed` or `to_bytes` gave; empty without it.

    Raises ValueError for anything else.
    """

    __slots__ = (
        "_bits",
        "_checks",
        "_data",
        "_digests",
        "_ends",
        "_labels",
        "_owned",
        "_starts",
        "_types",
        "labels",
        "networks",
    )

    def __init__(self, data: bytes | bytearray = b"") -> None:
        data = data or HEADER.pack(MAGIC, *bytes(5 + len(Network))) + bytes(8)
        if len(data) < HEADER.size or data[: len(MAGIC)] != MAGIC:
            raise ValueError("no table of owners of this version")
        _, count, owners, self.labels, self._bits, text_bytes, *networks = HEADER.unpack_from(data)
        self.networks: dict[Network, int] = dict(zip(Network, networks, strict=True))
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
        """The owner of an address in the form a backend writes, or of a key that `bookkeys.of_script` gives.

        None if it is not in the book.
        """
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

    @property
    def has_scripts(self) -> bool:
        """Whether public keys or scripts are in the book."""
        return self.networks[Network.SCRIPT] > 0

    def has_label(self, label: str) -> bool:
        """Whether an address has this label."""
        index = bisect_left(range(len(self._ends)), label, key=self._label)
        return index < len(self._ends) and self._label(index) == label

    def has_type(self, kind: OwnerType) -> bool:
        """Whether an owner has this type."""
        return TYPES.index(kind) in bytes(self._types)

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
    """The owners in the lines of a CSV file (`booklines.Lines`); `lines` gives them anew each time.

    Raises BookError with a fault for every line that cannot be used, the first `MAX_FAULTS` of them, or if there are
    more addresses than `limit`; `source` is the file's name in it.
    """
    found = _Reading(limit)
    for number, line in enumerate(lines(), start=1):
        found.take(number, line)
    if limit is not None and found.addresses > limit:
        problem = f"{source} has {found.addresses} addresses, {limit} are allowed: split the book or raise the limit"
        raise BookError((Fault("detection.max_book_addresses", problem),), reason=BookFailure.TOO_LARGE)
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
        self._lines = Lines()
        self._ends_lines = False
        self._networks = [0] * len(Network)
        # Where the first key of each network stands.
        self.first_lines: dict[Network, int] = {}

    def take(self, number: int, line: str) -> None:
        """A line."""
        try:
            entry = self._lines.entry(line)
        except LineFaultError as error:
            is_cut = self._ends_lines and not line.endswith("\n")
            self._blame(number, f"{error}{CUT_SHORT}" if is_cut else str(error))
            return
        finally:
            self._ends_lines = line.endswith("\n")
        if entry is None:
            return
        self.addresses += 1
        if self._limit is not None and self.addresses > self._limit:
            return  # only counted
        owner = self._owners.setdefault((entry.label, entry.type), len(self._owners))
        raw = entry.key.encode()
        record = RECORD.pack(crc32(raw), _digest(raw), number, owner)
        self._buckets[record[0]] += record
        self._networks[entry.network] += 1
        self.first_lines.setdefault(entry.network, number)

    def _blame(self, number: int, problem: str) -> None:
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
        again = Lines()
        for number, line in enumerate(lines(), start=1):
            try:
                entry = again.entry(line)
            except LineFaultError:
                continue
            if number in twice and entry is not None:
                first, known, owner = twice[number]
                here, there = (f"{label!r} ({TYPES[kind]})" for label, kind in (names[owner], names[known]))
                self._faults[number] = (
                    f"{entry.key} is {here} here and {there} in line {first}; "
                    "an address has one owner: remove one of the lines"
                )

    def raise_faults(self, source: str) -> None:
        """Raise BookError if there are any."""
        if not self._faults:
            return
        named = sorted(self._faults)[:MAX_FAULTS]
        faults = [Fault(f"line {number}", self._faults[number], source) for number in named]
        more = self._more_faults + len(self._faults) - len(named)
        if more:
            faults.append(Fault("", f"and {more} more lines cannot be used", source))
        raise BookError(tuple(faults), reason=BookFailure.FAULTS, lines=len(named) + more)

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
        header = HEADER.pack(MAGIC, len(checks), len(names), labels, bits, len(text), *self._networks)
        kinds = bytes(kind for _, kind in names)
        return Owners(b"".join((header, starts, checks, owned, ends, digests, kinds, text)))


def _digest(raw: bytes) -> bytes:
    return blake2b(raw, digest_size=DIGEST_BYTES).digest()
