"""`whaled simulate`: a mempool backend in miniature, for the demo and for trying whaled out."""

import argparse
import asyncio
import signal
import time
from typing import Any, Protocol

from whaled.errors import ExitStatus
from whaled.simulator.owners import BOOKS
from whaled.simulator.scripts import Network
from whaled.simulator.server import Simulator
from whaled.simulator.settings import DEMO, Mode, SimulatorSettings

DEFAULTS = DEMO


class Subparsers(Protocol):
    """What argparse's `add_subparsers()` returns, as far as it is needed here."""

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        """Begin a command."""
        ...


def register(subparsers: Subparsers) -> None:
    """Add the command; its `run` takes the parsed arguments and returns the exit status."""
    parser = subparsers.add_parser(
        "simulate",
        help="run a simulated mempool backend",
        description="Run a simulated mempool backend: the stream on any WebSocket path, REST under /api/v1, electrs' "
        "under /api in esplora mode, and the ground truth, faults and whales on demand under /simulator. Nothing in "
        "it is real. Ends on SIGINT or SIGTERM.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default=DEFAULTS.host, help="address to listen on")
    add("--port", type=int, default=DEFAULTS.port, help="port to listen on, 0 for any free one")
    # Not the same world at every start: its whales would be old news to a whaled that keeps its log.
    add(
        "--seed",
        type=int,
        default=argparse.SUPPRESS,
        help="the same seed makes the same world; another one if left out",
    )
    add("--network", type=Network, choices=list(Network), default=DEFAULTS.network, help="decides address prefixes")
    add("--rate", type=float, default=DEFAULTS.rate, help="transactions per second")
    add("--whale-share", type=float, default=DEFAULTS.whale_share, help="part of them that is a whale, 0 to 1")
    add("--owner-share", type=float, default=DEFAULTS.owner_share, help="how often an invented owner pays or is paid")
    add("--backlog", type=int, default=DEFAULTS.backlog, help="transactions always waiting: a fee market; 0 for none")
    add("--whale-btc", type=float, default=DEFAULTS.whale_btc, help="least outputs of a whale, in BTC")
    add("--events", type=float, default=DEFAULTS.events, help="how often transactions are replaced and blocks surprise")
    add("--block-interval", type=float, default=DEFAULTS.block_interval, help="mean seconds between blocks, 0 for none")
    add("--poll-interval", type=float, default=DEFAULTS.poll_interval, help="seconds between polls of the backend")
    add("--btc-usd", type=int, default=DEFAULTS.btc_usd, help="first price (mainnet only)")
    add("--database", action="store_true", help="behave like a backend with a database: it notices reorganisations")
    add("--mode", type=Mode, choices=list(Mode), default=DEFAULTS.mode, help="what the backend reads")
    add("--projected-blocks", type=int, default=DEFAULTS.projected_blocks, help="blocks the backend projects, 1 to 8")
    add("--fault-every", type=float, default=DEFAULTS.fault_every, help="seconds between random faults, 0 for none")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until asked to stop. ConfigError: a value out of range; ListenError: the port cannot be had."""
    names = SimulatorSettings.__struct_fields__
    chosen = {name: value for name, value in vars(arguments).items() if name in names}
    asyncio.run(_serve(SimulatorSettings(**{"seed": time.time_ns(), **chosen})))
    return ExitStatus.STOPPED


async def _serve(settings: SimulatorSettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Simulator(settings) as simulator:
        print(
            f"simulated mempool backend: {simulator.url} rest {simulator.rest_url} control {simulator.control_url}\n"
            f"its owners, all invented, for detection.address_book: {BOOKS[settings.network]}",
            flush=True,
        )
        await stop.wait()
