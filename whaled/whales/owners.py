"""The owners of addresses: a table in one contiguous block of memory, 21 MB for a million addresses. Pure.

A separate process (`whaled.addressbook.bookfile`) builds the table, and the daemon uses it unchanged: nothing is parsed
or built on the event loop.
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

# The version of the format. A table of another version is refused: the program files on disk, which the building
# process runs, may be newer than the daemon.
MAGIC = b"whaled2\n"
# Magic; numbers of addresses, owners, labels, addresses with several labels, groups of owners, members of the groups;
# number of bits of a bucket's number; length of the labels' text and of the notes; number of keys of each network.
HEADER = struct.Struct(f"=8s9I{len(Network)}I")
# A record of an address: checksum, digest, index of its line, owner. The checksum is fast and orders the table, but by
# it alone one in 4,300 unknown addresses would match one of a million. The 96 bits of the digest prevent chance matches
# and make deliberate ones infeasible.
RECORD = struct.Struct(">I12sII")
DIGEST_BYTES = 12
# Average number of addresses in a bucket.
BUCKET = 8
# Maximum number of labels of one address. More are not useful, and memory must not grow with repetitions in a file.
MAX_LABELS = 8


class Owner(Struct, frozen=True):
    """The owner of an address."""

    label: str
    type: OwnerType


class Owners:
    """The table of the owners of each address of a book. `data` comes from `to_bytes`; without it the table is empty.

    For each address the table has the number of its owner or of a group of owners; groups are numbered after the
    owners. Raises ValueError for other data.
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
        """Return the number of addresses."""
        return len(self._checks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Owners) and other._data == self._data

    def __hash__(self) -> int:
        return hash(bytes(self._data))

    @property
    def size_bytes(self) -> int:
        """The size of the table in memory, in bytes."""
        return len(self._data)

    def to_bytes(self) -> bytes | bytearray:
        """Return the table for another process of the same version on the same machine."""
        return self._data

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks about the book: not faults, but possibly unintended."""
        return msgspec.json.decode(bytes(self._notes), type=tuple[str, ...]) if self._notes else ()

    def get(self, key: str) -> Owner | None:
        """Return the first owner of an address in the backend's form, or of a key from `bookkeys.of_script`.

        None if it is not in the book.
        """
        number = self._number(key)
        if number is None:
            return None
        owners = len(self._ends)
        return self._owner(number if number < owners else self._members[self._group(number - owners)[0]])

    def all(self, key: str) -> tuple[Owner, ...]:
        """Return all owners of an address in the order of their lines."""
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
        """True if the book has public keys or scripts."""
        return self.networks[Network.SCRIPT] > 0

    def has_label(self, label: str) -> bool:
        """Return whether an address has this label."""
        index = bisect_left(range(len(self._ends)), label, key=self._label)
        return index < len(self._ends) and self._label(index) == label

    def has_type(self, kind: OwnerType) -> bool:
        """Return whether an owner has this type."""
        return TYPES.index(kind) in bytes(self._types)

    def each_label(self) -> Iterator[str]:
        """Yield every label once, in sorted order."""
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
    """Return the size of a book in words."""
    addresses, labels = len(owners), owners.labels
    several = f", {owners.several:,} of them with several labels" if owners.several else ""
    return f"{addresses:,} address{'es' * (addresses != 1)} of {labels:,} owner{'s' * (labels != 1)}{several}"


class Packer:
    """Builds a table from entries. Records are grouped by their first byte, so that few are sorted at a time."""

    def __init__(self) -> None:
        self._buckets = [bytearray() for _ in range(256)]
        self._owners: dict[tuple[str, int], int] = {}
        self._label_of: list[str] = []
        self._networks = [0] * len(Network)
        # The number of labels left out because their address has MAX_LABELS others.
        self.left_out = 0
        # The number of entries that repeat a label of an address with another type.
        self.contradictions = 0

    def add(self, place: int, entry: Entry) -> None:
        """Add an address and its owner. The first owner of an address is the one with the lowest `place`."""
        owner = self._owners.setdefault((entry.label, entry.type), len(self._owners))
        raw = entry.key.encode()
        record = RECORD.pack(crc32(raw), _digest(raw), place, owner)
        self._buckets[record[0]] += record
        self._networks[entry.network] += 1

    def addresses(self) -> int:
        """Return the number of distinct addresses added."""
        size, key = RECORD.size, RECORD.size - 8
        return sum(
            len({bytes(bucket[at : at + key]) for at in range(0, len(bucket), size)}) for bucket in self._buckets
        )

    def packed(self, notes: Callable[["Packer"], Sequence[str]] = lambda _: ()) -> Owners:
        """Return the table; the packer cannot be used afterwards. `notes` is called once the counters are final."""
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
        remarks = notes(self)
        encoded = msgspec.json.encode(remarks) if remarks else b""
        sizes = (len(checks), len(names), labels, several, len(groups), len(members), bits, len(text), len(encoded))
        header = HEADER.pack(MAGIC, *sizes, *self._networks)
        kinds = bytes(kind for _, kind in names)
        parts = (header, starts, checks, owned, ends, group_ends, members, digests, kinds, text, encoded)
        return Owners(b"".join(parts))

    def _by_key(self) -> Iterator[tuple[tuple[int, bytes], list[int]]]:
        """Yield the checksum and digest of each address, in order, with its owners in the order of their places."""
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
    """Return the end of each label in the text, the text, and the number of distinct labels."""
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
