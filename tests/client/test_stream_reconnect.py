"""A stream that lost its connection: resumed where it was, after a growing delay, and honest about what is missing."""

import asyncio
import logging
import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from kit.scripted_server import Peer, alert_frame, jwt, position, scripted
from kit.streams import at, next_offsets, stream
from whaled.client import (
    Connected,
    Disconnected,
    Limits,
    LinkLostError,
    Missed,
    Progress,
    Retry,
    UpstreamStatus,
    WhaleAlert,
)


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
        assert await next_offsets(source, 2) == [1, 2]
        taken.set()
        assert await next_offsets(source, 3) == [3, 4, 5]
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
        assert await next_offsets(source, 1) == [41]
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
        assert await next_offsets(source, 1) == [98]
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
        assert await next_offsets(source, 1) == [21]  # though its offset is below that of the old epoch


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
        assert await next_offsets(source, 1) == [1]
        assert await anext(source) == Missed(since=at(1), position=at(50), oldest=at(30))
        assert await next_offsets(source, 1) == [51]


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
            assert await next_offsets(source, 1) == [1]
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
        assert await next_offsets(source, 1) == [1]
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
