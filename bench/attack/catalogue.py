"""The attacks. Each consists of attacking processes and the setup of the attacked daemon."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.attack.assaults import Order
from bench.attack.rig import Surroundings

PLAIN = Surroundings()


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack. `orders` are the tasks of its processes; their duration is set when it runs."""

    name: str
    orders: Sequence[Order]
    around: Surroundings = PLAIN
    # A flood of connections: the kernel's work for them also uses the daemon's core.
    is_flood: bool = False
    # Duration with --quick; 0: not part of it.
    quick_s: float = 0.0
    seconds: float = 8.0


WSS = Surroundings(tls=True)
LOG = Surroundings(history=True)


def times(count: int, order: Order) -> list[Order]:
    """Repeat an order for several processes, each with separate addresses."""
    return [replace(order, index=index) for index in range(count)]


def strangers(count: int, payload: str = "", **more: object) -> Order:
    """Return an order for connections without a session."""
    return replace(Order("strangers", count=count, payload=payload), **more)  # type: ignore[arg-type]


def clients(count: int, message: str = "", **more: object) -> Order:
    """Return an order for authenticated attackers."""
    return replace(Order("clients", count=count, message=message), **more)  # type: ignore[arg-type]


MANY = 10_000
_SILENT = times(2, strangers(2_500, addresses=MANY))
_HANDSHAKES = times(4, strangers(3_000, "handshake", addresses=MANY))
_HALF = times(2, strangers(3_000, "half a request", addresses=MANY))
_REPLAYS = [clients(500, opening="whole log", every_s=0.02)]
_FILTERS = [clients(200, "large filter", every_s=0.1)]
_TOKENS = times(2, strangers(64, "wrong token", finish="refused", addresses=MANY))
_METRICS = [strangers(500, "50 scrapes", reads=False, receive_buffer=1024, target="metrics", addresses=1)]

ATTACKS: tuple[Attack, ...] = (
    # --- connections ---
    Attack("nobody", [strangers(1, rate=1)]),
    Attack("silent, ws, many addresses", _SILENT),
    Attack("silent, ws, one address", [strangers(5_000, addresses=1)]),
    Attack("silent, wss, many addresses", times(3, strangers(2_000, addresses=MANY)), WSS, quick_s=5),
    Attack("silent, wss, one address", [strangers(5_000, addresses=1)], WSS),
    Attack("half a request, again and again", _HALF, is_flood=True, quick_s=5),
    Attack("half a request of 15 KiB", times(2, strangers(2_000, "half a request of 15 KiB", addresses=MANY)),
           is_flood=True),
    Attack("slow headers", times(2, strangers(1_000, "half a request", drip="X: y\r\n", drip_s=0.5, addresses=MANY))),
    Attack("200 connects a second", [strangers(10_000, "handshake", rate=200, addresses=MANY)], is_flood=True),
    Attack("1,000 connects a second", [strangers(10_000, "handshake", rate=1_000, addresses=MANY)], is_flood=True),
    Attack("connects as fast as they go", _HANDSHAKES, is_flood=True, quick_s=5),
    Attack("connects as fast as they go, 5 addresses", [
        replace(order, addresses=5) for order in _HANDSHAKES], is_flood=True),
    Attack("connects without a request, at once closed", times(3, strangers(1, addresses=MANY, finish="at once")),
           is_flood=True),
    Attack("connects with a request, at once closed", times(3, strangers(
        1, "handshake", addresses=MANY, finish="at once")), is_flood=True),
    Attack("bursts of 4,000", [strangers(4_000, burst_s=1.0, addresses=MANY)], is_flood=True, quick_s=5),
    Attack("bursts of 4,000, wss", [strangers(4_000, burst_s=1.0, addresses=MANY)], WSS, is_flood=True),
    Attack("handshakes and away, no token", times(2, strangers(64, "handshake", finish="reply", addresses=MANY)),
           is_flood=True),
    Attack("handshakes and away, with token", times(2, strangers(
        64, "handshake with token", finish="reply", addresses=MANY)), is_flood=True),
    Attack("TLS hellos", times(2, strangers(500, "hello", finish="reply", addresses=MANY)), WSS, is_flood=True,
           quick_s=5),
    Attack("TLS hellos, held", times(2, strangers(2_000, "hello", addresses=MANY)), WSS, is_flood=True),
    Attack("rubbish, wss", times(2, strangers(64, "rubbish", addresses=MANY)), WSS, is_flood=True),
    # --- frames ---
    Attack("pings without a token, 20 connections a second", [strangers(500, "80 KiB of pings", rate=20)],
           quick_s=5),
    Attack("pings without a token, 300 a second", times(3, strangers(500, "80 KiB of pings", rate=100))),
    Attack("pings after a close", times(2, strangers(500, "close, then 80 KiB of pings", rate=50))),
    Attack("pings by clients", [clients(200, "pings", every_s=0)], quick_s=5),
    Attack("pings by clients, wss", [clients(200, "pings", every_s=0, tls=True)], WSS),
    Attack("fragments", [clients(200, "fragments", every_s=0.1)]),
    Attack("compressed messages of 16 KiB", [clients(200, "compressed", every_s=0.1)], quick_s=5),
    Attack("compressed messages of 16 KiB without a token", times(2, strangers(
        500, "compressed, 16 KiB of empty blocks", rate=50, addresses=MANY))),
    Attack("wrong tokens, many addresses", _TOKENS, is_flood=True),
    Attack("wrong tokens, one address", [strangers(64, "wrong token", finish="refused", addresses=1)], is_flood=True),
    Attack("wrong tokens in messages", times(2, strangers(
        64, "wrong token in a message", finish="refused", addresses=MANY)),
           is_flood=True),
    Attack("a wrong token a second beside valid ones", [strangers(
        4, "wrong token", finish="refused", rate=1, addresses=1)],
           Surroundings(newcomers_beside=True), seconds=20),
    Attack("wrong tokens beside valid ones", [strangers(
        16, "wrong token", finish="refused", rate=50, addresses=1)],
           Surroundings(newcomers_beside=True), quick_s=5),
    Attack("wrong tokens on open connections", [clients(50, "wrong token", every_s=0.11)]),
    Attack("changing filters", _FILTERS, quick_s=5),
    Attack("changing filters, one client id", [replace(_FILTERS[0], one_client=True)]),
    Attack("9,000 filters", times(4, clients(2_250, opening="own filter", every_s=0.2)), seconds=20),
    Attack("slow readers", [clients(500, "stats", reads=False, receive_buffer=1024)]),
    # --- the log ---
    Attack("replays", _REPLAYS, LOG, quick_s=5),
    Attack("replays, not read", [clients(500, opening="whole log", reads=False, every_s=1)], LOG),
    Attack("replays, nothing matches", [
        clients(500, opening="whole log, nothing matches", every_s=0.02)], LOG),
    Attack("replays, nothing matches, one client", [
        clients(1, opening="whole log, nothing matches", every_s=0.02)], LOG, quick_s=5),
    Attack("replays, again and again", [clients(200, "whole log", every_s=0.12)], LOG),
    # --- metrics ---
    Attack("metrics, hammered", [strangers(16, "scrape", finish="reply", target="metrics", addresses=1)]),
    Attack("metrics, 50 requests unread", _METRICS, quick_s=5),
    Attack("metrics, idle connections", times(2, strangers(3_000, target="metrics", addresses=MANY))),
    # --- resources ---
    Attack("descriptors, through clients", times(2, strangers(900, "handshake", addresses=MANY)),
           Surroundings(descriptors=1024), seconds=12),
    Attack("descriptors, through metrics", [strangers(1_300, target="metrics", addresses=MANY)],
           Surroundings(descriptors=1024), seconds=12, quick_s=10),
    Attack("log not read", _TOKENS, Surroundings(log_pipe=True), is_flood=True, quick_s=5),
    Attack("systemd does not read", [strangers(1, rate=1)], Surroundings(deaf_systemd=True)),
    # --- mixtures ---
    Attack("mixture: silent, filters, replays", [*_SILENT, *_FILTERS, *_REPLAYS], LOG),
    Attack("mixture: connects, half requests, wrong tokens", [*_HANDSHAKES[:2], *_HALF, *_TOKENS], is_flood=True),
    Attack("mixture: pings, metrics, slow readers", [
        clients(200, "pings", every_s=0), *_METRICS, clients(300, "stats", reads=False, receive_buffer=1024)]),
    Attack("mixture: TLS hellos, silent, replays", [
        *times(2, strangers(500, "hello", finish="reply", addresses=MANY)),
        strangers(2_000, addresses=MANY, first_address=20_000),
        clients(200, opening="whole log", every_s=0.02, tls=True)],
        Surroundings(tls=True, history=True), is_flood=True),
)  # fmt: skip
