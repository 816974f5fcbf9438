"""The registry of metrics. All children of a metric exist at 0 from the start, so that rate() sees the first event."""

from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

LATENCY_BUCKETS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class Component(StrEnum):
    """The component that met an error (a metric label)."""

    UPSTREAM = "upstream"
    REST = "rest"
    EVENTLOG = "eventlog"
    GATEWAY = "gateway"
    CONFIG = "config"


class _Read(Collector):
    """A counter whose value is read from a function."""

    def __init__(self, name: str, text: str, value: Callable[[], float]) -> None:
        self._name = name
        self._text = text
        self._value = value

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self._name, self._text, value=self._value())


class Registry:
    """The factory of metrics, which registers them with the prefix `whaled_`. Labels come from closed sets only."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's own function has no annotations
        self.collectors = CollectorRegistry()
        self.signed_histograms: list[str] = []
        self.errors = self.counter("errors", "Errors, by the component that met them.", "component", Component)

    def counter(self, name: str, text: str, label: str | None = None, values: Iterable[str] = ()) -> Counter:
        """Register a counter, with a child for each of `values`. `_total` is appended to its name."""
        counter = Counter(f"whaled_{name}", text, [label] if label else [], registry=self.collectors)
        for value in values:
            counter.labels(value)
        return counter

    def gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        """Register a gauge."""
        return Gauge(f"whaled_{name}", text, labels, registry=self.collectors)

    def counter_of(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Register a counter whose value is read at each rendering."""
        self.collectors.register(_Read(f"whaled_{name}", text, value))

    def histogram(self, name: str, text: str, buckets: tuple[float, ...] = LATENCY_BUCKETS) -> Histogram:
        """Register a histogram, by default with buckets for latencies."""
        if buckets[0] < 0:
            self.signed_histograms.append(f"whaled_{name}")
        return Histogram(f"whaled_{name}", text, registry=self.collectors, buckets=buckets)
