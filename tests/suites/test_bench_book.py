"""The benchmark of the address book: what it writes is a book, and what it finds is there."""

import asyncio
import os
import sys
from pathlib import Path

from bench.book import peak_mib, readers, write_book
from kit.processes import child_of
from whaled.whales.labels import AddressBook


def test_the_written_book_has_the_requested_size(tmp_path: Path) -> None:
    path = tmp_path / "book.csv"
    write_book(path, 500, 40)
    book = AddressBook.parse(path.read_text(), str(path)).owners
    assert (len(book), book.labels) == (500, 40)


async def test_the_process_that_reads_is_found_with_its_memory() -> None:
    assert readers(os.getpid()) == []
    assert peak_mib(2**30) == 0
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import sys; sys.stdin.read()",
        "whaled.addressbook.bookfile",
        stdin=asyncio.subprocess.PIPE,
    )
    try:
        assert await child_of(os.getpid(), "whaled.addressbook.bookfile") == child.pid
        assert readers(os.getpid()) == [child.pid]
        assert peak_mib(child.pid) > 1
    finally:
        child.kill()
        await child.wait()
