"""Checksums of rows, which detect a row that changed on the disk although it still decodes.

The checksum is the CRC-32 of every column that a reader uses. It detects accidental changes by disks, memory and manual
edits: all changes within 32 consecutive bits, and all but one in 2^32 of the others. It does not protect against an
attacker who can write to the file. Text is passed as bytes, as SQLite stores it, so invalid UTF-8 has a checksum too.
"""

from struct import Struct, pack
from zlib import crc32

_EVENT = Struct("<qddIIB")  # offset, at, high_at, length of kind, length of ref, 1 if there is a body


def of_event(
    offset: int, kind: bytes, ref: bytes, repeat: int, at: float, high_at: float, body: bytes | None, txid: bytes
) -> int:  # fmt: skip
    """Return the checksum of an event. It covers the txid of its whale: an event linked to another whale is damaged.

    Raises struct.error or TypeError if a column has the wrong type.
    """
    if repeat != 1:
        ref = numbered(ref, repeat)
    start = _EVENT.pack(offset, at, high_at, len(kind), len(ref), body is not None)
    return crc32(b"".join((start, txid, kind, ref, body or b"")))


def numbered(ref: bytes, repeat: int) -> bytes:
    """Return ref and repeat number as one text, "ref#2": the form in which versions before 5 stored them.

    Checksums cover this form, so those of older rows are valid still.
    """
    return ref if repeat == 1 else b"%b#%d" % (ref, repeat)


def of_whale(txid: bytes, alert: bytes, addresses: bytes) -> int:
    """Return the checksum of a row of `whales`. It does not cover the row number."""
    return crc32(b"".join((txid, alert, addresses)))


def of_spend(outpoint: bytes, whale: int) -> int:
    """Return the checksum of a row of `spends`. A single CRC call: a whale may have thousands of these rows."""
    return crc32(outpoint, whale & 0xFFFF_FFFF)


def of_log(epoch: bytes, head: int, created_at: float) -> int:
    """Return the checksum of the row of `log`, which every commit rewrites."""
    return crc32(epoch, crc32(pack("<qd", head, created_at)))


def of_values(*values: object) -> int:
    """Return the checksum of a row of `state` or `blocks`. Text may be str or bytes."""
    crc = 0
    for value in values:
        if isinstance(value, int | float):
            data = repr(float(value)).encode()
        elif isinstance(value, str):
            data = value.encode()
        else:
            data = value if isinstance(value, bytes) else b""
        crc = crc32(data, crc32(pack("<BI", value is None, len(data)), crc))
    return crc
