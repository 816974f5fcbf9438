"""`whaled simulate`: run a simulated mempool backend, for trying whaled out and for tests."""

import argparse
import asyncio
import signal
import time

from whaled.cli.options import Subparsers
from whaled.errors import ExitStatus
from whaled.simulator.owners import BOOKS
from whaled.simulator.scripts import Network
from whaled.simulator.server import Simulator
from whaled.simulator.settings import DEMO, Mode, SimulatorSettings

DEFAULTS = DEMO


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "simulate",
        help="run a simulated mempool backend",
        description="Run a simulated mempool backend: the stream on any WebSocket path, REST under /api/v1, electrs's "
        "REST under /api in esplora mode, and under /simulator the ground truth, faults and whales on demand. All its "
        "data is invented. Ends on SIGINT or SIGTERM.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default=DEFAULTS.host, help="address to listen on")
    add("--port", type=int, default=DEFAULTS.port, help="port to listen on, 0 for any free one")
    # A fixed default would repeat the same world, whose whales a whaled with an existing log already knows.
    add(
        "--seed",
        type=int,
        default=argparse.SUPPRESS,
        help="the same seed makes the same world; random if omitted",
    )
    add("--network", type=Network, choices=list(Network), default=DEFAULTS.network, help="determines address prefixes")
    add("--rate", type=float, default=DEFAULTS.rate, help="transactions per second")
    add("--whale-share", type=float, default=DEFAULTS.whale_share, help="share of whales among them, 0 to 1")
    add(
        "--owner-share",
        type=float,
        default=DEFAULTS.owner_share,
        help="probability that a payer or payee is an invented owner",
    )
    add("--backlog", type=int, default=DEFAULTS.backlog, help="transactions kept waiting for a fee market; 0 for none")
    add("--whale-btc", type=float, default=DEFAULTS.whale_btc, help="minimum total output of a whale, in BTC")
    add(
        "--events", type=float, default=DEFAULTS.events, help="scale of replacements and odd blocks: 1 is usual, 0 none"
    )
    add("--block-interval", type=float, default=DEFAULTS.block_interval, help="mean seconds between blocks, 0 for none")
    add("--poll-interval", type=float, default=DEFAULTS.poll_interval, help="seconds between polls of the backend")
    add("--btc-usd", type=int, default=DEFAULTS.btc_usd, help="initial price (mainnet only)")
    add("--database", action="store_true", help="behave like a backend with a database, which detects reorganisations")
    add("--mode", type=Mode, choices=list(Mode), default=DEFAULTS.mode, help="where the backend gets its data")
    add("--projected-blocks", type=int, default=DEFAULTS.projected_blocks, help="blocks the backend projects, 1 to 8")
    add("--fault-every", type=float, default=DEFAULTS.fault_every, help="seconds between random faults, 0 for none")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal. Raises ConfigError for a value out of range, ListenError if the port is not available."""
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
            f"address book of its invented owners, for detection.address_book: {BOOKS[settings.network]}",
            flush=True,
        )
        await stop.wait()
