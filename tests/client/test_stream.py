"""The client against a server that follows a script; tests/suites/test_client_gateway.py has the real gateway."""

import asyncio
import io
import logging
import random
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kit.scripted_server import EPOCH, Peer, alert_frame, jwt, position, scripted, update_frame
from kit.whales import txid
from whaled import client as public
from whaled.client import (
    AlertData,
    AuthenticationFailed,
    Connected,
    Disconnected,
    Last,
    Limits,
    LinkLostError,
    Missed,
    Position,
    Progress,
    ProtocolError,
    Retry,
    StreamError,
    SubscriptionError,
    TokenRenewed,
    UnusableServerError,
    UpdateData,
    UpstreamStatus,
    WhaleAlert,
    WhaleStream,
    WhaleUpdate,
    parse_since,
)
from whaled.client.cursor import Cursor
from whaled.client.events import Subscribed
from whaled.model import Alert, Update

Kind = TypeVar("Kind")
SOON = Retry(initial_s=0.001, max_s=0.005)


def stream(url: str, **options: Any) -> WhaleStream:
    return WhaleStream(url, **{"retry": SOON, **options})


def at(offset: int, epoch: str = EPOCH) -> Position:
    return Position(epoch, offset)


async def offsets(source: WhaleStream, count: int) -> list[int]:
    """The offsets of the next alerts and updates; nothing else may come between."""
    found = []
    for _ in range(count):
        event = await anext(source)
        assert isinstance(event, WhaleAlert | WhaleUpdate), event
        found.append(event.position.offset)
    return found


async def next_of(source: WhaleStream, kind: type[Kind]) -> Kind:
    """The next event of a kind; others are passed over."""
    async for event in source:
        if isinstance(event, kind):
            return event
    raise AssertionError("the stream ended")


# --- delivery ---------------------------------------------------------------------------------------------------------


async def test_alerts_updates_and_upstream_states_come_typed_and_in_order() -> None:
    async def script(peer: Peer) -> None:
        await peer.open(0)
        await peer.say(
            alert_frame(
                1, btc_value=812, flow_type="inflow", flow_sat=7, moved_sat=None, from_labels=["Cold"], rbf_enabled=True
            ),
            update_frame(2, of=1, block_height=800_000, seconds_to_confirmation=61.5),
            {"type": "status", "upstream": "degraded", "since": "2026-01-01T00:00:00Z"},
        )
        await peer.linger()

    async with scripted(script) as server, stream(server.url) as source:
        first, second, third = await anext(source), await anext(source), await anext(source)
        assert isinstance(first, WhaleAlert)
        assert (first.data.btc_value, first.data.flow_type, first.data.moved_sat) == (812.0, "inflow", None)
        assert first.data.flow_sat == 7
        assert first.data.from_labels == ("Cold",)
        assert first.timestamp == datetime(2026, 1, 1, tzinfo=UTC)
        assert first.position == at(1)
        assert isinstance(second, WhaleUpdate)
        assert (second.data.transaction_id, second.data.status) == (txid(1), "confirmed")
        assert second.data.block_height == 800_000
        assert third == UpstreamStatus(state="degraded", since=datetime(2026, 1, 1, tzinfo=UTC))


async def test_a_newer_server_does_not_disturb() -> None:
    async def script(peer: Peer) -> None:
        await peer.say({"type": "news", "from": "protocol 2"})
        await peer.open(0)
        await peer.say({"type": "weather", "position": {"epoch": "x"}})
        await peer.say({**alert_frame(1, shape="spiral", raw={"un": "known"}), "raw": [1], "extra": {"deep": []}})
        await peer.linger()

    async with scripted(script) as server, stream(server.url) as source:
        event = await anext(source)
        assert isinstance(event, WhaleAlert)
        assert event.data.shape == "spiral"
        assert msgspec.json.decode(event.raw)["extra"] == {"deep": []}


def test_the_client_knows_every_field_the_server_sends() -> None:
    for ours, theirs in ((AlertData, Alert), (UpdateData, Update)):
        known = {field.name for field in msgspec.structs.fields(ours)}
        assert known == {field.name for field in msgspec.structs.fields(theirs)}


async def test_the_position_is_that_of_the_event_in_hand() -> None:
    async def script(peer: Peer) -> None:
        await peer.open(7)
        await peer.say(alert_frame(8), alert_frame(9), alert_frame(12))
        await peer.linger()

    async with scripted(script) as server, stream(server.url) as source:
        seen = [source.position]
        async for event in source:
            assert isinstance(event, WhaleAlert)
            assert source.position == event.position
            seen.append(event.position)
            if len(seen) == 3:
                break
        assert seen == [None, at(8), at(9)]
        assert source.position == at(9)  # 12 may have come in; it was not handed over


async def test_alerts_before_subscribed_are_not_delivered() -> None:
    asked: list[Any] = []

    async def script(peer: Peer) -> None:
        await peer.welcome(10)
        await peer.say(alert_frame(11))  # unfiltered: the subscription is still on its way
        asked.append(await peer.subscribe(12))
        await peer.say(alert_frame(12))
        await peer.linger()

    async with scripted(script) as server, stream(server.url, filters={"min_btc": 500}) as source:
        assert await offsets(source, 1) == [12]
    assert asked == [{"type": "subscribe", "filters": {"min_btc": 500}, "since": position(10)}]


@pytest.mark.parametrize(
    ("since", "sent"),
    [
        (at(4), position(4)),
        (f"{EPOCH}:4", position(4)),
        (Last(3), {"last": 3}),
        ("last:3", {"last": 3}),
        (datetime(2026, 1, 1, tzinfo=UTC), {"time": "2026-01-01T00:00:00+00:00"}),
        ("2026-01-01T02:00+02:00", {"time": "2026-01-01T02:00:00+02:00"}),
        ("2026-01-01", {"time": "2026-01-01T00:00:00+00:00"}),
    ],
)
async def test_a_stream_starts_at_the_requested_position(since: Any, sent: Any) -> None:
    asked: list[Any] = []

    async def script(peer: Peer) -> None:
        asked.append((await peer.open(10))["since"])
        await peer.say(alert_frame(8))
        await peer.linger()

    async with scripted(script) as server, stream(server.url, since=since) as source:
        assert await offsets(source, 1) == [8]
    assert asked == [sent]


# --- coming back ------------------------------------------------------------------------------------------------------


async def test_a_lost_connection_is_resumed_after_the_last_event_received() -> None:
    asked: list[Any] = []

    async def first(peer: Peer) -> None:
        await peer.open(0)
        await peer.say(alert_frame(1), alert_frame(2))
        await taken.wait()
        peer.ws.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.welcome(4)
        asked.append((await peer.subscribe(4))["since"])
        await peer.say(alert_frame(2), alert_frame(3), alert_frame(4))  # a server that repeats itself is not believed
        await peer.ws.close(1012)

    async def third(peer: Peer) -> None:
        await peer.welcome(4)
        asked.append((await peer.subscribe(4))["since"])
        await peer.say(alert_frame(5))
        await peer.linger()

    taken = asyncio.Event()
    async with scripted(first, second, third) as server, stream(server.url) as source:
        assert await offsets(source, 2) == [1, 2]
        taken.set()
        assert await offsets(source, 3) == [3, 4, 5]
    assert asked == [position(2), position(4)]


async def test_a_position_frame_moves_the_resume_point() -> None:
    asked: list[Any] = []

    async def first(peer: Peer) -> None:
        await peer.open(0)
        await peer.say({"type": "position", "position": position(40)})
        await peer.ws.close(1001)

    async def second(peer: Peer) -> None:
        asked.append((await peer.open(41))["since"])
        await peer.say(alert_frame(41))
        await peer.linger()

    async with scripted(first, second) as server, stream(server.url) as source:
        assert await offsets(source, 1) == [41]
    assert asked == [position(40)]


async def test_a_stream_without_events_resumes_at_its_original_start() -> None:
    asked: list[Any] = []

    async def first(peer: Peer) -> None:
        asked.append((await peer.open(100))["since"])
        await peer.ws.close(1012)

    async def second(peer: Peer) -> None:
        await peer.welcome(105)
        asked.append((await peer.subscribe(105))["since"])
        await peer.say(alert_frame(98))
        await peer.linger()

    async with scripted(first, second) as server, stream(server.url, since="last:3") as source:
        assert await offsets(source, 1) == [98]
    assert asked == [{"last": 3}, position(97)]  # the log grew: three back is another place now


async def test_a_lost_position_is_reported_before_anything_else() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome(20, epoch="new")
        await peer.say({"type": "status", "upstream": "disconnected", "since": "2026-01-01T00:00:00Z"})
        await peer.subscribe(20, recovered=False, epoch="new", oldest=position(5, "new"))
        await peer.say(alert_frame(21, epoch="new"))
        await peer.linger()

    async with scripted(script) as server, stream(server.url, since=at(900)) as source:
        assert source.position == at(900)
        assert await anext(source) == Missed(since=at(900), position=at(20, "new"), oldest=at(5, "new"))
        assert source.position == at(20, "new")
        assert isinstance(await anext(source), UpstreamStatus)
        assert await offsets(source, 1) == [21]  # though its offset is below that of the old epoch


async def test_a_recovery_that_is_not_promised_is_not_assumed() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome(20)
        await peer.subscribe(20, recovered=None)
        await peer.linger()

    async with scripted(script) as server, stream(server.url, since=at(9)) as source:
        assert await anext(source) == Missed(since=at(9), position=at(20))


async def test_missed_events_are_reported_on_a_reconnect_too() -> None:
    async def first(peer: Peer) -> None:
        await peer.open(0)
        await peer.say(alert_frame(1))
        await peer.ws.close(1012)

    async def second(peer: Peer) -> None:
        await peer.welcome(50)
        await peer.subscribe(50, recovered=False, oldest=position(30))
        await peer.say(alert_frame(51))
        await peer.linger()

    async with scripted(first, second) as server, stream(server.url) as source:
        assert await offsets(source, 1) == [1]
        assert await anext(source) == Missed(since=at(1), position=at(50), oldest=at(30))
        assert await offsets(source, 1) == [51]


async def test_link_events_report_the_state_of_the_connection() -> None:
    async def first(peer: Peer) -> None:
        await peer.open(3)
        await peer.say({"type": "closing", "code": 1012, "retry_after": 0.03})
        await peer.ws.close(1012, "Service restart")

    async def second(peer: Peer) -> None:
        await peer.open(4)
        await peer.linger()

    async with scripted(first, second) as server, stream(server.url, link_events=True) as source:
        assert await anext(source) == Connected(client_id=None, head=at(3), is_recovered=True)
        assert await anext(source) == Progress(position=at(3))
        lost = await anext(source)
        assert isinstance(lost, Disconnected)
        assert (lost.code, lost.reason) == (1012, "Service restart (1012)")
        assert lost.retry_in_s >= 0.03
        assert isinstance(await anext(source), Connected)


async def test_without_link_events_a_lost_connection_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def first(peer: Peer) -> None:
        await peer.authenticate("t0psecret")
        await peer.subscribe(0)
        await peer.ws.close(1011)

    async def second(peer: Peer) -> None:
        await peer.authenticate("t0psecret")
        await peer.subscribe(0)
        await peer.say(alert_frame(1))
        await peer.linger()

    async with scripted(first, second) as server, stream(server.url, token=jwt("t0psecret")) as source:
        with caplog.at_level(logging.INFO, "whaled.client"):
            assert await offsets(source, 1) == [1]
    assert "error on the server (1011); trying again in 0.0 s" in caplog.text
    assert jwt("t0psecret") not in caplog.text


@pytest.mark.slow
async def test_the_delay_grows_with_failures_and_is_reset_by_a_good_connection() -> None:
    async def fail(peer: Peer) -> None:
        await peer.open()
        await peer.ws.close(1011)

    async def stand(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1))
        await standing.wait()
        await peer.ws.close(1011)

    standing = asyncio.Event()
    waits = []
    retry = Retry(initial_s=0.001, max_s=0.2, stable_after_s=0.05)
    async with (
        scripted(*[fail] * 12, stand, fail, stand) as server,
        stream(server.url, link_events=True, retry=retry) as source,
    ):
        loop = asyncio.get_running_loop()
        async for event in source:
            if isinstance(event, Disconnected):
                waits.append(event.retry_in_s)
            if isinstance(event, WhaleAlert):
                stable_at = loop.time() + 0.06
                loop.call_at(stable_at, standing.set)
            if len(waits) == 14:
                break
    assert all(wait <= 0.001 * 2**number for number, wait in enumerate(waits[:8]))
    assert waits[12] <= 0.001  # the connection that stood was the thirteenth
    assert waits[13] <= 0.002


@pytest.mark.parametrize("status", [503, 429])
async def test_retry_after_of_a_server_that_is_full_is_honoured(status: int) -> None:
    async with (
        scripted(status=(status, {"Retry-After": "7"})) as server,
        stream(server.url, link_events=True) as source,
    ):
        lost = await anext(source)
        assert isinstance(lost, Disconnected)
        assert 7.0 <= lost.retry_in_s < 7.1
        assert f"HTTP {status}: come later" in lost.reason


async def test_retry_after_may_be_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    async with (
        scripted(status=(503, {"Retry-After": date})) as server,
        stream(server.url, link_events=True) as source,
    ):
        lost = await anext(source)
        assert isinstance(lost, Disconnected)
        assert 20 < lost.retry_in_s < 31


@pytest.mark.parametrize(("header", "least", "most"), [("99999999999", 600, 601), ("soon", 0, 0.01), ("", 0, 0.01)])
async def test_an_unreasonable_retry_after_is_bounded(header: str, least: float, most: float) -> None:
    async with (
        scripted(status=(503, {"Retry-After": header})) as server,
        stream(server.url, link_events=True) as source,
    ):
        lost = await anext(source)
        assert isinstance(lost, Disconnected)
        assert least <= lost.retry_in_s <= most


async def test_a_refused_connection_is_retried_and_reported_clearly() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    async with stream(f"ws://user:pa55@127.0.0.1:{port}", link_events=True) as source:
        for _ in range(3):
            lost = await anext(source)
            assert isinstance(lost, Disconnected)
            assert lost.reason == f"cannot connect to 127.0.0.1:{port}: Connection refused"


async def test_without_reconnect_the_first_loss_is_raised() -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1))
        await peer.ws.close(1013, "Too slow")

    async with scripted(script) as server, stream(server.url, reconnect=False) as source:
        assert await offsets(source, 1) == [1]
        with pytest.raises(LinkLostError, match=r"Too slow \(1013\)") as caught:
            await anext(source)
        assert caught.value.code == 1013


async def test_a_connection_without_welcome_is_closed_in_time() -> None:
    limits = Limits(open_timeout_s=0.05)
    async with scripted(Peer.linger) as server, stream(server.url, limits=limits, reconnect=False) as source:
        with pytest.raises(LinkLostError, match=r"no `welcome` from .* is it a whaled server"):
            await anext(source)


async def test_a_silent_server_is_noticed_by_its_missing_pongs() -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        peer.ws.transport.pause_reading()  # no pong, no close: the machine behind the link is gone
        await gone.wait()
        peer.ws.transport.abort()

    gone = asyncio.Event()
    limits = Limits(ping_interval_s=0.05, ping_timeout_s=0.05, close_timeout_s=0.1)
    async with scripted(script) as server, stream(server.url, limits=limits, reconnect=False) as source:
        with pytest.raises(LinkLostError, match="keepalive ping timeout"):
            await anext(source)
        gone.set()


# --- authentication ---------------------------------------------------------------------------------------------------


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
        assert await offsets(source, 1) == [1]


async def test_a_token_for_a_server_without_authentication_does_no_harm() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome(0)
        await peer.hear("auth")
        await peer.say({"type": "auth_success", "client_id": None, "permissions": [], "expires_at": None})
        await peer.subscribe(0)
        await peer.say(alert_frame(1))
        await peer.linger()

    async with scripted(script) as server, stream(server.url, token=jwt("jwt")) as source:
        assert await offsets(source, 1) == [1]


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
        assert await offsets(source, 2) == [1, 2]


async def let_in(peer: Peer, token: str) -> None:
    assert await peer.hear("auth") == {"type": "auth", "token": token}
    await peer.welcome(0, authenticated=True)
    await peer.subscribe(0)


def always(token: str) -> Callable[[], Awaitable[str]]:
    async def provide() -> str:
        return token

    return provide


async def test_a_token_is_stripped_of_its_surroundings() -> None:
    async def script(peer: Peer) -> None:
        await peer.authenticate("c1")
        await peer.subscribe(0)
        await peer.say(alert_frame(1))
        await peer.linger()

    for text in (f'\ufeffBearer "{jwt("c1")}"\r\n', f"WHALED_TOKEN={jwt('c1')}"):
        for options in ({"token": text}, {"token_provider": always(text)}):
            async with scripted(script) as server, stream(server.url, **options) as source:
                assert await offsets(source, 1) == [1]


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
        assert await offsets(source, 1) == [1]


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
        assert await offsets(source, 1) == [1]


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
        assert await offsets(source, 1) == [1]


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
        assert await offsets(source, 1) == [1]


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
        assert await offsets(source, 2) == [1, 2]
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
        assert await offsets(source, 2) == [1, 2]
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
        assert await offsets(source, 1) == [1]
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
        assert await offsets(source, 2) == [1, 2]


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
        assert await offsets(source, 1) == [1]


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
        assert await offsets(source, 1) == [1]


# --- what ends a stream -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["invalid_filter", "invalid_position", "forbidden", "a_code_of_tomorrow"])
async def test_a_subscription_that_is_refused_is_raised(code: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome(0)
        await peer.hear("subscribe")
        await peer.say({"type": "error", "code": code, "message": "must be a number", "path": "filters.min_btc"})
        await peer.linger()

    async with scripted(script) as server, stream(server.url, filters={"min_btc": "x"}) as source:
        with pytest.raises(SubscriptionError, match=r"must be a number \(filters.min_btc\)") as caught:
            await anext(source)
        assert (caught.value.code, caught.value.path) == (code, "filters.min_btc")


async def test_a_subscription_over_the_rate_is_tried_again() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome(0)
        await peer.hear("subscribe")
        await peer.say({"type": "error", "code": "rate_limited", "message": "Rate limit exceeded", "retry_after": 0.01})
        await peer.linger()

    async def second(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1))
        await peer.linger()

    async with scripted(first, second) as server, stream(server.url) as source:
        assert await offsets(source, 1) == [1]


async def test_filters_too_large_for_the_server_raise_a_subscription_error() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome(0)
        await peer.ws.close(1009, "Message too big")

    async with scripted(script) as server, stream(server.url) as source:
        with pytest.raises(SubscriptionError, match="larger than this server takes"):
            await anext(source)


async def test_a_message_over_the_bound_ends_the_stream() -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1, reasons=["x" * 5000]))
        await peer.linger()

    limits = Limits(max_message_bytes=2000)
    async with scripted(script) as server, stream(server.url, limits=limits) as source:
        with pytest.raises(ProtocolError, match="max_message_bytes"):
            await anext(source)


async def test_abuse_is_not_repeated() -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.ws.close(1008, "Rate limit exceeded")

    async with scripted(script) as server, stream(server.url) as source:
        with pytest.raises(UnusableServerError, match="too much"):
            await anext(source)


@pytest.mark.parametrize(
    "frame",
    [
        "not json",
        "[]",
        '{"no":"type"}',
        '{"type":"whale_alert","data":{"transaction_id":7,"btc_value":1}}',
        '{"type":"whale_alert","data":{"transaction_id":"a","btc_value":1},"timestamp":"2026-01-01T00:00:00Z"}',
        '{"type":"position","position":{"epoch":"e","offset":-1}}',
        b"\xff\xfe",
        '{"type":"tomorrow","field":' + "[" * 5000 + "]" * 5000 + "}",
    ],
)
async def test_a_frame_that_cannot_be_understood_is_raised_not_skipped(frame: str | bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1))
        await peer.ws.send(frame)
        await peer.linger()

    async with scripted(script) as server, stream(server.url) as source:
        assert await offsets(source, 1) == [1]
        with pytest.raises(ProtocolError, match="is this a whaled server"):
            await anext(source)
        assert source.position == at(1)


@pytest.mark.parametrize("status", [400, 403, 404])
async def test_a_server_that_turns_the_url_away_is_not_pestered(status: int) -> None:
    async with scripted(status=(status, {})) as server, stream(server.url) as source:
        with pytest.raises(UnusableServerError, match=f"HTTP {status}"):
            await anext(source)
        assert server.handshakes == 1


async def test_a_redirect_is_not_followed() -> None:
    async def script(peer: Peer) -> None:
        raise AssertionError("the token would have come here")

    async with (
        scripted(script) as elsewhere,
        scripted(status=(302, {"Location": elsewhere.url})) as server,
        stream(server.url, token=jwt("jwt")) as source,
    ):
        with pytest.raises(UnusableServerError, match="HTTP 302"):
            await anext(source)
        assert elsewhere.handshakes == 0


@asynccontextmanager
async def raw_server(answer: bytes) -> Any:
    """Answers anything with these bytes and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.slow
async def test_a_port_that_speaks_another_protocol_is_named() -> None:
    async with raw_server(b"220 smtp ready\r\n") as url, stream(url) as source:
        with pytest.raises(UnusableServerError, match=r"speaks SMTP or FTP, not WebSocket: is the port right\?"):
            await anext(source)


@pytest.mark.slow
async def test_a_port_that_hangs_up_is_tried_again() -> None:
    async with raw_server(b"") as url, stream(url, link_events=True) as source:
        for _ in range(2):
            lost = await anext(source)
            assert isinstance(lost, Disconnected)
            assert "hung up during the handshake" in lost.reason


@pytest.mark.parametrize("url", ["http://x", "127.0.0.1:8765", "ws://", "ws://x:99999"])
def test_an_impossible_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="not a WebSocket URL"):
        WhaleStream(url)


# --- TLS --------------------------------------------------------------------------------------------------------------


def server_context(chain: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    return context


async def test_tls_with_a_trusted_certificate(certificate: tuple[Path, Path, ssl.SSLContext]) -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1))
        await peer.linger()

    chain, key, trusting = certificate
    async with (
        scripted(script, tls=server_context(chain, key)) as server,
        stream(server.url, ssl=trusting) as source,
    ):
        assert await offsets(source, 1) == [1]


async def test_an_untrusted_certificate_is_refused_by_default(
    certificate: tuple[Path, Path, ssl.SSLContext],
) -> None:
    chain, key, _ = certificate
    async with scripted(tls=server_context(chain, key)) as server, stream(server.url) as source:
        with pytest.raises(UnusableServerError, match=r"certificate of 127.0.0.1:\d+ is not accepted"):
            await anext(source)


def test_a_tls_context_for_an_unencrypted_url_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="wss://"):
        WhaleStream("ws://127.0.0.1:8765", ssl=ssl.create_default_context())


# --- leaving ----------------------------------------------------------------------------------------------------------


async def test_leaving_a_stream_closes_with_code_1000() -> None:
    codes: list[int | None] = []

    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1))
        await peer.linger()
        codes.append(peer.ws.close_code)

    async with scripted(script) as server, stream(server.url) as source:
        await anext(source)
    assert codes == [1000]


async def test_leaving_does_not_wait_for_a_peer_that_stopped_reading() -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1))
        peer.ws.transport.pause_reading()
        await left.wait()
        peer.ws.transport.abort()

    left = asyncio.Event()
    async with scripted(script) as server:
        async with stream(server.url, limits=Limits(close_timeout_s=0.05)) as source:
            await anext(source)
        left.set()


async def test_stop_ends_the_iteration_from_anywhere() -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1), alert_frame(2))
        await peer.linger()

    seen = []
    async with scripted(script) as server, stream(server.url) as source:
        async for event in source:
            assert isinstance(event, WhaleAlert)
            seen.append(event.position.offset)
            source.stop()
    assert seen == [1]
    assert source.position == at(1)


async def test_stop_wakes_a_consumer_that_waits() -> None:
    async with scripted(*[Peer.open_and_linger]) as server, stream(server.url, link_events=True) as source:
        await next_of(source, Progress)
        asyncio.get_running_loop().call_soon(source.stop)
        with pytest.raises(StopAsyncIteration):
            await anext(source)


async def test_a_cancelled_wait_loses_nothing() -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await go.wait()
        await peer.say(alert_frame(1), alert_frame(2))
        await peer.linger()

    go = asyncio.Event()
    async with scripted(script) as server, stream(server.url) as source:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await anext(source)
        go.set()
        assert await offsets(source, 2) == [1, 2]


async def test_exceptions_of_the_body_are_raised_unchanged() -> None:
    async with scripted(Peer.open_and_linger) as server:
        with pytest.raises(ZeroDivisionError):
            async with stream(server.url):
                raise ZeroDivisionError


async def test_cancelling_the_consumer_ends_everything() -> None:
    async def consume() -> None:
        async with stream(server.url, link_events=True) as source:
            async for event in source:
                if isinstance(event, Connected):
                    there.set()

    there = asyncio.Event()
    async with scripted(Peer.open_and_linger) as server:
        task = asyncio.create_task(consume())
        await there.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not [other for other in asyncio.all_tasks() if other.get_name() == "whaled stream"]


async def test_iterating_without_entering_raises_a_clear_error() -> None:
    source = WhaleStream("ws://127.0.0.1:1")
    with pytest.raises(RuntimeError, match="async with"):
        await anext(source)
    async with source:
        pass
    with pytest.raises(RuntimeError, match="entered once"):
        await source.__aenter__()


async def test_a_busy_consumer_holds_a_bounded_number_of_events() -> None:
    size = 2000

    async def script(peer: Peer) -> None:
        await peer.open()
        for offset in range(1, size + 1):
            sent.append(offset)
            try:
                async with asyncio.timeout(0.1 if not full.is_set() else None):
                    await peer.say(alert_frame(offset, reasons=["x" * 4000]))
            except TimeoutError:
                full.set()  # the frame is in the buffer all the same
        await peer.linger()

    sent: list[int] = []
    full = asyncio.Event()
    limits = Limits(buffered_events=4)
    async with scripted(script) as server, stream(server.url, limits=limits) as source:
        assert await offsets(source, 1) == [1]
        await full.wait()
        assert len(sent) < size
        assert await offsets(source, size - 1) == list(range(2, size + 1))


# --- the cursor, against a model of the log ---------------------------------------------------------------------------


@given(seed=st.integers(), filtered=st.booleans(), last=st.none() | st.integers(0, 12))
def test_over_any_sequence_of_disconnects_every_event_comes_once(seed: int, filtered: bool, last: int | None) -> None:
    rng = random.Random(seed)
    head = rng.randrange(20)
    cursor = Cursor(None if last is None else Last(last))
    got: list[int] = []
    start: int | None = None
    for _ in range(rng.randrange(1, 8)):
        asked = cursor.start(at(head))
        head += rng.randrange(3)  # between welcome and subscribe
        match asked:
            case Position():
                begin = asked.offset
            case Last():
                begin = max(0, head - asked.last)
            case other:
                raise AssertionError(other)
        start = begin if start is None else start
        assert cursor.subscribed(asked, Subscribed(recovered=True, position=at(head))) is None
        head += rng.randrange(6)  # live
        cut = rng.randrange(begin, head + 1)  # how far this connection came
        got += [n for n in range(begin + 1, cut + 1) if (n % 3 or not filtered) and cursor.take(at(n))]
    end = got[-1] if got else 0
    assert start is not None
    assert got == [n for n in range(start + 1, end + 1) if n % 3 or not filtered]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "last:",
        "last:-1",
        "yesterday",
        "2026-13-01",
        "epoch:",
        ":5",
        "a b:5",
        "12",
        "10:00",
        "1767225600",
        "1/2/2026",
    ],
)
def test_a_starting_point_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a starting point|is not an ISO 8601 time"):
        parse_since(text)


def test_starting_points_are_read_as_they_are_written() -> None:
    assert parse_since("last:20") == Last(20)
    assert parse_since(" -_k3:4711 ") == Position("-_k3", 4711)
    assert parse_since("c045c3b92ba929dac234b51e:7") == Position("c045c3b92ba929dac234b51e", 7)
    assert parse_since("123456789012345678901234:7") == Position("123456789012345678901234", 7)
    assert parse_since("2026-01-31T11:00Z") == datetime(2026, 1, 31, 11, tzinfo=UTC)
    assert parse_since("2026-01-31T12:00:00+01:00") == datetime(2026, 1, 31, 12, tzinfo=timezone(timedelta(hours=1)))


def test_a_datetime_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="has no time zone"):
        WhaleStream("ws://127.0.0.1:1", since=datetime(2026, 1, 1))  # noqa: DTZ001 - that is the mistake


def test_everything_raised_on_purpose_is_a_stream_error() -> None:
    for name in public.__all__:
        found = getattr(public, name)
        if isinstance(found, type) and issubclass(found, Exception):
            assert issubclass(found, StreamError)
