"""Two whales that spend the same output: the one that is in the mempool or in a block has replaced the other.

A backend does not name every replacement: not after a restart, not across a gap, not where the new transaction pays the
lower fee by itself (package RBF). What both spend always tells.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from msgspec.structs import replace

from whaled.model import Draft, Kind, Whale
from whaled.whales import lifecycle
from whaled.whales.history import GONE, WAITING, History, next_event


class Conflicts(Protocol):
    """The event log, as far as conflicts go."""

    async def whales(self, txids: Iterable[str]) -> dict[str, Whale]:
        """The whales that were alerted among these transactions."""
        ...

    async def histories(self, txids: Iterable[str]) -> dict[str, History]:
        """Kind and ref of every event about these whales that is held."""
        ...

    async def rivals(self, outpoints: Iterable[str]) -> dict[str, list[str]]:
        """The whales that spend each of these outpoints."""
        ...

    async def outpoints(self, txids: Iterable[str]) -> dict[str, list[str]]:
        """The outpoints that each of these whales spends."""
        ...


async def linked(drafts: Sequence[Draft], event_log: Conflicts) -> list[Draft]:
    """The drafts, and what follows from two whales that spend the same output: the one that is here now, in the mempool
    or in a block, has replaced the other, whoever told of it.
    """
    found = list(drafts)
    here = _here(drafts)
    if not here:
        return found
    spent = {txid: whale.outpoints for txid, whale in here.items() if whale.outpoints}
    stored = await event_log.outpoints([txid for txid in here if txid not in spent])
    spent.update((txid, tuple(outpoints)) for txid, outpoints in stored.items())
    by_outpoint = await event_log.rivals({outpoint for outpoints in spent.values() for outpoint in outpoints})
    rivals = {
        txid: list(
            dict.fromkeys(rival for each in outpoints for rival in by_outpoint.get(each, ()) if rival not in here)
        )
        for txid, outpoints in spent.items()
    }
    names = {rival for each in rivals.values() for rival in each}
    if not names:
        return found
    histories = await event_log.histories(names)
    whales = await event_log.whales(names)
    spoken_of = {draft.whale.alert.transaction_id for draft in drafts}
    for txid, others in rivals.items():
        # What was dropped may be replaced later; who is confirmed is taken back by the death of the block.
        beaten = [rival for rival in others if histories[rival][-1][0] in WAITING | GONE]
        for index, draft in enumerate(found):
            alert = draft.whale.alert
            if beaten and draft.kind is Kind.ALERT and alert.transaction_id == txid and alert.replaces is None:
                found[index] = replace(draft, whale=lifecycle.replacing(draft.whale, beaten[-1]))
        for rival in beaten:
            draft = lifecycle.replaced(whales[rival], txid, drafts[0].at)
            if rival not in spoken_of and (news := next_event(draft, histories[rival])) is not None:
                found.append(news)
    return found


def _here(drafts: Sequence[Draft]) -> dict[str, Whale]:
    """The whales that are in the mempool or in a block after these drafts, of those that are new or confirmed now."""
    here: dict[str, Whale] = {}
    for draft in drafts:
        txid = draft.whale.alert.transaction_id
        if draft.kind in {Kind.ALERT, Kind.CONFIRMED}:
            here.setdefault(txid, draft.whale)
        elif draft.kind in GONE:
            here.pop(txid, None)
    return here
