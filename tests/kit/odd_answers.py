"""A server that answers every handshake with a given HTTP head, such as broken servers and proxies send."""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

BUSY = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n"
LIMITED = b"HTTP/1.1 429 Limited\r\nContent-Length: 0\r\n"
MOVED = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n"
# `ACCEPT` is replaced by the value that the handshake expects: clients read the other headers only if it matches.
OPEN = b"HTTP/1.1 101 Hello\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ACCEPT\r\n"
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3

# Headers that are repeated or malformed.
ODD: dict[str, bytes] = {
    "two Retry-After headers": BUSY + b"Retry-After: 7\r\nRetry-After: 9\r\n",
    "429, two Retry-After headers": LIMITED + b"Retry-After: 7\r\nretry-after: 9\r\n",
    "a valid and an invalid Retry-After": BUSY + b"Retry-After: soon\r\nRetry-After: 3\r\n",
    "two invalid Retry-After headers": LIMITED + b"Retry-After: soon\r\nRetry-After:\r\n",
    "a nonexistent year": BUSY + b"Retry-After: Fri, 31 Dec 99999 23:59:59 GMT\r\n",
    "a year of 5000 digits": LIMITED + b"Retry-After: Fri, 31 Dec " + b"9" * 5000 + b" 23:59:59 GMT\r\n",
    "a nonexistent time zone": LIMITED + b"Retry-After: Fri, 31 Dec 2026 23:59:59 +99999999999\r\n",
    "a day of 40 digits": BUSY + b"Retry-After: " + b"9" * 40 + b" Dec 2026 23:59:59 GMT\r\n",
    "two locations": MOVED + b"Location: http://a.example/\r\nLocation: http://b.example/\r\n",
    "two invalid locations": MOVED + b"Location: http://[::1\r\nLocation: \xff\xfe\r\n",
    "two empty locations": MOVED + b"Location:\r\nLocation:\r\n",
    "two lengths": b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nContent-Length: 1\r\nRetry-After: 1\r\n",
    "a negative length": b"HTTP/1.1 503 Busy\r\nContent-Length: -5\r\n",
    "a length of 5000 digits": b"HTTP/1.1 429 Limited\r\nContent-Length: " + b"9" * 5000 + b"\r\n",
    "two codings": b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n",
    "two dates and servers": BUSY + b"Date: x\r\nDate: y\r\nServer: a\r\nServer: b\r\n",
    "a header without a name": BUSY + b": 5\r\n",
    "a header without a colon": BUSY + b"Retry-After 5\r\n",
    "a header of bytes": BUSY + b"Server: \x00\x80\xff\r\n",
    "300 headers": BUSY + b"".join(b"X-%d: 1\r\n" % number for number in range(300)),
    "a header line that is too long": BUSY + b"Server: " + b"x" * 20_000 + b"\r\n",
    "a nonexistent status": b"HTTP/1.1 999 What\r\n",
    "a status of letters": b"HTTP/1.1 abc What\r\n",
    "two keys accepted": OPEN + b"Sec-WebSocket-Accept: ACCEPT\r\n",
    "another key accepted": OPEN.replace(b"ACCEPT", b"\xff"),
    "two upgrades": OPEN + b"Upgrade: h2c\r\nConnection: close\r\n",
    "invalid connection options": OPEN + b"Connection: \x80, ;;\r\n",
    "two subprotocols": OPEN + b"Sec-WebSocket-Protocol: a\r\nSec-WebSocket-Protocol: b\r\n",
    "an invalid subprotocol": OPEN + b"Sec-WebSocket-Protocol: \xff ;\r\n",
    "an unknown extension": OPEN + b"Sec-WebSocket-Extensions: x-dream\r\nSec-WebSocket-Extensions: x-dream\r\n",
    "compression twice": OPEN + b"Sec-WebSocket-Extensions: permessage-deflate\r\n" * 2,
    "a nonexistent window": OPEN + b"Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits=99\r\n",
    "an invalid extension": OPEN + b'Sec-WebSocket-Extensions: permessage-deflate; a="\xff; ,,=\r\n',
}  # fmt: skip


@asynccontextmanager
async def answering(head: bytes) -> AsyncIterator[str]:
    """Run a server that answers every handshake with this head and closes the connection. Yields its host and port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readexactly(3)
            if request != b"GET":  # a probe of the port that is not HTTP, and would wait for an answer
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
