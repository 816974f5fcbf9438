"""An issuer of access tokens under the test's control: its keys, its tokens, and a server that may answer anything."""

import asyncio
import base64
import json
import queue
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from typing import Any

import jwt
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from kit.whales import NOW
from whaled.auth.oidc.keyset import KeySet, read_key_set
from whaled.config.sections import Algorithm, IssuerSettings

ISSUER = "https://login.example.org/realms/ops"
AUDIENCE = "whaled"

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
CURVES: dict[str, ec.EllipticCurve] = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}


def private_key(algorithm: str, name: str = "k1", bits: int = 2048) -> PrivateKey:
    """Return the private key of an algorithm with a name, the same one throughout a test run."""
    return _private_key(algorithm, name, bits)


@cache
def _private_key(algorithm: str, name: str, bits: int) -> PrivateKey:
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    if algorithm in CURVES:
        return ec.generate_private_key(CURVES[algorithm])
    return rsa.generate_private_key(65537, bits)


def kid_of(algorithm: str, name: str = "k1") -> str:
    return f"{algorithm.lower()}-{name}"


def public_jwk(algorithm: str = "RS256", name: str = "k1", bits: int = 2048, **more: object) -> dict[str, Any]:
    """Return the public key as the issuer publishes it."""
    public = private_key(algorithm, name, bits).public_key()
    found: dict[str, Any]
    if isinstance(public, rsa.RSAPublicKey):
        found = RSAAlgorithm.to_jwk(public, as_dict=True)
    elif isinstance(public, ec.EllipticCurvePublicKey):
        found = ECAlgorithm.to_jwk(public, as_dict=True)
    else:
        found = OKPAlgorithm.to_jwk(public, as_dict=True)
    found = {key: value for key, value in found.items() if key not in {"key_ops", "alg"}}
    changed = {**found, "kid": kid_of(algorithm, name), "use": "sig", **more}
    return {key: value for key, value in changed.items() if value is not None}


def jwks(*keys: Mapping[str, object]) -> bytes:
    return json.dumps({"keys": keys or (public_jwk(),)}).encode()


def key_set(*algorithms: Algorithm) -> KeySet:
    """Return a set with one key for each algorithm, RS256 without any."""
    chosen = algorithms or (Algorithm.RS256,)
    return read_key_set(jwks(*(public_jwk(each.value) for each in chosen)), chosen)


def issuer_settings(**more: Any) -> IssuerSettings:
    plain: dict[str, Any] = {"name": "corp", "issuer": ISSUER, "audience": AUDIENCE, "read": ("scope=whales:read",)}
    return IssuerSettings(**plain | more)


def claims(now: float = NOW, **more: object) -> dict[str, Any]:
    """Return the claims of a good token. A claim that is given as None is left out."""
    plain = {
        "iss": ISSUER, "aud": AUDIENCE, "sub": "service-7", "client_id": "bot", "iat": int(now), "exp": int(now) + 300,
        "scope": "openid whales:read", "jti": "j1",
    }  # fmt: skip
    return {name: value for name, value in (plain | more).items() if value is not None}


def access_token(
    content: Mapping[str, Any] | None = None, algorithm: str = "RS256", name: str = "k1", **header: object
) -> str:
    """Return a token signed by the issuer. A header that is given as None is left out."""
    plain = {"kid": kid_of(algorithm, name), "typ": "at+jwt"} | header
    kept = {key: value for key, value in plain.items() if value is not None}
    if "typ" not in kept:
        kept["typ"] = None  # the library's way to leave it out
    payload = json.dumps(content if content is not None else claims()).encode()
    # Not `jwt.encode`, which refuses some of the odd claims.
    return jwt.PyJWS().encode(payload, private_key(algorithm, name), algorithm=algorithm, headers=kept)


def unsigned_part(value: object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class StandIn:
    """A server in place of an issuer. `discovery` and `keys` answer; both may be replaced by anything."""

    def __init__(self) -> None:
        self.url = ""
        self.published: list[dict[str, Any]] = [public_jwk()]
        self.asked: list[str] = []
        self.fetched = asyncio.Event()
        self.discovery: Answer = self._discovery
        self.keys: Answer = self._keys

    async def _discovery(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"issuer": self.url, "jwks_uri": f"{self.url}/jwks"})

    async def _keys(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=jwks(*self.published), content_type="application/json")

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        try:
            return await (self.keys if request.path == "/jwks" else self.discovery)(request)
        finally:
            self.fetched.set()

    def heal(self) -> None:
        """Answer as an issuer again."""
        self.discovery, self.keys = self._discovery, self._keys

    def settings(self, **more: Any) -> IssuerSettings:
        return issuer_settings(**{"issuer": self.url} | more)

    def token(self, name: str = "k1", **more: object) -> str:
        """Return a token that is valid now, by the system's clock."""
        return access_token(claims(time.time(), **{"iss": self.url} | more), name=name)


@asynccontextmanager
async def stand_in() -> AsyncIterator[StandIn]:
    """Run the server on port 0 of loopback."""
    server = StandIn()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        server.url = f"http://{host}:{port}"
        yield server
    finally:
        await runner.cleanup()


@contextmanager
def stand_in_apart() -> Iterator[StandIn]:
    """Run the server in a thread, for a test that blocks."""
    up: queue.SimpleQueue[tuple[StandIn, asyncio.AbstractEventLoop, asyncio.Event]] = queue.SimpleQueue()

    async def serve() -> None:
        ended = asyncio.Event()
        async with stand_in() as server:
            up.put((server, asyncio.get_running_loop(), ended))
            await ended.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    server, loop, ended = up.get(timeout=10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
