"""Admission of connections: limits in total and per address, and room for new connections.

The code calls an unauthenticated connection a stranger. At the limit of unauthenticated connections a new one is still
admitted, and displaces another: the oldest if that had time to authenticate, or else the oldest of the busiest network.
A genuine client authenticates within a round trip or two, long before it could be displaced.

While connections arrive faster than they can be accepted, connections of a network from which nearly all connections
fail are reset at the accept, before anything is allocated for them. A reset is cheap, so the kernel's accept queue, in
which genuine clients wait as well, stays short.
"""

import ipaddress
import time
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import NamedTuple

from whaled.gateway.limits import NO_FAULTS, Refusal
from whaled.listening import source_of

# The limits of connections that wait for their refusal. They use descriptors too, so further ones displace the oldest.
TURNED_AWAY = 256
TURNED_AWAY_PER_ADDRESS = 16
# The time from the accept to the credential, through TLS and handshake: several intercontinental round trips.
TIME_TO_BEGIN_S = 2.0
# A network is busy if it has at least one in BUSY_PART of all unauthenticated connections.
BUSY_PART = 10
# Failed connects count for one to two windows.
FAILURE_WINDOW_S = 1.0
# Until the accept queue is empty, the limit of failures per network is halved at this interval, so that connections of
# more and more networks are reset.
HALVED_AFTER_S = 0.25
# The limit is never halved below one LEAST_PART of its configured value.
LEAST_PART = 10
# After this time unauthenticated connections count as failures as well: a flood that moves from network to network has
# left each one before its first connection there has failed. Of thousands of clients that connect at once, all have
# been accepted by then, or many have authenticated.
UNFINISHED_AFTER_S = 0.5
# A network is not a flood while at least one in CLIENT_PART of its connections is a client's, since a proxy may serve
# some broken clients.
CLIENT_PART = 10


class Source(NamedTuple):
    """The origin of a connection: its address (/64 for IPv6) and the network around it (/24, or /48 for IPv6)."""

    address: str
    network: str


def source(address: str) -> Source:
    """Return the source of a peer's address. All connections of a Unix socket have the same source."""
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
    """The unauthenticated connections by network and address, oldest first.

    The time of an operation does not grow with their number.
    """

    def __init__(self) -> None:
        self._networks: dict[str, dict[str, dict[Hashable, None]]] = {}
        self._sizes: dict[str, int] = {}
        self._by_size: dict[int, dict[str, None]] = {}
        self._largest = 0
        # The source and arrival time of each member, oldest first.
        self._members: dict[Hashable, tuple[Source, float]] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, member: Hashable) -> bool:
        return member in self._members

    def add(self, member: Hashable, source: Source, now: float = 0.0) -> None:
        """Add a new member."""
        self._members[member] = source, now
        self._networks.setdefault(source.network, {}).setdefault(source.address, {})[member] = None
        self._resize(source.network, 1)

    def discard(self, member: Hashable) -> None:
        """Remove a member, if it is present."""
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
            self._largest = new  # sizes change by one, so no other network is larger than this one now

    def oldest_of_busiest(self) -> Hashable:
        """Return the oldest member of the busiest address of the busiest network. Raises KeyError if empty."""
        network = next(iter(self._by_size[self._largest]))
        busiest = max(self._networks[network].items(), key=lambda address: len(address[1]))
        return next(iter(busiest[1]))

    def oldest(self) -> Hashable:
        """Return the oldest member of all. Raises StopIteration if empty."""
        return next(iter(self._members))

    def arrived_at(self, member: Hashable) -> float:
        """Return the time at which a member was added."""
        return self._members[member][1]

    @property
    def is_one_busy(self) -> bool:
        """True if one network has at least one in BUSY_PART of all members."""
        return self._largest * BUSY_PART >= len(self)

    def network_of(self, member: Hashable) -> str:
        """Return the network of a member."""
        return self._members[member][0].network

    def count_in(self, network: str) -> int:
        """Return the number of members in one network."""
        return self._sizes.get(network, 0)

    def count(self, source: Source) -> int:
        """Return the number of members of one address."""
        return len(self._networks.get(source.network, {}).get(source.address, ()))

    def oldest_of(self, source: Source) -> Hashable | None:
        """Return the oldest member of one address; None if there is none."""
        members = self._networks.get(source.network, {}).get(source.address)
        return next(iter(members)) if members else None


class FailedConnects:
    """The recent failed connects of each network: connections that ended before they authenticated.

    A network counts as a flood if more than `limit` of its connections fail within FAILURE_WINDOW_S.
    """

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._began = clock()
        # By network, the number of connections that failed and that authenticated, in this window and the previous one.
        self._now: dict[str, list[int]] = {}
        self._before: dict[str, list[int]] = {}

    def failed(self, network: str) -> None:
        """Count a connection that ended before it authenticated."""
        self._count(network)[0] += 1

    def succeeded(self, network: str) -> None:
        """Count a connection that authenticated."""
        self._count(network)[1] += 1

    def is_flood(
        self, network: str, behind_s: float, clients_here: int = 0, unfinished: int = 0, *, is_deep: bool = False
    ) -> bool:
        """Return whether a network has many connections, nearly all of them failed.

        For `behind_s` seconds, connections have arrived faster than they can be accepted. `clients_here` is the number
        of connected clients in the network, `unfinished` the number of its unauthenticated connections. If the accept
        queue `is_deep`, the lowest limit applies at once. Unfinished connections do not count sooner for that: a deep
        queue may consist of genuine clients that return after a restart.
        """
        self._turn()
        failed, clients = self._now.get(network, (0, 0))
        failed_before, clients_before = self._before.get(network, (0, 0))
        least = self.limit // LEAST_PART
        limit = least if is_deep else max(least, self.limit >> int(behind_s / HALVED_AFTER_S))
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
    """The decision about a new connection.

    `refusal` is the answer it gets, `displaced` the unauthenticated connection that it displaces; either may be None.
    If not `is_admitted`, close the connection at once: it has not been counted, and `leave` must not be called for it.
    """

    refusal: Refusal | None = None
    displaced: Hashable | None = None
    is_admitted: bool = True


def has_failed(refusal: Refusal | None, *, is_waiting: bool) -> bool:
    """Return whether the end of a connection, without authentication, counts as a failed connect of its network.

    `refusal` is the reason why it has no session, if any. The end does not count if it was not the client's fault, or
    if bytes of the client waited to be read. It does if the connection was displaced, even before anything was read
    from it: in a flood from thousands of networks every connection ends like that.
    """
    return refusal is Refusal.DISPLACED or (refusal not in NO_FAULTS and not is_waiting)


def _always(_: Hashable) -> bool:
    return True


class Admission:
    """The counts of open connections, and the decision about new ones. The limits may be changed at any time."""

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

    def is_flood(self, source: Source, behind_s: float, *, is_deep: bool = False) -> bool:
        """Return whether the network of a new connection counts as a flood. See `FailedConnects.is_flood`."""
        network = source.network
        return self.failures.is_flood(
            network, behind_s, self._clients.get(network, 0), self.strangers.count_in(network), is_deep=is_deep
        )

    def admit(
        self,
        member: Hashable,
        source: Source,
        may_displace: Callable[[Hashable], bool] = _always,
        *,
        is_proxy: bool = False,
    ) -> Verdict:
        """Count a new connection as unauthenticated. `leave` must be called once for it, and for the displaced one.

        A refused connection is counted as well, beyond the limits, since it holds a socket until its refusal is sent.
        If the connection to displace is of the same network as the new one, `may_displace` decides; if it returns
        False, the new connection is not admitted. A connection of another network is displaced unconditionally. The
        limit per address does not apply to a trusted proxy, which has not named its client yet.
        """
        here = self._by_address.get(source.address, 0)
        strangers, strangers_here = len(self.strangers), self.strangers.count(source)
        refusal, displaced = None, None
        if not is_proxy and here - strangers_here >= self.per_address_limit:
            refusal = Refusal.ADDRESS_CAP
            if strangers_here >= TURNED_AWAY_PER_ADDRESS:
                displaced = self.strangers.oldest_of(source)
        elif self.total - strangers >= self.total_limit:
            refusal = Refusal.GLOBAL_CAP
            if strangers >= TURNED_AWAY:
                displaced = self._to_displace()
        elif not is_proxy and here >= self.per_address_limit:
            displaced = self.strangers.oldest_of(source)
        elif self.total >= self.total_limit or strangers >= self.unauthenticated_limit:
            displaced = self._to_displace()
        is_own = displaced is not None and self.strangers.network_of(displaced) == source.network
        if is_own and not may_displace(displaced):
            return Verdict(is_admitted=False)
        self.total += 1
        self._by_address[source.address] = here + 1
        self.strangers.add(member, source, self._clock())
        return Verdict(refusal, displaced)

    def _to_displace(self) -> Hashable:
        """Return the unauthenticated connection to displace.

        It is the oldest one, if that had time to begin or no network is busy; else the oldest of the busiest network.
        Without a busy network only their age distinguishes connections: the network with the most of them may be a
        proxy whose clients are in their handshakes.
        """
        oldest = self.strangers.oldest()
        had_time = self._clock() - self.strangers.arrived_at(oldest) > TIME_TO_BEGIN_S
        return oldest if had_time or not self.strangers.is_one_busy else self.strangers.oldest_of_busiest()

    @property
    def unauthenticated(self) -> int:
        """The number of unauthenticated connections, including those that are being refused."""
        return len(self.strangers)

    def known(self, member: Hashable) -> None:
        """Count an unauthenticated connection as a client: it has authenticated, or need not."""
        if member in self.strangers:
            network = self.strangers.network_of(member)
            self.failures.succeeded(network)
            self.strangers.discard(member)
            self._clients[network] = self._clients.get(network, 0) + 1

    def leave(self, member: Hashable, source: Source, *, has_failed: bool = True) -> None:
        """Remove a connection that is closed or closing. `has_failed` is False if that is not the client's fault."""
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
