"""Recognition, by the first bytes, of files that are mistaken for an address book. Pure."""

import re

from whaled.model import OwnerType
from whaled.whales import bookkeys
from whaled.whales.booklines import COLUMNS, SEPARATORS, LineFaultError, Lines, split

IMPORT = "`whaled labels import` makes an address book of it"
_MAGIC = {
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"BZh91AY&SY": "compressed with bzip2: unpack it",
    b"\xfd7zXZ": "compressed with xz: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it",
    b"PK\x03\x04": "a ZIP archive or a workbook (xlsx, ods): unpack it, or save the sheet as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "a workbook (xls): save the sheet as CSV UTF-8",
    b"%PDF-": "a PDF",
    b"SQLite format 3": "an SQLite database",
}
_TEXTS = {
    "version https://git-lfs.github.com/": "a pointer of Git LFS, not the file itself: git lfs pull fetches that",
    "<": "a page in HTML or XML: the download gave an error or login page",
    '{"': f"JSON; {IMPORT} if it is BIP 329",
    "{ ": f"JSON; {IMPORT} if it is BIP 329",
    "[": "JSON",
    '"#Wallet': f"an export of WalletExplorer; {IMPORT}",
    "#Wallet": f"an export of WalletExplorer; {IMPORT}",
    "address,balance": f"an export of WalletExplorer; {IMPORT}",
}
# The plain text that servers send instead of a file, such as `404: Not Found`.
_ANSWER = re.compile(
    r"(?:error:? *)?(?:[45]\d\d[: -]*)?(?:page |file )?"
    r"(?:not found|forbidden|unauthori[sz]ed|bad request|access denied|"
    r"too many requests|rate limit exceeded|internal server error|bad gateway|service (?:temporarily )?unavailable|"
    r"gateway time-?out)\b[^\n]{0,200}",
    re.IGNORECASE,
)
_TAGPACK = re.compile("^(title|creator|header|tags):", re.MULTILINE)


def binary(head: bytes) -> str | None:
    """Return the kind of a file that is not text, None for any other."""
    return next((what for start, what in _MAGIC.items() if head.startswith(start)), None)


def text(head: str) -> str | None:
    """Return the kind of a text that is not an address book, None if it may be one."""
    head = head.lstrip("\ufeff \t\r\n\f\v")
    first = head.partition("\n")[0].strip()
    if is_row(first):
        return None
    what = next((what for start, what in _TEXTS.items() if head.startswith(start)), None)
    if what is None and _ANSWER.fullmatch(head.strip()):
        return f"the response of a server, {first[:60]!r}: the download failed"
    if what is None and _TAGPACK.search(head):
        return f"YAML; {IMPORT} if it is a GraphSense TagPack"
    return what


def is_row(line: str) -> bool:
    """Return whether a line has the columns of an address book, with an address or a type in the expected column."""
    for separator in SEPARATORS:
        try:
            cells = split(line, separator)
        except LineFaultError:
            continue
        if len(cells) >= len(COLUMNS) and (
            bookkeys.fault_in(cells[1]) is None or cells[2].lower() in set(map(str, OwnerType))
        ):
            return True
    return False


def is_book(head: str) -> bool:
    """Return whether a text is an address book: it begins with the names of the columns or with an entry."""
    lines = Lines()
    for line in head.splitlines()[:20]:
        try:
            entry = lines.entry(line)
        except LineFaultError:
            return is_row(line)
        if entry is not None or lines.has_names:
            return True
    return False
