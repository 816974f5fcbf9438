"""Connections through a proxy, for the stream and for REST: the proxy's handshake, then TLS if the target uses it."""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler

from whaled.config.sections import UpstreamSettings
from whaled.sources.mempool_space.address import unusable
from whaled.sources.mempool_space.proxy import HEAD_LIMIT_BYTES, Proxy, ProxyFault, Step, Target, closed, handshake

if TYPE_CHECKING:
    from aiohttp.tracing import Trace

P = TypeVar("P", bound=asyncio.Protocol)


class Tunnel:
    """Connections through one proxy. They have no time limit of their own: the caller must set one."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy

    async def open(self, factory: Callable[[], P], target: Target, tls: ssl.SSLContext | None) -> P:
        """Open a connection to `target` with a protocol made by `factory`; with `tls`, check the target's certificate.

        Raises ProxyError if the proxy opens no tunnel, OSError if TLS with the target fails.
        """
        transport, wire = await self._reach()
        try:
            await self._negotiate(transport, wire, await self._resolved(target))
            protocol = factory()
            transport.set_protocol(protocol)
            if tls is not None:
                started = await asyncio.get_running_loop().start_tls(
                    transport, protocol, tls, server_hostname=target.host.rstrip(".")
                )
                assert started is not None  # it is None only for a closed transport
                transport = started
        except BaseException:
            transport.abort()
            raise
        protocol.connection_made(transport)
        return protocol

    async def _reach(self) -> tuple[asyncio.Transport, "_Wire"]:
        proxy = self.proxy
        try:
            return await asyncio.get_running_loop().create_connection(
                _Wire,
                proxy.host,
                proxy.port,
                ssl=ssl.create_default_context() if proxy.scheme == "https" else None,
            )
        except ssl.SSLError as error:
            raise proxy.error(
                ProxyFault.UNREACHABLE,
                f"cannot be reached by TLS: {error}; http:// if it speaks none, SSL_CERT_FILE for a private CA",
            ) from error
        except (OSError, UnicodeError) as error:
            raise proxy.error(ProxyFault.UNREACHABLE, f"cannot be reached: {_plain(error)}; is it running?") from error

    async def _resolved(self, target: Target) -> Target:
        if self.proxy.resolves:
            return target
        try:
            found = await asyncio.get_running_loop().getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise self.proxy.error(
                ProxyFault.TARGET,
                f"accepts addresses only, and {target.host} ({target.key}) cannot be resolved here: "
                f"{_plain(error)}; with socks5h:// the proxy resolves it",
            ) from error
        # The minimum prefers IPv4, which more proxies can reach.
        _, address = min((family, str(address[0])) for family, _, _, _, address in found)
        return Target(address, target.port, target.key)

    async def _negotiate(self, transport: asyncio.Transport, wire: "_Wire", target: Target) -> None:
        steps = handshake(self.proxy, target)
        step = next(steps)
        try:
            while True:
                transport.write(step.send)
                step = steps.send(await wire.answer(step))
        except StopIteration:
            pass
        except EOFError as error:
            raise closed(self.proxy, target) from error
        except ValueError as error:
            raise self.proxy.error(ProxyFault.PROTOCOL, str(error)) from error
        if wire.received:
            raise self.proxy.error(ProxyFault.PROTOCOL, "sent unexpected bytes after its response")


def _plain(error: Exception) -> str:
    """Return the text of a network error without the event loop's additions.

    The combined error of several addresses is returned unchanged.
    """
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)
    return getattr(error, "strerror", None) or str(error)


def tunnel_of(settings: UpstreamSettings) -> Tunnel | None:
    """Return the tunnel through `upstream.proxy`, None if that is null. Raises ConfigError."""
    if settings.proxy is None:
        return None
    try:
        return Tunnel(Proxy.parse(settings.proxy))
    except ValueError as error:
        raise unusable("upstream.proxy", settings.proxy, "http://127.0.0.1:3128 or socks5h://127.0.0.1:9050") from error


class _Wire(asyncio.Protocol):
    """The protocol that receives a proxy's bytes until the tunnel is open."""

    def __init__(self) -> None:
        self.received = bytearray()
        self._ended = False
        self._changed = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        if len(self.received) <= HEAD_LIMIT_BYTES:  # further bytes are never read
            self.received += data
        self._changed.set()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the end is all that counts
        self._ended = True
        self._changed.set()

    async def answer(self, step: Step) -> bytes:
        """Return the reply to a step. Raises EOFError at the end of the stream, ValueError above the size limit."""
        while (end := self._end(step)) is None:
            if len(self.received) > HEAD_LIMIT_BYTES:
                raise ValueError(f"answers CONNECT with more than {HEAD_LIMIT_BYTES} bytes of headers")
            if self._ended:
                raise EOFError
            self._changed.clear()
            await self._changed.wait()
        answer = bytes(self.received[:end])
        del self.received[:end]
        return answer

    def _end(self, step: Step) -> int | None:
        if step.count is not None:
            return step.count if len(self.received) >= step.count else None
        if self.received and not b"HTTP/".startswith(self.received[:5]):
            return len(self.received)  # not HTTP: a blank line may never arrive
        ends = [found + len(blank) for blank in (b"\r\n\r\n", b"\n\n") if (found := self.received.find(blank)) >= 0]
        return min(ends, default=None)


class TunnelConnector(aiohttp.BaseConnector):
    """An aiohttp connector through a tunnel. `key` is the configuration key that sets the hosts."""

    def __init__(self, tunnel: Tunnel, key: str, limit: int) -> None:
        super().__init__(limit=limit)
        self._tunnel = tunnel
        self._key = key
        self._tls: ssl.SSLContext | None = None

    async def _create_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: "list[Trace]",  # noqa: ARG002
        timeout: aiohttp.ClientTimeout,
    ) -> ResponseHandler:
        target = Target(cast("str", req.url.raw_host), cast("int", req.url.port), self._key)
        try:
            async with asyncio.timeout(timeout.sock_connect):
                return await self._tunnel.open(self._factory, target, self._context() if req.is_ssl() else None)
        except ssl.SSLCertVerificationError as error:
            raise aiohttp.ClientConnectorCertificateError(req.connection_key, error) from error
        except ssl.SSLError as error:
            raise aiohttp.ClientConnectorSSLError(req.connection_key, error) from error

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])
        return self._tls
