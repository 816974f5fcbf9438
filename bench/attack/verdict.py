"""The outcome of an attack, and its bounds."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

from bench.attack.victims import Arrival, Gathered
from bench.report import Row

MEMORY_LIMIT_MIB = 1024.0
IN_TIME_MS = 1000.0
# If the daemon waited for a core for more than this share of the time, the machine slowed it, and times prove little.
WAITED_PART = 0.05


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of an attack.

    Latency is within bounds if its ratio to that of a quiet daemon is, or if it is at most `p99_ms`; above `most_ms` it
    never is. Memory must be released within `calm_s`.
    """

    ratio: float = 2.0
    flood_ratio: float = 3.0
    p99_ms: float = 0.0
    most_ms: float = float("inf")
    memory_part: float = 0.10
    # The daemon returns free memory to the kernel once a minute.
    calm_s: float = 75.0
    newcomers_part: float = 1.0
    flood_newcomers_part: float = 1.0


STRICT = Bounds()
# For shared machines: values beyond these bounds are not noise. New clients have no bound in floods of connections,
# which fill the kernel's accept queue while the machine is slow.
GENEROUS = Bounds(
    ratio=10.0, flood_ratio=10.0, p99_ms=150.0, most_ms=1000.0, memory_part=0.6, calm_s=15.0, newcomers_part=0.8,
    flood_newcomers_part=0.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Used:
    """MiB or descriptors: before the attack, at most, and afterwards."""

    before: float
    peak: float
    after: float

    def text(self) -> str:
        """Return the text for the table."""
        return f"{self.before:.0f} {self.peak:.0f} {self.after:.0f}"


NOTHING = Used(0, 0, 0)


@dataclass
class Outcome:
    """The measurements of one attack."""

    name: str
    is_flood: bool = False
    quiet: Gathered = field(default_factory=Gathered)
    attacked: Gathered = field(default_factory=Gathered)
    after: Gathered = field(default_factory=Gathered)
    arrivals: list[Arrival] = field(default_factory=list)
    memory_mib: Used = NOTHING
    descriptors: Used = NOTHING
    log_bytes: int = 0
    is_alive: bool = False
    exit_status: int | None = None
    unsent: int = 0
    # Share of the time that the daemon's main thread waited for a core. It is large on a busy machine.
    waited_part: float = 0.0
    did: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Return p99 under attack divided by p99 before it; infinite if no alert arrived."""
        return self._ratio(self.attacked)

    @property
    def ratio_after(self) -> float:
        """Return the same ratio for the period after the attack."""
        return self._ratio(self.after)

    def _ratio(self, window: Gathered) -> float:
        if not window.received or not self.quiet.p99_ms:
            return float("inf")
        return window.p99_ms / self.quiet.p99_ms

    @property
    def doubled(self) -> int:
        """Return the number of duplicates, which the victims count from their start."""
        return max(each.doubled for each in (self.quiet, self.attacked, self.after))

    @property
    def lost(self) -> int:
        """Return the number of deliveries that never arrived."""
        return self.quiet.lost + self.attacked.lost + self.after.lost

    @property
    def cut(self) -> int:
        """Return the number of victims whose connection ended."""
        return max(each.cut for each in (self.quiet, self.attacked, self.after))

    def newcomers(self, *, in_header: bool) -> tuple[int, int, float, float]:
        """Return (accepted within a second, all, median ms, worst ms); infinity for a client never accepted."""
        took = [
            each.after_ms if each.after_ms is not None else float("inf")
            for each in self.arrivals
            if each.in_header == in_header
        ]
        if not took:
            return 0, 0, 0.0, 0.0
        return sum(each <= IN_TIME_MS for each in took), len(took), median(took), max(took)

    def broken(self, bounds: Bounds) -> list[str]:
        """Return a description of each bound that does not hold, with the measured and the allowed value."""
        found = list(self.complaints)
        if not self.is_alive:
            found.append("it ended")
        elif self.exit_status != 0:
            found.append(f"stopped with {self.exit_status}")
        return [*found, *self._deliveries(bounds), *self._memory(bounds), *self._arrivals(bounds)]

    def _deliveries(self, bounds: Bounds) -> Iterator[str]:
        allowed = bounds.flood_ratio if self.is_flood else bounds.ratio
        for window, ratio, when in ((self.attacked, self.ratio, ""), (self.after, self.ratio_after, " afterwards")):
            is_fast = bool(window.received) and window.p99_ms <= bounds.p99_ms
            if window.p99_ms > bounds.most_ms:
                yield f"p99 {window.p99_ms:.0f} ms{when}, bound {bounds.most_ms:.0f} ms"
            elif ratio > allowed and not is_fast:
                or_fast = f" or {bounds.p99_ms:.0f} ms" if bounds.p99_ms else ""
                yield f"p99 {_above(ratio, allowed)} times{when}, bound {allowed:g} times{or_fast}"
        counts = {"lost": self.lost, "doubled": self.doubled, "cut off": self.cut, "not sent": self.unsent}
        yield from (f"{count} {what}" for what, count in counts.items() if count)

    def _memory(self, bounds: Bounds) -> Iterator[str]:
        memory = self.memory_mib
        if memory.after > memory.before * (1 + bounds.memory_part):
            yield f"memory {memory.after / memory.before - 1:+.0%}, bound {bounds.memory_part:+.0%}"
        if memory.peak > MEMORY_LIMIT_MIB:
            yield f"{memory.peak:.0f} MiB, bound {MEMORY_LIMIT_MIB:.0f} MiB"

    def _arrivals(self, bounds: Bounds) -> Iterator[str]:
        for in_header, way in ((True, "header"), (False, "message")):
            in_time, count, _, _ = self.newcomers(in_header=in_header)
            part = bounds.flood_newcomers_part if self.is_flood else bounds.newcomers_part
            if in_time < count * part:
                yield f"{count - in_time} of {count} newcomers late ({way}), bound {math.floor(count * (1 - part))}"

    def row(self, bounds: Bounds) -> Row:
        """Return the row of the table."""
        newcomers = [self.newcomers(in_header=each) for each in (True, False)]
        return (
            self.name,
            f"{self.quiet.p50_ms:.1f} {self.quiet.p99_ms:.1f}",
            f"{self.attacked.p50_ms:.1f} {self.attacked.p99_ms:.1f} {self.attacked.max_ms:.1f}",
            f"{self.ratio:.1f} {self.ratio_after:.1f}",
            f"{self.lost} {self.doubled} {self.cut}",
            *(f"{each[0]}/{each[1]} {each[2]:.0f} {each[3]:.0f}" for each in newcomers),
            self.memory_mib.text(),
            self.descriptors.text(),
            f"{self.log_bytes / 1024:.0f}",
            f"{100 * self.waited_part:.0f}",
            "; ".join(self.broken(bounds)) or "holds",
        )


def _above(ratio: float, allowed: float) -> str:
    """Format a ratio above the allowed one, with enough digits to show that it is."""
    return f"{ratio:.1f}" if float(f"{ratio:.1f}") > allowed else f"{ratio:.3f}"


def total(outcomes: Sequence[Outcome], bounds: Bounds) -> str:
    """Return the last line: how many attacks missed a bound, and how many the machine slowed."""
    missed = sum(bool(outcome.broken(bounds)) for outcome in outcomes)
    waited = sum(outcome.waited_part > WAITED_PART for outcome in outcomes)
    line = f"{missed} of {len(outcomes)} missed a bound"
    if not waited:
        return line
    where = "1 row" if waited == 1 else f"{waited} rows"
    return f"{line}; in {where} the daemon waited for a core more than {100 * WAITED_PART:g} %: times there say little"


HEADER: Row = (
    "attack",
    "quiet p50 p99 ms",
    "attacked p50 p99 max ms",
    "ratio, afterwards",
    "lost, doubled, cut off",
    "newcomers in 1 s (header), median, worst ms",
    "the same (message)",
    "MiB before, peak, after",
    "descriptors",
    "log KiB",
    "waited for a core, %",
    "verdict",
)


def rows(outcomes: Sequence[Outcome], bounds: Bounds) -> list[Row]:
    """Return a row per attack."""
    return [outcome.row(bounds) for outcome in outcomes]
