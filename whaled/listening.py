"""Listening sockets: opening them, naming their addresses, and ending accept without losing a connection."""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from msgspec import Struct

from whaled.errors import ListenError, reason_of

# Errors of accept(2): the process or the machine has no descriptor or no memory for another socket.
SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# Number of turns of the event loop after which asyncio has passed an accepted connection to its protocol.
ACCEPT_TURNS = 3
# Errors of socket(2) and bind(2): the machine lacks the address, or any address of its family.
ABSENT = {
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EAFNOSUPPORT: "this machine has no {family}, or this process may not use it",
    errno.ENODEV: "this machine has no such interface",
}
ANY_V4, ANY_V6 = "0.0.0.0", "::"  # noqa: S104 - the operator asked for it
# For port 0: a port that is free at one address may be in use at another. With 28,000 ports to choose from, this number
# of attempts is enough.
PORT_ATTEMPTS = 16


class Missing(Struct, frozen=True):
    """A host that could not be listened on, and the reason."""

    host: str
    reason: str


class Listening(Struct, frozen=True):
    """The listening sockets, all on one port, and the configured hosts that are missing."""

    sockets: tuple[socket.socket, ...]
    missing: tuple[Missing, ...]


class _Place(NamedTuple):
    family: socket.AddressFamily
    host: str
    scope: int

    def address(self, port: int) -> tuple[str | int, ...]:
        """Return the address in the form that bind(2) takes."""
        return (self.host, port) if self.family == socket.AF_INET else (self.host, port, 0, self.scope)


async def open_sockets(hosts: Sequence[str], port: int, backlog: int, *, section: str) -> Listening:
    """Listen on every address of the hosts; `::` means all IPv6 and all IPv4 addresses.

    A missing host does not prevent listening on the others. An address that is in use or not permitted does, because
    its clients would reach another program. Raises ListenError, also if every host is missing; its remedy names the
    section.
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
    """Return the hosts that `open_sockets` would find missing, without listening and without using the port.

    Empty if this process may not create network sockets at all: systemd then passes them to it.
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
    """Add a listening socket to `sockets`, on the port of the first one, or the place to `absent` if it is missing.

    Raises OSError that names the place.
    """
    port = sockets[0].getsockname()[1] if sockets else port
    try:
        sock = socket.socket(place.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if place.family == socket.AF_INET6:
                # IPv4 has separate sockets, so that its clients appear with their own address, not a mapped IPv6 one.
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
    """Return the places to listen on, each once and none covered by a wildcard, and the missing hosts."""
    places: dict[_Place, None] = {}
    missing = []
    for host in hosts:
        if host == ANY_V6:
            places[_Place(socket.AF_INET6, ANY_V6, 0)] = places[_Place(socket.AF_INET, ANY_V4, 0)] = None
            continue
        try:
            # A plain address needs no resolver, which would run in a thread.
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
    reason = reason_of(error)
    return f"{'the address cannot be used' if ':' in host else 'the name cannot be resolved'} ({reason})"


def address_of(sock: socket.socket) -> str:
    """Return the address of a socket: `127.0.0.1:8765`, `[::1]:8765`, or `unix:/run/whaled.sock`."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    return host_port(*name[:2])


def host_port(host: str, port: int) -> str:
    """Return `host:port`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def peer_address(peer: Any) -> str:
    """Return the peer's address from the result of accept(2); "unix" for a Unix socket, whose peer has no name."""
    return peer[0] if isinstance(peer, tuple) else "unix"


def source_of(address: str) -> str:
    """Return the address under which a peer is counted: for IPv6 its /64, because one host can use all of that."""
    if ":" not in address:
        return address
    found = ipaddress.IPv6Address(address)
    return str(found.ipv4_mapped or ipaddress.IPv6Address(found.packed[:8] + bytes(8)))


async def stop_accepting(servers: Iterable[asyncio.Server]) -> None:
    """Close servers without losing an accepted connection: on return every one has been passed to its protocol.

    asyncio drops, without closing it, a connection that it accepted in the turn of the loop in which a server closes.
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
