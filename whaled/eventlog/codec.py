"""Values to column text and back. Each connection has its own, so that no thread shares one."""

from pathlib import Path

import msgspec

from whaled.errors import EventLogError, LogFailure
from whaled.model import Alert, Event, Kind, Update, Whale

EventRow = tuple[int, str, str, float, str | None, str, str, str]


class Codec:
    """JSON as text, not bytes: the operator's sqlite3 shell can read it, and its JSON functions work on it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encoder = msgspec.json.Encoder()
        self._alert = msgspec.json.Decoder(Alert)
        self._addresses = msgspec.json.Decoder(tuple[str, ...])
        self._update = msgspec.json.Decoder(Update)

    def text(self, value: Alert | Update | tuple[str, ...]) -> str:
        """The column text of a value."""
        return self._encoder.encode(value).decode()

    def whale(self, txid: str, alert: str, addresses: str) -> Whale:
        """A row of `whales`. Raises EventLogError(CORRUPT) if it is not what was written."""
        try:
            return Whale(self._alert.decode(alert), self._addresses.decode(addresses))
        except ValueError as error:
            raise self._damaged(f"the alert of {txid}", error) from error

    def event(self, row: EventRow) -> Event:
        """offset, kind, ref, at, body, and the columns of its whale. Raises EventLogError(CORRUPT)."""
        offset, kind, ref, at, body, txid, alert, addresses = row
        try:
            update = None if body is None else self._update.decode(body)
            known_kind = Kind(kind)
        except ValueError as error:
            raise self._damaged(f"the event with offset {offset}", error) from error
        whale = self.whale(txid, alert, addresses)
        return Event(offset=offset, kind=known_kind, at=at, whale=whale, ref=ref, update=update)

    def _damaged(self, what: str, error: ValueError) -> EventLogError:
        return EventLogError(
            f"{self._path}: {what} cannot be read: {error}. Restore a backup, or move the file away",
            reason=LogFailure.CORRUPT,
        )
