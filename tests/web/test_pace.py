"""Requests beyond the rate wait for their turn."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from kit.web import serving
from whaled.web.pace import BURST


async def test_requests_beyond_the_rate_wait_for_their_turn() -> None:
    async with serving(requests_per_second=1000.0) as rig, rig.visitor() as greedy:
        loop = asyncio.get_running_loop()
        began = loop.time()
        greedy.writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 300)
        for _ in range(300):
            assert (await greedy.answer()).status == 200
        assert loop.time() - began >= (300 - BURST - 1) / 1000
        assert rig.value("whaled_http_requests_delayed_total") > 0


@pytest.mark.slow
async def test_requests_of_connections_that_are_gone_take_no_turn() -> None:
    async with serving(requests_per_second=5.0) as rig:
        for _ in range(500):
            async with rig.visitor() as visitor:
                visitor.writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with rig.visitor() as scraper:
            assert (await scraper.ask("/metrics")).status == 200  # within seconds, not after a hundred


async def test_greedy_connections_do_not_keep_out_their_own_address() -> None:
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(serving(max_connections_per_address=4, requests_per_second=20.0))
        for _ in range(4):
            greedy = await stack.enter_async_context(rig.visitor())
            greedy.writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        await rig.until(lambda: rig.value("whaled_http_requests_delayed_total") >= 4)
        scraper = await stack.enter_async_context(rig.visitor())
        assert (await scraper.ask("/metrics")).status == 200
        assert rig.cut("address_full") == 0
