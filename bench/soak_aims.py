"""The bounds of the soak, and the arithmetic on its samples."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.report import Aim
from faults.verdict import Verdict

# Memory is flat after the warm-up: caches and Python's pools are full after a third of an hour. In a shorter soak they
# still fill, so it can only show that there is no large leak.
WARM_UP_S, FLAT_S = 1200.0, 2400.0
FLAT_MIB, SHORT_MIB = 1.0, 8.0
# Python's blocks tell a leak from memory that the allocators keep. There are about 300,000 of them, and 2 % are half a
# mebibyte.
BLOCKS_PERCENT, SHORT_BLOCKS_PERCENT = 2.0, 6.0
# A restarted backend sends its mempool again, in frames of tens of megabytes that are freed within seconds. So memory
# is the median of a minute.
MINUTE_S = 60.0
# Allowed change of the mempool's mean size from the second third to the last.
MEMPOOL_STEADY_PERCENT = 15.0
# The simulated backend and the clients share a process with the faults, so medians differ by tens of milliseconds.
DRIFT_NOISE_MS = 100.0
# In a short soak, one stall of a shared machine, or one whale that waited for its inputs while REST failed, moves the
# median of a third. Larger errors are still detected.
SHORT_S, SHORT_DRIFT_NOISE_MS = 1800.0, 500.0
# Depends on the outages: 2 to 4 % with a fault every 10 s. With more than this the comparison proves little.
UNKNOWABLE_PERCENT = 8.0
LIVE = ("whaled_frame_to_sent_seconds", "whaled_event_loop_lag_seconds")


@dataclass
class Sample:
    """A sample of the daemon's process."""

    at: float
    rss_mib: float
    descriptors: int
    mempool: int = 0
    blocks: int = 0


@dataclass
class Course:
    """The observations during the soak."""

    samples: list[Sample] = field(default_factory=list)
    thirds: list[dict[str, float]] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    visits: int = 0
    cuts: int = 0


# Seconds from a whale's first appearance in the backend to its receipt, in the first third and in the last.
Received = tuple[list[float], list[float]]


def rss_mib(sample: Sample) -> float:
    """Return the resident memory of a sample."""
    return sample.rss_mib


def by_minute(samples: Sequence[Sample], value: Callable[[Sample], float] = rss_mib) -> list[tuple[float, float]]:
    """Return the middle of each minute that has samples, and the median of a value in it."""
    minutes: dict[int, list[float]] = {}
    for sample in samples:
        minutes.setdefault(int((sample.at - samples[0].at) // MINUTE_S), []).append(value(sample))
    return [((minute + 0.5) * MINUTE_S, statistics.median(each)) for minute, each in minutes.items()]


def grown(samples: Sequence[Sample], value: Callable[[Sample], float] = rss_mib) -> float:
    """Return the growth of a value from the first sample to the last, by least squares over the minutes."""
    found = by_minute(samples, value)
    if len(found) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*found, strict=True)).slope * (samples[-1].at - samples[0].at)


def blocks_grown_percent(samples: Sequence[Sample]) -> float:
    """Return the growth of Python's blocks."""
    return 100 * grown(samples, lambda sample: sample.blocks) / max(1, samples[0].blocks)


def minutes_of(samples: Sequence[Sample]) -> float:
    """Return the minutes from the first sample to the last."""
    return (samples[-1].at - samples[0].at) / 60


def is_long(samples: Sequence[Sample]) -> bool:
    """Return whether the soak was long enough to tell whether memory is flat."""
    return samples[-1].at - samples[0].at >= WARM_UP_S + FLAT_S - 2 * MINUTE_S


def warm(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples for the growth of memory: the last 40 minutes of a long soak, two thirds of a short one."""
    if is_long(samples):
        return [sample for sample in samples if sample.at >= samples[-1].at - FLAT_S]
    return list(samples[len(samples) // 3 :])


def mean_ms(name: str, before: dict[str, float], after: dict[str, float]) -> float:
    """Return the mean of a histogram between two scrapes."""
    count = after[f"{name}_count"] - before[f"{name}_count"]
    return 1000 * (after[f"{name}_sum"] - before[f"{name}_sum"]) / count if count else 0.0


def aims(course: Course, verdict: Verdict, received: Received, left: Sample) -> list[Aim]:
    """Return the bounds with their measured values. `left` is a sample from after all clients have disconnected."""
    samples = course.samples
    drift = statistics.median(received[1]) - statistics.median(received[0])
    noise_ms = SHORT_DRIFT_NOISE_MS if samples[-1].at - samples[0].at < SHORT_S else DRIFT_NOISE_MS
    thirds = course.thirds
    lag = [mean_ms(LIVE[1], *pair) for pair in ((thirds[0], thirds[1]), (thirds[2], thirds[3]))]
    unknowable = 100 * verdict.unknowable / max(1, verdict.whales)
    return [
        Aim("differences from the truth", len(verdict.problems), 0),
        Aim("whales nobody could know", unknowable, UNKNOWABLE_PERCENT, " %"),
        Aim("whales compared", verdict.whales, 20, more_is_better=True),
        *memory_aims(samples),
        Aim("memory at most", max(s.rss_mib for s in samples), 200, " MiB"),
        Aim("descriptors left, beyond the first", left.descriptors - samples[0].descriptors, 6),
        Aim("descriptors at most", max(s.descriptors for s in samples), 100),
        Aim("loop lag, mean of the last third", lag[1], max(20.0, 2 * lag[0] + 5), " ms"),
        Aim("shown to received, drift of the median", 1000 * drift, noise_ms, " ms"),
    ]


def memory_aims(samples: list[Sample]) -> list[Aim]:
    """Return the bounds on memory: flat in the last 40 minutes of a long soak, little growth in a short one."""
    warmed = warm(samples)
    mib, blocks = grown(warmed), blocks_grown_percent(warmed)
    if not is_long(samples):
        return [
            Aim("memory grown after the first third", mib, SHORT_MIB, " MiB"),
            Aim("Python's blocks grown after the first third", blocks, SHORT_BLOCKS_PERCENT, " %"),
        ]
    _, second, last = (statistics.mean(s.mempool for s in part) for part in parts(samples, len(samples) // 3))
    return [
        Aim("memory grown in the last 40 minutes", mib, FLAT_MIB, " MiB"),
        Aim("Python's blocks grown in the last 40 minutes", blocks, BLOCKS_PERCENT, " %"),
        Aim("mempool, last third against the second", 100 * abs(last / second - 1), MEMPOOL_STEADY_PERCENT, " %"),
    ]


def parts(samples: list[Sample], third: int) -> tuple[list[Sample], ...]:
    """Return the thirds of the samples."""
    return samples[:third], samples[third : 2 * third], samples[2 * third :]
