"""Tokens of a stream: read, checked before connecting, sent first and never shown."""

import time
from pathlib import Path

import pytest

from kit.scripted_server import Peer, alert_frame, jwt, scripted
from kit.streams import always, at, next_offsets, stream
from whaled import client as public
from whaled.client import (
    AuthenticationFailed,
    Connected,
    WhaleStream,
)


async def test_the_token_is_the_first_message() -> None:
    async def script(peer: Peer) -> None:
        await peer.authenticate("jwt", head=3)
        await peer.subscribe(3)
        await peer.linger()

    async with scripted(script) as server, stream(server.url, token=jwt("jwt"), link_events=True) as source:
        assert await anext(source) == Connected(client_id="c1", head=at(3), is_recovered=True)


async def test_an_api_key_is_sent_as_one() -> None:
    async def script(peer: Peer) -> None:
        assert await peer.hear("auth") == {"type": "auth", "api_key": "whk_1"}
        await peer.welcome(0, authenticated=True)
        await peer.subscribe(0)
        await peer.say(alert_frame(1))
        await peer.linger()

    async with scripted(script) as server, stream(server.url, token="whk_1") as source:
        assert await next_offsets(source, 1) == [1]


async def test_an_api_key_that_expires_is_not_refreshed() -> None:
    async def script(peer: Peer) -> None:
        await peer.hear("auth")
        await peer.welcome(0, authenticated=True)
        await peer.subscribe(0)
        await peer.say({"type": "token_expiring", "expires_at": "2026-01-01T00:00:00Z"}, alert_frame(1))
        await peer.hear("ping")

    async with scripted(script) as server, stream(server.url, token="whk_1") as source:
        assert await next_offsets(source, 1) == [1]


async def test_a_token_for_a_server_without_authentication_does_no_harm() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome(0)
        await peer.hear("auth")
        await peer.say({"type": "auth_success", "client_id": None, "permissions": [], "expires_at": None})
        await peer.subscribe(0)
        await peer.say(alert_frame(1))
        await peer.linger()

    async with scripted(script) as server, stream(server.url, token=jwt("jwt")) as source:
        assert await next_offsets(source, 1) == [1]


async def test_a_refused_token_ends_the_stream() -> None:
    async def script(peer: Peer) -> None:
        await peer.hear("auth")
        await peer.refuse("Invalid or expired token")

    async with scripted(script) as server, stream(server.url, token=jwt("t0psecret")) as source:
        with pytest.raises(AuthenticationFailed, match="Invalid or expired token") as caught:
            await anext(source)
        assert jwt("t0psecret") not in str(caught.value)
        assert caught.value.message == "Invalid or expired token"
        with pytest.raises(AuthenticationFailed):  # and stays ended
            await anext(source)


async def test_a_missing_token_is_reported() -> None:
    async def script(peer: Peer) -> None:
        await peer.refuse("Authentication timeout")

    async with scripted(script) as server, stream(server.url) as source:
        with pytest.raises(AuthenticationFailed, match="requires a token, and this stream has none"):
            await anext(source)


async def nothing(_peer: Peer) -> None:
    raise AssertionError("nobody should connect")


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": -3 * 86400}, r"it expired at 20.*\+00:00, 3 d ago by the clock of this machine; get a new token"),
        ({"nbf": 8000}, r"it is not valid before 20.*\+00:00, in 2 h by the clock of this machine"),
    ],
)
async def test_a_token_that_cannot_be_valid_now_is_named_before_connecting(claims: dict[str, int], reason: str) -> None:
    token = jwt("c1", **{name: int(time.time()) + offset for name, offset in claims.items()})
    async with scripted(nothing) as server:
        for options in ({"token": token}, {"token_provider": always(token)}):
            async with stream(server.url, **options) as source:
                with pytest.raises(AuthenticationFailed, match=reason) as caught:
                    await anext(source)
            assert token not in str(caught.value)
        assert server.handshakes == 0


async def test_a_token_that_ended_a_moment_ago_is_for_the_server_to_judge() -> None:
    token = jwt("c1", exp=int(time.time()) - 60)

    async def script(peer: Peer) -> None:
        await peer.hear("auth")
        await peer.refuse("Invalid or expired token")

    async with scripted(script) as server, stream(server.url, token=token) as source:
        with pytest.raises(AuthenticationFailed, match=r"get a new token; it expired at .* 6\d s ago by the clock"):
            await anext(source)


async def test_an_authenticated_stream_is_not_ended_by_the_clock_of_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = jwt("c1", exp=int(time.time()) + 600)

    async def first(peer: Peer) -> None:
        await let_in(peer, token)
        await peer.say(alert_frame(1))
        later = time.time() + 7200
        monkeypatch.setattr("time.time", lambda: later)
        await peer.ws.close(1012)

    async def second(peer: Peer) -> None:
        await let_in(peer, token)
        await peer.say(alert_frame(2))
        await peer.linger()

    async with scripted(first, second) as server, stream(server.url, token=token) as source:
        assert await next_offsets(source, 2) == [1, 2]


async def let_in(peer: Peer, token: str) -> None:
    assert await peer.hear("auth") == {"type": "auth", "token": token}
    await peer.welcome(0, authenticated=True)
    await peer.subscribe(0)


async def test_a_token_is_stripped_of_its_surroundings() -> None:
    async def script(peer: Peer) -> None:
        await peer.authenticate("c1")
        await peer.subscribe(0)
        await peer.say(alert_frame(1))
        await peer.linger()

    for text in (f'\ufeffBearer "{jwt("c1")}"\r\n', f"WHALED_TOKEN={jwt('c1')}"):
        for options in ({"token": text}, {"token_provider": always(text)}):
            async with scripted(script) as server, stream(server.url, **options) as source:
                assert await next_offsets(source, 1) == [1]


async def test_an_invalid_token_is_refused_at_once_and_not_quoted() -> None:
    for text in ("", "two w0rds", jwt("c1")[:-5], "s3cret…"):
        with pytest.raises(ValueError, match="`token` holds") as caught:
            WhaleStream("ws://127.0.0.1:1", token=text)
        assert not text or text not in str(caught.value)
    async with stream("ws://127.0.0.1:1", token_provider=always("two w0rds")) as source:
        with pytest.raises(AuthenticationFailed, match="the text from the token provider holds no token"):
            await anext(source)


async def test_a_token_without_structure_is_named_before_connecting_and_sent(caplog: pytest.LogCaptureFixture) -> None:
    """A newer server may have such tokens."""

    async def script(peer: Peer) -> None:
        assert (await peer.hear("auth"))["token"] == "0paque"
        await peer.refuse("Invalid or expired token")

    async with scripted(script) as server, stream(server.url, token="0paque") as source:
        with pytest.raises(AuthenticationFailed, match=r"get a new token; it is neither a JWT .* nor an API key"):
            await anext(source)
    assert caplog.text.count("the token is neither a JWT (three parts with dots between) nor an API key (whk_...)") == 1
    assert "0paque" not in caplog.text


async def test_reading_a_world_readable_token_file_logs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t"
    path.write_text(f"{jwt('c1')}\n")
    path.chmod(0o640)
    assert public.read_token(path) == jwt("c1")
    assert caplog.text == ""
    path.chmod(0o644)
    assert public.read_token(str(path)) == jwt("c1")
    assert f"{path} can be read by every user of this machine (mode 0644); run: chmod 600 {path}" in caplog.text


@pytest.mark.parametrize("message", ["Rate limit exceeded", "Authentication timeout"])
async def test_a_token_that_was_not_verified_is_tried_again(message: str) -> None:
    async def first(peer: Peer) -> None:
        await peer.hear("auth")
        await peer.refuse(message)

    async def second(peer: Peer) -> None:
        await peer.authenticate("jwt")
        await peer.subscribe(0)
        await peer.say(alert_frame(1))
        await peer.linger()

    async with scripted(first, second) as server, stream(server.url, token=jwt("jwt")) as source:
        assert await next_offsets(source, 1) == [1]
