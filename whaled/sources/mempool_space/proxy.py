"""A proxy's URL, and the handshake that opens a tunnel through it: HTTP CONNECT or SOCKS5. Pure.

CONNECT: RFC 9110, 9.3.6. SOCKS5: RFC 1928, with user and password by RFC 1929. Both handshakes end with a plain byte
stream to the target, so the layers above work as without a proxy.
"""

import base64
import ipaddress
import re
from collections.abc import Generator
from enum import StrEnum
from urllib.parse import unquote, urlsplit

from msgspec import Struct

from whaled.errors import UpstreamError

# Size limit for a response to CONNECT. Real proxies send a few hundred bytes; the body of a refusal is not read.
HEAD_LIMIT_BYTES = 16 * 1024
REASON_CHARS = 80
DEFAULT_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: ([^\r\n]*))?\r?\n")
_SOCKS_VERSION = 5
_LOGIN_VERSION = 1
_NO_LOGIN, _LOGIN, _NO_METHOD = 0x00, 0x02, 0xFF
_CONNECT = 0x01
_IPV4, _NAME, _IPV6 = 0x01, 0x03, 0x04


class ProxyFault(StrEnum):
    """The kind of failure of a proxy."""

    UNREACHABLE = "unreachable"
    CREDENTIALS = "credentials"
    REFUSED = "refused"
    TARGET = "target"
    PROTOCOL = "protocol"


# These may be temporary; the others last until the configuration of whaled or of the proxy changes.
PASSING = frozenset({ProxyFault.UNREACHABLE, ProxyFault.TARGET})


class ProxyError(UpstreamError):
    """A failure to open a tunnel through the proxy.

    The message names `upstream.proxy`, and the configuration key of the target if that is relevant.
    """

    def __init__(self, fault: ProxyFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class Proxy(Struct, frozen=True):
    """A proxy as `upstream.proxy` names it. `login` is (user, password), decoded."""

    scheme: str
    host: str
    port: int
    login: tuple[str, str] | None = None

    @classmethod
    def parse(cls, url: str) -> "Proxy":
        """Parse a proxy URL. Raises ValueError if it is invalid."""
        parts = urlsplit(url)
        port = parts.port
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname or port == 0:
            raise ValueError("no proxy URL")
        login = None
        if parts.username is not None:
            login = (unquote(parts.username, errors="strict"), unquote(parts.password or "", errors="strict"))
        return cls(parts.scheme, parts.hostname, DEFAULT_PORTS[parts.scheme] if port is None else port, login)

    @property
    def place(self) -> str:
        """The host and port, without user and password."""
        return authority(self.host, self.port)

    @property
    def resolves(self) -> bool:
        """True if the proxy resolves the names of targets. With `socks5://`, this machine resolves them."""
        return self.scheme != "socks5"

    def error(self, fault: ProxyFault, problem: str) -> ProxyError:
        """Return the error for a failure of this proxy."""
        return ProxyError(fault, f"the proxy {self.place} (upstream.proxy) {problem}")


class Target(Struct, frozen=True):
    """The target of a tunnel: a name or an address, and the configuration key that sets it."""

    host: str
    port: int
    key: str

    def __str__(self) -> str:
        return authority(self.host, self.port)


class Step(Struct, frozen=True):
    """One step of a handshake: the bytes to send, then the reply to wait for.

    The reply is `count` bytes, or an HTTP head if `count` is None.
    """

    send: bytes
    count: int | None


Handshake = Generator[Step, bytes, None]


def handshake(proxy: Proxy, target: Target) -> Handshake:
    """Yield the steps that open a tunnel; the caller sends in the reply to each. Raises ProxyError."""
    return _connect(proxy, target) if proxy.scheme in {"http", "https"} else _socks(proxy, target)


def authority(host: str, port: int) -> str:
    """Return `host:port`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# --- HTTP CONNECT ---


def _connect(proxy: Proxy, target: Target) -> Handshake:
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.login is not None:
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(':'.join(proxy.login).encode()).decode()}")
    head = yield Step("".join(f"{line}\r\n" for line in [*lines, ""]).encode("ascii"), None)
    found = _STATUS_LINE.match(head)
    if found is None:
        raise proxy.error(
            ProxyFault.PROTOCOL, "does not answer as an HTTP proxy does; is it a SOCKS proxy? Then write socks5h://"
        )
    status = int(found[1])
    if 200 <= status < 300:
        return
    answer = f"HTTP {status} {_printable(found[2] or b'')}".rstrip()
    if status in {401, 407}:  # tinyproxy answers 401 to a wrong password
        raise _credentials(proxy, answer)
    if status == 404 or status >= 500:
        raise _no_target(proxy, target, answer)
    raise _refused(proxy, target, answer)


def _printable(raw: bytes) -> str:
    text = raw[:REASON_CHARS].decode("latin-1")
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# --- SOCKS5 ---

_REFUSED = 0x02
# 0x01 to 0x08: RFC 1928. 0xF0 to 0xF7: Tor with ExtendedErrors (its proposal 304).
_REPLIES = {
    0x01: "general failure",
    _REFUSED: "not allowed by its rules",
    0x03: "network unreachable",
    0x04: "host unreachable",
    0x05: "connection refused",
    0x06: "TTL expired",
    0x07: "command not supported",
    0x08: "address type not supported",
    0xF0: "no descriptor of this onion service",
    0xF1: "the descriptor of this onion service is invalid",
    0xF2: "introduction to the onion service failed",
    0xF3: "rendezvous with the onion service failed",
    0xF4: "the onion service wants client authorisation",
    0xF5: "the onion service refuses the client authorisation",
    0xF6: "no valid onion address",
    0xF7: "introduction to the onion service timed out",
}


def _socks(proxy: Proxy, target: Target) -> Handshake:
    methods = bytes([_NO_LOGIN] if proxy.login is None else [_NO_LOGIN, _LOGIN])
    answer = yield Step(bytes([_SOCKS_VERSION, len(methods)]) + methods, 2)
    _check_version(proxy, answer)
    if answer[1] == _NO_METHOD:
        raise _credentials(proxy, "no acceptable authentication method")
    if answer[1] not in methods:
        raise proxy.error(ProxyFault.PROTOCOL, f"chose authentication method {answer[1]}, which was not offered")
    if answer[1] == _LOGIN and proxy.login is not None:
        answer = yield Step(_login(proxy, proxy.login), 2)
        if answer[1] != 0:
            raise _credentials(proxy, "login refused")
    request = bytes([_SOCKS_VERSION, _CONNECT, 0]) + _address(target) + target.port.to_bytes(2, "big")
    answer = yield Step(request, 2)
    _check_version(proxy, answer)
    if answer[1] != 0:
        reply = _REPLIES.get(answer[1], f"reply {answer[1]:#04x}")
        raise (_refused if answer[1] == _REFUSED else _no_target)(proxy, target, reply)
    # whaled does not need the address from which the proxy connects, but must read it: the target's bytes follow it.
    kind = (yield Step(b"", 2))[1]
    if kind == _NAME:
        yield Step(b"", (yield Step(b"", 1))[0] + 2)
    elif kind in {_IPV4, _IPV6}:
        yield Step(b"", (4 if kind == _IPV4 else 16) + 2)
    else:
        raise proxy.error(ProxyFault.PROTOCOL, f"answered with an address of unknown type {kind}")


def _check_version(proxy: Proxy, answer: bytes) -> None:
    if answer[0] != _SOCKS_VERSION:
        raise proxy.error(
            ProxyFault.PROTOCOL, "does not answer as a SOCKS5 proxy does; is it an HTTP proxy? Then write http://"
        )


def _login(proxy: Proxy, login: tuple[str, str]) -> bytes:
    user, password = (text.encode() for text in login)
    if not (1 <= len(user) <= 255 and 1 <= len(password) <= 255):
        raise proxy.error(ProxyFault.CREDENTIALS, "takes a user and a password of 1 to 255 bytes each")
    return bytes([_LOGIN_VERSION, len(user)]) + user + bytes([len(password)]) + password


def _address(target: Target) -> bytes:
    try:
        address = ipaddress.ip_address(target.host)
    except ValueError:
        name = target.host.encode("ascii")
        return bytes([_NAME, len(name)]) + name
    return bytes([_IPV4 if address.version == 4 else _IPV6]) + address.packed


# --- failures ---


def _credentials(proxy: Proxy, answer: str) -> ProxyError:
    wanted = "does not accept the user and password in its URL" if proxy.login else "wants a user and a password"
    return proxy.error(ProxyFault.CREDENTIALS, f"{wanted}: {answer}; write {proxy.scheme}://user:password@host:port")


def _refused(proxy: Proxy, target: Target, answer: str) -> ProxyError:
    return proxy.error(
        ProxyFault.REFUSED,
        f"allows no tunnel to {target}: {answer}; its rules must allow CONNECT to this host and port",
    )


def closed(proxy: Proxy, target: Target) -> ProxyError:
    """Return the error for a proxy that closed the connection during the handshake, as `ssh -D` does."""
    return proxy.error(
        ProxyFault.TARGET,
        f"closed the connection before a tunnel to {target} was open: it cannot reach it ({target.key}) or does not "
        "allow it",
    )


def _no_target(proxy: Proxy, target: Target, answer: str) -> ProxyError:
    return proxy.error(
        ProxyFault.TARGET, f"cannot reach {target}: {answer}; is {target.key} right, and the backend running?"
    )
