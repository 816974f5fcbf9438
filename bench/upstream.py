"""A backend whose whales contain their time of sending: the simulator, with additional frames in its stream.

The simulator provides everything else, so that the daemon sees a consistent backend.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from bench import decode, messages
from bench.programs import BrokenError
from whaled.simulator.server import Simulator
from whaled.simulator.settings import Mode, SimulatorSettings

# New transactions of the main network between two polls of a backend: 7 per second, 2 s.
TRANSACTIONS_PER_FRAME = 14
CONNECT_LIMIT_S = 30.0
_TXID = "0" * 64
_SPENT_TXID = "f" * 64
_SEQUENCE = 1_000_000_007


class Relay:
    """A proxy between the daemon and a simulator that adds deltas to the stream."""

    def __init__(self, simulator: Simulator) -> None:
        self.rest_url = simulator.rest_url
        self.url = ""
        self.subscribed = asyncio.Event()
        self._simulator = simulator
        self._daemon: ServerConnection | None = None
        self._sequence = 0
        self._parts = _template()

    async def send_whale(self, number: int) -> None:
        """Send the transactions of one poll. One is a whale, whose txid contains the number and the time of sending."""
        if self._daemon is None:
            raise BrokenError("the daemon is not connected to its backend")
        self._sequence += 1
        # Each whale spends a different output: two that spend the same one would replace each other.
        values = (str(self._sequence), messages.stamp(number), f"{number:064x}")
        parts = zip(self._parts, (*(value.encode() for value in values), b""), strict=True)
        await self._daemon.send(b"".join(each for pair in parts for each in pair), text=True)

    async def serve_daemon(self, connection: ServerConnection) -> None:
        """Forward in both directions until one side closes."""
        async with connect(self._simulator.url, proxy=None, compression=None, max_size=None) as backend:
            self._daemon = connection
            self._sequence = self._simulator.backend.sequence
            async with asyncio.TaskGroup() as tasks:
                stream = tasks.create_task(self._forward_stream(backend, connection))
                try:
                    async for message in connection:
                        await backend.send(message, text=True)
                        if b"track-mempool" in (message if isinstance(message, bytes) else message.encode()):
                            self.subscribed.set()
                except ConnectionClosed:
                    pass
                finally:
                    self._daemon = None
                    stream.cancel()

    @staticmethod
    async def _forward_stream(backend: ClientConnection, daemon: ServerConnection) -> None:
        try:
            async for message in backend:
                await daemon.send(message, text=True)
        except ConnectionClosed:
            pass


@asynccontextmanager
async def relaying() -> AsyncIterator[Relay]:
    """Run a relay to a simulator without events of its own."""
    settings = SimulatorSettings(port=0, manual=True, rate=0, block_interval=0, mode=Mode.ESPLORA)
    async with Simulator(settings) as simulator:
        relay = Relay(simulator)
        async with serve(relay.serve_daemon, "127.0.0.1", 0, compression=None, max_size=None) as server:
            relay.url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/api/v1/ws"
            yield relay


def main_network() -> Simulator:
    """Return a simulator as busy as a backend on the main network, without whales."""
    return Simulator(SimulatorSettings(port=0, rate=7, whale_share=0, block_interval=0, events=0))


def _template() -> tuple[bytes, ...]:
    """Return a delta of recorded transactions, split at the sequence, the whale's txid, and the txid it spends from."""
    recorded = decode.transactions()
    small = [each for each in recorded if decode.value_sat(each) < decode.THRESHOLD_SAT]
    whale = dict(next(each for each in recorded if _is_plain_whale(each)))
    # The inputs are known, as with a backend on electrs: whaled is measured, not a request to the backend.
    payer = {key: whale["vout"][0][key] for key in ("scriptpubkey", "scriptpubkey_address", "scriptpubkey_type")}
    prevout = {**payer, "value": decode.value_sat(whale) + whale["fee"]}
    whale |= {"txid": _TXID, "vin": [{**whale["vin"][0], "txid": _SPENT_TXID, "prevout": prevout}]}
    delta: dict[str, Any] = {
        "sequence": _SEQUENCE,
        "added": [*small[: TRANSACTIONS_PER_FRAME - 1], whale],
        "removed": [],
        "mined": [],
        "replaced": [],
    }
    rest, parts = msgspec.json.encode({decode.DELTA: delta}), []
    for mark in (str(_SEQUENCE), _TXID, _SPENT_TXID):
        before, _, rest = rest.partition(mark.encode())
        parts.append(before)
    return (*parts, rest)


def _is_plain_whale(transaction: dict[str, Any]) -> bool:
    return (
        decode.value_sat(transaction) >= decode.THRESHOLD_SAT
        and len(transaction["vin"]) == 1
        and len(transaction["vout"]) == 2
    )
