"""The address book's file, read here and by a process of its own: the same comes of both."""

import asyncio
import io
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from book_kit import address, book
from processes import child_of, is_there

from whaled import bookfile, files
from whaled.bookfile import FAULTS, HEAD, MAX_LINE, TABLE, taken
from whaled.config.sections import Detection, WatchRule
from whaled.errors import ConfigError
from whaled.files import SMALL_BYTES, read_address_book, read_address_book_apart
from whaled.whales.labels import AddressBook
from whaled.whales.owners import Owners

Read = Callable[[Detection], Awaitable[AddressBook]]


async def here(settings: Detection) -> AddressBook:
    return read_address_book(settings)


@pytest.fixture(params=[here, read_address_book_apart])
def read(request: pytest.FixtureRequest) -> Read:
    found: Read = request.param
    return found


def written(directory: Path, lines: list[str], ending: str = "\n") -> Path:
    path = directory / "book.csv"
    path.write_text(ending.join([*lines, ""]))
    return path


async def refused(read: Read, path: Path, **settings: object) -> list[str]:
    with pytest.raises(ConfigError) as error:
        await read(Detection(address_book=str(path), **settings))  # type: ignore[arg-type]
    return [str(fault) for fault in error.value.faults]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
async def test_a_large_book_is_read_whole(tmp_path: Path, read: Read, ending: str) -> None:
    path = written(tmp_path, book(1_000), ending)
    assert path.stat().st_size > SMALL_BYTES
    found = await read(Detection(address_book=str(path)))
    assert found == AddressBook.parse("\n".join(book(1_000)), "book.csv")


async def test_a_book_that_is_not_configured_is_empty(read: Read) -> None:
    assert not (await read(Detection())).owners


async def test_what_is_wrong_is_named_with_file_and_line(tmp_path: Path, read: Read) -> None:
    lines = [*book(1_000), "x", f"Other,{address(0)},own"]
    path = written(tmp_path, lines)
    found = await refused(read, path)
    assert found[0] == (
        f"{path}: line 1001: expected 3 columns, label,address,type, found 1; put a label with a comma in quotes"
    )
    assert found[1].startswith(f"{path}: line 1002: {address(0)} is 'Other' (own) here and 'Owner 0' ")


async def test_too_many_addresses_are_counted(tmp_path: Path, read: Read) -> None:
    path = written(tmp_path, book(1_000))
    assert await refused(read, path, max_book_addresses=999) == [
        f"detection.max_book_addresses: {path} has 1000 addresses, 999 are allowed: split the book or raise the limit"
    ]


async def test_a_watched_label_has_to_be_in_it(tmp_path: Path, read: Read) -> None:
    path = written(tmp_path, book(1_000))
    rule = WatchRule(name="x", labels=("Owner 3", "Owner 9"))
    found = await refused(read, path, watch=(rule,))
    assert len(found) == 1
    assert found[0].startswith(f"detection.watch[0].labels[1]: no label 'Owner 9' in {path}; did you mean 'Owner ")


async def test_a_file_without_line_breaks_is_not_read_into_memory(tmp_path: Path, read: Read) -> None:
    path = written(tmp_path, [*book(1_000), "x" * 50_000_000])
    assert await refused(read, path) == [
        f"detection.address_book: {path}: line 1001 has more than {MAX_LINE} characters; expected label,address,type"
    ]


async def test_a_file_that_is_none_or_cannot_be_read_is_named(tmp_path: Path, read: Read) -> None:
    path = written(tmp_path, [*book(1_000), "x"])
    path.write_bytes(path.read_bytes() + b"\xe9,1,own\n")
    assert "can't decode byte 0xe9" in (await refused(read, path))[0]
    assert (await refused(read, tmp_path / "none"))[0].startswith(
        f"detection.address_book: cannot read {tmp_path}/none"
    )
    assert await refused(read, tmp_path) == [f"detection.address_book: {tmp_path} is no regular file"]
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert await refused(read, fifo) == [f"detection.address_book: {fifo} is no regular file"]


async def test_a_process_that_is_killed_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, book(30_000))
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(refused(read_address_book_apart, path))
        os.kill(await child_of(os.getpid(), "whaled.bookfile"), signal.SIGKILL)
        (problem,) = await reading
    assert problem.startswith(f"detection.address_book: the process that reads {path} failed")


async def test_who_does_not_wait_any_more_leaves_no_process_behind(tmp_path: Path) -> None:
    path = written(tmp_path, book(30_000))
    reading = asyncio.ensure_future(read_address_book_apart(Detection(address_book=str(path))))
    child = await child_of(os.getpid(), "whaled.bookfile")
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert not is_there(child)


async def test_a_file_system_that_hangs_does_not_hold_up_the_next_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "READ_LIMIT_S", 0.001)
    path = written(tmp_path, book(30_000))
    (problem,) = await refused(read_address_book_apart, path)
    assert problem == f"detection.address_book: {path} could not be read within 0.001 s"


async def test_a_process_that_cannot_be_started_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "none"))
    path = written(tmp_path, book(1_000))
    (problem,) = await refused(read_address_book_apart, path)
    assert f"the process that reads {path} failed" in problem
    assert "No such file" in problem


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        HEAD.pack(TABLE, 10),
        HEAD.pack(TABLE, 10) + b"x" * 10,
        HEAD.pack(b"X", 0),
        HEAD.pack(TABLE, 2**63),
        b"junk" * 9,
        HEAD.pack(FAULTS, 2) + b"{}",
    ],
)
def test_an_answer_of_another_version_is_no_table(answer: bytes) -> None:
    with pytest.raises(ValueError, match=r"this version|early"):
        taken(io.BytesIO(answer))  # type: ignore[arg-type]  # reads like a pipe


def test_a_reader_that_runs_out_of_memory_says_what_allows_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    def short(*_: object) -> Owners:
        raise MemoryError

    monkeypatch.setattr(bookfile, "read", short)
    monkeypatch.setattr("os.nice", lambda _: 0)
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    bookfile.main(str(tmp_path / "book.csv"), "7")
    with pytest.raises(ConfigError, match=r"more memory than detection\.max_book_addresses \(7\) allows for"):
        taken(io.BytesIO(capsysbinary.readouterr().out))  # type: ignore[arg-type]
