"""Values to column text and back. Each connection has its own, so that no thread shares one."""

import math
import struct
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec

from whaled.eventlog import checksums, notes
from whaled.eventlog.checksums import of_event, of_whale
from whaled.eventlog.damage import MISMATCH, NO_WHALE, DamagedRowError
from whaled.eventlog.notes import EARLIEST_S, LATEST_S
from whaled.model import Alert, Event, Kind, Scan, Update, Whale

# Text columns as bytes: what is no UTF-8 must be the fault of one row, not of the statement.
Row = tuple[Any, ...]

MAX_SAT = 21_000_000 * 100_000_000

# What decoding raises for a row that is not what was written.
UNREADABLE = (ValueError, TypeError, AttributeError, OverflowError, struct.error)

KINDS = {kind.value.encode(): kind for kind in Kind}


class Codec:
    """JSON as text, not bytes: the operator's sqlite3 shell can read it, and its JSON functions work on it."""

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()
        self._alert = msgspec.json.Decoder(Alert)
        self._addresses = msgspec.json.Decoder(tuple[str, ...])
        self._update = msgspec.json.Decoder(Update)

    def json(self, value: Alert | Update | tuple[str, ...]) -> bytes:
        """The column text of a value, as UTF-8."""
        return self._encoder.encode(value)

    def whale(self, txid: bytes, alert: bytes, addresses: bytes, checksum: int | None) -> Whale:
        """A row of `whales`. Raises DamagedRowError if it is not what was written."""
        try:
            if checksum is not None and checksum != of_whale(txid, alert, addresses):
                raise DamagedRowError(MISMATCH)
            whale = Whale(self._alert.decode(alert), self._addresses.decode(addresses))
            if checksum is None:
                _require_plausible(whale.alert, txid.decode())
        except UNREADABLE as error:
            raise _unreadable(error) from error
        return whale

    def known_whale(self, row: Row) -> tuple[str, Whale]:
        """txid, alert, addresses, checksum: the whale by its txid. Raises DamagedRowError."""
        whale = self.whale(*row)
        return whale.alert.transaction_id, whale

    def columns(self, row: Row) -> tuple[int, float]:
        """Offset and high_at of offset, kind, ref, at, high_at, body, checksum, and the txid of the event's whale,
        compared with the checksum. Raises DamagedRowError.
        """
        offset, kind, ref, at, high_at, body, checksum, txid = row
        if txid is None:
            raise DamagedRowError(NO_WHALE)
        try:
            # Also where there is none to compare with: it looks at the types.
            computed = of_event(offset, kind, ref, at, high_at, body, txid)
            if checksum != computed and checksum is not None:
                raise DamagedRowError(MISMATCH)
            # Older versions stored no checksum.
            if not EARLIEST_S <= at <= LATEST_S or not math.isfinite(high_at):
                raise DamagedRowError(f"its time {at!r} cannot be")
        except UNREADABLE as error:
            raise _unreadable(error) from error
        return offset, high_at

    def event(self, row: Row) -> Event:
        """The row of `columns`, then alert, addresses, checksum and number of the whale. Raises DamagedRowError."""
        # As `columns` and `whale`, in one: half of what a page of a replay costs is spent here.
        offset, kind, ref, at, high_at, body, checksum, txid, alert, addresses, whale_checksum, _ = row
        try:
            if checksum is None or txid is None:
                self.columns(row[:8])
            elif checksum != of_event(offset, kind, ref, at, high_at, body, txid):
                raise DamagedRowError(MISMATCH)
            known = KINDS[kind]
            update = None if body is None else self._update.decode(body)
            text = ref.decode()
        except KeyError as error:
            raise DamagedRowError(f"its kind {shown(kind)} is not known") from error
        except UNREADABLE as error:
            raise _unreadable(error) from error
        if (update is None) is not (known is Kind.ALERT):
            raise DamagedRowError(f"its kind is {known.value}, and its body does not fit")
        try:
            whale = self.whale(txid, alert, addresses, whale_checksum)
        except DamagedRowError as error:
            raise DamagedRowError(f"the alert of {shown(txid)}: {error}") from error
        return Event(offset=offset, kind=known, at=at, whale=whale, ref=text, update=update)

    def history(self, row: Row) -> tuple[str, Kind, str]:
        """txid, kind and ref of the row of `columns`. Raises DamagedRowError."""
        self.columns(row)
        _, kind, ref, *_, txid = row
        known = KINDS.get(kind)
        if known is None:
            raise DamagedRowError(f"its kind {shown(kind)} is not known")
        try:
            return txid.decode(), known, ref.decode()
        except UNREADABLE as error:
            raise _unreadable(error) from error

    def spend(self, row: Row) -> tuple[str, str]:
        """txid and outpoint of a row of `spends`: txid, outpoint, number of the whale, checksum.

        Raises DamagedRowError.
        """
        txid, outpoint, whale, checksum = row
        if txid is None:
            raise DamagedRowError(NO_WHALE)
        try:
            if checksum is not None and checksum != checksums.of_spend(outpoint, whale):
                raise DamagedRowError(MISMATCH)
            return txid.decode(), outpoint.decode()
        except UNREADABLE as error:
            raise _unreadable(error) from error

    def state(self, row: Row) -> str:
        """The value of a row of `state`: key, value, checksum. Raises DamagedRowError."""
        key, value, checksum = row
        try:
            if checksum is not None and checksum != checksums.of_values(key, value):
                raise DamagedRowError(MISMATCH)
            text: str = value.decode()
            notes.require_readable(key.decode(), text)
        except UNREADABLE as error:
            raise _unreadable(error) from error
        return text

    def scan(self, row: Row) -> Scan:
        """A row of `blocks`: the columns in the order of the fields, then the checksum. Raises DamagedRowError."""
        *columns, checksum = row
        try:
            if checksum is not None and checksum != checksums.of_values(*columns):
                raise DamagedRowError(MISMATCH)
            height, hash_, *rest = columns
            values = zip(Scan.__struct_fields__, (height, hash_.decode(), *rest), strict=True)
            return msgspec.convert(dict(values), Scan)
        except UNREADABLE as error:
            raise _unreadable(error) from error


def shown(text: object) -> str:
    """Column text for a message, also where it is no UTF-8 or no text."""
    return text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else str(text)


def _require_plausible(alert: Alert, txid: str) -> None:
    """For rows without a checksum, which older versions stored: what would break those who use the alert.

    Raises ValueError.
    """
    amounts: Sequence[int | None] = (alert.value_sat, alert.moved_sat, alert.fee_sat, alert.flow_sat)
    if alert.transaction_id != txid:
        raise ValueError("it is about another transaction")
    if not all(amount is None or 0 <= amount <= MAX_SAT for amount in amounts):
        raise ValueError("an amount cannot be")
    datetime.fromisoformat(alert.detection_timestamp)


def _unreadable(error: BaseException) -> DamagedRowError:
    return DamagedRowError(f"it cannot be read: {error}")
