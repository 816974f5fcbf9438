"""Loading of the address book that the configuration names. Every fault names the key and where it is set."""

import asyncio
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import whaled
from whaled.addressbook import bookfile
from whaled.config.sections import DetectionSettings
from whaled.errors import BookError, BookFailure, ConfigError, Fault
from whaled.whales import watch
from whaled.whales.labels import AddressBook
from whaled.whales.owners import Owners

# Smaller books (about 200 lines) are read in less time than a process takes to start.
SMALL_BYTES = 16 * 1024
# A million addresses take half a minute on a slow machine; a file system that hangs must not block reloads forever.
READ_LIMIT_S = 600.0
# The program of the process. It is started with `-P`, which keeps the working directory out of the module search path.
_READER = "import sys; sys.path.append(sys.argv[1]); from whaled.addressbook.bookfile import main; main(*sys.argv[2:])"


# The place at which each key of the configuration is set, as in `config.parse.Loaded.origins`.
Origins = Mapping[str, str]
NOWHERE: Origins = {}


def read_address_book(settings: DetectionSettings, origins: Origins = NOWHERE) -> AddressBook:
    """Read the operator's address book; it is empty if none is configured.

    Raises BookError, and ConfigError for a watch rule with a label that is not in the book.
    """
    if not settings.books:
        return AddressBook()
    with _placed(settings, origins):
        return _fitting(bookfile.read(settings.books, settings.max_book_addresses), settings)


async def read_address_book_apart(
    settings: DetectionSettings, origins: Origins = NOWHERE, *, in_force: int | None = None
) -> AddressBook:
    """Read the address book without blocking the event loop: a separate process reads files that are not small.

    `in_force` is the number of addresses that an earlier reading of the same files found. A book that lost too many of
    them is refused (`detection.max_book_loss`). Raises as `read_address_book`.
    """
    if _is_small(settings.books):
        book = read_address_book(settings, origins)
    else:
        with _placed(settings, origins):
            book = _fitting(await _read_in_time(settings.books, settings.max_book_addresses), settings)
    if in_force is not None:
        with _placed(settings, origins):
            _require_kept(in_force, len(book.owners), settings)
    return book


def idle_rules(settings: DetectionSettings, book: AddressBook, origins: Origins = NOWHERE) -> tuple[Fault, ...]:
    """Return a fault for each part of a watch rule that matches nothing with this book."""
    found = watch.idle(settings.watch, book, _names(settings.books))
    return tuple(_at_its_line(fault, origins) for fault in found)


def _names(paths: Sequence[str]) -> str:
    return ", ".join(paths)


async def _read_in_time(paths: Sequence[str], limit: int) -> Owners:
    try:
        async with asyncio.timeout(READ_LIMIT_S):
            return await _read_apart(paths, limit)
    except TimeoutError:
        problem = f"{_names(paths)} could not be read within {READ_LIMIT_S:g} s"
    except (OSError, ValueError) as error:
        problem = f"the process that reads {_names(paths)} failed ({error}); was it killed for lack of memory?"
    raise BookError((Fault(bookfile.KEY, problem),), reason=BookFailure.READER_FAILED)


def _require_kept(before: int, found: int, settings: DetectionSettings) -> None:
    if not settings.books or found >= before * (1 - settings.max_book_loss):
        return
    problem = (
        f"{_names(settings.books)} {'have' if settings.books[1:] else 'has'} {found:,} addresses, {before:,} are in "
        f"force: the loss is greater than detection.max_book_loss ({settings.max_book_loss:g}). Was the file cut "
        "short? If it is right, set that key to 1 and reload, or restart whaled"
    )
    raise BookError((Fault(bookfile.KEY, problem),), reason=BookFailure.SHRUNK)


@contextmanager
def _placed(settings: DetectionSettings, origins: Origins) -> Iterator[None]:
    """Add the place of the key to faults, and the key to faults of lines."""
    try:
        yield
    except BookError as error:
        faults = tuple(_at_its_line(fault, origins) for fault in error.faults)
        if error.lines:
            what = f"{error.lines:,} lines have faults" if error.lines > 1 else "a line has a fault"
            head = Fault(bookfile.KEY, f"cannot use {_names(settings.books)}: {what}")
            faults = (_at_its_line(head, origins), *faults)
        raise BookError(faults, reason=error.reason, lines=error.lines) from error
    except ConfigError as error:
        raise ConfigError(tuple(_at_its_line(fault, origins) for fault in error.faults)) from error


def _at_its_line(fault: Fault, origins: Origins) -> Fault:
    if fault.source or not fault.where:
        return fault
    place = origins.get(fault.where) or origins.get(fault.where.rpartition("[")[0]) or ""
    return Fault(fault.where, fault.problem, place)


def _is_small(paths: Sequence[str]) -> bool:
    try:
        return sum(Path(path).stat().st_size for path in paths) <= SMALL_BYTES
    except OSError:
        return True  # reading it fails at once, so no process is needed


async def _read_apart(paths: Sequence[str], limit: int) -> Owners:
    out, into = os.pipe()
    stream = FileIO(out, "rb")
    try:
        root = str(Path(whaled.__file__).parent.parent)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-c", _READER, root, str(limit), *paths,
            stdin=asyncio.subprocess.DEVNULL, stdout=into, start_new_session=True,
        )  # fmt: skip
    except BaseException:
        stream.close()
        raise
    finally:
        os.close(into)
    try:
        owners = await asyncio.to_thread(_taken, stream)
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()  # this also ends the reading thread
            await process.wait()
    return owners


def _taken(stream: FileIO) -> Owners:
    with stream:
        return bookfile.taken(stream)


def _fitting(owners: Owners, settings: DetectionSettings) -> AddressBook:
    book = AddressBook(owners)
    unknown = tuple(watch.faults(settings.watch, book, _names(settings.books)))
    if unknown:
        raise ConfigError(unknown)
    return book
