"""Requests to an issuer: its configuration (OpenID Connect Discovery 1.0) and its key set, as hostile input.

Every request has a time limit and a size limit, follows no redirect, accepts no compression, and sends no cookie.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Self
from urllib.parse import urlsplit

import aiohttp
import msgspec
from msgspec import Struct

from whaled.auth.oidc.keyset import KeySet, KeySetError, read_key_set
from whaled.config.issuers import trusted_url
from whaled.config.sections import IssuerSettings
from whaled.errors import WhaledError
from whaled.urls import without_secrets

DISCOVERY = "/.well-known/openid-configuration"
# Providers answer with 2 to 10 KB and 1 to 20 KB.
DISCOVERY_LIMIT_BYTES = 64 * 1024
KEYS_LIMIT_BYTES = 256 * 1024
# Issuers that are asked at the same time. Names are resolved in threads that other parts of the daemon need too.
CONCURRENCY = 4
HEADERS = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "whaled"}


class FetchFailure(StrEnum):
    """The reason a key set could not be fetched."""

    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    TLS = "tls"
    REDIRECTED = "redirected"
    STATUS = "status"
    TOO_BIG = "too_big"
    GARBAGE = "garbage"
    WRONG_ISSUER = "wrong_issuer"
    BAD_ADDRESS = "bad_address"


class FetchError(WhaledError):
    """A fetch without a usable key set."""

    def __init__(self, reason: FetchFailure, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _Discovered(Struct, frozen=True):
    issuer: str
    jwks_uri: str


_decode_discovered = msgspec.json.Decoder(_Discovered).decode


class Fetcher:
    """The HTTP client of all issuers. Created by `open`."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._slots = asyncio.Semaphore(CONCURRENCY)

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator[Self]:
        """Return a client whose connections are closed at the end of the `async with` block."""
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONCURRENCY, force_close=True),
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers=HEADERS,
        ) as session:
            yield cls(session)

    async def key_set(self, settings: IssuerSettings) -> KeySet:
        """Return the current key set of an issuer. Raises FetchError."""
        async with self._slots:
            address = settings.jwks_uri or await self._discovered(settings)
            raw = await self._get(address, KEYS_LIMIT_BYTES, settings.timeout)
        try:
            # In a thread: a text of 256 KiB with 64 keys takes a millisecond or more, in which alerts would wait.
            return await asyncio.to_thread(read_key_set, raw, settings.algorithms)
        except KeySetError as error:
            raise FetchError(FetchFailure.GARBAGE, f"{without_secrets(address)} {error}") from error

    async def _discovered(self, settings: IssuerSettings) -> str:
        """Return the address of the key set that the issuer publishes. Raises FetchError."""
        url = settings.issuer.rstrip("/") + DISCOVERY
        raw = await self._get(url, DISCOVERY_LIMIT_BYTES, settings.timeout)
        try:
            found = _decode_discovered(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FetchError(
                FetchFailure.GARBAGE, f"{url} is not a JSON object with texts `issuer` and `jwks_uri`"
            ) from error
        if found.issuer != settings.issuer:
            raise FetchError(
                FetchFailure.WRONG_ISSUER, f"{url} states the issuer {found.issuer[:200]!r}, not {settings.issuer!r}"
            )
        # Plain HTTP is for an issuer on this machine only: no other one may direct whaled to this machine.
        is_plain = urlsplit(settings.issuer).scheme == "http"
        if trusted_url(found.jwks_uri) is None or (found.jwks_uri.startswith("http:") and not is_plain):
            raise FetchError(
                FetchFailure.BAD_ADDRESS, f"{url} names the key set {found.jwks_uri[:200]!r}, not https://"
            )
        return found.jwks_uri

    async def _get(self, url: str, limit_bytes: int, timeout_s: float) -> bytes:
        """Return the body of the response to a GET. Raises FetchError."""
        what = without_secrets(url)
        try:
            async with self._session.get(
                url, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=timeout_s)
            ) as response:
                if 300 <= response.status < 400:
                    raise FetchError(FetchFailure.REDIRECTED, f"{what} redirects: name the final address")
                if response.status != 200:
                    raise FetchError(FetchFailure.STATUS, f"{what} answers with status {response.status}")
                if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                    raise FetchError(FetchFailure.GARBAGE, f"{what} is compressed, which was not asked for")
                body = bytearray()
                async for part in response.content.iter_chunked(16 * 1024):
                    body += part
                    if len(body) > limit_bytes:
                        raise FetchError(FetchFailure.TOO_BIG, f"{what} has more than {limit_bytes // 1024} KiB")
                return bytes(body)
        except TimeoutError as error:
            raise FetchError(FetchFailure.TIMEOUT, f"{what}: no complete response in {timeout_s:g} s") from error
        except (aiohttp.ClientSSLError, ssl.SSLError) as error:
            raise FetchError(FetchFailure.TLS, f"{what}: TLS failed: {error}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: a host name that is none
            raise FetchError(FetchFailure.UNREACHABLE, f"{what}: {str(error) or type(error).__name__}") from error
