"""`whaled labels`: import other label files into an address book; check and count address books."""

import argparse
import contextlib
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

import msgspec

from whaled.addressbook import bookfile, formats
from whaled.addressbook.formats import Format
from whaled.addressbook.rows import HEADING, LabelFileError, Options, Report, line_of
from whaled.cli.options import Subparsers
from whaled.durable import replacing
from whaled.errors import BookError, ExitStatus, WhaledError, reason_of, why_unreadable
from whaled.model import OwnerType
from whaled.whales.booklines import TYPES, LineFaultError, Lines
from whaled.whales.owners import Owners, summary

MOST_ADDRESSES = 10_000_000  # the upper limit of detection.max_book_addresses
SHOWN = 20
STATUS = "exit status: 0 the book can be used, 1 it cannot"
# Limits memory: sources are counted by host, but a book may have a different one in each line.
MAX_SOURCES = 100_000


class Counts(msgspec.Struct, frozen=True):
    """The output of --json: the number of lines with an address, by owner, type, source and network."""

    addresses: int
    owners: int
    addresses_with_several: int
    entries: int
    by_type: dict[str, int]
    by_owner: dict[str, int]
    by_source: dict[str, int]
    by_network: dict[str, int]


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "labels",
        help="import, check and count address books",
        description="Create an address book (detection.address_book) from other label files, check it, or count its "
        "entries. docs/labels.md describes the formats.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _register_import(commands)
    check = commands.add_parser(
        "check",
        help="print the faults of an address book",
        description="Read address books as the daemon does, in the order given, and print the first 20 faults with "
        "file and line.",
        epilog=STATUS,
    )
    check.set_defaults(run=_check)
    stats = commands.add_parser(
        "stats",
        help="count the entries of an address book by owner, type and source",
        description="Count the lines of address books by type, network, source and owner. Sources that are URLs are "
        "counted by host.",
        epilog=STATUS,
    )
    stats.add_argument("--all", action="store_true", help=f"show every owner and source, not only the first {SHOWN}")
    stats.add_argument("--json", action="store_true", help="print one JSON object with all counts")
    stats.set_defaults(run=_stats)
    for command in (check, stats):
        command.add_argument("files", nargs="+", metavar="FILE")


def _register_import(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "import",
        help="create an address book from BIP 329, GraphSense TagPack or WalletExplorer files",
        description="Create an address book from label files: BIP 329 (JSON lines of wallets), GraphSense TagPacks "
        "(YAML), WalletExplorer (CSV of a wallet's addresses). Invalid lines are reported and skipped.",
        epilog="exit status: 0 at least one address was imported; 1 nothing was written: no address was found, a file "
        "cannot be read, or a line is invalid with --strict",
    )
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE")
    add("--output", type=Path, metavar="FILE", help="the address book to write (default: standard output)")
    add("--force", action="store_true", help="replace the output if it exists")
    add("--format", choices=[str(form) for form in Format], help="default: detected from the first lines of each file")
    add(
        "--type",
        choices=[str(kind) for kind in OwnerType],
        help="type for owners without one in the file (default: own for BIP 329, other for TagPacks)",
    )
    add("--label", metavar="TEXT", help="label for all addresses, in place of the file's labels")
    add("--source", metavar="TEXT", help="source for all addresses, in place of the file's sources")
    add("--strict", action="store_true", help="write nothing if any line is invalid")
    parser.set_defaults(run=_import)


# --- import ---


def _import(arguments: argparse.Namespace) -> int:
    """Convert the files and print a report. Raises WhaledError."""
    kind = OwnerType(arguments.type) if arguments.type is not None else None
    options = Options(kind, arguments.label, arguments.source)
    written = faults = 0
    with _output(arguments.output, force=arguments.force) as out:
        out.write(f"{HEADING}\n")
        for path in arguments.files:
            report = Report()
            try:
                form = Format(arguments.format) if arguments.format else formats.format_of(path)
                for row in formats.rows(path, form, options, report):
                    out.write(line_of(row))
                    report.written += 1
            except LabelFileError as error:
                raise WhaledError(f"{path}: {error}") from error
            except (OSError, UnicodeError) as error:
                raise WhaledError(f"cannot read {path}: {why_unreadable(error)}") from error
            _report(path, form, report)
            if form is Format.BIP329 and kind not in {None, OwnerType.OWN} and report.written:
                print(
                    f"whaled: warning: {path} (BIP 329): --type {kind} applies to all files; without it, these labels "
                    "of your own wallet would be `own`",
                    file=sys.stderr,
                )
            written += report.written
            faults += report.fault_count
        if arguments.strict and faults:
            raise WhaledError(f"{_lines(faults)} cannot be used: nothing is written (--strict)")
        if not written:
            raise WhaledError("no address was found: nothing is written")
    return ExitStatus.STOPPED


@contextlib.contextmanager
def _output(path: Path | None, *, force: bool) -> Iterator[TextIO]:
    """Open the output. It is written completely, or not at all if the body raises. Raises WhaledError."""
    try:
        if path is None:
            # With --strict an invalid last line must leave standard output empty.
            with tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as file:
                yield file
                file.seek(0)
                while text := file.read(1024 * 1024):
                    sys.stdout.write(text)
            return
        if path.exists() and not force:
            raise WhaledError(f"{path} exists: --force replaces it")
        with replacing(path, is_private=False) as raw:
            text_file = io.TextIOWrapper(raw, encoding="utf-8", newline="")
            yield text_file
            text_file.detach()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WhaledError(f"cannot write {path or 'the book'}: {reason_of(error)}") from error


def _report(path: Path, form: Format, report: Report) -> None:
    for line, problem in report.faults:
        print(f"whaled: {path}: line {line}: {problem}", file=sys.stderr)
    if report.fault_count > len(report.faults):
        more = report.fault_count - len(report.faults)
        print(f"whaled: {path}: and {_lines(more, 'more ')} cannot be used", file=sys.stderr)
    parts = [f"{report.read:,} read, {report.written:,} written"]
    if report.fault_count:
        parts.append(f"{report.fault_count:,} cannot be used")
    if report.left_out:
        parts.append("left out: " + ", ".join(f"{count:,} {what}" for what, count in report.left_out))
    if report.cut:
        parts.append(f"{report.cut:,} labels cut to 64 characters")
    print(f"whaled: {path} ({form.shown}): {'; '.join(parts)}", file=sys.stderr)


def _lines(count: int, more: str = "") -> str:
    return f"{count:,} {more}line{'s' * (count != 1)}"


# --- check and stats ---


def _check(arguments: argparse.Namespace) -> int:
    owners = _read(arguments.files)
    if owners is None:
        return ExitStatus.FAILED
    print(f"fine: {summary(owners)}")
    return ExitStatus.STOPPED


def _read(paths: Sequence[str]) -> Owners | None:
    """Return the book, None if it cannot be used. Prints faults and warnings."""
    try:
        owners = bookfile.read(paths, MOST_ADDRESSES)
    except BookError as error:
        for fault in error.faults:
            # The name of a configuration key means nothing here: the files come from the command line.
            print(str(fault).removeprefix(f"{fault.where}: ") if fault.where.startswith(bookfile.KEY) else fault)
        if error.lines:
            print(f"{_lines(error.lines)} cannot be used")
        return None
    for note in owners.notes:
        print(f"warning: {note}")
    return owners


def _stats(arguments: argparse.Namespace) -> int:
    owners = _read(arguments.files)
    if owners is None:
        return ExitStatus.FAILED
    counts = _counted(arguments.files, owners)
    if arguments.json:
        sys.stdout.write(msgspec.json.encode(counts).decode() + "\n")
        return ExitStatus.STOPPED
    print(f"{summary(owners)}; {_lines(counts.entries)} with an address")
    for title, found in (
        ("type", counts.by_type),
        ("network", counts.by_network),
        ("source", counts.by_source),
        ("owner", counts.by_owner),
    ):
        print(f"\n{title}")
        shown = list(found.items())[: None if arguments.all else SHOWN]
        for name, count in shown:
            print(f"{count:>12,}  {name}")
        if len(found) > len(shown):
            print(f"{'':>12}  and {len(found) - len(shown):,} more; --all shows them")
    return ExitStatus.STOPPED


def _counted(paths: Sequence[str], owners: Owners) -> Counts:
    types: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    for path in paths:
        book = Lines()
        for line in bookfile.lines(Path(path)):
            with contextlib.suppress(LineFaultError):  # the file was checked, but may have changed since
                entry = book.entry(line)
                if entry is not None:
                    types[str(TYPES[entry.type])] += 1
                    labels[entry.label] += 1
                    source = _host(book.source(line))
                    sources[source if source in sources or len(sources) < MAX_SOURCES else "others"] += 1
    networks = {network.title: count for network, count in owners.networks.items() if count}
    return Counts(
        addresses=len(owners),
        owners=owners.labels,
        addresses_with_several=owners.several,
        entries=types.total(),
        by_type=dict(types.most_common()),
        by_owner=dict(labels.most_common()),
        by_source=dict(sources.most_common()),
        by_network=networks,
    )


def _host(source: str) -> str:
    if "://" in source:
        with contextlib.suppress(ValueError):
            return urlsplit(source).hostname or source
    return source or "(none)"
