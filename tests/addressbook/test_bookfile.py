"""The address book's file, read here and by a process of its own: the same comes of both."""

import asyncio
import io
import os
import random
import signal
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from kit.books import address, book
from kit.processes import child_of, is_there
from whaled.addressbook import bookfile, loading
from whaled.addressbook.bookfile import FAULTS, HEAD, MAX_LINE, TABLE, taken
from whaled.addressbook.loading import NOWHERE, SMALL_BYTES, idle_rules, read_address_book, read_address_book_apart
from whaled.config.sections import DetectionSettings, WatchRule
from whaled.errors import BookError, BookFailure, ConfigError
from whaled.model import OwnerType
from whaled.whales.labels import AddressBook
from whaled.whales.owners import Owner, Owners

Read = Callable[..., Awaitable[AddressBook]]


async def here(settings: DetectionSettings, origins: Mapping[str, str] = NOWHERE) -> AddressBook:
    return read_address_book(settings, origins)


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
        await read(DetectionSettings(**{"address_book": str(path), **settings}))  # type: ignore[arg-type]
    return [str(fault) for fault in error.value.faults]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
async def test_a_large_book_is_read_completely(tmp_path: Path, read: Read, ending: str) -> None:
    path = written(tmp_path, book(1_000), ending)
    assert path.stat().st_size > SMALL_BYTES
    found = await read(DetectionSettings(address_book=str(path)))
    assert found == AddressBook.parse("\n".join(book(1_000)), "book.csv")


async def test_a_book_that_is_not_configured_is_empty(read: Read) -> None:
    assert not (await read(DetectionSettings())).owners


async def test_faults_are_named_with_file_and_line(tmp_path: Path, read: Read) -> None:
    lines = [*book(1_000), "x", f"Other,{address(0)},owner"]
    path = written(tmp_path, lines)
    found = await refused(read, path)
    assert found[:2] == [
        f"detection.address_book: cannot use {path}: 2 lines have faults",
        (
            f"{path}: line 1001: expected 3 columns, label,address,type, found 1; separate them by commas, semicolons "
            "or tabs"
        ),
    ]
    assert found[2].startswith(f"{path}: line 1002: type must be one of exchange, custodian, ")


async def test_the_line_of_the_key_that_names_the_file_is_named(tmp_path: Path, read: Read) -> None:
    places = {"detection.address_book": "w.yaml:7", "detection.max_book_addresses": "w.yaml:9"}
    path = written(tmp_path, [*book(1_000), "x"])
    settings = DetectionSettings(address_book=str(path))
    for wrong, place in (
        (settings, f"w.yaml:7: detection.address_book: cannot use {path}: a line has a fault"),
        (DetectionSettings(address_book="/nowhere"), "w.yaml:7: detection.address_book: cannot read /nowhere"),
        (DetectionSettings(address_book=str(path), max_book_addresses=7), "w.yaml:9: detection.max_book_addresses: "),
    ):
        with pytest.raises(ConfigError) as error:
            await read(wrong, places)
        assert str(error.value.faults[0]).startswith(place)
    rule = WatchRule(name="x", labels=("Owner 9",))
    written(tmp_path, book(1_000))
    with pytest.raises(ConfigError) as error:
        await read(DetectionSettings(address_book=str(path), watch=(rule,)), {"detection.watch[0].labels": "w.yaml:3"})
    assert str(error.value.faults[0]).startswith("w.yaml:3: detection.watch[0].labels[0]: no label 'Owner 9' in ")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
async def test_encodings_that_show_are_read(tmp_path: Path, read: Read, encoding: str) -> None:
    path = tmp_path / "book.csv"
    path.write_bytes("\r\n".join([f"Börse,{address(2_000)},exchange", *book(1_000)]).encode(encoding))
    found = (await read(DetectionSettings(address_book=str(path)))).owners
    assert (len(found), found.get(address(2_000))) == (1_001, Owner("Börse", OwnerType.EXCHANGE))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x1f\x8b\x08\x00\x00", "compressed with gzip: unpack it"),
        (b"PK\x03\x04rest", "a ZIP archive or a workbook (xlsx, ods): unpack it, or save the sheet as CSV UTF-8"),
        (b"\n<!DOCTYPE html>\n<title>403</title>", "a page in HTML or XML: the download gave an error or login page"),
        (b'\xef\xbb\xbf{"type":"addr"}', "JSON; `whaled labels import` makes an address book of it if it is BIP 329"),
        (
            b"title: x\ntags:\n- a: b\n",
            "YAML; `whaled labels import` makes an address book of it if it is a GraphSense",
        ),
        (
            b'"#Wallet Huobi.com. Updated to block 523401"\n',
            "an export of WalletExplorer; `whaled labels import` makes",
        ),
        (b"Not Found", "the response of a server, 'Not Found': the download failed"),
        (b"403: Forbidden\n", "the response of a server, '403: Forbidden': the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "a pointer of Git LFS, not the file itself"),
        (b'[{"label":"x"}]', "JSON"),
    ],
)
async def test_a_file_that_is_not_csv_is_named(tmp_path: Path, read: Read, content: bytes, what: str) -> None:
    path = tmp_path / "book.csv"
    path.write_bytes(content + b" " * 20_000)
    (problem,) = await refused(read, path)
    assert problem.startswith(f"detection.address_book: {path} is not an address book but {what}")


@pytest.mark.slow
@pytest.mark.parametrize("label", ["[Hot] Binance", "<unknown>", "{x}", "{ x", "PKx", "Not Found", "title: x", "[1"])
async def test_a_label_may_begin_as_other_files_do(tmp_path: Path, read: Read, label: str) -> None:
    path = written(tmp_path, [f"{label},{address(2_000)},exchange", *book(1_000)])
    assert (await read(DetectionSettings(address_book=str(path)))).owners.get(address(2_000)) == Owner(
        label, OwnerType.EXCHANGE
    )
    path = written(tmp_path, [f"{label},{address(2_000)[:-1]}z,exchange", *book(1_000)])
    (_, problem) = await refused(read, path)
    assert problem.startswith(f"{path}: line 1: address ")


async def test_a_file_that_is_missing_is_named_in_plain_words(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "book.csv"
    assert await refused(read, path) == [f"detection.address_book: cannot read {path}: there is no such file"]


async def test_a_binary_file_is_named(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "book.csv"
    path.write_bytes(random.Random(1).randbytes(20_000))
    assert await refused(read, path) == [f"detection.address_book: {path} is not text: it has NUL bytes"]


@pytest.mark.parametrize("text", ["", "label,address,type\n", "\ufeff# nothing\n\n" + "#\n" * 10_000])
async def test_a_book_without_addresses_is_refused(tmp_path: Path, read: Read, text: str) -> None:
    path = tmp_path / "book.csv"
    path.write_text(text)
    assert await refused(read, path) == [
        (
            f"detection.address_book: {path} has no address ({path.stat().st_size} bytes): did its download fail? To "
            "run without labels set detection.address_book to null"
        )
    ]


async def test_a_file_that_ends_within_a_line_is_named(tmp_path: Path, read: Read) -> None:
    path = written(tmp_path, book(1_000))
    path.write_text(path.read_text()[:-12])
    (_, problem) = await refused(read, path)
    assert problem.endswith("; the file ends here, amid a line: was it cut short?")


async def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, book(10))

    def growing(*_: object) -> bool:
        with path.open("a") as file:
            file.write("x,")
        return True

    monkeypatch.setattr("whaled.whales.books.Reading.add", growing)
    (problem,) = await refused(here, path)
    assert problem == (
        f"detection.address_book: {path} changed while it was read: write a new file next to it and rename that "
        f"(mv NEW {path})"
    )


async def test_several_files_are_read_in_their_order(tmp_path: Path, read: Read) -> None:
    first, second = tmp_path / "mine.csv", written(tmp_path, book(1_000))
    first.write_text(f"Mine;{address(3)};own\n")
    found = (await read(DetectionSettings(address_book=(str(first), str(second))))).owners
    assert [owner.label for owner in found.all(address(3))] == ["Mine", "Owner 3"]
    assert (len(found), found.several) == (1_000, 1)
    found = (await read(DetectionSettings(address_book=(str(second), str(first))))).owners
    assert [owner.label for owner in found.all(address(3))] == ["Owner 3", "Mine"]


async def test_of_several_files_the_one_at_fault_is_named(tmp_path: Path, read: Read) -> None:
    first, second = tmp_path / "mine.csv", written(tmp_path, book(1_000))
    first.write_text("")
    places = {"detection.address_book": "w.yaml:2", "detection.address_book[1]": "w.yaml:4"}
    settings = DetectionSettings(address_book=(str(second), str(first)))
    with pytest.raises(BookError) as error:
        await read(settings, places)
    assert error.value.reason is BookFailure.EMPTY
    assert str(error.value).startswith(f"w.yaml:4: detection.address_book[1]: {first} has no address (0 bytes)")
    first.write_text("x\n")
    with pytest.raises(BookError) as error:
        await read(settings, places)
    head, fault = str(error.value).splitlines()
    assert head == f"w.yaml:2: detection.address_book: cannot use {second}, {first}: a line has a fault"
    assert fault.startswith(f"{first}: line 1: expected 3 columns")
    first.write_text(f"x,{address(5_000)},own")
    assert await refused(read, second, address_book=(str(first), str(second)), max_book_addresses=1_000) == [
        (
            f"detection.max_book_addresses: {first}, {second} have 1001 addresses, 1000 are allowed: raise the limit, "
            "or take some out"
        )
    ]


@pytest.mark.parametrize(("count", "loss", "is_kept"), [(500, 0.5, True), (499, 0.5, False), (1, 1.0, True)])
async def test_a_book_that_lost_too_much_is_refused(tmp_path: Path, count: int, loss: float, *, is_kept: bool) -> None:
    path = written(tmp_path, book(count))
    settings = DetectionSettings(address_book=str(path), max_book_loss=loss)
    if is_kept:
        assert len((await read_address_book_apart(settings, in_force=1_000)).owners) == count
        return
    with pytest.raises(BookError) as error:
        await read_address_book_apart(settings, {"detection.address_book": "w.yaml:2"}, in_force=1_000)
    assert error.value.reason is BookFailure.SHRUNK
    assert str(error.value) == (
        f"w.yaml:2: detection.address_book: {path} has {count} addresses, 1,000 are in force: the loss is greater than "
        "detection.max_book_loss (0.5). Was the file cut short? If it is right, set that key to 1 and reload, or "
        "restart whaled"
    )


def test_types_that_no_address_has_are_named() -> None:
    found = AddressBook.parse(f"A,{address(1)},own", "book.csv")
    settings = DetectionSettings(
        address_book="book.csv",
        watch=(WatchRule(name="x", types=(OwnerType.OWN,)), WatchRule(name="y", types=(OwnerType.OWN, OwnerType.FUND))),
    )
    assert [str(fault) for fault in idle_rules(settings, found, {"detection.watch[1].types": "w.yaml:9"})] == [
        (
            "w.yaml:9: detection.watch[1].types: no address in book.csv has the type fund: that part of the rule "
            "matches nothing"
        )
    ]


async def test_too_many_addresses_are_counted(tmp_path: Path, read: Read) -> None:
    path = written(tmp_path, book(1_000))
    assert await refused(read, path, max_book_addresses=999) == [
        f"detection.max_book_addresses: {path} has 1000 addresses, 999 are allowed: raise the limit, or take some out"
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


async def test_a_path_that_is_not_a_readable_file_is_named(tmp_path: Path, read: Read) -> None:
    path = written(tmp_path, [*book(1_000), "x"])
    path.write_bytes(path.read_bytes() + b"\xe9,1,own\n")
    assert (await refused(read, path))[2] == (
        f"{path}: line 1002: not UTF-8: byte 0xe9. As Windows-1252, the plain CSV of spreadsheets, it is 'é,1,own'. "
        "Save the file as CSV UTF-8, or, if that reads right: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
    )
    assert (await refused(read, tmp_path / "none"))[0].startswith(
        f"detection.address_book: cannot read {tmp_path}/none"
    )
    assert await refused(read, tmp_path) == [f"detection.address_book: {tmp_path} is not a regular file"]
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert await refused(read, fifo) == [f"detection.address_book: {fifo} is not a regular file"]


async def test_a_process_that_is_killed_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, book(30_000))
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(refused(read_address_book_apart, path))
        os.kill(await child_of(os.getpid(), "whaled.addressbook.bookfile"), signal.SIGKILL)
        (problem,) = await reading
    assert problem.startswith(f"detection.address_book: the process that reads {path} failed")


async def test_a_cancelled_read_leaves_no_process_behind(tmp_path: Path) -> None:
    path = written(tmp_path, book(30_000))
    reading = asyncio.ensure_future(read_address_book_apart(DetectionSettings(address_book=str(path))))
    child = await child_of(os.getpid(), "whaled.addressbook.bookfile")
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert not is_there(child)


async def test_a_file_system_that_hangs_does_not_hold_up_the_next_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "READ_LIMIT_S", 0.001)
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
def test_a_result_of_another_version_is_refused(answer: bytes) -> None:
    with pytest.raises(ValueError, match=r"this version|early"):
        taken(io.BytesIO(answer))  # type: ignore[arg-type]  # reads like a pipe


def test_a_reader_out_of_memory_names_the_key_that_allows_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    def short(*_: object) -> Owners:
        raise MemoryError

    monkeypatch.setattr(bookfile, "read", short)
    monkeypatch.setattr("os.nice", lambda _: 0)
    monkeypatch.setattr("resource.setrlimit", lambda *_: None)
    bookfile.main("7", str(tmp_path / "book.csv"))
    with pytest.raises(ConfigError, match=r"more memory than detection\.max_book_addresses \(7\) allows for"):
        taken(io.BytesIO(capsysbinary.readouterr().out))  # type: ignore[arg-type]
