"""Conflicts: of two whales that spend the same output, the one in the mempool or in a block has replaced the other.

A backend does not report every replacement: not after a restart, not across a gap, and not if the new transaction
itself pays the lower fee (package RBF). A common outpoint always proves the replacement.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from msgspec.structs import replace

from whaled.model import Draft, Kind, Whale
from whaled.whales import lifecycle
from whaled.whales.lifecycle import GONE, WAITING, History, Origin


class Conflicts(Protocol):
    """The queries of the event log that conflicts need."""

    async def whales(self, txids: Iterable[str]) -> dict[str, Whale]:
        """Return the alerted whales among these transactions, by txid."""
        ...

    async def histories(self, txids: Iterable[str]) -> dict[str, History]:
        """Return every event held about these whales, in order, by txid."""
        ...

    async def rivals(self, outpoints: Iterable[str]) -> dict[str, list[str]]:
        """Return the txids of the whales that spend these outpoints, by outpoint."""
        ...

    async def outpoints(self, txids: Iterable[str]) -> dict[str, list[str]]:
        """Return the outpoints that these whales spend, by txid."""
        ...


async def rivals_of(txid: str, outpoints: Iterable[str], event_log: Conflicts) -> dict[str, Kind]:
    """Return the other whales that spend one of these outpoints, with the kind of the newest event about each."""
    found = await event_log.rivals(outpoints)
    rivals = {rival for each in found.values() for rival in each} - {txid}
    return {rival: history[-1].kind for rival, history in (await event_log.histories(rivals)).items()}


async def linked(drafts: Sequence[Draft], event_log: Conflicts) -> list[Draft]:
    """Return the drafts, with `replaces` filled in, and the REPLACED drafts that follow from conflicts.

    Of two whales that spend the same output, the one now in the mempool or in a block has replaced the other,
    whatever reported it.
    """
    found = list(drafts)
    present = _present(drafts)
    if not present:
        return found
    spent = {txid: whale.outpoints for txid, whale in present.items() if whale.outpoints}
    stored = await event_log.outpoints([txid for txid in present if txid not in spent])
    spent.update((txid, tuple(outpoints)) for txid, outpoints in stored.items())
    by_outpoint = await event_log.rivals({outpoint for outpoints in spent.values() for outpoint in outpoints})
    rivals = {
        txid: list(
            dict.fromkeys(rival for each in outpoints for rival in by_outpoint.get(each, ()) if rival not in present)
        )
        for txid, outpoints in spent.items()
    }
    names = {rival for each in rivals.values() for rival in each}
    if not names:
        return found
    histories = await event_log.histories(names)
    whales = await event_log.whales(names)
    mentioned = {draft.whale.alert.transaction_id for draft in drafts}
    alerts: dict[str, int] = {}
    for index, draft in enumerate(drafts):
        if draft.kind is Kind.ALERT:
            alerts.setdefault(draft.whale.alert.transaction_id, index)
    replaced: list[Draft] = []
    for txid, others in rivals.items():
        # A dropped whale may be replaced later. A confirmed one is excluded: only its block leaving the chain revokes
        # that. Retention may have removed a whale since it was found.
        losers = [rival for rival in others if rival in whales and _last(histories, rival)[0] in WAITING | GONE]
        index = alerts.get(txid, -1)
        if index >= 0 and found[index].whale.alert.replaces is None:
            whale = lifecycle.replacing(found[index].whale, _predecessor(txid, losers, histories))
            found[index] = replace(found[index], whale=whale)
        replaced += [
            lifecycle.replaced(whales[rival], txid, drafts[0].at) for rival in losers if rival not in mentioned
        ]
    return [*found, *lifecycle.valid(replaced, histories, Origin.POLLED)]


def _last(histories: Mapping[str, History], txid: str) -> tuple[Kind | None, str]:
    """Return kind and ref of the newest event about a whale."""
    history = histories.get(txid)
    return (history[-1].kind, history[-1].ref) if history else (None, "")


def _predecessor(txid: str, losers: Sequence[str], histories: Mapping[str, History]) -> str | None:
    """Return the whale among `losers` that a new one replaced.

    That is one that was still waiting, else one already reported as replaced by it, else one that was dropped. None if
    all of them were replaced by others before.
    """
    last = {rival: _last(histories, rival) for rival in losers}
    waiting = [rival for rival in losers if last[rival][0] in WAITING]
    reported = [rival for rival in losers if last[rival] == (Kind.REPLACED, txid)]
    dropped = [rival for rival in losers if last[rival][0] is Kind.DROPPED]
    return next(reversed(waiting or reported or dropped), None)


def _present(drafts: Sequence[Draft]) -> dict[str, Whale]:
    """Return the whales that these drafts alert or confirm and that are in the mempool or in a block after them."""
    present: dict[str, Whale] = {}
    for draft in drafts:
        txid = draft.whale.alert.transaction_id
        if draft.kind in {Kind.ALERT, Kind.CONFIRMED}:
            present.setdefault(txid, draft.whale)
        elif draft.kind in GONE:
            present.pop(txid, None)
    return present
