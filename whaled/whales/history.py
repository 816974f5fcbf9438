"""The order of a whale's events: which event may follow which, and which repeats the current state. Pure."""

from msgspec.structs import replace

from whaled.model import Draft, Kind

# Kind and ref of each event about a whale, in order.
History = list[tuple[Kind, str]]

GONE = frozenset({Kind.REPLACED, Kind.DROPPED})
WAITING = frozenset({Kind.ALERT, Kind.PENDING})
# For each kind, the kinds that it may follow. An event learned by polling gives the whale's present state, so
# intermediate events may be missing.
AFTER = {
    Kind.CONFIRMED: frozenset({Kind.CONFIRMED}) | WAITING | GONE,
    Kind.REPLACED: WAITING | {Kind.DROPPED},
    Kind.DROPPED: WAITING,
    Kind.PENDING: frozenset({Kind.CONFIRMED}) | GONE,
}


def next_event(draft: Draft, history: History) -> Draft | None:
    """Return the draft in the form to store, None if it repeats the last event or may not follow it.

    The log accepts each (kind, ref) of a whale once. A whale that moves back and forth between two branches of the
    chain repeats an earlier event; the repetition has a number after its ref.
    """
    if draft.kind is Kind.ALERT:
        return None if history else draft
    last, ref = history[-1] if history else (Kind.ALERT, "")
    ref = ref.partition("#")[0]
    if last not in AFTER[draft.kind] or (last, ref) == (draft.kind, draft.ref):
        return None
    # A block that left the chain revokes only the last event, and only if that names this block. A replaced or dropped
    # whale becomes pending again without a block.
    if draft.kind is Kind.PENDING and (draft.ref != ref if last is Kind.CONFIRMED else draft.ref):
        return None
    # Retention may have removed earlier repetitions, so the highest stored number counts, not their quantity.
    numbers = [
        int(number or 1)
        for before, number in (ref.partition("#")[::2] for kind, ref in history if kind is draft.kind)
        if before == draft.ref
    ]
    return replace(draft, ref=f"{draft.ref}#{max(numbers) + 1}") if numbers else draft
