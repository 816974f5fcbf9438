"""Who may hold a connection, and who gives way."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from whaled.gateway.admission import (
    FAILURE_WINDOW_S,
    HALVED_AFTER_S,
    LEAST_PART,
    TIME_TO_BEGIN_S,
    TURNED_AWAY_PER_ADDRESS,
    UNFINISHED_AFTER_S,
    Admission,
    FailedConnects,
    Source,
    Strangers,
    source,
)
from whaled.gateway.limits import Refusal


def test_an_ipv6_host_is_its_64_and_its_network_the_48_around_it() -> None:
    assert source("2001:db8::1") == source("2001:db8::2") == Source("2001:db8::", "2001:db8::/48")
    assert source("2001:db8:0:1::1") == Source("2001:db8:0:1::", "2001:db8::/48")
    assert source("::ffff:192.0.2.1") == source("192.0.2.1") == Source("192.0.2.1", "192.0.2.0/24")
    assert source("unix") == Source("unix", "unix")


def test_the_oldest_unauthenticated_connection_of_the_busiest_network_is_displaced() -> None:
    admission = Admission(total=100, per_address=100, unauthenticated=5, failed_connects=20)
    for number in range(4):
        assert admission.admit(f"flood {number}", source(f"192.0.2.{number % 2}")) == (None, None, True)
    assert admission.admit("newcomer", source("198.51.100.1")) == (None, None, True)
    assert admission.admit("second newcomer", source("203.0.113.1")) == (None, "flood 0", True)
    admission.leave("flood 0", source("192.0.2.0"))
    assert admission.unauthenticated == 5
    # A network that goes on connecting displaces itself.
    assert admission.admit("flood 5", source("192.0.2.1")) == (None, "flood 1", True)


def test_authenticated_clients_are_never_displaced() -> None:
    admission = Admission(total=3, per_address=100, unauthenticated=2, failed_connects=20)
    for number in range(3):
        admission.admit(number, source("192.0.2.1"))
        admission.known(number)
    assert admission.admit("late", source("198.51.100.1")) == (Refusal.GLOBAL_CAP, None, True)
    assert (admission.total, admission.unauthenticated) == (4, 1)  # it waits for its refusal
    admission.leave("late", source("198.51.100.1"))
    admission.leave(0, source("192.0.2.1"))
    assert admission.admit("next", source("198.51.100.1")) == (None, None, True)
    assert admission.admit("after it", source("203.0.113.1")) == (None, "next", True)


def test_an_address_at_its_cap_displaces_its_own_unauthenticated_connection_or_is_refused() -> None:
    admission, here = Admission(total=100, per_address=2, unauthenticated=100, failed_connects=20), source("192.0.2.1")
    admission.admit("stranger", here)
    admission.admit("client", here)
    admission.known("client")
    assert admission.admit("newcomer", here) == (None, "stranger", True)
    admission.leave("stranger", here)
    admission.known("newcomer")
    for number in range(TURNED_AWAY_PER_ADDRESS):
        assert admission.admit(number, here) == (Refusal.ADDRESS_CAP, None, True)
    assert admission.admit("one more", here) == (Refusal.ADDRESS_CAP, 0, True)  # what waits for a refusal is bounded
    assert admission.admit("elsewhere", source("192.0.2.2")) == (None, None, True)


def test_a_proxy_with_clients_in_the_handshake_is_not_treated_as_a_flood() -> None:
    """A stranger each from many networks: the one that has had its time goes, not the proxy, which has two."""
    now = 0.0
    admission = Admission(total=500, per_address=100, unauthenticated=100, failed_connects=20, clock=lambda: now)
    flood = [source(f"198.51.{number}.1") for number in range(98)]
    for number, place in enumerate(flood):
        admission.admit(number, place)
    now += TIME_TO_BEGIN_S + 0.1
    proxy = source("192.0.2.1")
    admission.admit("first client", proxy)
    admission.admit("second client", proxy)
    for number in range(98):
        verdict = admission.admit(f"next {number}", source(f"203.0.{number}.1"))
        assert verdict.displaced == number
        admission.leave(number, flood[number])
    # All have just come: the oldest goes, and the proxy's are no worse off than others.
    assert admission.admit("one more", source("203.0.99.1")).displaced == "first client"


def test_a_network_with_clients_has_ten_failures_for_each_of_them() -> None:
    admission, proxy = Admission(total=99, per_address=99, unauthenticated=99, failed_connects=4), source("192.0.2.1")
    for number in range(3):
        admission.admit(number, proxy)
        admission.known(number)
    admission.failures = FailedConnects(4, lambda: 0.0)  # a minute later
    for _ in range(30):
        admission.failures.failed(proxy.network)
    assert not admission.is_flood(proxy, behind_s=60.0)
    admission.leave(0, proxy)
    assert admission.is_flood(proxy, behind_s=60.0)
    assert admission.is_flood(source("192.0.2.77"), behind_s=60.0)


def test_a_connection_that_ended_without_fault_is_no_failure_of_its_network() -> None:
    admission, place = Admission(total=99, per_address=99, unauthenticated=99, failed_connects=1), source("192.0.2.1")
    for number in range(9):
        admission.admit(number, place)
        admission.leave(number, place, has_failed=False)
    assert not admission.is_flood(place, behind_s=60.0)


def test_nothing_is_left_of_connections_that_are_gone() -> None:
    admission, rng = Admission(total=20, per_address=9, unauthenticated=10, failed_connects=20), random.Random(1)
    open_: dict[int, Source] = {}
    for number in range(5000):
        place = source(f"192.0.{rng.randrange(4)}.{rng.randrange(4)}")
        verdict = admission.admit(number, place)
        open_[number] = place
        if isinstance(verdict.displaced, int):
            admission.leave(verdict.displaced, open_.pop(verdict.displaced))
        elif verdict.refusal is None and rng.random() < 0.5:
            admission.known(number)
        if rng.random() < 0.3:
            gone = rng.choice(list(open_))
            admission.leave(gone, open_.pop(gone))
        assert admission.total == len(open_) <= 20 + 256 + 1
    for gone, place in open_.items():
        admission.leave(gone, place)
    strangers = admission.strangers
    assert (admission.total, admission.unauthenticated, admission._by_address, admission._clients) == (0, 0, {}, {})
    assert (strangers._networks, strangers._sizes, strangers._by_size, strangers._largest) == ({}, {}, {}, 0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=60))
def test_the_busiest_is_the_one_that_counting_finds(steps: list[tuple[int, int, bool]]) -> None:
    strangers, held = Strangers(), list[tuple[int, Source]]()
    for number, (network, host, adds) in enumerate(steps):
        if adds or not held:
            place = source(f"192.0.{network}.{host}")
            strangers.add(number, place)
            held.append((number, place))
        else:
            strangers.discard(held.pop(number % len(held))[0])
        if held:
            networks = Counter(place.network for _, place in held)
            found = strangers.oldest_of_busiest()
            place = next(place for each, place in held if each == found)
            assert networks[place.network] == max(networks.values())
            inside = Counter(other.address for _, other in held if other.network == place.network)
            assert inside[place.address] == max(inside.values())
            assert found == next(each for each, other in held if other == place)
        assert len(strangers) == len(held)


def test_a_new_client_of_the_busiest_network_is_refused_if_its_oldest_may_not_be_displaced() -> None:
    admission, flood = Admission(total=100, per_address=100, unauthenticated=3, failed_connects=20), source("192.0.2.1")
    for number in range(3):
        admission.admit(number, flood)
    assert not admission.admit("of the flood", flood, lambda _: False).is_admitted
    assert (admission.total, admission.unauthenticated) == (3, 3)
    # Another network's newcomer takes the place of one of the flood all the same.
    assert admission.admit("from elsewhere", source("198.51.100.1"), lambda _: False) == (None, 0, True)


def test_a_network_from_which_nearly_all_connections_fail_is_a_flood_for_two_seconds() -> None:
    now = 0.0
    failures = FailedConnects(4 * LEAST_PART, lambda: now)
    for _ in range(4 * LEAST_PART):
        failures.failed("192.0.2.0/24")
    for _ in range(4):
        failures.failed("203.0.113.0/24")
    assert not failures.is_flood("192.0.2.0/24", behind_s=0.1)
    assert failures.is_flood("192.0.2.0/24", behind_s=HALVED_AFTER_S)  # half are too many then
    assert not failures.is_flood("203.0.113.0/24", behind_s=60.0)  # so many may always fail
    failures.failed("192.0.2.0/24")
    assert failures.is_flood("192.0.2.0/24", behind_s=0.1)
    assert not failures.is_flood("198.51.100.0/24", behind_s=60.0)
    # A deep queue applies the lowest limit at once, and still counts no unfinished connection of a genuine client.
    failures.failed("203.0.113.0/24")
    assert not failures.is_flood("203.0.113.0/24", behind_s=0.01)
    assert failures.is_flood("203.0.113.0/24", behind_s=0.01, is_deep=True)
    assert not failures.is_flood("198.51.100.0/24", behind_s=0.01, unfinished=1000, is_deep=True)
    now += FAILURE_WINDOW_S
    assert failures.is_flood("192.0.2.0/24", behind_s=0.1)
    now += FAILURE_WINDOW_S
    assert not failures.is_flood("192.0.2.0/24", behind_s=60.0)


def test_connections_that_have_not_authenticated_count_once_a_flood_has_lasted() -> None:
    """It may come from network after network, and be gone from each before one of its connections has failed."""
    admission, flood = Admission(total=99, per_address=99, unauthenticated=99, failed_connects=20), source("192.0.2.1")
    for number in range(30):
        admission.admit(number, flood)
    assert not admission.is_flood(flood, behind_s=UNFINISHED_AFTER_S / 2)
    assert admission.is_flood(flood, behind_s=UNFINISHED_AFTER_S)
    assert not admission.is_flood(source("198.51.100.1"), behind_s=60.0)
    # Clients that come all at once are known by those of them that are in.
    for number in range(3):
        admission.known(number)
    assert not admission.is_flood(flood, behind_s=UNFINISHED_AFTER_S)


def test_a_few_broken_clients_behind_a_proxy_make_no_flood_of_it() -> None:
    admission, proxy = Admission(total=100, per_address=100, unauthenticated=5, failed_connects=4), source("192.0.2.1")
    for number in range(100):
        admission.admit(number, proxy)
        if number % 10 == 0:
            admission.known(number)
        admission.leave(number, proxy)
    assert not admission.failures.is_flood(proxy.network, behind_s=60.0)
    for _ in range(11):
        admission.failures.failed(proxy.network)
    assert admission.failures.is_flood(proxy.network, behind_s=60.0)
