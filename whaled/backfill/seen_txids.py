"""A compact set of txids."""

import sys
from collections.abc import Iterable

from whaled.tables import Tables

# More than any mempool holds at a node's default of 300 MB. The next mempool comparison finds what is forgotten beyond.
SEEN_LIMIT = 1_000_000
HASH_BITS_LEFT_OUT = 4


class SeenTxids:
    """Transactions that have been examined, at most `SEEN_LIMIT`; beyond, all are forgotten.

    Each is kept as 60 bits of its hash: 32 bytes and a slot in the table instead of a text of 64 letters. Two of a
    million collide in one of 10^6 mempools.
    """

    def __init__(self) -> None:
        self._hashes: set[int] = set()
        self._tables = Tables(self._hashes)

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, txid: str) -> bool:
        return _key(txid) in self._hashes

    @property
    def table_bytes(self) -> int:
        """Size of the table in bytes, without the hashes in it."""
        return sys.getsizeof(self._hashes)

    def add(self, txids: Iterable[str]) -> None:
        """Add transactions that have been examined."""
        self._hashes.update(map(_key, txids))
        if len(self._hashes) > SEEN_LIMIT:
            self._hashes.clear()
        self._tables.shrink()

    def discard(self, txids: Iterable[str]) -> None:
        """Remove transactions, so that they are examined if they return."""
        self._hashes.difference_update(map(_key, txids))
        self._tables.shrink()

    def compare(self, mempool: Iterable[str]) -> list[str]:
        """Remove what is not in the mempool. Returns the transactions of the mempool that have not been examined."""
        here: set[int] = set()
        unseen: list[str] = []
        for txid in mempool:
            key = _key(txid)
            if key in self._hashes:
                here.add(key)
            else:
                unseen.append(txid)
        # Not intersection_update(here): that keeps the new integers of `here` instead of the old ones. They lie among
        # the texts of the whole mempool, and would hold those pages of Python's allocator when the texts are freed.
        self._hashes.difference_update(self._hashes - here)
        self._tables.shrink()
        return unseen


def _key(txid: str) -> int:
    # Python stores integers of up to 60 bits in 32 bytes, and larger ones in 48.
    return hash(txid) >> HASH_BITS_LEFT_OUT
