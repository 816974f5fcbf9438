"""permessage-deflate (RFC 7692): offers and answers, frames sent, messages received. Its section 7.2.3 has examples."""

import asyncio
import contextlib
import json
import random
import zlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory

from kit.backfill import Clock
from kit.fuzz import scaling
from kit.gateway import SMALL_SEGMENT, Rig, offsets, receive, receive_type, running_gateway, silent_client, until
from kit.raw import CLOSE, CONTINUATION, PING, PONG, TEXT, Raw, masked, raw, request
from kit.tokens import Tokens
from kit.whales import whale
from whaled.config.sections import AuthSettings, GatewaySettings
from whaled.gateway import framing
from whaled.gateway.deflate import (
    ALONE_MESSAGES,
    LARGEST_BYTES,
    MAX_FINAL_BLOCKS,
    MAX_WINDOW_BYTES,
    SMALLEST_BYTES,
    TAIL,
    WINDOW_BITS,
    DeflateError,
    Deflater,
    InflatedTooBigError,
    Inflater,
    inflate,
)
from whaled.gateway.handshake import MAX_SEPARATORS
from whaled.gateway.hub import WORTH_COMPRESSING
from whaled.model import Draft, Kind, UpstreamState

BINARY = 2
PLAIN = "server_no_context_takeover; client_no_context_takeover"
AGREED = f"permessage-deflate; {PLAIN}"
HELLO = bytes.fromhex("f248cdc9c90700")
MIB = 1024 * 1024
NOISE = random.Random(7).randbytes(500)


def deflated(message: bytes) -> bytes:
    """A message as a client compresses it."""
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(message) + compressor.flush(zlib.Z_SYNC_FLUSH))[: -len(TAIL)]


def compressed(opcode: int, payload: bytes, *, fin: bool = True) -> bytes:
    """A client's frame with RSV1 set."""
    frame = masked(opcode, payload, fin=fin)
    return bytes((frame[0] | 0x40,)) + frame[1:]


def command(**message: object) -> bytes:
    """A compressed message of the client protocol."""
    return compressed(TEXT, deflated(json.dumps(message).encode()))


def asking(offer: str = "permessage-deflate") -> bytes:
    return request("/", f"Sec-WebSocket-Extensions: {offer}")


async def answered(client: Raw) -> str | None:
    """The extensions in the answer to the handshake."""
    client._is_answered = True
    head = (await client.reader.readuntil(b"\r\n\r\n")).decode()
    assert head.startswith("HTTP/1.1 101")
    found = [line.partition(": ")[2] for line in head.split("\r\n") if line.startswith("Sec-WebSocket-Extensions")]
    assert len(found) <= 1
    return found[0] if found else None


# --- what is agreed ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("offer", "answer"),
    [
        ("permessage-deflate", AGREED),
        ("permessage-deflate; client_max_window_bits", AGREED),
        ("permessage-deflate; client_max_window_bits=9", f"{AGREED}; client_max_window_bits=9"),
        ('permessage-deflate; client_max_window_bits="15"', f"{AGREED}; client_max_window_bits=15"),
        ("permessage-deflate; server_no_context_takeover", AGREED),
        ("permessage-deflate; client_no_context_takeover", AGREED),
        (
            f"permessage-deflate; server_max_window_bits={WINDOW_BITS}",
            f"{AGREED}; server_max_window_bits={WINDOW_BITS}",
        ),
        ("permessage-deflate; server_max_window_bits=15", f"{AGREED}; server_max_window_bits={WINDOW_BITS}"),
        # The first that can be kept, and once.
        ("permessage-deflate; server_max_window_bits=9, permessage-deflate", AGREED),
        ("x-webkit-deflate-frame, permessage-deflate; unknown, permessage-deflate, permessage-deflate", AGREED),
        ("permessage-deflate;client_max_window_bits ,foo;bar", AGREED),
        # Declined: the connection goes on without.
        ("permessage-deflate; server_max_window_bits=8", None),
        ("permessage-deflate; server_max_window_bits=11", None),
        ("permessage-deflate; server_max_window_bits", None),
        ("permessage-deflate; server_max_window_bits=16", None),
        ("permessage-deflate; server_max_window_bits=012", None),
        ("permessage-deflate; client_max_window_bits=7", None),
        ("permessage-deflate; client_max_window_bits=x", None),
        ("permessage-deflate; server_no_context_takeover=1", None),
        ("permessage-deflate; client_no_context_takeover=true", None),
        ("permessage-deflate; client_max_window_bits; client_max_window_bits=10", None),
        ("permessage-deflate; server_no_context_takeover; server_no_context_takeover", None),
        ("permessage-deflate; mystery=1", None),
        ("Permessage-Deflate", None),
        ("permessage-bzip2", None),
    ],
)
async def test_an_offer_that_can_be_kept_is_accepted_and_another_one_declined(
    tmp_path: Path, offer: str, answer: str | None
) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, asking(offer)) as client:
        assert await answered(client) == answer
        assert (await client.told("welcome"))["protocol"] == 1
        assert rig.gateway.roster.compressed == (answer is not None)
        client.send(command(type="ping", id=1))
        if answer is None:
            assert await client.closed() == (1002, "reserved bits must be 0")
        else:
            assert (await client.told("pong"))["id"] == 1


async def test_several_headers_are_one_list(tmp_path: Path) -> None:
    two = request("/", "Sec-WebSocket-Extensions: foo", "Sec-WebSocket-Extensions: permessage-deflate")
    async with running_gateway(tmp_path) as rig, raw(rig, two) as client:
        assert await answered(client) == AGREED


@pytest.mark.parametrize("offer", ["permessage-deflate; a=", "permessage-deflate client_max", "a b", ";", 'x; y="z'])
async def test_offers_that_are_no_list_open_no_connection(tmp_path: Path, offer: str) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, asking(offer)) as client:
        assert await client.status() == 400


@pytest.mark.parametrize("name", ["Connection", "Upgrade", "Sec-WebSocket-Extensions", "Sec-WebSocket-Protocol"])
async def test_a_header_with_a_list_without_end_opens_no_connection(tmp_path: Path, name: str) -> None:
    for separator in ",;":
        many = request("/", f"{name}: " + f"x{separator}" * MAX_SEPARATORS + "x")
        async with running_gateway(tmp_path) as rig, raw(rig, many) as client:
            assert await client.status() == 400


async def test_without_compression_in_the_configuration_offers_are_declined(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, compression=False) as rig, raw(rig, asking()) as client:
        assert await answered(client) is None
        await client.told("welcome")
        assert rig.gateway.roster.compressed == 0


async def test_a_reload_turns_compression_on_or_off_for_new_connections(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, asking()) as before:
        assert await answered(before) == AGREED
        await before.told("status")
        rig.gateway.reconfigure(GatewaySettings(port=0, compression=False), AuthSettings(), None)
        async with raw(rig, asking()) as after:
            assert await answered(after) is None
            await after.told("status")
            await rig.alerts(1)
            assert (await before.frame())[0] == TEXT
            assert (await after.told("whale_alert"))["position"]["offset"] == 1


# --- what is sent -----------------------------------------------------------------------------------------------------


async def test_clients_with_and_without_compression_get_the_same_messages(tmp_path: Path) -> None:
    async with (
        running_gateway(tmp_path) as rig,
        connect(rig.url, proxy=None) as one,
        connect(rig.url, proxy=None, extensions=[ClientPerMessageDeflateFactory(server_max_window_bits=12)]) as two,
        rig.connect() as plain,
    ):
        assert rig.gateway.roster.compressed == 2
        for client in (one, two, plain):
            await receive_type(client, "status")
        await rig.alerts(*range(50))
        expected = [await plain.recv() for _ in range(50)]
        for client in (one, two):
            assert [await client.recv() for _ in range(50)] == expected
        rig.gateway.publish_upstream_state(UpstreamState.CONNECTED)
        for client in (one, two, plain):
            assert (await receive(client))["type"] == "status"
        sent, saved = rig.value("whaled_compressed_bytes_total"), rig.value("whaled_compression_saved_bytes_total")
        assert sent + saved == 2 * sum(len(framing.text_frame(str(frame).encode())) for frame in expected)
        assert 0.3 < saved / (sent + saved) < 0.6
        assert rig.value("whaled_messages_sent_total", type="whale_alert") == 150
    assert rig.gateway.roster.compressed == 0


async def test_one_compressed_frame_serves_every_filter_and_client(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, asking()) as one, raw(rig, asking()) as two:
        for client in (one, two):
            await client.told("status")
        two.send(command(type="subscribe", filters={"min_btc": 120}))
        await two.told("subscribed")
        made: list[bytes] = []
        make = rig.gateway.hub.deflater.frame

        def count(plain: bytes) -> bytes:
            made.append(plain)
            return make(plain)

        rig.gateway.hub.deflater.frame = count  # type: ignore[method-assign]  # it still does what it does
        await rig.alerts(*range(3))
        frames = [[await client.frame() for _ in range(3)] for client in (one, two)]
        assert frames[0] == frames[1]
        assert len(made) == 3
        assert [json.loads(inflate(body, MIB))["position"]["offset"] for _, body in frames[0]] == [1, 2, 3]


async def test_frames_with_the_addresses_of_a_filter_go_to_that_filter_and_are_compressed_for_a_few(
    tmp_path: Path,
) -> None:
    """There may be thousands of such filters, and compressing takes longer than sending."""
    ours, others = "bc1q" + "o" * 38, "bc1q" + "p" * 38
    draft = Draft(kind=Kind.ALERT, at=1_800_000_000.0, whale=whale(1, addresses=(ours, others)))
    async with running_gateway(tmp_path) as rig, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(raw(rig, asking())) for _ in range(WORTH_COMPRESSING + 2)]
        filters: list[dict[str, list[str]]] = [{"addresses": [ours]}] * WORTH_COMPRESSING + [
            {"addresses": [others]},
            {},
        ]
        for client, chosen in zip(clients, filters, strict=True):
            await client.told("status")
            client.send(command(type="subscribe", filters=chosen))
            await client.told("subscribed")
        await rig.publish(draft)
        frames = [await client.whole_frame() for client in clients]
    bits = [first for first, _ in frames]
    assert bits == [0xC1] * WORTH_COMPRESSING + [0x81, 0xC1]
    named = [
        json.loads(inflate(body, MIB) if first == 0xC1 else body).get("matched_addresses") for first, body in frames
    ]
    assert named == [[ours]] * WORTH_COMPRESSING + [[others], None]


@asynccontextmanager
async def narrow(rig: Rig, *first: bytes) -> AsyncIterator[Raw]:
    """A client over a link of which the kernel holds some 100 KB, and which it reads with little ahead."""
    sock = silent_client(rig.url, receive_buffer=16_384, segment_bytes=SMALL_SEGMENT, request=b"".join(first))
    sock.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_a_replay_is_compressed_once_the_link_turns_out_to_be_slow(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, ping_interval=600) as rig:
        await rig.alerts(*range(400))
        resume = masked(TEXT, b'{"type":"subscribe","since":{"last":400}}')
        async with narrow(rig, asking(), resume) as client, raw(rig, request() + resume) as plain:
            for each in (client, plain):
                await each.told("subscribed")
            bodies, first_bits = [], []
            for _ in range(400):
                bits, body = await client.whole_frame()
                first_bits.append(bits)
                bodies.append(inflate(body, MIB) if bits == 0xC1 else body)
            assert bodies == [(await plain.frame())[1] for _ in range(400)]
            assert first_bits[0] == 0x81  # it had room
            assert set(first_bits[-100:]) == {0xC1}
            sent, saved = rig.value("whaled_compressed_bytes_total"), rig.value("whaled_compression_saved_bytes_total")
            assert 0.3 < saved / (sent + saved) < 0.6
            await until(lambda: rig.gateway.hub.live_members == 2)
            await rig.alerts(400)
            assert inflate((await client.frame())[1], MIB) == (await plain.frame())[1]


@pytest.mark.slow
async def test_a_client_with_compression_that_lags_misses_nothing(tmp_path: Path) -> None:
    async with (
        running_gateway(tmp_path, max_unsent=4_000, slow_timeout=30.0) as rig,
        connect(rig.url, proxy=None, max_queue=1) as client,
    ):
        await receive_type(client, "status")
        count = 0
        while not rig.value("whaled_clients_lagged_total"):
            await rig.alerts(*range(count, count + 500))
            count += 500
        assert await offsets(client, count) == list(range(1, count + 1))
        await rig.alerts(count)
        assert await offsets(client, 1) == [count + 1]


async def test_frames_for_a_single_client_are_not_compressed(tmp_path: Path) -> None:
    """Compressed with text of the client's choosing, a token could be read off the sizes."""
    async with (
        running_gateway(tmp_path, authenticator=Tokens(), clock=lambda: 1.0) as rig,  # the tokens end in 1970
        raw(rig, asking()) as client,
    ):
        assert await answered(client) == AGREED
        client.send(command(type="auth", token="good") + command(type="refresh"))
        client.send(command(type="subscribe", filters={"exchanges": ["a" * 60] * 8}))
        for kind in ("auth_success", "welcome", "token", "subscribed"):
            assert (await client.told(kind))["type"] == kind


def test_each_frame_is_inflated_by_itself_and_no_frame_grows() -> None:
    deflater, chance = Deflater(), random.Random(1)
    sizes = set()
    for size in (0, 1, SMALLEST_BYTES - 1, SMALLEST_BYTES, 900, 4_096, 5_000, 70_000, LARGEST_BYTES, LARGEST_BYTES + 1):
        for alphabet in (b"a", b'{"btc":01.}', bytes(range(256))):
            plain = framing.text_frame(bytes(chance.choices(alphabet, k=size)))
            frame = deflater.frame(plain)
            assert len(frame) <= len(plain)
            sizes.add(frame[0])
            if frame is plain:
                assert size < 1_000 or len(alphabet) == 256 or size > LARGEST_BYTES
                continue
            assert frame[0] == 0xC1
            data = bytes(framing.payload_of(frame)) + TAIL
            assert zlib.decompressobj(-WINDOW_BITS).decompress(data) == framing.payload_of(plain)
    assert sizes == {0x81, 0xC1}


def test_the_time_of_a_frame_is_linear_in_its_size_for_any_content() -> None:
    deflater = Deflater()

    def run(plain: bytes) -> None:
        deflater.frame(plain)

    for word in (b"a", b"ab" * 40 + b"c", b"0123456789abcdef"):

        def make(size: int, word: bytes = word) -> bytes:
            return framing.text_frame(word * (size // len(word)))

        assert scaling(make, run, 30_000) < 20


# --- what comes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (HELLO, b"Hello"),
        (bytes.fromhex("000500faff48656c6c6f00"), b"Hello"),  # a block without compression
        (bytes.fromhex("f348cdc9c9070000"), b"Hello"),  # a final block
        (bytes.fromhex("f248050000 00ffff cac9c90700".replace(" ", "")), b"Hello"),  # two blocks
        (bytes.fromhex("f348cdc9c90700 f348cdc9c9070000".replace(" ", "")), b"HelloHello"),  # two final blocks
        (b"\x00", b""),
        (b"\x02\x00", b""),
    ],
)
def test_the_examples_of_the_rfc_are_read(payload: bytes, message: bytes) -> None:
    assert inflate(payload, 100) == message
    assert inflate(payload, len(message)) == message
    if message:
        with pytest.raises(InflatedTooBigError):
            inflate(payload, len(message) - 1)


def test_a_block_after_a_final_one_may_refer_to_what_came_before_it() -> None:
    text = NOISE[:300]
    first = zlib.compressobj(wbits=-15)
    data = first.compress(text) + first.flush()
    second = zlib.compressobj(wbits=-15, zdict=text)
    data += second.compress(text) + second.flush(zlib.Z_SYNC_FLUSH)
    assert len(data) < 400
    assert inflate(data[: -len(TAIL)], 600) == text * 2


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x07",  # a kind of block that there is not
        b"\xff" * 30,
        HELLO[:3],
        HELLO[:-1],
        deflated(b"x" * 500 + NOISE)[:-20],
        bytes.fromhex("000a00f5ff48656c6c6f"),  # fewer bytes than the block says
        bytes.fromhex("f348cdc9c90700"),  # nothing behind a final block
        deflated(b"ab" * 40)[:2] + b"\x01",
        b"\x03\x00" * (MAX_FINAL_BLOCKS + 1) + b"\x00",
        b"\x03\x00" * 8_000,
    ],
)
def test_a_damaged_or_truncated_message_is_refused(payload: bytes) -> None:
    with pytest.raises(DeflateError):
        inflate(payload, 16 * 1024)


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2_000), st.integers(0, 2**16 - 1))
def test_any_input_ends_in_a_message_within_the_limit_or_an_error(data: bytes, limit: int, change: int) -> None:
    assert inflate(deflated(data), max(limit, len(data))) == data
    damaged = bytearray(deflated(data * 3) + data)
    damaged[change % len(damaged)] ^= change >> 8 | 1
    try:
        assert len(inflate(damaged, limit)) <= limit
    except (DeflateError, InflatedTooBigError):
        return


async def test_compressed_messages_are_answered_also_in_fragments(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, asking()) as client:
        await client.told("status")
        client.send(command(type="ping", id=1) + masked(TEXT, b'{"type":"ping","id":2}'))
        data = deflated(b'{"type":"ping","id":3}')
        parts = [data[:1], b"", data[1:9], data[9:]]
        client.send(compressed(TEXT, parts[0], fin=False) + masked(CONTINUATION, parts[1], fin=False))
        client.send(masked(PING, b"between") + masked(CONTINUATION, parts[2], fin=False))
        client.send(masked(CONTINUATION, parts[3]))
        frames = [await client.frame() for _ in range(4)]
        assert (PONG, b"between") in frames
        assert [json.loads(body)["id"] for opcode, body in frames if opcode == TEXT] == [1, 2, 3]


GARBAGE = NOISE[:3] + b"\xff" * 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "closed"),
    [
        (compressed(TEXT, b"\x07" + GARBAGE), (1007, "Compressed message is damaged")),
        (compressed(TEXT, HELLO[:-1]), (1007, "Compressed message is damaged")),
        (compressed(TEXT, b"", fin=False) + masked(CONTINUATION, b"\x07"), (1007, "Compressed message is damaged")),
        (compressed(TEXT, deflated(b"\xc3\x28")), (1007, "Text is not UTF-8")),
        (compressed(TEXT, deflated(b"x" * 16_385)), (1009, "Message too big")),
        (compressed(TEXT, deflated(b"x" * 4 * MIB)), (1009, "Message too big")),
        (compressed(TEXT, deflated(b"x" * 9 * MIB)[:9_000], fin=False), None),  # never finished, never inflated
        (compressed(TEXT, HELLO, fin=False) + compressed(CONTINUATION, b"x"), (1002, "reserved bits must be 0")),
        (masked(TEXT, b"x", fin=False) + compressed(CONTINUATION, b"x"), (1002, "reserved bits must be 0")),
        (compressed(CONTINUATION, HELLO), (1002, "reserved bits must be 0")),
        (compressed(PING, b""), (1002, "reserved bits must be 0")),
        (compressed(PONG, b"x"), (1002, "reserved bits must be 0")),
        (compressed(CLOSE, b"\x03\xe8"), (1002, "reserved bits must be 0")),
        (compressed(TEXT, HELLO, fin=False) + compressed(TEXT, HELLO), (1002, "expected a continuation frame")),
        (bytes((0xE1,)) + masked(TEXT, HELLO)[1:], (1002, "reserved bits must be 0")),  # RSV2
        (bytes((0xD1,)) + masked(TEXT, HELLO)[1:], (1002, "reserved bits must be 0")),  # RSV3
    ],
)
async def test_compressed_frames_that_break_the_rules_end_the_connection_with_their_code(
    tmp_path: Path, data: bytes, closed: tuple[int, str] | None
) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, asking()) as client:
        await client.told("status")
        client.send(data)
        if closed is None:
            client.send(masked(PING, b"x"))
            assert await client.frame() == (PONG, b"x")
            return
        assert await client.closed() == closed
        client.writer.close()
        await until(lambda: rig.value("whaled_connections_closed_total", code=str(closed[0])) == 1)
        assert rig.value("whaled_errors_total", component="gateway") == 0


async def test_the_wire_has_a_bound_too(tmp_path: Path) -> None:
    data = b"\x00\x00\x00\xff\xff" * 3_300  # empty blocks: they inflate to nothing
    parts = compressed(TEXT, data[:8_000], fin=False) + masked(CONTINUATION, data[8_000:])
    async with running_gateway(tmp_path) as rig, raw(rig, asking()) as client:
        await client.told("status")
        client.send(parts)
        assert (await client.closed())[0] == 1009


async def test_a_binary_message_is_not_inflated(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, asking()) as client:
        await client.told("status")
        client.send(compressed(BINARY, deflated(b"x" * 4 * MIB)) + compressed(BINARY, b"\x07"))
        for _ in range(2):
            assert (await client.told("error"))["code"] == "invalid_message"


async def test_messages_are_charged_by_their_inflated_and_their_sent_size(tmp_path: Path) -> None:
    long = json.dumps({"type": "ping", "x": "x" * 15_000}).encode()
    blocks = b"\x00\x00\x00\xff\xff" * 3_000 + deflated(b'{"type":"ping"}')
    for payload in (deflated(long), blocks):
        async with running_gateway(tmp_path, messages_per_second=0.001) as rig, raw(rig, asking()) as client:
            await client.told("status")
            client.send(compressed(TEXT, payload) * 4)
            answers = [json.loads((await client.frame())[1])["type"] for _ in range(4)]
            assert answers == ["pong", "pong", "pong", "error"]  # a budget of 40 tokens, and 15 or 16 a message


async def test_a_flood_of_compressed_messages_is_closed_without_inflating_those_above_the_rate(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as rig, raw(rig, asking()) as client:
        await client.told("status")
        # If they were inflated, the connection would be closed 1009.
        client.send(command(type="ping") * 40 + compressed(TEXT, deflated(b"x" * 4 * MIB)) * 100)
        assert await client.closed() == (1008, "Rate limit exceeded")


async def test_a_compression_bomb_ends_an_unauthenticated_connection(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, authenticator=Tokens()) as rig, raw(rig, asking()) as client:
        client.send(compressed(TEXT, deflated(b"x" * 9 * MIB)))
        assert await client.closed() == (1009, "Message too big")
        async with raw(rig, asking()) as other:
            other.send(compressed(TEXT, deflated(b'{"type":"ping"}')))
            assert await other.closed() == (1008, "Authentication required")


# --- clients that refer to their earlier messages, although they were told not to -------------------------------------


class Kept:
    """A compressor that is kept over messages, as in Tornado 6.6 and Mojolicious, whatever the answer said."""

    def __init__(self, level: int = 6, wbits: int = -15) -> None:
        self._zlib = zlib.compressobj(level, zlib.DEFLATED, wbits, 8)

    def data(self, message: bytes) -> bytes:
        data = self._zlib.compress(message) + self._zlib.flush(zlib.Z_SYNC_FLUSH)
        assert data.endswith(TAIL)
        return data[: -len(TAIL)]

    def command(self, **message: object) -> bytes:
        return compressed(TEXT, self.data(json.dumps(message).encode()))


@pytest.mark.parametrize("level", [1, 6, 9])
@pytest.mark.parametrize("wbits", [-9, -12, -15])
async def test_a_client_that_keeps_its_compressor_is_understood(tmp_path: Path, level: int, wbits: int) -> None:
    kept = Kept(level, wbits)
    async with running_gateway(tmp_path, authenticator=Tokens(expires_at=4e9)) as rig, raw(rig, asking()) as client:
        client.send(kept.command(type="auth", token="good"))
        await client.told("welcome")
        exchanges = [f"exchange number {number}" for number in range(40)]
        client.send(kept.command(type="subscribe", filters={"exchanges": exchanges}))
        assert sorted((await client.told("subscribed"))["filters"]["exchanges"]) == sorted(exchanges)
        for number in range(30):
            client.send(kept.command(type="ping", id=number))
            assert (await client.told("pong"))["id"] == number


async def test_a_kept_compressor_goes_with_messages_that_are_not_compressed_and_with_fragments(tmp_path: Path) -> None:
    kept = Kept()
    async with running_gateway(tmp_path) as rig, raw(rig, asking()) as client:
        client.send(kept.command(type="ping", id=1) + masked(TEXT, b'{"type":"ping","id":2}'))
        data = kept.data(b'{"type": "ping", "id": 3}')
        client.send(compressed(TEXT, data[:4], fin=False) + masked(PING) + masked(CONTINUATION, data[4:]))
        client.send(kept.command(type="ping", id=4))
        assert [(await client.told("pong"))["id"] for _ in range(4)] == [1, 2, 3, 4]


def test_the_window_is_kept_until_a_client_keeps_the_agreement() -> None:
    kept, chance = Kept(9), random.Random(3)
    client, message = Inflater(), b""
    for _ in range(20):
        message = message[: len(message) // 2] + chance.randbytes(9_000)
        assert client.inflate(kept.data(message), MIB) == message
        assert len(client._before) <= MAX_WINDOW_BYTES
    assert len(client._before) == MAX_WINDOW_BYTES
    good = Inflater()
    for number in range(ALONE_MESSAGES - 1):
        good.inflate(deflated(b'{"type":"ping"}'), MIB)
        assert len(good._before) == 15 * (number + 1)
    for _ in range(3):
        good.inflate(deflated(b'{"type":"ping"}'), MIB)
        assert good._before == b""


def test_a_reference_to_skipped_data_is_refused_and_one_to_later_data_is_read() -> None:
    for keeps in (False, True):
        kept, client = Kept(9), Inflater()
        client.inflate(kept.data(NOISE[:100]), MIB)
        if keeps:
            client.inflate(kept.data(NOISE[:90]), MIB)
        kept.data(NOISE[100:200])
        client.skip()
        assert client.inflate(kept.data(NOISE[200:300]), MIB) == NOISE[200:300]
        assert client.inflate(kept.data(NOISE[210:290]), MIB) == NOISE[210:290]
        for lost in (NOISE[110:190], NOISE[10:90]):
            with pytest.raises(DeflateError):
                client.inflate(kept.data(lost), MIB)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["send", "skip", "reset"]), st.integers(0, 90), st.integers(0, 400))))
def test_every_message_is_read_as_it_was_sent_or_not_at_all(steps: list[tuple[str, int, int]]) -> None:
    kept, client, has_skipped = Kept(9), Inflater(), False
    for step, start, size in steps:
        message = NOISE[start : start + size]
        if step == "reset":
            kept = Kept(9)
        data = kept.data(message)
        if step == "skip":
            client.skip()
            has_skipped = True
            continue
        try:
            assert client.inflate(data, MIB) == message
        except DeflateError:
            assert has_skipped
            return


def test_the_bounds_hold_with_a_kept_compressor_too() -> None:
    kept, client = Kept(9), Inflater()
    client.inflate(kept.data(NOISE), 16_384)
    client.inflate(kept.data(NOISE), 16_384)
    with pytest.raises(InflatedTooBigError):
        client.inflate(kept.data(NOISE * 40), 16_384)


async def test_a_damaged_message_closes_a_client_with_a_kept_compressor_too(tmp_path: Path) -> None:
    kept = Kept()
    async with running_gateway(tmp_path) as rig, raw(rig, asking()) as client:
        client.send(kept.command(type="ping") + kept.command(type="ping") + compressed(TEXT, b"\x07" + GARBAGE))
        assert await client.closed() == (1007, "Compressed message is damaged")


async def test_a_reference_to_a_message_over_the_rate_is_closed_with_that_reason(tmp_path: Path) -> None:
    clock, kept = Clock(), Kept()
    limits: dict[str, Any] = {"messages_per_second": 10.0, "message_burst": 5}
    async with running_gateway(tmp_path, clock=clock, **limits) as rig, raw(rig, asking()) as client:
        client.send(b"".join(kept.command(type="ping", id=number) for number in range(6)))
        assert (await client.told("error"))["code"] == "rate_limited"
        clock.ahead_s = 5.0
        client.send(kept.command(type="subscribe", filters={"min_btc": 1}) + kept.command(type="ping", id=5))
        assert await client.closed() == (1008, "Rate limit exceeded")


async def test_a_client_that_keeps_the_agreement_goes_on_after_messages_over_the_rate(tmp_path: Path) -> None:
    clock = Clock()
    limits: dict[str, Any] = {"messages_per_second": 10.0, "message_burst": 5}
    async with running_gateway(tmp_path, clock=clock, **limits) as rig, raw(rig, asking()) as client:
        client.send(b"".join(command(type="ping", id=number) for number in range(6)))
        assert (await client.told("error"))["code"] == "rate_limited"
        clock.ahead_s = 5.0
        client.send(command(type="ping", id=7))
        assert (await client.told("pong"))["id"] == 7


async def test_a_closing_connection_remembers_nothing(tmp_path: Path) -> None:
    kept = Kept()
    async with running_gateway(tmp_path) as rig, raw(rig, asking()) as client:
        client.send(kept.command(type="ping"))
        await client.told("pong")
        (connection,) = rig.gateway.roster.all()
        assert connection._ws._incoming is not None
        client.send(masked(CLOSE, b"\x03\xe8"))
        assert (await client.closed())[0] == 1000
        assert connection._ws._incoming is None
