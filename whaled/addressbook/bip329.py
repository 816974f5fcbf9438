"""Labels exported by wallets: BIP 329, one JSON object per line. Pure."""

from collections.abc import Iterator

import msgspec
from msgspec import Struct

from whaled.addressbook.rows import Lines, Options, Report, Row
from whaled.model import OwnerType

# The other types of the specification, which requires to ignore unknown ones.
WITHOUT_ADDRESS = frozenset({"tx", "input", "output", "xpub"})
X_ONLY_DIGITS = 64


class _Record(Struct):
    type: str
    ref: str
    label: str | None = None
    origin: str | None = None
    spendable: object = None


def rows(lines: Lines, options: Options, report: Report) -> Iterator[Row]:
    """Yield a row for each record of an address or a public key.

    The records name no type of owner: it is `own` unless the options set another. Raises LabelFileError for a file that
    ends within a record.
    """
    decoder = msgspec.json.Decoder(_Record)
    number, line = 0, "\n"
    for number, line in lines:
        if not line.strip():
            continue
        report.read += 1
        try:
            record = decoder.decode(line.encode("utf-8", "surrogateescape"))
        except (msgspec.MsgspecError, UnicodeError) as error:
            report.blame(number, f"not a BIP 329 record: {error}")
            continue
        if record.type not in {"addr", "pubkey"}:
            report.leave_out(_reason(record))
            continue
        if record.type == "pubkey" and len(record.ref) == X_ONLY_DIGITS:
            report.leave_out("pubkey records of 32 bytes")
            continue
        row = report.row(
            number,
            label=options.label or record.label,
            key=record.ref,
            type=options.type or OwnerType.OWN,
            source=options.source or record.origin,
        )
        if row is not None:
            yield row
    if not line.endswith(("\n", "}")):
        report.require_usable(number)


def _reason(record: _Record) -> str:
    if record.type not in WITHOUT_ADDRESS:
        return "records of other types"
    if record.spendable is False:
        return f"{record.type} records that are not spendable"
    return f"{record.type} records"
