"""How a listening socket is named to people and programs."""

import socket


def address_of(sock: socket.socket) -> str:
    """`127.0.0.1:8765`, `[::1]:8765`, or `unix:/run/whaled.sock`."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    return host_port(*name[:2])


def host_port(host: str, port: int) -> str:
    """An address and a port, in brackets where the address has colons."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
