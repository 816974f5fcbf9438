"""A whale's life as a table: which event may follow which, and when one is no news. Pure."""

from msgspec.structs import replace

from whaled.model import Draft, Kind

# Kind and ref of each event about a whale, in their order.
History = list[tuple[Kind, str]]

GONE = frozenset({Kind.REPLACED, Kind.DROPPED})
WAITING = frozenset({Kind.ALERT, Kind.PENDING})
# The kinds that an event learned by polling may follow: it is the state as it is known now.
AFTER = {
    Kind.CONFIRMED: frozenset({Kind.CONFIRMED}) | WAITING | GONE,
    Kind.REPLACED: WAITING | {Kind.DROPPED},
    Kind.DROPPED: WAITING,
    Kind.PENDING: frozenset({Kind.CONFIRMED}) | GONE,
}


def next_event(draft: Draft, history: History) -> Draft | None:
    """The draft as it can be stored, None if it is the last thing that was said, or no longer so.

    The log takes each (kind, ref) of a whale once. A whale that goes back and forth between two branches is told the
    same a second time: with a number behind the ref.
    """
    if draft.kind is Kind.ALERT:
        return None if history else draft
    last, ref = history[-1] if history else (Kind.ALERT, "")
    ref = ref.partition("#")[0]
    if last not in AFTER[draft.kind] or (last, ref) == (draft.kind, draft.ref):
        return None
    # A block that died takes back only what was said last, and only of itself; who was gone comes back without a block.
    if draft.kind is Kind.PENDING and (draft.ref != ref if last is Kind.CONFIRMED else draft.ref):
        return None
    # Retention may have taken the first of them: what counts is the highest number that is held.
    numbers = [
        int(number or 1)
        for before, number in (ref.partition("#")[::2] for kind, ref in history if kind is draft.kind)
        if before == draft.ref
    ]
    return replace(draft, ref=f"{draft.ref}#{max(numbers) + 1}") if numbers else draft
