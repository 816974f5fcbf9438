"""The way to a server: its URL, and a proxy in between."""

import asyncio
import base64

import pytest

from kit.ports import answers, closed_port, ended, linked_stream, lost, port
from kit.scripted_server import Peer, alert_frame, scripted
from whaled.client import (
    WhaleAlert,
    WhaleStream,
)

# --- proxies ---


@pytest.mark.parametrize(
    ("status", "text", "is_passing"),
    [
        (403, "HTTP 403 (it does not allow connections to whales.example:8765)", False),
        (407, "HTTP 407 (it requires a login: put it into its URL)", False),
        (502, "HTTP 502 (for whales.example:8765)", True),
        (501, "HTTP 501 (for whales.example:8765)", False),
    ],
)
async def test_the_response_of_a_proxy_is_not_taken_for_the_servers(status: int, text: str, is_passing: bool) -> None:
    async with port(answers(b"HTTP/1.1 %d x\r\n\r\n" % status)) as place:
        say = lost if is_passing else ended
        reason = await say("ws://whales.example:8765", proxy=f"http://u:s3cret@{place}")
    assert reason == f"the proxy {place} answered {text}"


async def test_a_proxy_that_is_not_there_is_named_and_not_its_login() -> None:
    number = closed_port()
    reason = await lost("ws://whales.example:8765", proxy=f"http://u:s3cret@127.0.0.1:{number}")
    assert reason == f"cannot connect to the proxy 127.0.0.1:{number}: Connection refused"


async def test_a_port_that_is_not_a_proxy_is_named() -> None:
    async with port(answers(b"SSH-2.0-x\r\n")) as place:
        reason = await ended("ws://whales.example:8765", proxy=f"http://{place}")
    assert reason.startswith(f"the proxy {place} failed, or is not a proxy of this kind: ")


async def test_a_stream_goes_through_a_proxy() -> None:
    async def script(peer: Peer) -> None:
        await peer.open()
        await peer.say(alert_frame(1))
        await peer.linger()

    asked: list[bytes] = []

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        async with asyncio.TaskGroup() as group:
            group.create_task(pump(reader, to_writer))
            group.create_task(pump(to_reader, writer))

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(4096):
            sink.write(data)
        sink.close()

    async with (
        scripted(script) as server,
        port(tunnel) as place,
        linked_stream(server.url, proxy=f"http://u:p@{place}", link_events=False) as source,
    ):
        assert isinstance(await anext(source), WhaleAlert)
    assert asked[0].startswith(b"CONNECT 127.0.0.1:")
    assert b"Proxy-Authorization: Basic " + base64.b64encode(b"u:p") in asked[0]


@pytest.mark.parametrize("proxy", ["ftp://u:s3cret@x", "http://", "127.0.0.1:3128", "socks5://u:s3cret@127.0.0.1:1080"])
def test_a_proxy_that_cannot_be_used_is_refused_at_once_without_its_login(proxy: str) -> None:
    with pytest.raises(ValueError, match=r"is not a proxy such as|is a SOCKS proxy, which needs") as caught:
        WhaleStream("ws://127.0.0.1:1", proxy=proxy)
    assert "s3cret" not in str(caught.value)


# --- URLs ---


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://u:s3cret@x:8765/a", "use ws://***@x:8765/a"),
        ("https://x", "use wss://x"),
        ("127.0.0.1:8765", "begin it with ws:// or wss://"),
        ("localhost", "begin it with ws:// or wss://"),
        ("ws://u:s3cret@", "is not a WebSocket URL"),
        ("ftp://x", "scheme isn't ws or wss"),
    ],
)
def test_an_invalid_url_is_refused_with_a_valid_one_and_without_its_login(url: str, text: str) -> None:
    with pytest.raises(ValueError, match="is not a WebSocket URL") as caught:
        WhaleStream(url)
    assert text in str(caught.value)
    assert "s3cret" not in str(caught.value)
