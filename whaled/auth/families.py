"""Families of refreshed tokens: of each family only the newest token may be refreshed. Pure.

A family is an issued token with all tokens refreshed from it. If a token is refreshed a second time, two parties hold a
copy of it, and whaled cannot determine which is the thief: the family ends (RFC 9700, 4.14.2).
"""

from collections import OrderedDict

from msgspec import Struct

# About 300 bytes each. A family is remembered from its first refresh until its last token expires. Above this number,
# the family refreshed longest ago is forgotten, and a second refresh of its old tokens is no longer noticed.
MAX_FAMILIES = 20_000


class _Family(Struct):
    """An open family. `newest` may be refreshed, and so may `spare`, whose successor may not have reached the client.

    `until` is in Unix seconds.
    """

    newest: str
    until: float
    spare: str | None = None


class Families:
    """The open and the ended families, in memory only. `gate` stores those that have ended, for after a restart."""

    def __init__(self, limit: int = MAX_FAMILIES) -> None:
        self._limit = limit
        self._open: OrderedDict[str, _Family] = OrderedDict()
        self._ended: OrderedDict[str, float] = OrderedDict()

    def is_ended(self, family: str, now: float) -> bool:
        """Return whether a family has ended, so that its tokens are refused."""
        until = self._ended.get(family)
        if until is None:
            return False
        if now < until:
            return True
        del self._ended[family]  # its last token has expired
        return False

    def may_refresh(self, family: str, parent: str) -> bool:
        """Return whether `parent` is the newest token of its family, or its spare."""
        known = self._open.get(family)
        return known is None or parent in (known.newest, known.spare)

    def refreshed(self, family: str, child: str, *, until: float) -> None:
        """Record `child` as the newest token of its family.

        `until` is the time at which the last token of the family expires, if later than known so far.
        """
        known = self._open.pop(family, None)
        self._open[family] = _Family(child, max(until, known.until if known is not None else 0.0))
        if len(self._open) > self._limit:
            self._open.popitem(last=False)

    def answer_lost(self, family: str, parent: str, child: str) -> None:
        """Record that the connection broke right after `child` was sent: its parent may be refreshed once more."""
        known = self._open.get(family)
        if known is not None and known.newest == child:
            known.spare = parent

    def end(self, family: str, *, until: float) -> None:
        """End a family: its tokens are refused from now on. It is remembered until its last token has expired."""
        known = self._open.pop(family, None)
        self._ended[family] = max(until, known.until if known is not None else 0.0)
        if len(self._ended) > self._limit:
            self._ended.popitem(last=False)

    def ended_until(self, family: str) -> float:
        """Return the time until which an ended family is remembered, 0 if it has not ended."""
        return self._ended.get(family, 0.0)

    @property
    def size(self) -> int:
        """The number of families remembered."""
        return len(self._open) + len(self._ended)
