"""Reading of label files: recognition of their format, and their rows."""

import codecs
import itertools
import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TextIO

from whaled.addressbook import bip329, tagpack, walletexplorer
from whaled.addressbook.rows import LabelFileError, Options, Report, Row
from whaled.whales import filekinds

HEAD_BYTES = 4_096
# Maximum length of a line kept in memory. It is large because a BIP 329 record may list the heights of all its
# transactions.
MAX_LINE = 1024 * 1024


class Format(StrEnum):
    """A format of label files."""

    BIP329 = "bip329"
    TAGPACK = "tagpack"
    WALLETEXPLORER = "walletexplorer"

    @property
    def shown(self) -> str:
        """The name of the format in texts for the operator."""
        return {"bip329": "BIP 329", "tagpack": "GraphSense TagPack", "walletexplorer": "WalletExplorer"}[self]


_TAGPACK = re.compile(r"^(title|creator|header|tags|label|currency|description)\s*:", re.MULTILINE)


def format_of(path: Path) -> Format:
    """Return the format of a file, recognised by its beginning. Raises LabelFileError, OSError."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise LabelFileError("the file is empty (0 bytes): did its download fail?")
    what = filekinds.binary(head)
    if what is not None:
        raise LabelFileError(f"this is {what}")
    text = head.decode(_encoding(head), "replace").lstrip()
    if filekinds.is_book(text):
        raise LabelFileError("this is an address book already: detection.address_book accepts it unchanged")
    if text.startswith("{"):
        return Format.BIP329
    lower = text.lower()
    if lower.startswith(('"#', "#wallet", "# wallet", "address,balance")):
        return Format.WALLETEXPLORER
    if _TAGPACK.search(text) is not None:
        return Format.TAGPACK
    formats = ", ".join(each.shown for each in Format)
    what = filekinds.text(text)
    if what is not None:
        raise LabelFileError(f"this is {what}; expected {formats}")
    raise LabelFileError(f"an unknown format: expected {formats}; name it with --format")


def rows(path: Path, form: Format, options: Options, report: Report) -> Iterator[Row]:
    """Yield the rows of a file, reading it lazily. Raises LabelFileError, OSError."""
    if form is Format.TAGPACK:
        yield from tagpack.rows(lambda: _opened(path, errors="strict"), options, report, is_whole=_ends_line(path))
        return
    with _opened(path, errors="surrogateescape") as file:
        importer = bip329.rows if form is Format.BIP329 else walletexplorer.rows
        yield from importer(_lines(file, report), options, report)


def _encoding(head: bytes) -> str:
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def _opened(path: Path, *, errors: str) -> TextIO:
    with path.open("rb") as file:
        encoding = _encoding(file.read(2))
    return path.open(encoding=encoding, errors="strict" if encoding == "utf-16" else errors)


def _ends_line(path: Path) -> bool:
    """Return whether the last line of a file ends with a line break."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2))
        return bool(set(file.read()) & set(b"\r\n"))


def _lines(file: TextIO, report: Report) -> Iterator[tuple[int, str]]:
    for number in itertools.count(1):
        line = file.readline(MAX_LINE)
        if not line:
            return
        if len(line) == MAX_LINE and not line.endswith("\n"):
            report.blame(number, f"more than {MAX_LINE:,} characters")
            while line and not line.endswith("\n"):
                line = file.readline(MAX_LINE)
            continue
        yield number, line
