"""Conversion between values and column text. Each connection has its own `Codec`, so threads share none."""

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
from whaled.model import MAX_SAT, Alert, Event, Kind, Scan, Update, Whale
from whaled.whales.lifecycle import Step

# Text columns are bytes: invalid UTF-8 must fail a single row, not the whole statement.
Row = tuple[Any, ...]

# The exceptions that decoding a damaged row may raise.
UNREADABLE = (ValueError, TypeError, AttributeError, OverflowError, struct.error)

KINDS = {kind.value.encode(): kind for kind in Kind}


class Codec:
    """Encodes values as JSON and decodes rows.

    JSON is stored as text, not as blobs, so that the sqlite3 shell can show it and its JSON functions work on it.
    """

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()
        self._alert = msgspec.json.Decoder(Alert)
        self._addresses = msgspec.json.Decoder(tuple[str, ...])
        self._update = msgspec.json.Decoder(Update)

    def json(self, value: Alert | Update | tuple[str, ...]) -> bytes:
        """Return the column text of a value as UTF-8."""
        return self._encoder.encode(value)

    def whale(self, txid: bytes, alert: bytes, addresses: bytes, checksum: int | None) -> Whale:
        """Decode a row of `whales`. Raises DamagedRowError."""
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
        """Decode a row of txid, alert, addresses, checksum. Return (txid, whale). Raises DamagedRowError."""
        whale = self.whale(*row)
        return whale.alert.transaction_id, whale

    def columns(self, row: Row) -> tuple[int, float]:
        """Verify a row of `Queries.columns` without decoding its JSON. Return (offset, high_at).

        The row is offset, kind, ref, repeat, at, high_at, body, checksum, txid of the whale. Raises DamagedRowError.
        """
        offset, kind, ref, repeat, at, high_at, body, checksum, txid = row
        if txid is None:
            raise DamagedRowError(NO_WHALE)
        try:
            # Computed also if no checksum is stored: packing the columns verifies their types.
            computed = of_event(offset, kind, ref, repeat, at, high_at, body, txid)
            if checksum != computed and checksum is not None:
                raise DamagedRowError(MISMATCH)
            # Rows of older versions have no checksum, so implausible times are checked for as well.
            if not EARLIEST_S <= at <= LATEST_S or not math.isfinite(high_at):
                raise DamagedRowError(f"its time {at!r} is impossible")
        except UNREADABLE as error:
            raise _unreadable(error) from error
        return offset, high_at

    def event(self, row: Row) -> Event:
        """Decode a row of `Queries.events`. Raises DamagedRowError.

        The row is that of `columns`, followed by alert, addresses, checksum and number of the whale.
        """
        # Repeats `columns` in line: half of the cost of a replay's page is spent here.
        offset, kind, ref, repeat, at, high_at, body, checksum, txid, alert, addresses, whale_checksum, _ = row
        try:
            if checksum is None or txid is None:
                self.columns(row[:9])
            elif checksum != of_event(offset, kind, ref, repeat, at, high_at, body, txid):
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
        return Event(offset=offset, kind=known, at=at, whale=whale, ref=text, update=update, repeat=repeat)

    def step(self, row: Row) -> tuple[str, Step]:
        """Decode a row of `Queries.columns`. Return the txid and the step of its history. Raises DamagedRowError."""
        self.columns(row)
        _, kind, ref, repeat, *_, txid = row
        known = KINDS.get(kind)
        if known is None:
            raise DamagedRowError(f"its kind {shown(kind)} is not known")
        try:
            return txid.decode(), Step(known, ref.decode(), repeat)
        except UNREADABLE as error:
            raise _unreadable(error) from error

    def spend(self, row: Row) -> tuple[str, str]:
        """Decode a row of txid, outpoint, number of the whale, checksum. Return (txid, outpoint).

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
        """Decode a row of `state`: key, value, checksum. Return the value. Raises DamagedRowError."""
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
        """Decode a row of `blocks`: the columns in the order of Scan's fields, then the checksum.

        Raises DamagedRowError.
        """
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
    """Return column text for use in a message, also if it is invalid UTF-8 or not text."""
    return text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else str(text)


def _require_plausible(alert: Alert, txid: str) -> None:
    """Raise ValueError if an alert has values that its consumers could not process.

    Applied to rows without a checksum, which older versions stored.
    """
    amounts: Sequence[int | None] = (alert.value_sat, alert.moved_sat, alert.fee_sat, alert.flow_sat)
    if alert.transaction_id != txid:
        raise ValueError("it is about another transaction")
    if not all(amount is None or 0 <= amount <= MAX_SAT for amount in amounts):
        raise ValueError("an amount is impossible")
    datetime.fromisoformat(alert.detection_timestamp)


def _unreadable(error: BaseException) -> DamagedRowError:
    return DamagedRowError(f"it cannot be read: {error}")
