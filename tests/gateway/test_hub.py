"""The hub: each client gets what its filter passes, and a publication costs no more than it must."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from kit.transactions import relaxed
from kit.whales import BTC, txid, whale
from whaled.gateway import messages
from whaled.gateway.framing import text_frame
from whaled.gateway.hub import EVENTS_TOGETHER, POSITIONS_AT_ONCE, SHARED_FRAMES, Group, Hub
from whaled.gateway.interest import Later, at_once
from whaled.metrics import Metrics
from whaled.model import Event, Flow, Kind, Status, Update, Whale
from whaled.whales.filters import EVERYTHING, Filter, parse_filter

ADDRESSES = [f"bc1q{number:038d}" for number in range(6)]
NAMES = ["Kraken", "BITSTAMP", "Straße"]
RULES = ["threshold_btc", "watch:a"]


class Client:
    """A member that keeps what it is sent."""

    fd = -1
    takes_deflate = False

    def __init__(self) -> None:
        self.sent = bytearray()

    def write_behind(self, data: bytes) -> bool:
        self.sent += data
        return True

    def write_rest(self, rest: bytes) -> None:
        raise NotImplementedError

    def fell_behind(self, cursor: int) -> None:
        raise NotImplementedError

    @property
    def offsets(self) -> list[int]:
        return [int(part.split(b"}")[0]) for part in self.sent.split(b'"offset":')[1:]]


class Full(Client):
    """A member that takes nothing."""

    def write_behind(self, data: bytes) -> bool:
        return False

    def fell_behind(self, cursor: int) -> None:
        pass


def hub(later: Later = at_once) -> Hub:
    return Hub(epoch="e", head=0, meter=Metrics().gateway, slice_bytes=1 << 18, later=later)


def event(offset: int, subject: Whale, kind: Kind = Kind.ALERT) -> Event:
    update = None
    if kind is not Kind.ALERT:
        update = Update(transaction_id=txid(1), status=Status.DROPPED, btc_value=1.0)
    return Event(offset=offset, kind=kind, at=1.0, whale=subject, update=update)


def wants(**filters: Any) -> Filter:
    return parse_filter(filters, max_addresses=1000)


class Walked(tuple[str, ...]):
    """Addresses that count how often they are walked."""

    walks = 0

    def __iter__(self) -> Iterator[str]:
        type(self).walks += 1
        return super().__iter__()


class Folded(str):
    """A name that counts how often it is case-folded."""

    folds = 0

    def casefold(self) -> str:
        type(self).folds += 1
        return super().casefold()


def test_a_large_transaction_is_examined_once_and_not_for_each_filter() -> None:
    Walked.walks = Folded.folds = 0
    found = whale(1, addresses=Walked(f"bc1q{number:038d}" for number in range(3000)))
    found = Whale(replace(found.alert, exchange_addresses=(Folded("Kraken"),)), found.addresses)
    crowd = hub()
    clients = [Client() for _ in range(400)]
    for number, client in enumerate(clients):
        # Half of them want this transaction, by its last address.
        address = f"bc1q{2999:038d}" if number % 4 < 2 else f"bc1p{number:038d}"
        chosen = wants(addresses=[address, f"bc1p{number:038d}"], exchanges=["kraken"], max_btc=1000 + number)
        crowd.join(client, chosen if number % 2 else wants(exchanges=["kraken", str(number)]))
    crowd.publish([event(1, found, Kind.DROPPED)])  # its frame has no names of the alert
    assert sum(client.offsets == [1] for client in clients) == 300
    assert Walked.walks <= 2
    assert Folded.folds == 1


def test_filters_of_names_that_an_event_does_not_have_are_not_evaluated() -> None:
    evaluated = []

    class Watched(Filter):
        def passes(self, subject: Any) -> bool:
            evaluated.append(self)
            return super().passes(subject)

    crowd = hub()
    for number in range(50):
        crowd.join(Client(), Watched(addresses=frozenset({f"bc1p{number:038d}"})))
        crowd.join(Client(), Watched(exchanges=frozenset({f"exchange {number}"})))
        crowd.join(Client(), Watched(rules=frozenset({f"watch:{number}"})))
    crowd.publish([event(1, whale(1, addresses=("bc1p" + "7".zfill(38), ADDRESSES[0])))])
    crowd.rehearse(event(2, whale(2)), Group(EVERYTHING, 1))
    assert len(evaluated) == 1


def test_clients_whose_filters_match_the_same_addresses_get_them_whether_or_not_a_frame_is_shared() -> None:
    crowd = hub()
    clients = [Client() for _ in range(SHARED_FRAMES + 10)]
    for number, client in enumerate(clients):
        wanted = [ADDRESSES[2], ADDRESSES[0], f"bc1p{number:038d}"]
        crowd.join(client, wants(addresses=wanted if number else wanted[:1]))
    found = whale(1, addresses=(*ADDRESSES[:4], *(f"bc1p{number:038d}" for number in range(500, 2000))))
    crowd.publish([event(1, found)])

    def expected(*addresses: str) -> bytes:
        return text_frame(messages.event(event(1, found), "e", addresses))

    assert clients[0].sent == expected(ADDRESSES[2])
    assert {bytes(client.sent) for client in clients[1:500]} == {expected(ADDRESSES[0], ADDRESSES[2])}
    for number, client in enumerate(clients[500:], start=500):
        assert client.sent == expected(ADDRESSES[0], ADDRESSES[2], f"bc1p{number:038d}")


def _some(values: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=3)


CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "min_btc": st.sampled_from([1, 100, 1000]),
        "flow_types": st.sampled_from([["inflow"], ["unknown"]]),
        "exchanges": _some(NAMES),
        "addresses": _some(ADDRESSES),
        "rules": _some(RULES),
        "kinds": st.sampled_from([["alert"], ["update"]]),
        "updates_of": st.sampled_from(["sent", "all"]),
    },
)
SUBJECTS = st.builds(
    lambda btc, flow, addresses, names, rules: Whale(
        replace(
            whale(1, btc).alert,
            value_sat=round(btc * BTC),
            flow_type=flow,
            to_labels=tuple(names),
            matched_rules=tuple(rules),
        ),
        tuple(addresses),
    ),
    st.sampled_from([50.0, 150.0, 2000.0]),
    st.sampled_from([Flow.INFLOW, Flow.UNKNOWN]),
    st.lists(st.sampled_from(ADDRESSES), max_size=4),
    st.lists(st.sampled_from(NAMES), max_size=2),
    st.lists(st.sampled_from(RULES), max_size=2),
)
STEPS = st.lists(
    st.tuples(st.integers(0, 4), CHOICES)
    | st.integers(0, 4)
    | st.lists(st.tuples(SUBJECTS, st.sampled_from([Kind.ALERT, Kind.DROPPED])), min_size=1, max_size=3),
    max_size=25,
)


@pytest.mark.slow
@relaxed
@given(STEPS, st.booleans())
def test_each_client_gets_the_events_of_its_filter_in_order_and_once(steps: list[Any], removes_later: bool) -> None:
    jobs: list[Callable[[], bool]] = []
    crowd = hub(jobs.append if removes_later else at_once)
    clients = [Client() for _ in range(5)]
    chosen: dict[int, Filter] = {}
    due: list[list[int]] = [[] for _ in clients]
    for step in steps:
        match step:
            case int():  # a client leaves
                crowd.leave(clients[step])
                chosen.pop(step, None)
            case (int(number), dict(filters)):  # a client comes, or takes another filter
                chosen[number] = wants(**filters)
                crowd.join(clients[number], chosen[number])
            case subjects:
                events = [event(crowd.head + 1 + i, found, kind) for i, (found, kind) in enumerate(subjects)]
                crowd.publish(events)
                for number, wanted in chosen.items():
                    due[number] += [each.offset for each in events if wanted.matches(each)]
                jobs[:] = [job for job in jobs if job()]
    assert [client.offsets for client in clients] == due
    for client in clients:
        crowd.leave(client)
    while jobs:
        jobs[:] = [job for job in jobs if job()]
    assert crowd.filter_groups == crowd.names_indexed == 0


def test_names_of_clients_that_fall_behind_together_are_removed_one_client_at_a_time() -> None:
    jobs: list[Callable[[], bool]] = []
    crowd = hub(jobs.append)
    for number in range(10):
        crowd.join(Full(), wants(addresses=[ADDRESSES[0], f"bc1p{number:038d}"]))
    assert crowd.names_indexed == 11
    crowd.publish([event(1, whale(1, addresses=(ADDRESSES[0],)))])
    assert crowd.live_members == crowd.filter_groups == 0
    assert crowd.names_indexed == 11
    assert len(jobs) == 1
    runs = 1
    while jobs[0]():
        runs += 1
    assert (runs, crowd.names_indexed) == (10, 0)


def test_positions_are_sent_in_slices_and_only_to_groups_that_are_still_behind() -> None:
    jobs: list[Callable[[], bool]] = []
    crowd = hub(jobs.append)
    clients = [Client() for _ in range(3 * POSITIONS_AT_ONCE)]
    for number, client in enumerate(clients):
        crowd.join(client, wants(min_btc=1_000_000 + number))
    crowd.publish_positions()
    assert not jobs  # nobody is behind
    crowd.publish([event(1, whale(1, btc=1.0))])
    crowd.publish_positions()
    (job,) = jobs
    assert sum(bool(client.sent) for client in clients) == 0
    assert job()
    assert sum(bool(client.sent) for client in clients) == POSITIONS_AT_ONCE
    crowd.leave(clients[0])
    crowd.publish([event(2, whale(2, btc=1_000_001.5))])
    while job():
        pass
    assert [client.offsets for client in clients[:2]] == [[], [2]]
    early, late = clients[-POSITIONS_AT_ONCE:], clients[2:-POSITIONS_AT_ONCE]
    assert {tuple(client.offsets) for client in early} == {(1,)}
    assert {tuple(client.offsets) for client in late} == {(2,)}
    crowd.publish_positions()
    while jobs[1]():
        pass
    assert {tuple(client.offsets) for client in early} == {(1, 2)}
    assert {tuple(client.offsets) for client in late} == {(2,)}


def test_with_many_filters_fewer_events_are_published_at_once() -> None:
    crowd = hub()
    assert crowd.at_once > 10_000
    for number in range(2000):
        crowd.join(Client(), wants(min_btc=1 + number))
    assert crowd.at_once == EVENTS_TOGETHER
