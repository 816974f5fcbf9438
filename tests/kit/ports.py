"""Ports at which something else than whaled listens, and the reasons that a stream gives for it."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from whaled.client import (
    Disconnected,
    Retry,
    UnusableServerError,
    WhaleStream,
)


def linked_stream(url: str, **options: Any) -> WhaleStream:
    """Return a stream that reports the state of its connection and tries again at once."""
    return WhaleStream(url, **{"retry": Retry(initial_s=0.001, max_s=0.005), "link_events": True, **options})


async def ended(url: str, **options: Any) -> str:
    """Return the reason for which a stream ends without having worked."""
    async with asyncio.timeout(15), linked_stream(url, **options) as source:
        with pytest.raises(UnusableServerError) as caught:
            await anext(source)
    return str(caught.value)


async def lost(url: str, **options: Any) -> str:
    """Return the reason for which a stream tries again, twice the same."""
    async with asyncio.timeout(20), linked_stream(url, **options) as source:
        first, second = await anext(source), await anext(source)
        assert isinstance(first, Disconnected)
        assert isinstance(second, Disconnected)
        assert first.reason == second.reason
        return first.reason


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


@asynccontextmanager
async def port(talk: Talk, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Listen as something else than whaled, and give the host and port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except OSError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def answers(answer: bytes) -> Talk:
    """Return a service that writes an answer when something came."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.read(1000):
            writer.write(answer)
            await writer.drain()

    return talk


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        return int(reserved.getsockname()[1])
