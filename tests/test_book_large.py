"""An address book of a million lines: time and memory, in the process that reads it."""

import resource
import sys
import time
from pathlib import Path

import pytest
from book_kit import address

from whaled.addresses import base58check
from whaled.config.sections import Detection
from whaled.files import read_address_book_apart
from whaled.model import OwnerType
from whaled.whales.owners import Owner

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COUNT = 1_000_000
# A million take 18 s of CPU where one core is free; a machine may be three times as slow.
CPU_LIMIT_S = 60.0
READER_LIMIT_BYTES = 256 * 1024**2


def write_book(path: Path, count: int) -> None:
    """Every tenth address has a second label."""
    kinds = list(OwnerType)
    with path.open("w") as file:
        file.write("label,address,type,source,date\n")
        for number in range(count):
            file.write(
                f"Owner {number % 40},{base58check(0, number.to_bytes(20))},{kinds[number % 8]},a list,2026-01-02\n"
            )
            if number % 10 == 0:
                file.write(f"Hot wallet {number % 3},{base58check(0, number.to_bytes(20))},exchange,another,\n")


async def test_a_million_addresses_are_read_in_bounded_time_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "book.csv"
    write_book(path, COUNT)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    book = await read_address_book_apart(Detection(address_book=(str(path),), max_book_addresses=2 * COUNT))
    after, took_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{took_s:.1f} s, {cpu_s:.1f} s of CPU, reader {after.ru_maxrss / 1024:.0f} MiB", file=sys.stderr)
    assert (len(book.owners), book.owners.several, book.owners.labels) == (COUNT, COUNT // 10, 43)
    assert 20 < book.owners.size_bytes / COUNT < 22
    assert cpu_s < CPU_LIMIT_S
    assert after.ru_maxrss * 1024 < READER_LIMIT_BYTES
    assert book.owners.get(address(999_999)) == Owner("Owner 39", list(OwnerType)[999_999 % 8])
    assert [owner.label for owner in book.owners.all(address(999_990))] == ["Owner 30", "Hot wallet 0"]
