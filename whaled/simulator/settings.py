"""The settings of the simulated world and its backend."""

from enum import StrEnum

from msgspec import Struct

from whaled.errors import ConfigError, Fault
from whaled.model import PROJECTED_BLOCKS
from whaled.simulator.scripts import Network

# The consensus limit on a block's weight. The simulator may fill smaller blocks, see `block_weight`.
MAX_BLOCK_WEIGHT = 4_000_000
# Mean weight of a transaction with the default mix of kinds (measured over 20,000).
MEAN_TX_WEIGHT = 1_200


class Mode(StrEnum):
    """The backend's data source (`MEMPOOL.BACKEND`): its node, its node and an Electrum server, or electrs."""

    NONE = "none"
    ELECTRUM = "electrum"
    ESPLORA = "esplora"


class SimulatorSettings(Struct, frozen=True, kw_only=True):
    """The settings of a `Simulator`.

    By default there is a whale every few seconds and a block per minute. `DEMO` adds the invented owners and a fee
    market.

    `rate` is in transactions per second; `whale_share` is the share of whales among them (outputs of at least
    `whale_btc`). `events` scales the frequency of replacements, children and surprises in blocks; 0 turns them off.
    `block_interval` is the mean in seconds; with 0, blocks are mined only on request. `block_weight` None sizes blocks
    to the load, so that fees vary. `poll_interval` is the time between the backend's polls of its node.

    `manual` runs no timers: every `poll()` advances the clock by `poll_interval`. `start` is the initial time in Unix
    seconds, None means now. `early_subscriber` delays the first poll until a client has subscribed, so that the client
    gets what a backend sends while it starts. `mode` is the backend's data source; in `esplora` mode the routes of
    electrs are served too, under `/api`. `projected_blocks` is the number of projected blocks
    (`MEMPOOL_BLOCKS_AMOUNT`).

    Limits on memory: `keep_blocks` blocks with their transactions, `mempool_limit` transactions (beyond it the cheapest
    are evicted), and in the ground truth `truth_limit` whales and as many other transactions. With `mempool_floor`,
    blocks leave that many of the cheapest transactions, so that the mempool keeps its size.

    `owner_share` is the probability that a payer is one of the invented owners (`owners.OWNERS`), and the same for a
    payee. `backlog` creates a fee market: that many transactions, initially no whales, are waiting from the start and
    after every block, and whales pay the recommended fee for a random urgency.
    """

    host: str = "127.0.0.1"
    port: int = 8999
    seed: int = 1
    network: Network = Network.MAINNET
    rate: float = 3.0
    whale_share: float = 0.08
    whale_btc: float = 100.0
    events: float = 1.0
    block_interval: float = 60.0
    block_weight: int | None = None
    start_height: int = 900_000
    poll_interval: float = 2.0
    fetch_latency: float = 0.02
    database: bool = False
    mode: Mode = Mode.NONE
    projected_blocks: int = 8
    manual: bool = False
    early_subscriber: bool = False
    start: float | None = None
    btc_usd: int | None = 65_000
    price_interval: float = 3600.0
    fault_every: float = 0.0
    keep_blocks: int = 40
    mempool_limit: int = 30_000
    mempool_floor: int = 0
    owner_share: float = 0.0
    backlog: int = 0
    truth_limit: int = 50_000

    def __post_init__(self) -> None:
        allowed = {
            "port": 0 <= self.port <= 65535,
            "rate": 0 <= self.rate <= 10_000,
            "whale_share": 0 <= self.whale_share <= 1,
            "whale_btc": 0.01 <= self.whale_btc <= 10_000,
            "events": 0 <= self.events <= 10,
            "block_interval": self.block_interval == 0 or self.block_interval >= 0.1,
            "block_weight": self.block_weight is None or 20_000 <= self.block_weight <= MAX_BLOCK_WEIGHT,
            "start_height": 100 <= self.start_height <= 10_000_000,
            "poll_interval": 0.01 <= self.poll_interval <= 600,
            "fetch_latency": 0 <= self.fetch_latency <= 10,
            "projected_blocks": 1 <= self.projected_blocks <= PROJECTED_BLOCKS,
            "price_interval": self.price_interval >= 1,
            "fault_every": self.fault_every == 0 or self.fault_every >= 1,
            "keep_blocks": 17 <= self.keep_blocks <= 10_000,
            "mempool_limit": self.mempool_limit >= 100,
            "mempool_floor": 0 <= self.mempool_floor <= self.mempool_limit // 2,
            "owner_share": 0 <= self.owner_share <= 1,
            "backlog": 0 <= self.backlog <= self.mempool_limit // 2,
            "truth_limit": self.truth_limit >= 100,
        }
        faults = tuple(
            Fault(where=name, problem=f"{getattr(self, name)!r} is out of range; {RANGES[name]}", source="simulator")
            for name, fits in allowed.items()
            if not fits
        )
        if faults:
            raise ConfigError(faults)

    @property
    def weight_of_block(self) -> int:
        """Return the weight limit of a block."""
        if self.block_weight is not None:
            return self.block_weight
        load = self.rate * self.block_interval * MEAN_TX_WEIGHT
        # Slightly more than the load: the mempool then grows and empties by chance, as on a real network.
        return int(min(MAX_BLOCK_WEIGHT, max(60_000, load * 1.15)))

    @property
    def usd(self) -> int | None:
        """Return the initial price, None on regtest."""
        return self.btc_usd if self.network is Network.MAINNET else None


RANGES = {
    "port": "use 0 (any free port) to 65535",
    "rate": "use 0 to 10000 transactions per second",
    "whale_share": "use 0 to 1",
    "whale_btc": "use 0.01 to 10000 BTC",
    "events": "use 0 (none) to 10",
    "block_interval": "use 0 (none) or at least 0.1 s",
    "block_weight": "use 20000 to 4000000, or leave it out",
    "start_height": "use 100 to 10000000",
    "poll_interval": "use 0.01 to 600 s",
    "fetch_latency": "use 0 to 10 s",
    "projected_blocks": "use 1 to 8",
    "price_interval": "use at least 1 s",
    "fault_every": "use 0 (none) or at least 1 s",
    "keep_blocks": "use 17 to 10000: a backend looks at 16 blocks at once",
    "mempool_limit": "use at least 100",
    "mempool_floor": "use 0 to half of mempool_limit",
    "owner_share": "use 0 (none) to 1",
    "backlog": "use 0 (none) to half of mempool_limit",
    "truth_limit": "use at least 100",
}

# The settings of `whaled run --simulate` and `whaled simulate`: owners for flows, and a fee market for urgency.
DEMO = SimulatorSettings(owner_share=0.6, backlog=700)
