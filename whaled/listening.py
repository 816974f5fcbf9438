"""Listening sockets: how they are opened, named to people and programs, and how accepting ends."""

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Iterable
from typing import Any

# accept(2): this process or the machine has no descriptor, or no memory, for another socket.
SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# So many turns of the loop after asyncio accepted a connection its protocol has it.
ACCEPT_TURNS = 3


async def open_sockets(host: str, port: int, backlog: int) -> list[socket.socket]:
    """Sockets that listen on every address of a host. Raises OSError."""
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)
    try:
        sockets = [sock.dup() for sock in server.sockets]
    finally:
        server.close()
    for sock in sockets:
        sock.setblocking(False)
        sock.listen(backlog)
    return sockets


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
