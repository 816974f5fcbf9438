"""Whose an address is, for a million addresses in 21 MB: a table in one piece of memory. Pure.

Read by a process of its own (`whaled.bookfile`), taken over as it is: nothing is parsed or built on the event loop.
"""

import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from zlib import crc32

import msgspec
from msgspec import Struct

from whaled.model import OwnerType
from whaled.whales.bookkeys import Network
from whaled.whales.booklines import TYPES, Entry

# A table that was written by another version is not taken over: the daemon may be older than the files on the disk.
MAGIC = b"whaled2\n"
# Magic; how many addresses, owners, labels, addresses with several labels, groups of owners, members of these; the bits
# of a bucket's number; length of the labels' text and of the notes; how many keys of each network.
HEADER = struct.Struct(f"=8s9I{len(Network)}I")
# What was read of an address: checksum, digest, place among all lines, owner. The checksum is quick and orders the
# table; by it alone one in 4,300 addresses would be taken for one of a million. With the 96 bits of the digest nobody
# can aim at that.
RECORD = struct.Struct(">I12sII")
DIGEST_BYTES = 12
# Addresses in a bucket, on average.
BUCKET = 8
# Labels of one address. More are no help to anybody, and memory must not depend on what a file repeats.
MAX_LABELS = 8


class Owner(Struct, frozen=True):
    """Whose an address is."""

    label: str
    type: OwnerType


class Owners:
    """The owners of each address of a book. `data` is what `packed` or `to_bytes` gave; empty without it.

    An address has the number of its owner, or of a group of owners, which come after the owners. Raises ValueError for
    other data.
    """

    __slots__ = (
        "_bits",
        "_checks",
        "_data",
        "_digests",
        "_ends",
        "_group_ends",
        "_labels",
        "_members",
        "_notes",
        "_owned",
        "_starts",
        "_types",
        "labels",
        "networks",
        "several",
    )

    def __init__(self, data: bytes | bytearray = b"") -> None:
        data = data or HEADER.pack(MAGIC, *bytes(9 + len(Network))) + bytes(8)
        if len(data) < HEADER.size or data[: len(MAGIC)] != MAGIC:
            raise ValueError("no table of owners of this version")
        fields = HEADER.unpack_from(data)
        _, count, owners, self.labels, self.several, groups, members, self._bits, text_bytes, note_bytes = fields[:10]
        self.networks: dict[Network, int] = dict(zip(Network, fields[10:], strict=True))
        words = (2**self._bits + 1, count, count, owners, groups, members)
        sizes = (*(4 * size for size in words), DIGEST_BYTES * count, owners, text_bytes, note_bytes)
        if len(data) != HEADER.size + sum(sizes):
            raise ValueError("a table of owners that is not whole")
        parts: list[memoryview] = []
        begin = HEADER.size
        for size in sizes:
            parts.append(memoryview(data)[begin : begin + size])
            begin += size
        self._data = data
        tables = (part.cast("I") for part in parts[:6])
        self._starts, self._checks, self._owned, self._ends, self._group_ends, self._members = tables
        self._digests, self._types, self._labels, self._notes = parts[6:]

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

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks about the book: no faults, but perhaps not meant."""
        return msgspec.json.decode(bytes(self._notes), type=tuple[str, ...]) if self._notes else ()

    def get(self, key: str) -> Owner | None:
        """The first owner of an address in the form a backend writes, or of a key that `bookkeys.of_script` gives.

        None if it is not in the book.
        """
        number = self._number(key)
        if number is None:
            return None
        owners = len(self._ends)
        return self._owner(number if number < owners else self._members[self._group(number - owners)[0]])

    def all(self, key: str) -> tuple[Owner, ...]:
        """All owners of an address, the first one first."""
        number = self._number(key)
        if number is None:
            return ()
        owners = len(self._ends)
        if number < owners:
            return (self._owner(number),)
        begin, end = self._group(number - owners)
        return tuple(self._owner(member) for member in self._members[begin:end])

    def _number(self, key: str) -> int | None:
        checks = self._checks
        if not checks:
            return None
        raw = key.encode(errors="surrogatepass")
        check = crc32(raw)
        bucket = check >> (32 - self._bits)
        end = self._starts[bucket + 1]
        index = bisect_left(checks, check, self._starts[bucket], end)
        while index < end and checks[index] == check:
            if self._digests[DIGEST_BYTES * index : DIGEST_BYTES * (index + 1)] == _digest(raw):
                return self._owned[index]
            index += 1
        return None

    def _group(self, group: int) -> tuple[int, int]:
        return self._group_ends[group - 1] if group else 0, self._group_ends[group]

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


def summary(owners: Owners) -> str:
    """How much is in a book, in words."""
    addresses, labels = len(owners), owners.labels
    several = f", {owners.several:,} of them with several labels" if owners.several else ""
    return f"{addresses:,} address{'es' * (addresses != 1)} of {labels:,} owner{'s' * (labels != 1)}{several}"


class Packer:
    """Makes a table of what was read. Records are kept by their first byte, so that a few are sorted at a time."""

    def __init__(self) -> None:
        self._buckets = [bytearray() for _ in range(256)]
        self._owners: dict[tuple[str, int], int] = {}
        self._label_of: list[str] = []
        self._networks = [0] * len(Network)
        # Labels beyond MAX_LABELS that were left out.
        self.left_out = 0
        # Labels that an address has with a second type.
        self.contradictions = 0

    def add(self, place: int, entry: Entry) -> None:
        """An address and its owner. Of several owners of an address the one with the lowest place is the first."""
        owner = self._owners.setdefault((entry.label, entry.type), len(self._owners))
        raw = entry.key.encode()
        record = RECORD.pack(crc32(raw), _digest(raw), place, owner)
        self._buckets[record[0]] += record
        self._networks[entry.network] += 1

    def addresses(self) -> int:
        """How many addresses were added, each counted once."""
        size, key = RECORD.size, RECORD.size - 8
        return sum(
            len({bytes(bucket[at : at + key]) for at in range(0, len(bucket), size)}) for bucket in self._buckets
        )

    def packed(self, notes: Callable[["Packer"], Sequence[str]] = lambda _: ()) -> Owners:
        """The table, which ends the use of this. `notes` is called when all else is known."""
        names = sorted(self._owners)
        places = array("I", bytes(4 * len(names)))
        for place, name in enumerate(names):
            places[self._owners[name]] = place
        self._label_of = [label for label, _ in self._owners]
        checks, owned, digests = array("I"), array("I"), bytearray()
        groups: dict[tuple[int, ...], int] = {}
        several = 0
        for (check, digest), found in self._by_key():
            owners = self._kept(found)
            checks.append(check)
            digests += digest
            if len(owners) == 1:
                owned.append(places[owners[0]])
            else:
                several += 1
                group = tuple(places[owner] for owner in owners)
                owned.append(len(names) + groups.setdefault(group, len(groups)))
        bits = max(0, (len(checks) // BUCKET).bit_length() - 1)
        starts = array("I", (bisect_left(checks, bucket << (32 - bits)) for bucket in range(2**bits)))
        starts.append(len(checks))
        ends, text, labels = _texts(names)
        group_ends, members = array("I"), array("I")
        for group in groups:
            members.extend(group)
            group_ends.append(len(members))
        told = notes(self)
        remarks = msgspec.json.encode(told) if told else b""
        sizes = (len(checks), len(names), labels, several, len(groups), len(members), bits, len(text), len(remarks))
        header = HEADER.pack(MAGIC, *sizes, *self._networks)
        kinds = bytes(kind for _, kind in names)
        parts = (header, starts, checks, owned, ends, group_ends, members, digests, kinds, text, remarks)
        return Owners(b"".join(parts))

    def _by_key(self) -> Iterator[tuple[tuple[int, bytes], list[int]]]:
        """Checksum and digest of each address, in order, with its owners by their places."""
        size = RECORD.size
        key: tuple[int, bytes] | None = None
        owners: list[int] = []
        for index, bucket in enumerate(self._buckets):
            records = sorted(bytes(bucket[at : at + size]) for at in range(0, len(bucket), size))
            self._buckets[index] = bytearray()
            for check, digest, _, owner in map(RECORD.unpack, records):
                if key != (check, digest):
                    if key is not None:
                        yield key, owners
                    key, owners = (check, digest), [owner]
                else:
                    owners.append(owner)
        if key is not None:
            yield key, owners

    def _kept(self, found: list[int]) -> Sequence[int]:
        if len(found) == 1:
            return found
        owners: dict[str, int] = {}
        for owner in found:
            label = self._label_of[owner]
            first = owners.setdefault(label, owner)
            self.contradictions += first != owner
        self.left_out += max(0, len(owners) - MAX_LABELS)
        return list(owners.values())[:MAX_LABELS]


def _texts(names: Sequence[tuple[str, int]]) -> tuple["array[int]", bytearray, int]:
    """Where each label ends, their text, and how many there are."""
    text, ends = bytearray(), array("I")
    labels, last = 0, ""
    for label, _ in names:
        labels += label != last
        last = label
        text += label.encode()
        ends.append(len(text))
    return ends, text, labels


def _digest(raw: bytes) -> bytes:
    return blake2b(raw, digest_size=DIGEST_BYTES).digest()
