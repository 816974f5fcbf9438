"""Listening sockets: how they are opened, named to people and programs, and how accepting ends."""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from msgspec import Struct

from whaled.errors import ListenError

# accept(2): this process or the machine has no descriptor, or no memory, for another socket.
SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# So many turns of the loop after asyncio accepted a connection its protocol has it.
ACCEPT_TURNS = 3
# socket(2), bind(2): the machine does not have the address, or no address of its family.
ABSENT = {
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EAFNOSUPPORT: "this machine has no {family}, or this process may not use it",
    errno.ENODEV: "this machine has no such interface",
}
ANY_V4, ANY_V6 = "0.0.0.0", "::"  # noqa: S104 - the operator asked for it
# A port that is free at one address can be taken at another. There are 28,000 to choose from, so this many are enough.
PORT_ATTEMPTS = 16
# The log's line about each host that is missing.
NOT_LISTENING = "an address to listen on is missing: nobody can connect there"


class Missing(Struct, frozen=True):
    """A host that nothing could listen on, and why."""

    host: str
    reason: str


class Listening(Struct, frozen=True):
    """Sockets that listen, all on one port, and what is missing of the hosts that were asked for."""

    sockets: tuple[socket.socket, ...]
    missing: tuple[Missing, ...]


class _Place(NamedTuple):
    family: socket.AddressFamily
    host: str
    scope: int

    def address(self, port: int) -> tuple[str | int, ...]:
        """As bind(2) takes it."""
        return (self.host, port) if self.family == socket.AF_INET else (self.host, port, 0, self.scope)


async def open_sockets(hosts: Sequence[str], port: int, backlog: int, *, section: str) -> Listening:
    """Listen on every address of the hosts; `::` stands for all of IPv6 and all of IPv4.

    What is missing does not keep whaled from listening on the rest. An address that another program uses, or that is
    not allowed, does: its clients would reach the other program. Raises ListenError, whose remedy names the section.
    """
    places, missing = await _places(hosts)
    remedy = f"set {section}.host and {section}.port"
    for attempt in range(PORT_ATTEMPTS):
        sockets: list[socket.socket] = []
        absent = list(missing)
        try:
            for place in places:
                _listen(place, port, backlog, sockets, absent)
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE and not port and sockets and attempt < PORT_ATTEMPTS - 1
            for sock in sockets:
                sock.close()
            if not is_taken:
                raise ListenError(error.filename, port, error, remedy) from error
            continue
        if not sockets:
            reasons = [f"{found.host}: {found.reason}" if len(hosts) > 1 else found.reason for found in absent]
            raise ListenError(", ".join(hosts), port, "; ".join(reasons), remedy)
        return Listening(tuple(sockets), tuple(absent))
    raise AssertionError


async def missing_hosts(hosts: Sequence[str]) -> tuple[Missing, ...]:
    """What `open_sockets` would find missing, without listening and without using the port. Nothing where this process
    may have no sockets of the network at all: then it gets them from systemd.
    """
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
    except OSError:
        return ()
    places, missing = await _places(hosts)
    for place in places:
        try:
            with socket.socket(place.family, socket.SOCK_STREAM) as sock:
                sock.bind(place.address(0))
        except OSError as error:
            if error.errno in ABSENT:
                missing.append(_missing(place, error.errno))
    return tuple(missing)


def _missing(place: _Place, number: int) -> Missing:
    return Missing(place.host, ABSENT[number].format(family="IPv4" if place.family == socket.AF_INET else "IPv6"))


def _listen(place: _Place, port: int, backlog: int, sockets: list[socket.socket], absent: list[Missing]) -> None:
    """Add the socket of a place, on the port of those before it, or note that the place is missing. Raises OSError that
    names it.
    """
    port = sockets[0].getsockname()[1] if sockets else port
    try:
        sock = socket.socket(place.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if place.family == socket.AF_INET6:
                # IPv4 has sockets of its own: its clients then have their own address, not one of IPv6 that holds it.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(place.address(port))
            sock.listen(backlog)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        if error.errno not in ABSENT:
            raise OSError(error.errno, error.strerror, place.host) from error
        absent.append(_missing(place, error.errno))
    else:
        sockets.append(sock)


async def _places(hosts: Sequence[str]) -> tuple[list[_Place], list[Missing]]:
    """Where to listen: each address once, and none that is part of another one."""
    places: dict[_Place, None] = {}
    missing = []
    for host in hosts:
        if host == ANY_V6:
            places[_Place(socket.AF_INET6, ANY_V6, 0)] = places[_Place(socket.AF_INET, ANY_V4, 0)] = None
            continue
        try:
            # A plain address needs no resolver, and no thread for one.
            address = ipaddress.ip_address(host)
            if address.version == 4 or address.scope_id is None:
                family = socket.AF_INET if address.version == 4 else socket.AF_INET6
                places[_Place(family, str(address), 0)] = None
                continue
        except ValueError:
            pass
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except (OSError, UnicodeError) as error:
            missing.append(Missing(host, _unresolved(host, error)))
            continue
        for family, _, _, _, name in found:
            if family in {socket.AF_INET, socket.AF_INET6}:
                places[_Place(family, str(name[0]).partition("%")[0], name[3] if len(name) > 3 else 0)] = None
    whole = {place.family for place in places if place.host in {ANY_V4, ANY_V6}}
    return [place for place in places if place.host in {ANY_V4, ANY_V6} or place.family not in whole], missing


def _unresolved(host: str, error: OSError | UnicodeError) -> str:
    interfaces = {name for _, name in socket.if_nameindex()}
    if host in interfaces:
        return "this is a network interface: write the address that it has"
    if "%" in host and host.partition("%")[2] not in interfaces:
        return f"this machine has no interface {host.partition('%')[2]}"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"{'the address cannot be used' if ':' in host else 'the name cannot be resolved'} ({reason})"


def address_of(sock: socket.socket) -> str:
    """`127.0.0.1:8765`, `[::1]:8765`, or `unix:/run/whaled.sock`."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    return host_port(*name[:2])


def host_port(host: str, port: int) -> str:
    """An address and a port, in brackets where the address has colons."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def peer_address(peer: Any) -> str:
    """The address of an accepted connection's peer, by what accept(2) gives; that of a Unix socket has no name."""
    return peer[0] if isinstance(peer, tuple) else "unix"


def source_of(address: str) -> str:
    """What counts as one address: an IPv6 host has its /64 to itself, and could come from 2^64 addresses."""
    if ":" not in address:
        return address
    found = ipaddress.IPv6Address(address)
    return str(found.ipv4_mapped or ipaddress.IPv6Address(found.packed[:8] + bytes(8)))


async def stop_accepting(servers: Iterable[asyncio.Server]) -> None:
    """Close servers without losing a connection that was already accepted: on return its protocol has it.

    asyncio drops, without closing it, what it accepted in the turn of the loop in which a server is closed.
    """
    servers = list(servers)
    loop = asyncio.get_running_loop()
    for server in servers:
        for sock in server.sockets:
            loop.remove_reader(sock)
    for _ in range(ACCEPT_TURNS):
        await asyncio.sleep(0)
    for server in servers:
        server.close()
