"""An address book of a million lines: time and memory, in the process that reads it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kit.paths import TESTS
from whaled.addresses import base58check
from whaled.model import OwnerType

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

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


# In a process of its own: the kernel's peaks of children are those of the largest one that a process ever had.
READ = """
import asyncio, json, resource, sys
from kit.books import address
from whaled.config.sections import DetectionSettings
from whaled.addressbook.loading import read_address_book_apart

path, count = sys.argv[1], int(sys.argv[2])
book = asyncio.run(read_address_book_apart(DetectionSettings(address_book=(path,), max_book_addresses=2 * count)))
used, owners = resource.getrusage(resource.RUSAGE_CHILDREN), book.owners
first = owners.get(address(999_999))
print(json.dumps({
    "counts": [len(owners), owners.several, owners.labels],
    "bytes_each": owners.size_bytes / count,
    "cpu_s": used.ru_utime + used.ru_stime,
    "peak_bytes": used.ru_maxrss * 1024,
    "first": [first.label, first.type],
    "all": [owner.label for owner in owners.all(address(999_990))],
}))
"""


def test_a_million_addresses_are_read_in_bounded_time_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "book.csv"
    write_book(path, COUNT)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path), str(COUNT)],
        cwd=TESTS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    cpu_s, peak_bytes = found["cpu_s"], found["peak_bytes"]
    print(f"{time.monotonic() - began:.1f} s, {cpu_s:.1f} s of CPU, reader {peak_bytes >> 20} MiB", file=sys.stderr)
    assert found["counts"] == [COUNT, COUNT // 10, 43]
    assert 20 < found["bytes_each"] < 22
    assert cpu_s < CPU_LIMIT_S
    assert peak_bytes < READER_LIMIT_BYTES
    assert found["first"] == ["Owner 39", list(OwnerType)[999_999 % 8]]
    assert found["all"] == ["Owner 30", "Hot wallet 0"]
