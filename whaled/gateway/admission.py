"""Who may hold a connection: counts in all and per address, and makes room for newcomers at the cost of strangers.

A stranger is a connection that has not authenticated. When all places for strangers are taken a newcomer is still let
in: the stranger that had time to authenticate and did not goes, or else the oldest of a network that connects a lot. A
client that means business authenticates within a round trip or two, long before that is it.

While more connect than can be accepted, a network from which nearly all connections fail is reset at the accept, before
anything is built for it: resets are cheap, and so the queue in the kernel, in which clients wait as well, stays short.
"""

import ipaddress
import time
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import NamedTuple

from whaled.gateway.limits import Refusal
from whaled.listening import source_of

# Connections beyond the limits that wait for their refusal. They are descriptors too: further ones displace the oldest.
TURNED_AWAY = 256
TURNED_AWAY_PER_ADDRESS = 16
# From the accept to the credential, through TLS and handshake: some round trips around the world.
TIME_TO_BEGIN_S = 2.0
# A network connects a lot if it has one in so many of all strangers.
BUSY_PART = 10
# Failed connects count for one to two of these.
FAILURE_WINDOW_S = 1.0
# Until the queue is empty, connections of more and more networks are reset: after each such time the limit is halved.
HALVED_AFTER_S = 0.25
# It is halved no further than to one in so many.
LEAST_PART = 10
# From then on those that have not authenticated yet count as failures as well: a flood that goes through network after
# network is gone from each before the first of its connections has failed. Thousands of clients that come at once are
# accepted by then, or many of them are in.
UNFINISHED_AFTER_S = 0.5
# A network is no flood while one in so many of its connections is a client's: a proxy may serve some broken clients.
CLIENT_PART = 10


class Source(NamedTuple):
    """Where a connection comes from: its address (an IPv6 host's /64), and the network around it (/24, /48)."""

    address: str
    network: str


def source(address: str) -> Source:
    """The source of a peer's address; a Unix socket is one source."""
    octets = address.rpartition(".")
    if octets[1] and ":" not in address:
        return Source(address, f"{octets[0]}.0/24")
    return _source_by_parsing(address)


@lru_cache(maxsize=256)
def _source_by_parsing(address: str) -> Source:
    found = source_of(address)
    try:
        parsed = ipaddress.ip_address(found)
    except ValueError:
        return Source(found, found)
    prefix = 24 if parsed.version == 4 else 48
    return Source(found, str(ipaddress.ip_network((parsed, prefix), strict=False)))


class Strangers:
    """Members by network and address, oldest first. What an operation takes does not grow with their number."""

    def __init__(self) -> None:
        self._networks: dict[str, dict[str, dict[Hashable, None]]] = {}
        self._sizes: dict[str, int] = {}
        self._by_size: dict[int, dict[str, None]] = {}
        self._largest = 0
        # Of each member, oldest first: its source, and when it came.
        self._members: dict[Hashable, tuple[Source, float]] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, member: Hashable) -> bool:
        return member in self._members

    def add(self, member: Hashable, source: Source, now: float = 0.0) -> None:
        """Add a newcomer."""
        self._members[member] = source, now
        self._networks.setdefault(source.network, {}).setdefault(source.address, {})[member] = None
        self._resize(source.network, 1)

    def discard(self, member: Hashable) -> None:
        """Forget a member, if it is one."""
        if member not in self._members:
            return
        source, _ = self._members.pop(member)
        addresses = self._networks[source.network]
        members = addresses[source.address]
        del members[member]
        if not members:
            del addresses[source.address]
            if not addresses:
                del self._networks[source.network]
        self._resize(source.network, -1)

    def _resize(self, network: str, by: int) -> None:
        old = self._sizes.get(network, 0)
        new = self._sizes[network] = old + by
        if old:
            same = self._by_size[old]
            del same[network]
            if not same:
                del self._by_size[old]
        if new:
            self._by_size.setdefault(new, {})[network] = None
        else:
            del self._sizes[network]
        if new > self._largest:
            self._largest = new
        elif old == self._largest and old not in self._by_size:
            self._largest = new  # sizes change by one: the next largest is this network's, or as large as it

    def oldest_of_busiest(self) -> Hashable:
        """The oldest member of the address with the most of the network with the most. Raises KeyError if empty."""
        network = next(iter(self._by_size[self._largest]))
        busiest = max(self._networks[network].items(), key=lambda address: len(address[1]))
        return next(iter(busiest[1]))

    def oldest(self) -> Hashable:
        """The oldest member of all. Raises StopIteration if empty."""
        return next(iter(self._members))

    def arrived_at(self, member: Hashable) -> float:
        """When a member was added."""
        return self._members[member][1]

    @property
    def is_one_busy(self) -> bool:
        """Whether one network has a large part of all members."""
        return self._largest * BUSY_PART >= len(self)

    def network_of(self, member: Hashable) -> str:
        """The network of a member."""
        return self._members[member][0].network

    def count_in(self, network: str) -> int:
        """Members of one network."""
        return self._sizes.get(network, 0)

    def count(self, source: Source) -> int:
        """Members of one address."""
        return len(self._networks.get(source.network, {}).get(source.address, ()))

    def oldest_of(self, source: Source) -> Hashable | None:
        """The oldest member of one address, None if there is none."""
        members = self._networks.get(source.network, {}).get(source.address)
        return next(iter(members)) if members else None


class FailedConnects:
    """How many connections of each network failed lately: ended before they authenticated.

    `limit` is how many may fail within FAILURE_WINDOW_S before the network counts as a flood.
    """

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._began = clock()
        # Per network, how many failed and how many became clients: in this window, and in the one before.
        self._now: dict[str, list[int]] = {}
        self._before: dict[str, list[int]] = {}

    def failed(self, network: str) -> None:
        """A connection ended before it authenticated."""
        self._count(network)[0] += 1

    def succeeded(self, network: str) -> None:
        """A connection authenticated."""
        self._count(network)[1] += 1

    def is_flood(self, network: str, behind_s: float, clients_here: int = 0, unfinished: int = 0) -> bool:
        """Whether nearly all of many connections failed. `behind_s`: for how long more have come than can be accepted;
        `clients_here`: how many of the network are connected; `unfinished`: how many have not authenticated yet.
        """
        self._turn()
        failed, clients = self._now.get(network, (0, 0))
        failed_before, clients_before = self._before.get(network, (0, 0))
        limit = max(self.limit // LEAST_PART, self.limit >> int(behind_s / HALVED_AFTER_S))
        if behind_s >= UNFINISHED_AFTER_S:
            failed += unfinished
        return failed + failed_before > max(limit, CLIENT_PART * (clients + clients_before + clients_here))

    def _count(self, network: str) -> list[int]:
        self._turn()
        return self._now.setdefault(network, [0, 0])

    def _turn(self) -> None:
        now = self._clock()
        if now - self._began >= FAILURE_WINDOW_S:
            self._before = self._now if now - self._began < 2 * FAILURE_WINDOW_S else {}
            self._now = {}
            self._began = now


class Verdict(NamedTuple):
    """What a newcomer meets: a refusal, or None; and the stranger that gives way to it, or None. One that is not
    admitted is to be closed at once: it is not counted, and no `leave` follows.
    """

    refusal: Refusal | None = None
    displaced: Hashable | None = None
    is_admitted: bool = True


def _always(_: Hashable) -> bool:
    return True


class Admission:
    """Counts open connections and decides about newcomers. The limits may be changed at any time."""

    def __init__(
        self,
        *,
        total: int,
        per_address: int,
        unauthenticated: int,
        failed_connects: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_limit = total
        self.per_address_limit = per_address
        self.unauthenticated_limit = unauthenticated
        self.total = 0
        self.strangers = Strangers()
        self.failures = FailedConnects(failed_connects, clock)
        self._by_address: dict[str, int] = {}
        self._clients: dict[str, int] = {}  # by network
        self._clock = clock

    def is_flood(self, source: Source, behind_s: float) -> bool:
        """Whether nearly all of many connections of a newcomer's network fail. See `FailedConnects.is_flood`."""
        network = source.network
        return self.failures.is_flood(
            network, behind_s, self._clients.get(network, 0), self.strangers.count_in(network)
        )

    def admit(self, member: Hashable, source: Source, may_displace: Callable[[Hashable], bool] = _always) -> Verdict:
        """Count a newcomer as a stranger. `leave` must be called for it once, and for the displaced one too.

        A newcomer that is refused is counted as well, beyond the limits: it holds a socket until its refusal is sent.
        `may_displace` is asked about a stranger of the newcomer's own network; if it may not, the newcomer is not
        admitted. A stranger of another, busier network gives way whatever it does.
        """
        here = self._by_address.get(source.address, 0)
        strangers, strangers_here = len(self.strangers), self.strangers.count(source)
        refusal, displaced = None, None
        if here - strangers_here >= self.per_address_limit:
            refusal = Refusal.ADDRESS_CAP
            if strangers_here >= TURNED_AWAY_PER_ADDRESS:
                displaced = self.strangers.oldest_of(source)
        elif self.total - strangers >= self.total_limit:
            refusal = Refusal.GLOBAL_CAP
            if strangers >= TURNED_AWAY:
                displaced = self._gives_way()
        elif here >= self.per_address_limit:
            displaced = self.strangers.oldest_of(source)
        elif self.total >= self.total_limit or strangers >= self.unauthenticated_limit:
            displaced = self._gives_way()
        is_own = displaced is not None and self.strangers.network_of(displaced) == source.network
        if is_own and not may_displace(displaced):
            return Verdict(is_admitted=False)
        self.total += 1
        self._by_address[source.address] = here + 1
        self.strangers.add(member, source, self._clock())
        return Verdict(refusal, displaced)

    def _gives_way(self) -> Hashable:
        """The stranger to displace. If all of them came just now, from many networks, their age is all there is to tell
        them apart; the network that has most of them may be a proxy with clients in mid-handshake.
        """
        oldest = self.strangers.oldest()
        had_time = self._clock() - self.strangers.arrived_at(oldest) > TIME_TO_BEGIN_S
        return oldest if had_time or not self.strangers.is_one_busy else self.strangers.oldest_of_busiest()

    @property
    def unauthenticated(self) -> int:
        """Strangers, those that are being refused among them."""
        return len(self.strangers)

    def known(self, member: Hashable) -> None:
        """A stranger has authenticated, or need not."""
        if member in self.strangers:
            network = self.strangers.network_of(member)
            self.failures.succeeded(network)
            self.strangers.discard(member)
            self._clients[network] = self._clients.get(network, 0) + 1

    def leave(self, member: Hashable, source: Source, *, has_failed: bool = True) -> None:
        """A connection is gone, or is on its way out. A stranger may have gone for no fault of its own."""
        if member in self.strangers:
            if has_failed:
                self.failures.failed(source.network)
            self.strangers.discard(member)
        else:
            clients = self._clients[source.network] - 1
            if clients:
                self._clients[source.network] = clients
            else:
                del self._clients[source.network]
        self.total -= 1
        left = self._by_address[source.address] - 1
        if left:
            self._by_address[source.address] = left
        else:
            del self._by_address[source.address]
