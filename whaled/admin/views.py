"""What the admin API returns: the types of both its sides."""

from typing import Any

from msgspec import Struct

from whaled.model import UpstreamState
from whaled.whales.filters import Filter

# A filter may name a thousand addresses; a summary has at most this many of each kind, and characters.
NAMES_SHOWN = 3
SUMMARY_CHARS = 200


class Whale(Struct, frozen=True, kw_only=True):
    """The newest alert. `at` is in Unix seconds."""

    at: float
    txid: str
    value_sat: int


class Status(Struct, frozen=True, kw_only=True):
    """The state of the daemon. Times are Unix seconds; null is unknown, or not yet."""

    version: str
    pid: int
    started_at: float
    now: float
    is_stopping: bool
    upstream: UpstreamState
    shortfall: str | None
    addresses: list[str]
    event_log: str
    epoch: str
    head: int
    oldest: int
    connections: int
    authenticated: int
    replaying: int
    connections_limit: int
    unsent_bytes: int
    memory_used_bytes: int
    memory_limit_bytes: int | None
    is_short_of_memory: bool
    last_whale: Whale | None
    canary_arrives: bool
    canary_arrived_s_ago: float
    last_reload_at: float | None
    last_reload_problem: str | None


class Client(Struct, frozen=True, kw_only=True):
    """One connection.

    `delivery` is live, replaying, paused (no subscription) or unauthenticated. `lag` is the number of events between
    its position and the head. `budget` is how many messages it may send at once; below 1 the rate limit refuses it.
    """

    connection: int
    client_id: str | None
    address: str
    since: float | None
    delivery: str
    filter: str
    offset: int | None
    lag: int | None
    unsent_bytes: int
    budget: float | None


class Clients(Struct, frozen=True, kw_only=True):
    """One page of connections. `next` is the `after` of the next page; null on the last one."""

    clients: list[Client]
    next: str | None


class Disconnected(Struct, frozen=True, kw_only=True):
    """The result of a disconnect."""

    disconnected: int


class Reloaded(Struct, frozen=True, kw_only=True):
    """The result of a reload. `problem` is the reason it was refused; null if it was applied."""

    applied: bool
    problem: str | None
    pid: int


class Version(Struct, frozen=True, kw_only=True):
    """The version of the daemon, and of this API."""

    version: str
    api: int


class Error(Struct, frozen=True, kw_only=True):
    """Why a request was refused."""

    code: str
    message: str


class ErrorBody(Struct, frozen=True, kw_only=True):
    """The body of every response except 200."""

    error: Error


def summary(chosen: Filter) -> str:
    """Return a filter in a few words: `min_btc 100, addresses 12`; "everything" if it has no condition."""
    words = [f"{name} {_shown(value)}" for name, value in _given(chosen)]
    text = ", ".join(words) or "everything"
    return text if len(text) <= SUMMARY_CHARS else text[: SUMMARY_CHARS - 1] + "\u2026"


def _given(chosen: Filter) -> list[tuple[str, Any]]:
    """Return the conditions. Long lists are replaced by their length before they are sorted."""
    long: dict[str, int] = {}
    for name in ("exchanges", "addresses", "rules"):
        names = getattr(chosen, name)
        if names is not None and len(names) > NAMES_SHOWN:
            long[name] = len(names)
    given = (_without(chosen, long) if long else chosen).normalised()
    return [*given.items(), *long.items()]


def _without(chosen: Filter, names: dict[str, int]) -> Filter:
    """Return a filter without the conditions of these names."""
    kept = {name: getattr(chosen, name) for name in _FIELDS if name not in names}
    return Filter(**kept)


_FIELDS = (
    "min_sat", "max_sat", "min_moved_sat", "min_flow_sat", "min_usd", "flow_types", "min_urgency", "min_confidence",
    "exchanges", "addresses", "rules", "kinds", "updates_of",
)  # fmt: skip


def _shown(value: object) -> str:
    if isinstance(value, list):
        return "/".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
