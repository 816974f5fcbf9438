"""A server that answers every handshake with one head of HTTP, as broken servers and proxies send them."""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n"
LIMITED = b"HTTP/1.1 429 Limited\r\nContent-Length: 0\r\n"
MOVED = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n"
# `ACCEPT` becomes what the handshake asks for: what follows is looked at only then.
OPEN = b"HTTP/1.1 101 Hello\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ACCEPT\r\n"
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3

# Headers that come twice, or cannot be read.
ODD: dict[str, bytes] = {
    "two times to wait": BUSY + b"Retry-After: 7\r\nRetry-After: 9\r\n",
    "two times to wait, limited": LIMITED + b"Retry-After: 7\r\nretry-after: 9\r\n",
    "a time to wait and nonsense": BUSY + b"Retry-After: soon\r\nRetry-After: 3\r\n",
    "no time to wait, twice": LIMITED + b"Retry-After: soon\r\nRetry-After:\r\n",
    "a year that there is not": BUSY + b"Retry-After: Fri, 31 Dec 99999 23:59:59 GMT\r\n",
    "a year beyond numbers": LIMITED + b"Retry-After: Fri, 31 Dec " + b"9" * 5000 + b" 23:59:59 GMT\r\n",
    "a zone that there is not": LIMITED + b"Retry-After: Fri, 31 Dec 2026 23:59:59 +99999999999\r\n",
    "a day beyond numbers": BUSY + b"Retry-After: " + b"9" * 40 + b" Dec 2026 23:59:59 GMT\r\n",
    "two places": MOVED + b"Location: http://a.example/\r\nLocation: http://b.example/\r\n",
    "a place that is none": MOVED + b"Location: http://[::1\r\nLocation: \xff\xfe\r\n",
    "no place, twice": MOVED + b"Location:\r\nLocation:\r\n",
    "two lengths": b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nContent-Length: 1\r\nRetry-After: 1\r\n",
    "a length that is none": b"HTTP/1.1 503 Busy\r\nContent-Length: -5\r\n",
    "a length beyond numbers": b"HTTP/1.1 429 Limited\r\nContent-Length: " + b"9" * 5000 + b"\r\n",
    "two codings": b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n",
    "two dates and servers": BUSY + b"Date: x\r\nDate: y\r\nServer: a\r\nServer: b\r\n",
    "a header without a name": BUSY + b": 5\r\n",
    "a header without a colon": BUSY + b"Retry-After 5\r\n",
    "a header of bytes": BUSY + b"Server: \x00\x80\xff\r\n",
    "more headers than anybody sends": BUSY + b"".join(b"X-%d: 1\r\n" % number for number in range(300)),
    "a line that is too long": BUSY + b"Server: " + b"x" * 20_000 + b"\r\n",
    "a status that there is not": b"HTTP/1.1 999 What\r\n",
    "a status of letters": b"HTTP/1.1 abc What\r\n",
    "two keys accepted": OPEN + b"Sec-WebSocket-Accept: ACCEPT\r\n",
    "another key accepted": OPEN.replace(b"ACCEPT", b"\xff"),
    "two upgrades": OPEN + b"Upgrade: h2c\r\nConnection: close\r\n",
    "connection options that are none": OPEN + b"Connection: \x80, ;;\r\n",
    "two subprotocols": OPEN + b"Sec-WebSocket-Protocol: a\r\nSec-WebSocket-Protocol: b\r\n",
    "a subprotocol that is none": OPEN + b"Sec-WebSocket-Protocol: \xff ;\r\n",
    "an unknown extension": OPEN + b"Sec-WebSocket-Extensions: x-dream\r\nSec-WebSocket-Extensions: x-dream\r\n",
    "compression twice": OPEN + b"Sec-WebSocket-Extensions: permessage-deflate\r\n" * 2,
    "a window that there is not": OPEN + b"Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=99\r\n",
    "an extension that is none": OPEN + b'Sec-WebSocket-Extensions: permessage-deflate; a="\xff; ,,=\r\n',
}  # fmt: skip


@asynccontextmanager
async def answering(head: bytes) -> AsyncIterator[str]:
    """Answers every handshake with this head, and hangs up: the host and port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readexactly(3)
            if request != b"GET":  # no HTTP: a second look at the port, which would wait for an answer
                return
            request += await reader.readuntil(b"\r\n\r\n")
            key = re.search(rb"(?i)sec-websocket-key: *(\S+)", request)
            accept = base64.b64encode(hashlib.sha1(key[1] + GUID).digest()) if key is not None else b""
            writer.write(head.replace(b"ACCEPT", accept) + b"\r\n")
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
