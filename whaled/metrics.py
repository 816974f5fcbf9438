"""The meters of all rooms on one registry, and its rendering. docs/metrics.md explains each metric."""

import re

from prometheus_client import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from whaled.admin.meters import AdminMeter
from whaled.auth.meters import AccessMeter, ApiKeyMeter, CredentialMeter
from whaled.auth.oidc.meters import IssuerMeter
from whaled.backfill.meters import BackfillMeter
from whaled.canary import CanaryMeter
from whaled.config.meters import ConfigMeter
from whaled.detection_meters import DetectionMeter
from whaled.eventlog.meters import EventLogMeter
from whaled.gateway.meters import GatewayMeter
from whaled.ops import meters as process
from whaled.ops.memory_watch import MemoryMeter
from whaled.ops.starts import StartMeter
from whaled.ops.watchdog import LoopMeter
from whaled.registry import Registry
from whaled.sources.mempool_space.http import RestFailure, RestMeter
from whaled.sources.mempool_space.link_state import FeedMeter
from whaled.sources.mempool_space.survey import SurveyMeter
from whaled.web.exposition import Format
from whaled.web.meters import HttpMeter


class Metrics:
    """One meter of each kind.

    All exist from the start, also those of parts that the configuration disables: a scrape always has the same series.
    """

    def __init__(self) -> None:
        self.registry = registry = Registry()
        process.register(registry)
        self.rest = RestMeter(registry)
        self.feed = FeedMeter(registry)
        self.survey = SurveyMeter(registry)
        self.detection = DetectionMeter(registry)
        self.eventlog = EventLogMeter(registry)
        self.gateway = GatewayMeter(registry)
        self.config = ConfigMeter(registry)
        self.starts = StartMeter(registry)
        self.canary = CanaryMeter(registry)
        self.loop = LoopMeter(registry)
        self.memory = MemoryMeter(registry)
        self.credentials = CredentialMeter(registry)
        self.issuers = IssuerMeter(registry)
        self.access = AccessMeter(registry)
        self.api_keys = ApiKeyMeter(registry)
        self.backfill = BackfillMeter(registry, RestFailure)
        self.http = HttpMeter(registry)
        self.admin = AdminMeter(registry)

    def render(self, chosen: Format = Format.PROMETHEUS) -> bytes:
        """Return all metrics in one of Prometheus' text formats."""
        if chosen is Format.OPENMETRICS:
            rendered: bytes = openmetrics.generate_latest(self.registry.collectors)  # type: ignore[no-untyped-call]  # the library's own function has no annotations
            # A histogram with negative buckets has no sum, and OpenMetrics allows a count only together with a sum.
            for name in self.registry.signed_histograms:
                rendered = re.sub(rb"^%s_count .*\n" % name.encode(), b"", rendered, flags=re.MULTILINE)
            return rendered
        return generate_latest(self.registry.collectors)
