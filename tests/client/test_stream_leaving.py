"""Leaving a stream: closed, stopped, cancelled, or with a consumer that is slow."""

import asyncio

import pytest

from kit.scripted_server import Peer, alert_frame, scripted
from kit.streams import at, next_of, next_offsets, stream
from whaled.client import (
    Connected,
    Limits,
    Progress,
    WhaleAlert,
    WhaleStream,
)


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
        assert await next_offsets(source, 2) == [1, 2]


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
        assert await next_offsets(source, 1) == [1]
        await full.wait()
        assert len(sent) < size
        assert await next_offsets(source, size - 1) == list(range(2, size + 1))
