"""The bytes of the attacks, by name: valid and invalid handshakes, frames and messages."""

import contextlib
import json
import random
import ssl
import struct
import zlib
from collections.abc import Callable
from functools import cache

LOOPBACK = "127.0.0.1"


def request(token: str = "", path: str = "/", *, deflates: bool = False) -> bytes:
    """Return a WebSocket handshake, which offers compression if `deflates`."""
    extensions = "Sec-WebSocket-Extensions: permessage-deflate\r\n" if deflates else ""
    credential = f"Authorization: Bearer {token}\r\n" if token else ""
    return (
        f"GET {path} HTTP/1.1\r\nHost: {LOOPBACK}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{extensions}{credential}\r\n"
    ).encode()


def frame(payload: bytes, opcode: int = 1, *, fin: bool = True) -> bytes:
    """Return a client's WebSocket frame, masked with zeros."""
    first, size = opcode | (0x80 if fin else 0), len(payload)
    if size < 126:
        head = struct.pack("!BB", first, 0x80 | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, size)
    return head + bytes(4) + payload


def compressed(payload: bytes) -> bytes:
    """Return a client's frame of a compressed message with this payload."""
    plain = frame(payload)
    return bytes((plain[0] | 0x40,)) + plain[1:]


# An empty block with dynamic Huffman codes: no other bytes are more expensive to inflate.
EMPTY_BLOCK, EMPTY_BLOCK_BITS = 0x6BFF90000000000081C004, 90


def empty_blocks(size: int) -> bytes:
    """Return a compressed form of the empty message, of at most `size` bytes."""
    count = (8 * size - 3) // EMPTY_BLOCK_BITS  # 3 bits for the header of the last block, whose rest the sender removes
    blocks = sum(EMPTY_BLOCK << number * EMPTY_BLOCK_BITS for number in range(count))
    return blocks.to_bytes((count * EMPTY_BLOCK_BITS + 10) // 8, "little")


def long_ping(size: int) -> bytes:
    """Return a compressed ping of `size` bytes."""
    deflate = zlib.compressobj(wbits=-15)
    ping = b'{"type":"ping","x":"%s"}' % (b"x" * (size - 22))
    return (deflate.compress(ping) + deflate.flush(zlib.Z_SYNC_FLUSH))[:-4]


def message(**fields: object) -> bytes:
    """Return a message of the client protocol as a frame."""
    return frame(json.dumps(fields, separators=(",", ":")).encode())


def hello() -> bytes:
    """Return a TLS ClientHello. It can be sent repeatedly, and each one makes the server compute a key exchange."""
    out = ssl.MemoryBIO()
    pipe = ssl._create_unverified_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")  # noqa: SLF001
    with contextlib.suppress(ssl.SSLWantReadError):
        pipe.do_handshake()
    return out.read()


# A well-formed token with an invalid signature.
WRONG_TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJjbGllbnRfaWQiOiJ4In0.c2ln"
EMPTY_PING = frame(b"", 9)
PAYLOADS: dict[str, Callable[[str], bytes]] = {
    "": lambda _token: b"",
    "handshake": lambda _token: request(),
    "handshake with token": request,
    "wrong token": lambda _token: request(WRONG_TOKEN),
    "wrong token in a message": lambda _token: request() + message(type="auth", token=WRONG_TOKEN),
    "half a request": lambda _token: b"GET / HTTP/1.1\r\nHost: x\r\nX-A: b\r\n",
    "half a request of 15 KiB": lambda _token: b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 1_900,
    "80 KiB of pings": lambda _token: request() + EMPTY_PING * 13_600,
    "close, then 80 KiB of pings": lambda _token: request() + frame(b"\x03\xe8", 8) + EMPTY_PING * 13_600,
    "compressed, 16 KiB of empty blocks": lambda _token: request(deflates=True) + compressed(empty_blocks(16_000)),
    "hello": lambda _token: hello(),
    "rubbish": lambda _token: random.Random(1).randbytes(2_000),
    "scrape": lambda _token: b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "50 scrapes": lambda _token: b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 50,
}


@cache
def large_filter(number: int) -> bytes:
    """Return a filter with as many addresses as fit into a frame."""
    draw = random.Random(number)
    return message(type="subscribe", filters={"addresses": [f"{draw.getrandbits(56):014x}" for _ in range(900)]})


def own_filter(number: int) -> bytes:
    """Return a filter that no other client has, and that no event matches."""
    return message(
        type="subscribe",
        filters={"min_btc": 20_000_000 + number / 1e3, "addresses": [f"{number:010d}{each:04d}" for each in range(10)]},
    )


def whole_log(**filters: object) -> bytes:
    """Return a subscription that replays the whole log."""
    return message(type="subscribe", filters=filters, since={"last": 1_000_000})


BOMBS = (compressed(long_ping(16_000)), compressed(empty_blocks(16_000)))
LARGE_FILTERS = 64
# By name: functions of the client's number and the turn's number.
FRAMES: dict[str, Callable[[int, int], bytes]] = {
    "": lambda _client, _turn: b"",
    "pings": lambda _client, _turn: EMPTY_PING * 8,
    "compressed": lambda _client, turn: BOMBS[turn % 2],
    "fragments": lambda _client, turn: frame(b"" if turn else b"{", 0 if turn else 1, fin=False),
    "large filter": lambda client, turn: large_filter((client + turn) % LARGE_FILTERS),
    "own filter": lambda client, _turn: own_filter(client),
    "whole log": lambda _client, _turn: whole_log(),
    "whole log, nothing matches": lambda _client, _turn: whole_log(min_btc=20_000_000),
    "stats": lambda _client, _turn: message(type="stats"),
    "wrong token": lambda _client, _turn: message(type="auth", token=WRONG_TOKEN),
}
