"""Refreshed tokens and where they come from: of each family only the newest token may be refreshed. Pure.

A family is a token that was issued and all that were refreshed from it. Whoever refreshes a token that was refreshed
before holds a copy of it, and nobody can know which of the two is the thief: the family ends (RFC 9700, 4.14.2).
"""

from collections import OrderedDict

from msgspec import Struct

# About 300 bytes each. A family is known from its first refresh to the end of its longest token; beyond this number the
# one that was refreshed longest ago is forgotten, and a second refresh of its old tokens is not noticed.
MAX_FAMILIES = 20_000


class _Family(Struct):
    """`newest` may be refreshed, and so may `spare`: the token refreshed from it may never have arrived.

    `until` is Unix seconds.
    """

    newest: str
    until: float
    spare: str | None = None


class Families:
    """Which tokens may be refreshed, and which families have ended. Kept in memory only: a restart forgets."""

    def __init__(self, limit: int = MAX_FAMILIES) -> None:
        self._limit = limit
        self._open: OrderedDict[str, _Family] = OrderedDict()
        self._ended: OrderedDict[str, float] = OrderedDict()

    def is_ended(self, family: str, now: float) -> bool:
        """Whether the family's tokens are worth nothing any more."""
        until = self._ended.get(family)
        if until is None:
            return False
        if now < until:
            return True
        del self._ended[family]  # its last token has expired
        return False

    def may_refresh(self, family: str, parent: str) -> bool:
        """Whether `parent` is the newest token of its family."""
        known = self._open.get(family)
        return known is None or parent in (known.newest, known.spare)

    def refreshed(self, family: str, child: str, *, until: float) -> None:
        """`child` is the newest token of its family now. `until` is when the last token of it expires, if later."""
        known = self._open.pop(family, None)
        self._open[family] = _Family(child, max(until, known.until if known is not None else 0.0))
        if len(self._open) > self._limit:
            self._open.popitem(last=False)

    def answer_lost(self, family: str, parent: str, child: str) -> None:
        """The link broke right after `child` was sent: its parent may be refreshed once more."""
        known = self._open.get(family)
        if known is not None and known.newest == child:
            known.spare = parent

    def end(self, family: str, *, until: float) -> None:
        """The family is worth nothing from now on, until its last token has expired."""
        known = self._open.pop(family, None)
        self._ended[family] = max(until, known.until if known is not None else 0.0)
        if len(self._ended) > self._limit:
            self._ended.popitem(last=False)

    @property
    def size(self) -> int:
        """How many families are remembered."""
        return len(self._open) + len(self._ended)
