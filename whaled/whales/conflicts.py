"""Conflicts: of two whales that spend the same output, the one in the mempool or in a block has replaced the other.

Pure. A backend does not report every replacement: not after a restart, not across a gap, and not if the new transaction
itself pays the lower fee (package RBF). A common outpoint always proves the replacement.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from whaled.model import Draft, Kind, Whale
from whaled.whales import lifecycle
from whaled.whales.lifecycle import GONE, WAITING, History, Origin


class Rival(NamedTuple):
    """A whale of the event log that spends an output which another one spends.

    `history` is never empty. `whale` is None if its alert is damaged.
    """

    txid: str
    whale: Whale | None
    history: History

    @property
    def newest(self) -> Kind:
        """Return the kind of the newest event about it."""
        return self.history[-1].kind


def present(drafts: Sequence[Draft]) -> dict[str, Sequence[str]]:
    """Return the whales that these drafts alert or confirm and that are in the mempool or in a block after them.

    By txid, with the outpoints that each spends; empty if only the event log knows them.
    """
    found: dict[str, Sequence[str]] = {}
    for draft in drafts:
        txid = draft.whale.alert.transaction_id
        if draft.kind in {Kind.ALERT, Kind.CONFIRMED}:
            found.setdefault(txid, draft.whale.outpoints)
        elif draft.kind in GONE:
            found.pop(txid, None)
    return found


def linked(drafts: Sequence[Draft], rivals: Mapping[str, Sequence[Rival]]) -> list[Draft]:
    """Return the drafts, with `replaces` filled in, and the REPLACED drafts that follow from conflicts.

    Of two whales that spend the same output, the one now in the mempool or in a block has replaced the other,
    whatever reported it. `rivals` are those of the whales that are `present` after the drafts.
    """
    found = list(drafts)
    there = present(drafts)
    mentioned = {draft.whale.alert.transaction_id for draft in drafts}
    alerts: dict[str, int] = {}
    for index, draft in enumerate(drafts):
        if draft.kind is Kind.ALERT:
            alerts.setdefault(draft.whale.alert.transaction_id, index)
    replaced: list[Draft] = []
    histories: dict[str, History] = {}
    for txid, others in rivals.items():
        # A dropped whale may be replaced later. A confirmed one is excluded: only its block leaving the chain revokes
        # that.
        losers = [
            each
            for each in others
            if each.txid not in there and each.whale is not None and each.newest in WAITING | GONE
        ]
        index = alerts.get(txid, -1)
        if index >= 0 and found[index].whale.alert.replaces is None:
            whale = lifecycle.replacing(found[index].whale, _predecessor(txid, losers))
            found[index] = replace(found[index], whale=whale)
        for each in losers:
            if each.txid not in mentioned and each.whale is not None:
                replaced.append(lifecycle.replaced(each.whale, txid, drafts[0].at))
                histories[each.txid] = each.history
    return [*found, *lifecycle.valid(replaced, histories, Origin.POLLED)]


def _predecessor(txid: str, losers: Sequence[Rival]) -> str | None:
    """Return the whale among `losers` that a new one replaced.

    That is one that was still waiting, else one already reported as replaced by it, else one that was dropped. None if
    all of them were replaced by others before.
    """
    waiting = [each.txid for each in losers if each.newest in WAITING]
    reported = [each.txid for each in losers if each.history[-1][:2] == (Kind.REPLACED, txid)]
    dropped = [each.txid for each in losers if each.newest is Kind.DROPPED]
    return next(reversed(waiting or reported or dropped), None)
