"""The survey of a backend when the link comes up: its version, its network, and which needed calls it answers.

The link is refused unless the backend's network is that of the event log: a log never holds events of two networks.
While REST does not respond, the network counts as known if the log was last checked against the same `upstream.url`.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec
import structlog
from msgspec import Struct, structs

from whaled.bookmarks import NETWORK, Keeper
from whaled.config.sections import UpstreamSettings
from whaled.model import Block
from whaled.registry import Registry
from whaled.sources.mempool_space.fields import UNREADABLE
from whaled.sources.mempool_space.identity import MINIMUM_VERSION, SIGNET, Network, is_too_old
from whaled.sources.mempool_space.link_errors import LinkLostError, LossReason
from whaled.sources.mempool_space.rest import Rest
from whaled.sources.mempool_space.routes import ESPLORA, candidates
from whaled.sources.mempool_space.shapes import BackendInfo
from whaled.urls import without_secrets

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Maximum time that the link waits for the survey, while frames queue. Probes without a response are repeated later.
CONNECT_WAIT_S = 5.0
# The first repetition is soon, because REST may come up a moment after the stream; the interval then doubles each time.
RECHECK_FIRST_S = 2.0
RECHECK_S = 60.0
HASH_DIGITS = 64
# Maximum length quoted of a backend's own version and mode.
QUOTED_CHARS = 40


class Capability(StrEnum):
    """Something that whaled needs a backend to provide (a metric label)."""

    STREAM = "stream"
    CHAIN = "chain"
    MEMPOOL = "mempool"
    PREVOUTS = "prevouts"
    NETWORK = "network"


# The capabilities without which whales are missed, each with the effect of its absence.
NEEDED = {
    Capability.STREAM: "the backend sends no transactions, and whales are found late, by REST",
    Capability.CHAIN: "blocks cannot be scanned and the outcome of whales is unknown",
    Capability.MEMPOOL: "the mempool from before the connect is not compared",
}


class SurveyMeter:
    """The metric of the backend's capabilities."""

    def __init__(self, registry: Registry) -> None:
        self._capability = registry.gauge(
            "upstream_capability", "1 if the backend has a capability, 0 if not.", ("capability",)
        )
        for capability in Capability:
            self._capability.labels(capability)

    def capability(self, capability: Capability, *, is_there: bool) -> None:
        """Set whether the backend has a capability."""
        self._capability.labels(capability).set(is_there)


class _Noted(Struct, frozen=True):
    """The network of the log, and the `upstream.url` against which it was last checked."""

    genesis: str
    url: str
    block_1: str | None = None

    @property
    def network(self) -> Network:
        return Network(self.genesis, self.block_1)


class Survey:
    """The findings about the backend; one instance for the life of the daemon.

    Without a backfill only the stream is needed. `on_network` is called with the backend's network each time that it is
    accepted.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        rest: Rest,
        event_log: Keeper,
        meter: SurveyMeter,
        *,
        is_backfilling: bool = True,
        on_network: Callable[[str], None] = lambda _: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._rest = rest
        self._log = event_log
        self._meter = meter
        self._needs = set(NEEDED) if is_backfilling else {Capability.STREAM}
        self._on_network = on_network
        self._monotonic = monotonic
        self._blocks: Sequence[Block] = ()
        self._version = ""
        self._has: dict[Capability, bool] = {}
        self._reported: frozenset[Capability] | None = None
        self._link_up = asyncio.Event()
        # The link reads this before each frame and ends if it is set.
        self.refusal: LinkLostError | None = None
        for capability in Capability:
            meter.capability(capability, is_there=False)

    @property
    def shortfall(self) -> str | None:
        """The missing capabilities with their effects and the remedy, as text; None if nothing is missing."""
        missing = [capability for capability in NEEDED if capability in self._needs and not self._has.get(capability)]
        if not missing:
            return None
        listed = "; ".join(f"{capability.value}: {NEEDED[capability]}" for capability in missing)
        if Capability.STREAM in missing:
            minimum = ".".join(map(str, MINIMUM_VERSION))
            listed += f" (version {self._version!r}, {minimum} or newer is needed: upgrade the backend)"
        if missing == [Capability.STREAM]:
            return listed
        if self._rest.routes.is_esplora and self._rest.routes.esplora is None:
            return f"{listed} (esplora mode: set upstream.esplora_url to where its electrs answers)"
        key = "upstream.esplora_url" if self._rest.routes.is_esplora else "upstream.rest_url"
        return f"{listed} (see {key})"

    async def connected(self, info: BackendInfo | None, blocks: Sequence[Block]) -> None:
        """Survey a backend that has answered the subscription. Raises LinkLostError to refuse it."""
        self.refusal = None
        self._version = info.version[:QUOTED_CHARS] if info is not None else ""
        self._note(Capability.STREAM, not is_too_old(self._version))
        self._blocks = blocks
        if info is not None:
            self._rest.routes.mode = info.backend
        try:
            async with asyncio.timeout(CONNECT_WAIT_S):
                await self._survey()
        except TimeoutError:
            await self._without_network()
        if self.refusal is not None:
            raise self.refusal
        self._report()
        self._link_up.set()

    async def run(self) -> None:
        """Repeat the survey while something is missing, until cancelled."""
        delay_s = RECHECK_S
        while True:
            try:
                async with asyncio.timeout(delay_s):
                    await self._link_up.wait()
            except TimeoutError:
                delay_s = min(delay_s * 2, RECHECK_S)
                await self._survey_again()
            else:
                self._link_up.clear()
                delay_s = RECHECK_FIRST_S

    async def _survey_again(self) -> None:
        if self._reported and self.refusal is None:
            await self._survey()
            self._report()

    async def _survey(self) -> None:
        if self._rest.routes.mode == ESPLORA:
            await self._find_electrs()
        async with asyncio.TaskGroup() as group:
            network_task = group.create_task(self._network())
            chain = group.create_task(self._provides_chain())
            mempool = group.create_task(self._provides_mempool())
            prevouts = group.create_task(self._probe("prevouts", b"[]"))
        network = network_task.result()
        self._note(Capability.NETWORK, network is not None)
        self._note(Capability.CHAIN, chain.result())
        self._note(Capability.MEMPOOL, mempool.result())
        self._note(Capability.PREVOUTS, prevouts.result() == b"[]")
        if network is None:
            await self._without_network()
        else:
            await self._compare(network)

    # --- the network ---

    async def _network(self) -> Network | None:
        genesis = await self._block_hash(0) or await self._first_block()
        if genesis is None:
            return None
        return Network(genesis, await self._block_hash(1) if genesis == SIGNET else None)

    async def _first_block(self) -> str | None:
        """Return the hash of the genesis block, by a call that the backend itself answers in every mode."""
        try:
            found = msgspec.json.decode(await self._probe("blocks/0") or b"", type=list[_First])
        except UNREADABLE:
            return None
        return _hash(found[0].id.encode()) if found and found[0].height == 0 else None

    async def _compare(self, network: Network) -> None:
        if network.is_liquid:
            self.refusal = self._refused(
                LossReason.WRONG_NETWORK,
                f"the backend is on {network}, whose amounts are hidden; whaled reads Bitcoin networks (upstream.url)",
            )
            return
        noted = await self._noted()
        if noted is not None and not noted.network.same_as(network):
            self.refusal = self._refused(
                LossReason.WRONG_NETWORK,
                f"the backend is on {network}, and the event log holds {noted.network}: set upstream.url to a backend "
                f"on {noted.network}, or eventlog.path to another file for {network}",
            )
            return
        block_1 = network.block_1 or (None if noted is None else noted.block_1)
        new = _Noted(network.genesis, without_secrets(self._settings.url), block_1)
        if new != noted:
            await self._log.keep(NETWORK, structs.asdict(new))
        if noted is None:
            logger.info("network_recorded", network=str(network), genesis=network.genesis)
        self._on_network(str(network))

    async def _without_network(self) -> None:
        noted = await self._noted()
        if noted is not None and noted.url != without_secrets(self._settings.url):
            self.refusal = self._refused(
                LossReason.WRONG_NETWORK,
                f"the backend's network cannot be determined by REST, and the event log ({noted.network}) was "
                f"filled from {noted.url}: make {self._rest.shown_base} respond (upstream.rest_url), "
                "or set upstream.url back",
            )

    async def _noted(self) -> _Noted | None:
        held = await self._log.recall(NETWORK)
        try:
            return None if held is None else msgspec.convert(held, _Noted)
        except msgspec.ValidationError:
            logger.warning("network_record_unreadable", note=held)
            return None

    def _refused(self, reason: LossReason, detail: str) -> LinkLostError:
        # Only an operator can change this, so attempts are rare.
        return LinkLostError(reason, detail, wait_s=self._settings.reconnect_max)

    # --- capabilities ---

    async def _find_electrs(self) -> None:
        routes = self._rest.routes
        known = routes.esplora
        for base in dict.fromkeys([*([known] if known else []), *candidates(self._settings)]):
            if await self._is_electrs(base):
                routes.esplora = base
                return
        # A configured electrs is kept, because it may come back; a discovered one is searched for again.
        routes.esplora = known if known in candidates(self._settings)[:1] and self._settings.esplora_url else None

    async def _is_electrs(self, base: str) -> bool:
        """Return whether blocks named by the stream are in the chain of this electrs.

        On loopback there may be one electrs for each network.
        """
        named = self._named()
        if not named:
            return _hash(await self._rest.probe(f"{base}block-height/0")) is not None
        for height, block_hash in named:
            if _hash(await self._rest.probe(f"{base}block-height/{height}")) == block_hash:
                return True
        return False

    async def _provides_chain(self) -> bool:
        named = self._named()
        return await self._block_hash(named[0][0] if named else 0) is not None

    async def _provides_mempool(self) -> bool:
        """Return whether the mempool call is answered. The count is tried first: the list of txids may have 20 MB."""
        if _is_mempool(await self._probe("mempool")):
            return True
        url = self._rest.routes.url("mempool/txids")
        return url is not None and (await self._rest.probe(url, limit_bytes=1)) == b"["

    def _named(self) -> list[tuple[int, str]]:
        """Return height and hash of the oldest block of the stream and of its parent.

        Without a database the backend may name an oldest block that is on a dead branch.
        """
        if not self._blocks:
            return []
        oldest = min(self._blocks, key=lambda block: block.height)
        found = [(oldest.height, oldest.hash)]
        if oldest.previous_hash is not None and oldest.height > 0:
            found.append((oldest.height - 1, oldest.previous_hash))
        return found

    async def _block_hash(self, height: int) -> str | None:
        return _hash(await self._probe(f"block-height/{height}"))

    async def _probe(self, path: str, body: bytes | None = None) -> bytes | None:
        url = self._rest.routes.url(path)
        return None if url is None else await self._rest.probe(url, body)

    def _note(self, capability: Capability, is_there: bool) -> None:
        self._has[capability] = is_there
        self._meter.capability(capability, is_there=is_there)

    def _report(self) -> None:
        missing = frozenset(capability for capability in Capability if not self._has.get(capability))
        if missing == self._reported:
            return
        routes = self._rest.routes
        fields = {
            "mode": routes.mode[:QUOTED_CHARS],
            "rest": self._rest.shown_base,
            "esplora": without_secrets(routes.esplora) if routes.is_esplora and routes.esplora else None,
        }
        if missing:
            logger.warning(
                "upstream_capabilities_missing",
                missing=sorted(capability.value for capability in missing),
                effect=self.shortfall,
                **fields,
            )
        elif self._reported or routes.is_esplora:
            logger.info("upstream_capabilities_complete", **fields)
        self._reported = missing


class _Mempool(Struct):
    count: int


class _First(Struct):
    id: str
    height: int


def _is_mempool(raw: bytes | None) -> bool:
    """Return whether a body is the count of a mempool: a web page may be the response to every path."""
    try:
        return msgspec.json.decode(raw or b"", type=_Mempool).count >= 0
    except UNREADABLE:
        return False


def _hash(raw: bytes | None) -> str | None:
    text = raw[: HASH_DIGITS + 2].decode("latin-1").strip() if raw is not None else ""
    return text if len(text) == HASH_DIGITS and set(text) <= set("0123456789abcdef") else None
