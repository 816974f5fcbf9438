"""Checksums of rows: a row that changed on the disk and still decodes is not taken for the one that was written.

CRC-32 of every column that a reader uses. It finds what disks, memory and hands do by accident (all changes within 32
bits in a row, all but one in four thousand million of the others); it is no protection against somebody who may write
to the file. Text is bytes here, as SQLite stores it: what is no UTF-8 has a checksum, too.
"""

from struct import Struct, pack
from zlib import crc32

_EVENT = Struct("<qddIIB")  # offset, at, high_at, length of kind, length of ref, whether there is a body


def of_event(offset: int, kind: bytes, ref: bytes, at: float, high_at: float, body: bytes | None, txid: bytes) -> int:
    """The checksum of an event, with the txid of its whale: one that points to another whale is damaged.

    Raises struct.error or TypeError where a column is of the wrong type.
    """
    start = _EVENT.pack(offset, at, high_at, len(kind), len(ref), body is not None)
    return crc32(b"".join((start, txid, kind, ref, body or b"")))


def of_whale(txid: bytes, alert: bytes, addresses: bytes) -> int:
    """The checksum of a row of `whales`, which does not cover its number."""
    return crc32(b"".join((txid, alert, addresses)))


def of_spend(outpoint: bytes, whale: int) -> int:
    """The checksum of a row of `spends`. A whale may have thousands: one call each."""
    return crc32(outpoint, whale & 0xFFFF_FFFF)


def of_log(epoch: bytes, head: int, created_at: float) -> int:
    """The checksum of the row of `log`, which is written with each commit."""
    return crc32(epoch, crc32(pack("<qd", head, created_at)))


def of_values(*values: object) -> int:
    """The checksum of a row of `state` or `blocks`. Text may be given as str or as bytes."""
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
