"""The proxies that are trusted to name their clients, and what one of their connections says about its client. Pure."""

import ipaddress
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from websockets.datastructures import Headers

from whaled.config.proxies import UNIX, Network, networks_of
from whaled.config.sections import AddressHeader, GatewaySettings, ProxyProtocol
from whaled.gateway.forwarded import client_of
from whaled.gateway.proxy_protocol import Kind, ProxyHeaderError, plain_address, read_header

HEADER_NAMES: Final = {AddressHeader.X_FORWARDED_FOR: "X-Forwarded-For", AddressHeader.FORWARDED: "Forwarded"}
# Addresses whose answer is remembered: the proxies, and the direct clients of the moment.
REMEMBERED = 1024


class Proxies:
    """The trusted proxies, and the way in which they name their clients."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._networks: Sequence[Network] = networks_of(settings.trusted_proxies)
        self._is_unix_trusted = UNIX in settings.trusted_proxies
        self._protocol = settings.proxy_protocol
        self._header = settings.client_address_header
        self.is_trusted = lru_cache(maxsize=REMEMBERED)(self._is_trusted)

    def _is_trusted(self, address: str) -> bool:
        """Return whether a peer is a trusted proxy."""
        if address == UNIX or not self._networks:
            return self._is_unix_trusted and address == UNIX
        try:
            found = ipaddress.ip_address(plain_address(address))
        except ValueError:  # a link-local address has a zone, and no network contains it
            return False
        return any(found in network for network in self._networks)

    def preamble(self) -> "Preamble | None":
        """Return what collects the PROXY header of a trusted proxy's connection; None if it sends none."""
        if self._protocol is ProxyProtocol.NEVER:
            return None
        return Preamble(is_required=self._protocol is ProxyProtocol.REQUIRED)

    def client(self, headers: Headers) -> str | None:
        """Return the client's address in a request of a trusted proxy, None if it names none. Raises ForwardedError."""
        name = HEADER_NAMES.get(self._header)
        return None if name is None else client_of(self._header, headers.get_all(name), self.is_trusted)


class Preamble:
    """The first bytes of a connection of a trusted proxy, up to the end of its PROXY header."""

    __slots__ = ("_collected", "_is_required")

    def __init__(self, *, is_required: bool) -> None:
        self._collected = b""
        self._is_required = is_required

    def feed(self, data: bytes) -> tuple[str | None, bytes] | None:
        """Add bytes. Return None until the header is complete.

        Then return the address in it, if any, and the bytes that follow it. Raises ProxyHeaderError, also if there is
        no header although it is required.
        """
        self._collected += data
        header = read_header(self._collected)
        if header is None:
            return None
        if header.kind is Kind.ABSENT and self._is_required:
            raise ProxyHeaderError("there is no PROXY header, and gateway.proxy_protocol requires one")
        return header.address or None, self._collected[header.size :]
