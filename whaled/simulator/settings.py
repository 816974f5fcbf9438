"""What can be chosen about the simulated world and its backend."""

from enum import StrEnum

from msgspec import Struct

from whaled.errors import ConfigError, Fault
from whaled.simulator.scripts import Network

# A backend's own limit: a block is 4 million weight units. The simulator may fill smaller blocks, see `block_weight`.
MAX_BLOCK_WEIGHT = 4_000_000
MAX_PROJECTED_BLOCKS = 8
# Mean weight of a transaction as the default mix of kinds makes them (measured over 20,000).
MEAN_TX_WEIGHT = 1_200


class Mode(StrEnum):
    """What the backend reads (`MEMPOOL.BACKEND`): its node, its node and an Electrum server, or electrs."""

    NONE = "none"
    ELECTRUM = "electrum"
    ESPLORA = "esplora"


class SimulatorSettings(Struct, frozen=True, kw_only=True):
    """Settings of a `Simulator`. The defaults are a whale every few seconds and a block a minute; `DEMO` adds owners of
    an address book and a fee market.

    `rate` is transactions per second, `whale_share` the part of them that is a whale (at least `whale_btc` in
    outputs). `events` scales how often replacements, children and surprises in blocks happen; 0 turns them off.
    `block_interval` is the mean in seconds, 0 means no block unless asked for. `block_weight` None fits blocks to the
    load, so that fees move. `poll_interval` is how often the backend looks at its node.

    `manual` runs no timers: every `poll()` moves the clock by `poll_interval`. `start` is the first moment in Unix
    seconds, None is now. `early_subscriber` holds back the first poll until a client has subscribed, so that it gets
    what a backend sends while it starts. `mode` is what the backend reads; in `esplora` the routes of electrs
    are there too, under `/api`. `projected_blocks` is how many blocks it projects (`MEMPOOL_BLOCKS_AMOUNT`).

    Bounds on memory: `keep_blocks` blocks with their transactions, `mempool_limit` transactions (the cheapest are
    evicted beyond), and `truth_limit` whales, and as many other transactions, in the ground truth. With `mempool_floor`
    blocks leave as many transactions waiting, the cheapest: a mempool of one size.

    `owner_share` is how often a payer, and how often a payee, is one of the invented owners (`owners.OWNERS`).
    `backlog` makes a fee market: so many transactions wait from the start on and after every block, none of them a
    whale at the start, and whales pay what is recommended for the hurry they are in.
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
            "projected_blocks": 1 <= self.projected_blocks <= MAX_PROJECTED_BLOCKS,
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
        """Weight a block can hold."""
        if self.block_weight is not None:
            return self.block_weight
        load = self.rate * self.block_interval * MEAN_TX_WEIGHT
        # A little more than the load: the mempool then grows and empties by chance, as it does outside.
        return int(min(MAX_BLOCK_WEIGHT, max(60_000, load * 1.15)))

    @property
    def usd(self) -> int | None:
        """The price the backend starts with; test networks have none."""
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

# What `whaled run --simulate` and `whaled simulate` show: flows, and a fee market in which urgency differs.
DEMO = SimulatorSettings(owner_share=0.6, backlog=700)
