"""Addresses of a wallet in WalletExplorer's CSV export. Pure.

The file has a line like `"#Wallet Huobi.com. Updated to block 523401"`, the columns `address,balance,incoming txs,last
used in block`, and one address per line. An export consists of pages; concatenated pages repeat the first two lines.
"""

import re
from collections.abc import Iterator

from whaled.addressbook.rows import LabelFileError, Lines, Options, Report, Row
from whaled.whales.booklines import LineFaultError, split

_WALLET = re.compile(r"#\s*Wallet\s+(?P<name>\S+?)[.,;:]?(?=\s|$)(?P<rest>.*)", re.IGNORECASE)
_UPDATED = re.compile(
    r"updated to block (?P<block>\d{1,9})(?:\s*\((?P<date>\d{4}-\d\d-\d\d[ T0-9:Z+-]*)\))?", re.IGNORECASE
)


def rows(lines: Lines, options: Options, report: Report) -> Iterator[Row]:
    """Yield a row for each address. Its date is that of the export, or the last block that the export covers.

    Raises LabelFileError for a file of another kind, without a name or a type, or that ends within a line.
    """
    if options.type is None:
        raise LabelFileError(
            "WalletExplorer does not state the type of a wallet: give it, like --type exchange, in a separate command, "
            "because --type applies to all files"
        )
    name, date, place, width = options.label, "", None, 0
    number, line = 0, "\n"
    for number, line in lines:
        text = line.strip()
        if not text:
            continue
        wallet = _WALLET.match(text.strip('"'))
        if wallet is not None:
            name, date = options.label or wallet["name"], _date(wallet["rest"])
            continue
        try:
            cells = split(text, ",")
        except LineFaultError as error:
            report.blame(number, str(error))
            continue
        names = [cell.lower() for cell in cells]
        if "address" in names:
            place, width = names.index("address"), len(names)
            continue
        if place is None:
            raise LabelFileError(_no_addresses(number, names))
        if name is None:
            raise LabelFileError("no line `#Wallet NAME` before the addresses: give the label with --label")
        report.read += 1
        row = report.row(
            number,
            label=name,
            key=cells[place] if place < len(cells) else None,
            type=options.type,
            source=options.source or f"https://www.walletexplorer.com/wallet/{name}",
            date=date,
        )
        if row is not None:
            yield row
    _require_whole(number, line, width, report)


def _require_whole(number: int, line: str, width: int, report: Report) -> None:
    """Refuse a file whose last line has no line break and lacks columns or is unusable. Raises LabelFileError."""
    if line.endswith("\n") or line.isspace():
        return
    found = line.count(",") + 1
    if found < width:
        report.blame(number, f"expected {width} columns, found {found}")
    report.require_usable(number)


def _date(rest: str) -> str:
    updated = _UPDATED.search(rest)
    if updated is None:
        return ""
    return updated["date"].strip() if updated["date"] else f"block {updated['block']}"


def _no_addresses(number: int, names: list[str]) -> str:
    if "transaction" in names or "received from" in names:
        return f"line {number}: these are the transactions of a wallet; download its addresses"
    return f"line {number}: expected the columns address,balance,incoming txs,last used in block"
