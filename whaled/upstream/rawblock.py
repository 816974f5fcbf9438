"""A block as the network sends it, read for what its transactions spend. Pure.

Serialisation as in BIP 144; the txid is the double SHA-256 of a transaction without its witnesses.
"""

from collections.abc import Iterable
from hashlib import sha256

HEADER_BYTES = 80
# Of a transaction, at least: version, two counts, lock time.
LEAST_TRANSACTION_BYTES = 10
_SIZES = {0xFD: 2, 0xFE: 4, 0xFF: 8}


class BlockError(ValueError):
    """Bytes that are no block."""


def spenders_in(raw: bytes, outpoints: Iterable[str]) -> dict[str, str]:
    """The transactions of a block that spend one of these outpoints (`model.outpoint`): its txid by outpoint.

    Raises BlockError. A search through the bytes comes first: nearly always nothing is found, and 4 MB take a
    millisecond an outpoint that way.
    """
    wanted = {key: name for name in outpoints if (key := _key(name)) is not None and key in raw}
    return _read(raw, wanted) if wanted else {}


def _key(name: str) -> bytes | None:
    """An outpoint as a block has it."""
    txid, _, vout = name.partition(":")
    try:
        return bytes.fromhex(txid)[::-1] + int(vout).to_bytes(4, "little")
    except (ValueError, OverflowError):
        return None


class _Cursor:
    """A place in the block. Reading beyond the end is a BlockError."""

    def __init__(self, raw: bytes, at: int) -> None:
        self.raw = raw
        self.at = at

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.raw):
            raise BlockError(f"{len(self.raw)} bytes end within a transaction")
        taken = self.raw[self.at : end]
        self.at = end
        return taken

    def number(self) -> int:
        first = self.take(1)[0]
        return first if first < 0xFD else int.from_bytes(self.take(_SIZES[first]), "little")

    def skip(self) -> None:
        """A length and as many bytes."""
        self.take(self.number())


def _read(raw: bytes, wanted: dict[bytes, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    cursor = _Cursor(raw, HEADER_BYTES)
    count = cursor.number()
    if count > len(raw) // LEAST_TRANSACTION_BYTES:
        raise BlockError(f"{count} transactions in {len(raw)} bytes")
    for _ in range(count):
        txid, spent = _transaction(cursor)
        for key in spent:
            if key in wanted:
                found[wanted[key]] = txid
    return found


def _transaction(cursor: _Cursor) -> tuple[str, list[bytes]]:
    version = cursor.take(4)
    has_witness = cursor.raw[cursor.at : cursor.at + 2] == b"\x00\x01"
    if has_witness:
        cursor.take(2)
    begin = cursor.at
    spent: list[bytes] = []
    for _ in range(cursor.number()):
        spent.append(cursor.take(36))
        cursor.skip()
        cursor.take(4)
    for _ in range(cursor.number()):
        cursor.take(8)
        cursor.skip()
    middle = cursor.raw[begin : cursor.at]
    if has_witness:
        for _ in spent:
            for _ in range(cursor.number()):
                cursor.skip()
    digest = sha256(sha256(version + middle + cursor.take(4)).digest()).digest()
    return digest[::-1].hex(), spent
