"""The settings, ports and background tasks that the parts of the backfill share."""

import time
from collections.abc import Callable, Sequence

import structlog

from whaled.backfill.background import Background
from whaled.backfill.meters import BackfillMeter
from whaled.backfill.ports import Committer, Log
from whaled.config.sections import BackfillSettings
from whaled.model import Draft, Kind
from whaled.sampling import Sampler
from whaled.source import Backend, BackendError
from whaled.whales import lifecycle
from whaled.whales.lifecycle import History, Origin

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Whales or transactions that are looked up in the event log together and then requested, as far as the turn allows.
BATCH = 100
# At most one log line per failure reason in this time.
LOG_INTERVAL_S = 600.0


class Context:
    """Settings, backend, event log, committer, meter, clocks and background tasks of one backfill."""

    def __init__(
        self,
        *,
        settings: BackfillSettings,
        backend: Backend,
        event_log: Log,
        committer: Committer,
        meter: BackfillMeter,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.event_log = event_log
        self.committer = committer
        self.meter = meter
        self.clock = clock
        self.monotonic = monotonic
        self.background = Background()
        # Whales committed as replaced because of a response, which may be older than their return to the mempool.
        self.replaced: dict[str, None] = {}
        self._sampler = Sampler(LOG_INTERVAL_S, monotonic)

    def report_failure(self, error: BackendError, again_s: float) -> None:
        """Count a failed request that is repeated in `again_s` seconds.

        It is logged at most once per `LOG_INTERVAL_S` and reason.
        """
        self.meter.failed(error.reason)
        suppressed = self._sampler.admit(error.reason)
        if suppressed is not None:
            logger.warning(
                "backfill_request_failed",
                reason=str(error.reason),
                problem=str(error),
                again_s=again_s,
                suppressed=suppressed,
            )

    async def commit_valid(
        self, drafts: Sequence[Draft], still_holds: Callable[[str, History], bool] | None = None
    ) -> bool:
        """Commit, all at once, those drafts that may follow the events in the log and are not in it yet.

        `still_holds(txid, history)` returns whether the finding behind a draft is still true: the stream may have
        reported something newer since the request was sent. It is called between two messages of the stream. Returns
        whether anything was committed.
        """
        if not drafts:
            return False

        async def decide() -> list[Draft]:
            histories = await self.event_log.histories({draft.whale.alert.transaction_id for draft in drafts})
            holding = [
                draft
                for draft in drafts
                if still_holds is None or still_holds(txid := draft.whale.alert.transaction_id, histories.get(txid, []))
            ]
            return lifecycle.valid(holding, histories, Origin.POLLED)

        events = await self.committer.commit(decide)
        self.replaced.update((each.whale.alert.transaction_id, None) for each in events if each.kind is Kind.REPLACED)
        return bool(events)
