"""Answers of an issuer. The stand-in is a server that a hostile or broken issuer could be."""

import asyncio
import gzip
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from kit.issuers import StandIn, issuer_settings, jwks, public_jwk, stand_in
from kit.tls import Certificate, server_context
from whaled.auth.oidc.fetch import DISCOVERY_LIMIT_BYTES, KEYS_LIMIT_BYTES, Fetcher, FetchError, FetchFailure
from whaled.config.sections import Algorithm

HTML = "<html><body>Please log in</body></html>"


async def failure(server: StandIn, **more: Any) -> FetchError:
    async with Fetcher.open() as fetcher:
        with pytest.raises(FetchError) as caught:
            await fetcher.key_set(server.settings(**more))
    return caught.value


def answering(*args: Any, **more: Any) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(*args, **more)

    return answer


async def test_the_keys_are_found_by_discovery() -> None:
    async with stand_in() as server, Fetcher.open() as fetcher:
        found = await fetcher.key_set(server.settings())
        assert found.kids == {"rs256-k1"}
        assert server.asked == ["/.well-known/openid-configuration", "/jwks"]


async def test_a_configured_address_of_the_keys_needs_no_discovery() -> None:
    async with stand_in() as server, Fetcher.open() as fetcher:
        server.discovery = answering(status=404)
        found = await fetcher.key_set(issuer_settings(jwks_uri=f"{server.url}/jwks"))
        assert (sorted(found.kids), server.asked) == (["rs256-k1"], ["/jwks"])


async def test_the_path_of_an_issuer_is_kept() -> None:
    async with stand_in() as server:
        error = await failure(server, issuer=f"{server.url}/realms/a/")
        assert server.asked == ["/realms/a/.well-known/openid-configuration"]
        assert error.reason is FetchFailure.WRONG_ISSUER


@pytest.mark.parametrize("page", ["discovery", "keys"])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (answering(text=HTML, content_type="text/html"), FetchFailure.GARBAGE),
        (answering(body=b""), FetchFailure.GARBAGE),
        (answering(body=b"[" * 10_000), FetchFailure.GARBAGE),
        (answering(body=b"\xff\xfe\x00"), FetchFailure.GARBAGE),
        (answering(body=b'{"keys":[]}'), FetchFailure.GARBAGE),
        (answering(status=404), FetchFailure.STATUS),
        (answering(status=500, text="x" * 100_000), FetchFailure.STATUS),
        (answering(status=204), FetchFailure.STATUS),
        (answering(status=302, headers={"Location": "/jwks"}), FetchFailure.REDIRECTED),
        (answering(status=308, headers={"Location": "https://example.org/"}), FetchFailure.REDIRECTED),
        (answering(body=b" " * (KEYS_LIMIT_BYTES + 1)), FetchFailure.TOO_BIG),
        (
            answering(body=gzip.compress(jwks()), headers={"Content-Encoding": "gzip"}),
            FetchFailure.GARBAGE,
        ),
    ],
)
async def test_an_answer_that_is_no_key_set_is_refused_with_its_reason(page: str, answer: Any, reason: Any) -> None:
    async with stand_in() as server:
        setattr(server, page, answer)
        error = await failure(server)
        assert error.reason is reason
        assert server.url in str(error)


async def test_the_limits_of_size_are_exact() -> None:
    async with stand_in() as server, Fetcher.open() as fetcher:
        server.keys = answering(body=jwks().ljust(KEYS_LIMIT_BYTES))
        assert (await fetcher.key_set(server.settings())).kids
        document = f'{{"issuer":"{server.url}","jwks_uri":"{server.url}/jwks"}}'.encode()
        server.discovery = answering(body=document.ljust(DISCOVERY_LIMIT_BYTES))
        assert (await fetcher.key_set(server.settings())).kids
        server.discovery = answering(body=document.ljust(DISCOVERY_LIMIT_BYTES + 1))
        assert (await failure(server)).reason is FetchFailure.TOO_BIG


async def test_a_body_without_end_is_cut_off_by_size_and_one_without_bytes_by_time() -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 65536)

    async def silent(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.Event().wait()
        return response

    async with stand_in() as server:
        server.keys = endless
        assert (await failure(server)).reason is FetchFailure.TOO_BIG
        server.keys = silent
        assert (await failure(server, timeout=0.1)).reason is FetchFailure.TIMEOUT
        server.discovery = silent
        assert (await failure(server, timeout=0.1)).reason is FetchFailure.TIMEOUT


@pytest.mark.parametrize(
    "address",
    [
        "http://issuer.example/jwks",
        "file:///etc/passwd",
        "https://user:password@issuer.example/jwks",
        "//issuer.example/jwks",
        "https://",
        "https://[::1",
        "https://issuer.example/a b",
        "",
    ],
)
async def test_a_discovered_address_must_be_one_that_can_be_trusted(address: str) -> None:
    async with stand_in() as server:

        async def discovery(request: web.Request) -> web.StreamResponse:
            return web.json_response({"issuer": server.url, "jwks_uri": address})

        server.discovery = discovery
        assert (await failure(server)).reason is FetchFailure.BAD_ADDRESS


@pytest.mark.parametrize(
    "change", [str.upper, lambda url: url + "/", lambda url: url.replace("127.0.0.1", "localhost")]
)
async def test_the_issuer_must_state_its_own_name_exactly(change: Callable[[str], str]) -> None:
    async with stand_in() as server:

        async def discovery(request: web.Request) -> web.StreamResponse:
            return web.json_response({"issuer": change(server.url), "jwks_uri": f"{server.url}/jwks"})

        server.discovery = discovery
        error = await failure(server)
        assert error.reason is FetchFailure.WRONG_ISSUER
        assert "/jwks" not in server.asked


async def test_an_issuer_that_cannot_be_reached_is_named() -> None:
    async with stand_in() as server:
        settings = server.settings()
    async with Fetcher.open() as fetcher:
        with pytest.raises(FetchError, match=settings.issuer) as caught:
            await fetcher.key_set(settings)
        assert caught.value.reason is FetchFailure.UNREACHABLE
        label = "a" * 64  # longer than a label of a name may be
        with pytest.raises(FetchError) as caught:
            await fetcher.key_set(issuer_settings(issuer=f"https://{label}.example"))
        assert caught.value.reason is FetchFailure.UNREACHABLE


async def test_a_certificate_that_this_machine_does_not_trust_is_a_failure_of_tls(certificate: Certificate) -> None:
    server = await asyncio.start_server(
        lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=server_context(certificate)
    )
    async with server, Fetcher.open() as fetcher:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(FetchError) as caught:
            await fetcher.key_set(issuer_settings(issuer=f"https://localhost:{port}"))
        assert caught.value.reason is FetchFailure.TLS


async def test_no_cookie_and_no_login_is_sent() -> None:
    seen: list[Any] = []

    async with stand_in() as server, Fetcher.open() as fetcher:

        async def keys(request: web.Request) -> web.StreamResponse:
            seen.append(request.headers)
            response = web.Response(body=jwks(public_jwk()))
            response.set_cookie("session", "1")
            return response

        server.keys = keys
        await fetcher.key_set(server.settings(algorithms=(Algorithm.RS256,)))
        await fetcher.key_set(server.settings())
    for headers in seen:
        assert "Cookie" not in headers
        assert "Authorization" not in headers
        assert headers["Accept-Encoding"] == "identity"
