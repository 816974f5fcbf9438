"""Tokens that a stream renews: from a provider, from the server, and when one is refused."""

import asyncio
import io
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from kit.scripted_server import Peer, alert_frame, jwt, position, scripted
from kit.streams import always, next_of, next_offsets, stream
from whaled.client import (
    AuthenticationFailed,
    Connected,
    Disconnected,
    Limits,
    LinkLostError,
    Progress,
    ProtocolError,
    TokenRenewed,
    WhaleAlert,
)


async def test_an_invalid_token_from_the_provider_leaves_the_renewal_to_the_server() -> None:
    texts = [jwt("c1"), "half a tok"]

    async def provide() -> str:
        return texts.pop(0)

    async def script(peer: Peer) -> None:
        await peer.authenticate("c1")
        await peer.subscribe(0)
        await peer.say({"type": "token_expiring", "expires_at": "2026-01-02T00:00:00Z"})
        await peer.hear("refresh")
        await peer.say(alert_frame(1))
        await peer.linger()

    async with scripted(script) as server, stream(server.url, token_provider=provide) as source:
        assert await next_offsets(source, 1) == [1]


def provider(*tokens: str | Exception) -> Callable[[], Awaitable[str]]:
    """Gives the tokens of these names one after the other."""
    left = [token if isinstance(token, Exception) else jwt(token) for token in tokens]

    async def provide() -> str:
        token = left.pop(0)
        if isinstance(token, Exception):
            raise token
        return token

    return provide


async def limited(peer: Peer) -> None:
    """Refuse a token for now."""
    await peer.hear("auth")
    message = "Rate limit exceeded"
    await peer.say({"type": "error", "code": "rate_limited", "message": message, "retry_after": 0.01})
    await peer.ws.close(1013, message)


async def test_a_token_that_is_refused_for_now_is_tried_again() -> None:
    async def second(peer: Peer) -> None:
        await peer.authenticate("jwt")
        await peer.subscribe(0)
        await peer.say(alert_frame(1))
        await peer.linger()

    async with scripted(limited, second) as server, stream(server.url, token=jwt("jwt")) as source:
        assert await next_offsets(source, 1) == [1]


async def test_the_provider_is_called_again_when_a_token_is_refused_temporarily() -> None:
    async def second(peer: Peer) -> None:
        await peer.authenticate("two")
        await peer.subscribe(0)
        await peer.say(alert_frame(1))
        await peer.linger()

    async with (
        scripted(limited, second) as server,
        stream(server.url, token_provider=provider("one", "two")) as source,
    ):
        assert await next_offsets(source, 1) == [1]


async def test_a_temporary_refusal_gives_the_time_to_wait() -> None:
    async with scripted(limited) as server, stream(server.url, token=jwt("jwt"), reconnect=False) as source:
        with pytest.raises(LinkLostError, match="Rate limit exceeded") as caught:
            await anext(source)
    assert (caught.value.code, caught.value.retry_after_s) == (1013, 0.01)


@pytest.mark.parametrize("reason", ["Token expired", "Token revoked"])
async def test_the_provider_is_called_for_another_token(reason: str) -> None:
    asked: list[Any] = []

    async def first(peer: Peer) -> None:
        await peer.authenticate("one")
        await peer.subscribe(0)
        await peer.say(alert_frame(1))
        await peer.ws.close(1008, reason)

    async def second(peer: Peer) -> None:
        await peer.authenticate("two", head=2)
        asked.append((await peer.subscribe(2))["since"])
        await peer.say(alert_frame(2))
        await peer.linger()

    async with (
        scripted(first, second) as server,
        stream(server.url, token_provider=provider("one", OSError("identity provider is down"), "two")) as source,
    ):
        assert await next_offsets(source, 2) == [1, 2]
        assert source.token == jwt("two")
    assert asked == [position(1)]


async def test_a_provider_that_gives_the_refused_token_again_ends_the_stream() -> None:
    async def script(peer: Peer) -> None:
        await peer.authenticate("one")
        await peer.subscribe(0)
        await peer.ws.close(1008, "Token revoked")

    async with scripted(script) as server, stream(server.url, token_provider=provider("one", "one")) as source:
        with pytest.raises(AuthenticationFailed, match="the same token was given again; get a new token"):
            await anext(source)


async def test_a_provider_of_bad_tokens_is_not_called_indefinitely() -> None:
    async def script(peer: Peer) -> None:
        await peer.hear("auth")
        await peer.refuse("Invalid or expired token")

    async with scripted(*[script] * 3) as server, stream(server.url, token_provider=provider("a", "b", "c")) as source:
        with pytest.raises(AuthenticationFailed, match="refused 3 tokens from the provider in a row"):
            await anext(source)


async def test_other_exceptions_of_the_provider_reach_the_consumer() -> None:
    async with stream("ws://127.0.0.1:1", token_provider=provider(KeyError("no such client"))) as source:
        with pytest.raises(KeyError, match="no such client"):
            await anext(source)


async def test_an_expiring_token_is_refreshed_and_kept_for_the_next_connection() -> None:
    async def first(peer: Peer) -> None:
        await peer.authenticate("old")
        await peer.subscribe(0)
        await peer.say({"type": "token_expiring", "expires_at": "2026-01-01T00:00:00Z"})
        await peer.hear("refresh")
        await peer.say({"type": "token", "token": jwt("new"), "expires_at": "2026-01-02T00:00:00Z"}, alert_frame(1))
        await peer.ws.close(1012)

    async def second(peer: Peer) -> None:
        await peer.authenticate("new")
        await peer.subscribe(1)
        await peer.say(alert_frame(2))
        await peer.linger()

    async with scripted(first, second) as server, stream(server.url, token=jwt("old")) as source:
        assert await next_offsets(source, 2) == [1, 2]
        assert source.token == jwt("new")


RENEWED = {"type": "token", "token": jwt("new"), "expires_at": "2026-01-02T00:00:00Z"}


async def renew(peer: Peer, name: str, *frames: dict[str, Any]) -> None:
    """Tell that the token ends, and give the one of this name when the client asks."""
    await peer.say({"type": "token_expiring", "expires_at": "2026-01-01T00:00:00Z"})
    await peer.hear("refresh")
    await peer.say({**RENEWED, "token": jwt(name)}, *frames)


async def test_a_renewed_token_is_reported_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    async def script(peer: Peer) -> None:
        await peer.authenticate("old")
        await peer.subscribe(0)
        await renew(peer, "new", alert_frame(1))
        await peer.ws.close(1012)

    caplog.set_level(logging.DEBUG, "whaled")
    async with scripted(script) as server, stream(server.url, token=jwt("old"), link_events=True) as source:
        told = await next_of(source, TokenRenewed)
        assert source.token == jwt("new")
    assert (told.token, told.expires_at) == (jwt("new"), datetime(2026, 1, 2, tzinfo=UTC))
    shown = io.StringIO()
    Console(file=shown).print(told)
    assert jwt("new") not in repr(told) + str(told) + f"{told}" + shown.getvalue()
    assert "expires_at=datetime.datetime(2026, 1, 2" in repr(told)
    async with scripted(script) as server, stream(server.url, token=jwt("old")) as source:
        assert await next_offsets(source, 1) == [1]
        assert source.token == jwt("new")
    assert "the server renewed the token" in caplog.text
    assert jwt("new") not in caplog.text


async def test_a_token_renewed_before_a_failed_subscription_is_reported() -> None:
    async def script(peer: Peer) -> None:
        await peer.authenticate("old")
        await peer.hear("subscribe")
        await renew(peer, "new")
        await peer.ws.close(1012)

    async with scripted(script) as server, stream(server.url, token=jwt("old"), link_events=True) as source:
        first = await anext(source)
        assert isinstance(first, TokenRenewed)
        assert isinstance(await anext(source), Disconnected)


async def test_a_renewed_token_overtakes_waiting_events_and_replaces_an_older_one() -> None:
    sent = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.authenticate("old")
        await peer.subscribe(0)
        await peer.say(alert_frame(1), alert_frame(2))
        await renew(peer, "newer")
        await renew(peer, "newer still")
        await peer.say(alert_frame(3))
        await renew(peer, "newest")  # it is asked for when what came before was read
        sent.set()
        await peer.linger()

    limits = Limits(buffered_events=10)
    async with (
        scripted(script) as server,
        stream(server.url, token=jwt("old"), link_events=True, limits=limits) as source,
    ):
        await sent.wait()
        events = [await anext(source) for _ in range(6)]
    assert isinstance(events[0], TokenRenewed)
    assert events[0].token in {jwt("newer still"), jwt("newest")}  # the newest may still be on its way
    assert [type(event) for event in events[1:]] == [Connected, Progress, WhaleAlert, WhaleAlert, WhaleAlert]


async def test_a_frame_with_a_token_that_cannot_be_read_is_not_quoted() -> None:
    async def script(peer: Peer) -> None:
        await peer.authenticate("old")
        await peer.subscribe(0)
        await peer.say({**RENEWED, "expires_at": "99999-01-01"})
        await peer.linger()

    async with scripted(script) as server, stream(server.url, token=jwt("old")) as source:
        with pytest.raises(ProtocolError, match=r"\(not shown\)") as caught:
            await anext(source)
    assert jwt("new") not in str(caught.value)


async def test_a_provider_that_gives_the_renewed_token_again_gets_the_newest_renewed_once_more() -> None:
    async def first(peer: Peer) -> None:
        await peer.authenticate("file")
        await peer.subscribe(0)
        await renew(peer, "second")
        await renew(peer, "third", alert_frame(1))
        await peer.ws.close(1012)

    async def second(peer: Peer) -> None:
        await peer.authenticate("third")
        await peer.subscribe(1)
        await peer.ws.close(1012)

    async def last(peer: Peer) -> None:
        await peer.authenticate("third")
        await peer.subscribe(1)
        await peer.say(alert_frame(2))
        await peer.linger()

    async with (
        scripted(first, second, limited, last) as server,
        stream(server.url, token_provider=always(jwt("file"))) as source,
    ):
        assert await next_offsets(source, 2) == [1, 2]


async def test_without_reconnect_a_refused_token_is_named_with_its_advice_whatever_it_came_from() -> None:
    async def script(peer: Peer) -> None:
        await peer.hear("auth")
        await peer.refuse("Invalid or expired token")

    said = set()
    for options in ({"token": jwt("a")}, {"token_provider": always(jwt("a"))}):
        for reconnect in (True, False):
            async with scripted(script) as server, stream(server.url, reconnect=reconnect, **options) as source:
                with pytest.raises(AuthenticationFailed) as caught:
                    await anext(source)
            said.add(str(caught.value).replace("the same token was given again; ", ""))
    assert said == {"Invalid or expired token: get a new token; the server's log has the reason for the refusal"}


async def test_an_expiring_token_is_replaced_in_place_by_the_provider() -> None:
    async def script(peer: Peer) -> None:
        await peer.authenticate("old")
        await peer.subscribe(0)
        await peer.say({"type": "token_expiring", "expires_at": "2026-01-01T00:00:00Z"})
        assert await peer.hear("auth") == {"type": "auth", "token": jwt("new")}
        await peer.say({"type": "auth_success", "client_id": "c1", "permissions": ["read"], "expires_at": None})
        await peer.say(alert_frame(1))
        await peer.linger()

    async with scripted(script) as server, stream(server.url, token_provider=provider("old", "new")) as source:
        assert await next_offsets(source, 1) == [1]


async def test_a_token_is_renewed_while_the_consumer_is_busy() -> None:
    renewed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.authenticate("old")
        await peer.subscribe(0)
        await peer.say(alert_frame(1), {"type": "token_expiring", "expires_at": "2026-01-01T00:00:00Z"})
        await peer.hear("refresh")
        renewed.set()
        await peer.linger()

    async with scripted(script) as server, stream(server.url, token=jwt("old")) as source:
        async for _ in source:
            await renewed.wait()  # the event is still in hand
            break


async def test_a_provider_that_is_down_leaves_the_renewal_to_the_server() -> None:
    async def script(peer: Peer) -> None:
        await peer.authenticate("old")
        await peer.subscribe(0)
        await peer.say({"type": "token_expiring", "expires_at": "2026-01-01T00:00:00Z"})
        await peer.hear("refresh")
        await peer.say(
            {"type": "error", "code": "forbidden", "message": "this token cannot be refreshed"}, alert_frame(1)
        )
        await peer.linger()

    tokens = provider("old", TimeoutError())
    async with scripted(script) as server, stream(server.url, token_provider=tokens) as source:
        assert await next_offsets(source, 1) == [1]
