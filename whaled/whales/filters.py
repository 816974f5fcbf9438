"""A client's filter: parsed and compiled once, with the same meaning for live delivery, replay and history. Pure."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from functools import cached_property
from typing import Any, Final, TypeVar

from whaled.addresses import canonical
from whaled.errors import ClientError, ClientErrorCode, json_kind
from whaled.model import MAX_BTC, Alert, Draft, Event, Flow, Kind
from whaled.whales.amounts import btc_to_sat, sat_to_btc

MAX_EXCHANGES = 100
MAX_RULES = 102  # the rules of a full watch list and both thresholds
MAX_NAME = 100
# Lines that each may be an address. Checksums are not verified, to save time on the event loop: a wrong address matches
# nothing.
ADDRESS_LINES: Final = re.compile(r"[0-9A-Za-z]{14,90}(?:\n[0-9A-Za-z]{14,90})*")
# The first letters of the addresses that `canonical` may change.
MAY_BE_BECH32: Final = frozenset("bBtT")


class EventClass(StrEnum):
    """The two classes of event frames."""

    ALERT = "alert"
    UPDATE = "update"


class UpdatesOf(StrEnum):
    """The whales whose updates pass: those whose alert passes, or all."""

    SENT = "sent"
    ALL = "all"


class Subject:
    """An event prepared for matching: work proportional to the transaction's size is done once for all filters."""

    def __init__(self, event: Event | Draft) -> None:
        self.is_alert = event.kind is Kind.ALERT
        self.whale = event.whale
        self.alert = event.whale.alert

    @cached_property
    def addresses(self) -> Iterable[str]:
        """Every address of the transaction, as a set: an intersection of two sets iterates only the smaller one."""
        return frozenset(self.whale.addresses)

    @cached_property
    def names(self) -> frozenset[str]:
        """The names that `exchanges` matches, case-folded."""
        alert = self.alert
        labels = (*alert.from_labels, *alert.to_labels, *alert.from_other_labels, *alert.to_other_labels)
        return frozenset([name.casefold() for name in (*labels, *alert.exchange_addresses)])

    @cached_property
    def places(self) -> dict[str, int]:
        """The position of each address in the transaction, inputs first."""
        return {address: place for place, address in enumerate(self.whale.addresses)}

    @cached_property
    def rules(self) -> frozenset[str]:
        """The rules that the transaction matched."""
        return frozenset(self.alert.matched_rules)


class _SubjectOfOne(Subject):
    """An event matched by a single filter: iterating the addresses takes half the time of building a set."""

    @property
    def addresses(self) -> Iterable[str]:
        return self.whale.addresses


_Test = Callable[[Subject], bool]
_E = TypeVar("_E", bound=StrEnum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """A client's filter: an event must meet every given condition; None is not given. Equal filters compare equal.

    `exchanges` is case-folded. A null value of an alert never passes a minimum. An event must also pass `within`, a
    filter that the operator set and the client cannot change; the two are no single filter, since an event may pass
    both by different addresses.
    """

    min_sat: int | None = None
    max_sat: int | None = None
    min_moved_sat: int | None = None
    min_flow_sat: int | None = None
    min_usd: float | None = None
    flow_types: frozenset[Flow] | None = None
    min_urgency: float | None = None
    min_confidence: float | None = None
    exchanges: frozenset[str] | None = None
    addresses: frozenset[str] | None = None
    rules: frozenset[str] | None = None
    kinds: frozenset[EventClass] | None = None
    updates_of: UpdatesOf = UpdatesOf.SENT
    within: "Filter | None" = None
    _tests: tuple[_Test, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compile the tests: only the given conditions are ever evaluated."""
        object.__setattr__(self, "_tests", (*_compile(self), *_compile_rules(self)))

    def matches(self, event: Event | Draft) -> bool:
        """Return whether an event passes. An update passes with its alert unless `updates_of` is `all`."""
        return self.passes(_SubjectOfOne(event))

    def passes(self, subject: Subject) -> bool:
        """Return whether an event passes; as `matches`, for an event that many filters examine."""
        if self.within is not None and not self.within.passes(subject):
            return False
        if subject.is_alert:
            if self.kinds is not None and EventClass.ALERT not in self.kinds:
                return False
        elif self.kinds is not None and EventClass.UPDATE not in self.kinds:
            return False
        elif self.updates_of is UpdatesOf.ALL:
            return True
        for test in self._tests:  # noqa: SIM110 - `all` with a generator takes three times as long
            if not test(subject):
                return False
        return True

    def matched_addresses(self, event: Event | Draft) -> tuple[str, ...]:
        """Return the addresses of this filter that the event's transaction spends from or pays to, inputs first.

        Empty for a filter without addresses, and for an update that passes by `updates_of` alone. Those of `within`
        count if this filter has none.
        """
        wanted = self.addresses
        if wanted is None:
            return () if self.within is None else self.within.matched_addresses(event)
        return tuple(address for address in event.whale.addresses if address in wanted)

    def matched_in(self, subject: Subject) -> tuple[str, ...]:
        """Return the matched addresses; as `matched_addresses`, for an event that many filters examine."""
        if self.addresses is None:
            return () if self.within is None else self.within.matched_in(subject)
        matched = self.addresses.intersection(subject.addresses)
        return tuple(matched if len(matched) < 2 else sorted(matched, key=subject.places.__getitem__))

    def normalised(self) -> dict[str, Any]:
        """Return the filter in the form that `parse_filter` accepts, with only the given keys, ready for JSON.

        `within` is not part of it.
        """
        given: dict[str, Any] = {}
        for key, value_sat in (("min_btc", self.min_sat), ("max_btc", self.max_sat)):
            if value_sat is not None:
                given[key] = sat_to_btc(value_sat)
        for key, value_sat in (("min_moved_btc", self.min_moved_sat), ("min_flow_btc", self.min_flow_sat)):
            if value_sat is not None:
                given[key] = sat_to_btc(value_sat)
        for key in ("min_usd", "min_urgency", "min_confidence"):
            if getattr(self, key) is not None:
                given[key] = getattr(self, key)
        for key in ("flow_types", "exchanges", "addresses", "rules", "kinds"):
            if getattr(self, key) is not None:
                given[key] = sorted(map(str, getattr(self, key)))
        if self.updates_of is not UpdatesOf.SENT:
            given["updates_of"] = str(self.updates_of)
        return given


def _compile(wanted: Filter) -> list[_Test]:
    """Return the tests of the given conditions, cheap ones first."""
    tests: list[_Test] = []
    if (min_sat := wanted.min_sat) is not None:
        tests.append(lambda subject: subject.alert.value_sat >= min_sat)
    if (max_sat := wanted.max_sat) is not None:
        tests.append(lambda subject: subject.alert.value_sat <= max_sat)
    tests += [
        _at_least(least, read)
        for least, read in (
            (wanted.min_moved_sat, lambda alert: alert.moved_sat),
            (wanted.min_flow_sat, lambda alert: alert.flow_sat),
            (wanted.min_usd, lambda alert: alert.usd_value),
            (wanted.min_urgency, lambda alert: alert.urgency_score),
            (wanted.min_confidence, lambda alert: alert.confidence_score),
        )
        if least is not None
    ]
    if (flows := wanted.flow_types) is not None:
        tests.append(lambda subject: subject.alert.flow_type in flows)
    if (exchanges := wanted.exchanges) is not None:
        tests.append(lambda subject: not exchanges.isdisjoint(subject.names))
    if (addresses := wanted.addresses) is not None:
        tests.append(lambda subject: not addresses.isdisjoint(subject.addresses))
    return tests


def _compile_rules(wanted: Filter) -> list[_Test]:
    rules = wanted.rules
    return [] if rules is None else [lambda subject: not rules.isdisjoint(subject.rules)]


def _at_least(least: float, read: Callable[[Alert], float | None]) -> _Test:
    """Return a test that passes values of at least `least`; null never passes."""
    return lambda subject: (value := read(subject.alert)) is not None and value >= least


EVERYTHING: Final = Filter()


# --- parsing ---------------------------------------------------------------------------------------------------------


def parse_filter(raw: object, *, max_addresses: int) -> Filter:
    """Parse the `filters` of a subscribe message.

    Raises ClientError with code invalid_filter, the path of the fault, the value found and the values allowed.
    """
    if not isinstance(raw, Mapping):
        raise _invalid("", f"must be an object, found {json_kind(raw)}")
    given: dict[str, Any] = {}
    for key, value in raw.items():
        if key == "addresses":
            given[key] = _addresses(key, _strings(key, value, max_addresses))
        elif key in _READERS:
            name, reader = _READERS[key]
            given[name] = reader(key, value)
        else:
            near = get_close_matches(str(key)[:MAX_NAME], KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(KEYS)}"
            raise _invalid(str(key)[:MAX_NAME], f"unknown key; {hint}")
    if given.get("min_sat", 0) > given.get("max_sat", math.inf):
        raise _invalid("max_btc", f"is less than min_btc ({raw['max_btc']} < {raw['min_btc']}): nothing would pass")
    return Filter(**given)


def _amount(key: str, value: object) -> int:
    number = _number(key, value, 0, MAX_BTC)
    return btc_to_sat(number)


def _usd(key: str, value: object) -> float:
    return _number(key, value, 0, 1e15)


def _fraction(key: str, value: object) -> float:
    return _number(key, value, 0, 1)


def _number(key: str, value: object, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _invalid(key, f"must be a number, found {json_kind(value)}")
    if not least <= value <= most:
        # Python refuses to convert an integer of thousands of digits to text.
        found = str(value) if abs(value) < 1e18 else "a larger one"
        raise _invalid(key, f"must be from {least:,} to {most:,.0f}, found {found}")
    return float(value)


def _flows(key: str, value: object) -> frozenset[Flow]:
    return frozenset(_member(f"{key}[{i}]", name, Flow) for i, name in enumerate(_strings(key, value, 100)))


def _kinds(key: str, value: object) -> frozenset[EventClass]:
    return frozenset(_member(f"{key}[{i}]", name, EventClass) for i, name in enumerate(_strings(key, value, 100)))


def _updates_of(key: str, value: object) -> UpdatesOf:
    if not isinstance(value, str):
        raise _invalid(key, f"must be a string, found {json_kind(value)}")
    return _member(key, value, UpdatesOf)


def _exchanges(key: str, value: object) -> frozenset[str]:
    names = [name.casefold() for name in _strings(key, value, MAX_EXCHANGES)]
    # Case-folding can lengthen a name (some letters fold to three), and `normalised` must return a valid filter.
    return frozenset(_strings(key, names, MAX_EXCHANGES))


def _rules(key: str, value: object) -> frozenset[str]:
    return frozenset(_strings(key, value, MAX_RULES))


def _addresses(key: str, values: list[str]) -> frozenset[str]:
    # One match covers all values, because a filter may have a thousand. A line break within a value is invalid, so the
    # number of line breaks is checked first.
    lines = "\n".join(values)
    if lines.count("\n") >= len(values) or ADDRESS_LINES.fullmatch(lines) is None:
        for index, value in enumerate(values):
            if "\n" in value or ADDRESS_LINES.fullmatch(value) is None:
                raise _invalid(f"{key}[{index}]", f"is no address: {value[:MAX_NAME]!r}")
    return frozenset([canonical(value) if value[0] in MAY_BE_BECH32 else value for value in values])


def _strings(key: str, value: object, limit: int) -> list[str]:
    if not isinstance(value, list | tuple):
        raise _invalid(key, f"must be an array of strings, found {json_kind(value)}")
    if not 1 <= len(value) <= limit:
        raise _invalid(key, f"must have 1 to {limit} entries, found {len(value)}; leave it out to allow any")
    if set(map(type, value)) != {str} or not all(value) or len(max(value, key=len)) > MAX_NAME:
        _check_each(key, value)
    return list(value)


def _check_each(key: str, values: Sequence[object]) -> None:
    for index, entry in enumerate(values):
        if not isinstance(entry, str):
            raise _invalid(f"{key}[{index}]", f"must be a string, found {json_kind(entry)}")
        if not 1 <= len(entry) <= MAX_NAME:
            raise _invalid(f"{key}[{index}]", f"must have 1 to {MAX_NAME} characters, found {len(entry)}")


def _member(path: str, value: str, allowed: type[_E]) -> _E:
    try:
        return allowed(value)
    except ValueError:
        names = ", ".join(allowed)
        raise _invalid(path, f"must be one of {names}; found {value[:MAX_NAME]!r}") from None


def _invalid(key: str, problem: str) -> ClientError:
    path = f"filters.{key}" if key else "filters"
    return ClientError(ClientErrorCode.INVALID_FILTER, f"{path} {problem}", path=path)


_READERS: Final[Mapping[str, tuple[str, Callable[[str, object], object]]]] = {
    "min_btc": ("min_sat", _amount),
    "max_btc": ("max_sat", _amount),
    "min_moved_btc": ("min_moved_sat", _amount),
    "min_flow_btc": ("min_flow_sat", _amount),
    "min_usd": ("min_usd", _usd),
    "flow_types": ("flow_types", _flows),
    "min_urgency": ("min_urgency", _fraction),
    "min_confidence": ("min_confidence", _fraction),
    "exchanges": ("exchanges", _exchanges),
    "rules": ("rules", _rules),
    "kinds": ("kinds", _kinds),
    "updates_of": ("updates_of", _updates_of),
}
KEYS: Final = (*_READERS, "addresses")
