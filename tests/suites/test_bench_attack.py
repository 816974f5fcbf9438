"""The attacks' own arithmetic: what they send, whom they come from, and that each bound can be missed."""

import asyncio
import ipaddress
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from bench import messages
from bench.attack.__main__ import choose, duration, expected_s, main, parser, summary
from bench.attack.assaults import Did, Order, Strangers
from bench.attack.catalogue import ATTACKS
from bench.attack.payloads import FRAMES, PAYLOADS, empty_blocks, frame, hello, large_filter, long_ping, request
from bench.attack.rig import port_of
from bench.attack.verdict import GENEROUS, STRICT, Outcome, Used, rows, total
from bench.attack.victims import Arrival, Client, Crowd, Gathered
from bench.attack.victims import Order as VictimsOrder
from kit.paths import ROOT
from whaled.gateway.deflate import inflate

QUIET = Gathered(5, 10, 12, 1000)
WELL = Outcome(
    "x",
    quiet=QUIET,
    attacked=replace(QUIET, p99_ms=20),
    after=QUIET,
    arrivals=[Arrival(True, 5), Arrival(False, 1000)],
    memory_mib=Used(60, 90, 66),
    descriptors=Used(220, 900, 220),
    is_alive=True,
    exit_status=0,
)


# --- bounds ---


def test_an_attack_within_bounds_breaks_none() -> None:
    assert WELL.ratio == 2
    assert WELL.broken(STRICT) == []
    assert rows([WELL], STRICT)[0][-1] == "holds"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attacked": replace(QUIET, p99_ms=20.1)}, "p99 2.010 times, bound 2 times"),
        ({"attacked": replace(QUIET, p99_ms=30.2), "is_flood": True}, "p99 3.020 times, bound 3 times"),
        ({"attacked": Gathered()}, "p99 inf times, bound 2 times"),
        ({"after": replace(QUIET, p99_ms=21)}, "p99 2.1 times afterwards, bound 2 times"),
        ({"after": replace(QUIET, lost=3)}, "3 lost"),
        ({"attacked": replace(QUIET, doubled=2)}, "2 doubled"),
        ({"attacked": replace(QUIET, cut=1)}, "1 cut off"),
        ({"unsent": 4}, "4 not sent"),
        ({"memory_mib": Used(60, 90, 67)}, "memory +12%, bound +10%"),
        ({"memory_mib": Used(60, 1025, 60)}, "1025 MiB, bound 1024 MiB"),
        ({"arrivals": [Arrival(True, 1001), Arrival(True, 3)]}, "1 of 2 newcomers late (header), bound 0"),
        ({"arrivals": [Arrival(False, None)]}, "1 of 1 newcomers late (message), bound 0"),
        ({"is_alive": False}, "it ended"),
        ({"exit_status": -9}, "stopped with -9"),
        ({"complaints": ["no attack: x"]}, "no attack: x"),
    ],
)
def test_each_bound_can_be_missed_by_itself(change: dict[str, object], words: str) -> None:
    assert replace(WELL, **change).broken(STRICT) == [words]  # type: ignore[arg-type]


def test_generous_bounds_ignore_a_ratio_only_if_the_latency_is_small() -> None:
    assert replace(WELL, attacked=replace(QUIET, p99_ms=149)).broken(GENEROUS) == []
    words = "p99 15.1 times, bound 10 times or 150 ms"
    assert replace(WELL, attacked=replace(QUIET, p99_ms=151)).broken(GENEROUS) == [words]


def test_generous_bounds_have_a_limit() -> None:
    slow = replace(QUIET, p99_ms=400)
    assert replace(WELL, quiet=slow, attacked=replace(slow, p99_ms=999)).broken(GENEROUS) == []
    words = "p99 1001 ms, bound 1000 ms"
    assert replace(WELL, quiet=slow, attacked=replace(slow, p99_ms=1001)).broken(GENEROUS) == [words]


def test_the_last_line_counts_what_missed_and_what_the_machine_slowed() -> None:
    missed = replace(WELL, unsent=1)
    assert total([WELL, WELL], STRICT) == "0 of 2 missed a bound"
    assert total([missed, replace(WELL, waited_part=0.06)], STRICT) == (
        "1 of 2 missed a bound; in 1 row the daemon waited for a core more than 5 %: times there say little"
    )
    slowed = replace(missed, waited_part=0.3)
    assert "; in 2 rows the daemon" in total([slowed, slowed, replace(WELL, waited_part=0.05)], STRICT)


def test_the_expected_duration_is_that_of_the_documentation() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    for arguments, minutes in (([], 25), (["--quick"], 5)):
        options = parser().parse_args(arguments)
        spent_s = expected_s(options, choose([], is_quick=options.quick))
        assert abs(spent_s / 60 - minutes) < 1.5
        assert f", {minutes} minutes" in text
    assert (duration(119), duration(300)) == ("119 s", "5 minutes")


def test_a_new_client_that_was_never_admitted_counts_as_the_worst() -> None:
    arrivals = [Arrival(True, 1.0), Arrival(True, None), Arrival(True, 3.0), Arrival(False, 2.0)]
    assert replace(WELL, arrivals=arrivals).newcomers(in_header=True) == (2, 3, 3.0, float("inf"))


# --- the catalogue ---


def test_names_of_attacks_are_unique_and_each_sends_something_known() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
    for attack in ATTACKS:
        for order in attack.orders:
            assert order.who in {"strangers", "clients"}
            assert order.payload in PAYLOADS
            assert {order.opening, order.message} <= FRAMES.keys()
            assert order.finish in {"at once", "reply", "refused", "held"}


def test_attackers_of_one_attack_share_no_address_with_each_other_or_the_victims() -> None:
    for attack in ATTACKS:
        sources = [order.source(number) for order in attack.orders for number in (0, 1)]
        assert not {source for source in sources if source.startswith(("127.0.", "127.200."))}


def test_sources_are_the_requested_number_of_loopback_addresses() -> None:
    order = Order("strangers", addresses=600, index=3)
    sources = {order.source(number) for number in range(2_000)}
    assert len(sources) == 600
    assert {ipaddress.ip_address(each).is_loopback for each in sources} == {True}
    assert len({each.rpartition(".")[0] for each in sources}) == 3
    assert {replace(order, addresses=1).source(number) for number in range(9)} == {"127.4.0.1"}


def test_attacks_are_chosen_by_name_or_by_part_of_it() -> None:
    assert [attack.name for attack in choose(["replays"], is_quick=False)] == ["replays"]
    assert len(choose(["replays,", "nobody"], is_quick=False)) > 3
    assert 10 <= len(choose([], is_quick=True)) <= 16 < len(choose([], is_quick=False))
    with pytest.raises(SystemExit, match="no attack matches 'replais'"):
        choose(["replais"], is_quick=False)


def test_names_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [attack.name for attack in ATTACKS]


# --- bytes ---


@pytest.mark.parametrize("size", [0, 125, 126, 65_535, 65_536])
def test_frames_have_the_shortest_length_and_a_mask_of_zeros(size: int) -> None:
    made = frame(b"x" * size)
    head = 2 if size < 126 else 4 if size < 1 << 16 else 10
    assert made[0] == 0x81
    assert made[1] & 0x80
    assert made[head : head + 4] == bytes(4)
    assert made[head + 4 :] == b"x" * size


def test_large_filters_fit_into_a_frame_and_are_valid() -> None:
    payload = large_filter(3)[8:]
    assert len(payload) <= 16 * 1024
    assert len(json.loads(payload)["filters"]["addresses"]) == 900


def test_compressed_messages_are_valid_and_of_the_maximum_length() -> None:
    assert 15_950 < len(empty_blocks(16_000)) <= 16_000
    assert inflate(empty_blocks(16_000), 0) == b""
    assert len(long_ping(16_000)) < 100
    assert json.loads(inflate(long_ping(16_000), 16_000))["type"] == "ping"
    assert b"\r\nSec-WebSocket-Extensions: permessage-deflate\r\n" in request(deflates=True)
    assert b"Extensions" not in request()


def test_a_hello_is_a_tls_record() -> None:
    assert hello()[:3] == b"\x16\x03\x01"


def test_a_token_goes_into_the_header() -> None:
    assert b"\r\nAuthorization: Bearer abc\r\n" in request("abc")
    assert b"Authorization" not in request()


def test_the_port_of_the_metrics_is_found() -> None:
    assert port_of("http://127.0.0.1:9108/metrics") == 9108


def test_a_summary_gives_the_rate_and_leaves_out_zeros() -> None:
    assert summary("x", Did(opened=10, closed=3, seconds=2.0)) == "x: 10 opened (5/s), 3 closed"


# --- victims ---


def alert(number: int) -> bytes:
    return messages.frame(number, "e" * 16, "")


async def test_victims_find_whales_in_fragmented_frames_and_count_duplicates() -> None:
    crowd = Crowd(VictimsOrder(0, []))
    client = Client(b"", crowd._record)
    crowd.clients.append(client)
    stream = b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + alert(7) + alert(8) + alert(8)
    for cut in range(0, len(stream), 11):
        client.data_received(stream[cut : cut + 11])
    found = await crowd.gather(7, 3, 0.0)
    assert (found.received, found.lost, found.doubled, found.cut) == (2, 1, 1, 0)
    assert 0 <= found.p50_ms <= found.p99_ms <= found.max_ms


async def test_a_victim_that_is_refused_is_cut_and_never_welcome() -> None:
    client = Client(b"")
    client.data_received(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
    assert client.is_cut
    with pytest.raises(ConnectionResetError):
        await client.welcome


# --- attackers ---


@contextmanager
def listener(reply: bytes) -> Iterator[int]:
    """A server that answers each connection at once and hangs up."""
    server = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve() -> None:
        while True:
            try:
                made, _ = server.accept()
            except OSError:
                return
            with made, suppress(OSError):  # attackers leave whenever they like
                made.sendall(reply)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


@pytest.mark.slow
def test_disconnected_attackers_reconnect_within_their_rate() -> None:
    with listener(b"HTTP/1.1 503 Service Unavailable\r\n\r\n") as port:
        attacker = Strangers(Order("strangers", port, 0.5, count=4, payload="handshake", rate=100), [])
        attacker.run()
    assert 4 < attacker.did.opened <= 50
    assert attacker.did.closed > 0
    assert attacker.did.refused > 0
    assert attacker.did.failed == 0


def test_attackers_disconnect_at_the_first_reply() -> None:
    with listener(b"HTTP/1.1 101 Switching Protocols\r\n\r\n") as port:
        attacker = Strangers(Order("strangers", port, 0.2, count=2, payload="handshake", finish="reply"), [])
        attacker.run()
    assert attacker.did.replies > 2


@pytest.mark.slow
@pytest.mark.long
async def test_a_small_attack_runs_from_end_to_end(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.attack", "--quick", "--only", "half a request, again and again", "--victims", "5",
        "--seconds", "1", "--quiet-seconds", "1", "--json", str(file), "--directory", str(tmp_path),
        stdout=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode in (0, 1)
    assert b"[1/1] half a request, again and again: " in out
    (found,) = json.loads(file.read_text())
    assert found["is_alive"]
    assert found["exit_status"] == 0
    assert found["quiet"]["received"] >= 5 * 10
    assert (found["attacked"]["lost"], found["attacked"]["doubled"]) == (0, 0)
    assert found["arrivals"]
