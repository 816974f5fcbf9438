"""Fan-out: the server's cost of a delivery, compared with a program that only sends and with websockets.broadcast().

The servers run at the same time, each with its own load client and connections, and publish in turns, so that other
work on the machine affects all of them alike. Every delivery is checked: exactly once and in order.
"""

import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import messages
from bench.programs import BrokenError, Program, compile_c, resident_kib, running
from bench.report import Aim, Section, percentile
from bench.servers import EPOCH

OPEN_LIMIT_S = 120.0
COMPRESSED = "whaled, compressed"
# A delivery counts as lost this long after the end of publishing.
LATE_S = 20.0
# Memory per client is measured from the first few clients on, which excludes one-time allocations.
FIRST_CLIENTS = 50


@dataclass(frozen=True, slots=True)
class Plan:
    """The amount of work: `rounds` turns of `messages` messages for each server.

    `with_tasks` adds a server with a queue and a task per client. It is off by default because that server cannot keep
    up with 5000 clients, and keeps a core busy.
    """

    clients: int
    rounds: int
    messages: int
    rate: float = 10.0
    warm_up: int = 10
    with_tasks: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a server. CPU is per delivery in microseconds, latency is publish to receipt in milliseconds."""

    user_us: float
    system_us: float
    p50_ms: float
    p99_ms: float
    last_ms: tuple[float, ...]  # per message, until the last client
    frame_bytes: float  # per delivery

    @property
    def cpu_us(self) -> float:
        """Return the sum of user and system time."""
        return self.user_us + self.system_us


@dataclass
class Rig:
    """A server, its load client, and the results."""

    title: str
    server: Program
    load: Program
    number: int = 1
    memory_kib: float = 0.0
    handshakes_per_s: float = 0.0
    turns: list[Turn] = field(default_factory=list)

    def typical(self, of: str) -> float:
        """Return the median of an attribute over the turns."""
        return statistics.median(float(getattr(turn, of)) for turn in self.turns)


async def measure(plan: Plan, directory: Path) -> Section:
    """Measure CPU, latency and memory per client. Raises BrokenError if a message is lost or duplicated."""
    async with servers(directory, with_tasks=plan.with_tasks) as rigs:
        for rig in rigs:
            await connect(rig, plan.clients)
            await publish(rig, plan.clients, plan.warm_up, plan.rate)
        for _ in range(plan.rounds):
            for rig in rigs:
                rig.turns.append(await publish(rig, plan.clients, plan.messages, plan.rate))
    return section(plan, rigs)


@asynccontextmanager
async def servers(directory: Path, *, with_tasks: bool) -> AsyncIterator[Sequence[Rig]]:
    """Run the servers, each with a load client."""
    commands = {
        "whaled": (sys.executable, "-m", "bench.servers", "gateway"),
        COMPRESSED: (sys.executable, "-m", "bench.servers", "gateway"),
        "websockets.broadcast": (sys.executable, "-m", "bench.servers", "broadcast"),
    }
    if with_tasks:
        commands["queue and task per client"] = (sys.executable, "-m", "bench.servers", "tasks")
    async with AsyncExitStack() as stack:
        rigs = [await stack.enter_async_context(limit(directory))]
        for title, command in commands.items():
            deflates = title == COMPRESSED
            rigs.append(await stack.enter_async_context(rig_of(title, directory, *command, deflates=deflates)))
        yield rigs


def limit(directory: Path) -> AbstractAsyncContextManager[Rig]:
    """Run the program that only sends."""
    frame = directory / "frame"
    frame.write_bytes(messages.frame(0, EPOCH, messages.padding(EPOCH)))
    return rig_of("C limit", directory, compile_c("limit", directory), frame)


@asynccontextmanager
async def rig_of(title: str, directory: Path, *command: str | Path, deflates: bool = False) -> AsyncIterator[Rig]:
    """Run a server and its load client, which offers compression if `deflates`."""
    load = compile_c("load", directory)
    async with running(title, *command) as server:
        port = (await server.answer())["port"]
        async with running("load", load, str(port), *(["deflate"] if deflates else [])) as client:
            yield Rig(title, server, client)


async def connect(rig: Rig, clients: int) -> None:
    """Open the connections, and measure memory per client and handshakes per second."""
    few = min(FIRST_CLIENTS, clients // 2)
    await opened(rig.load, few, few)
    before_kib = resident_kib(rig.server.pid)
    answer = await opened(rig.load, clients - few, clients)
    rig.memory_kib = (resident_kib(rig.server.pid) - before_kib) / (clients - few)
    rig.handshakes_per_s = (clients - few) / answer["seconds"]


async def opened(load: Program, more: int, in_all: int) -> dict[str, Any]:
    """Open more connections. Raises BrokenError unless all of them are open then."""
    answer = await load.ask(f"open {more}", OPEN_LIMIT_S)
    if answer["open"] != in_all or answer["lost"]:
        raise BrokenError(f"{in_all} connections wanted, {answer['open']} open, {answer['lost']} refused or lost")
    return answer


async def publish(rig: Rig, clients: int, count: int, rate: float) -> Turn:
    """Run a turn: `count` messages to every client."""
    first, rig.number = rig.number, rig.number + count
    seconds = count / rate
    await rig.load.ask(f"expect {count} {first} {(seconds + LATE_S) * 1000:g}")
    before = await rig.server.ask("usage")
    if before["clients"] != clients:
        raise BrokenError(f"{rig.title} has {before['clients']} clients instead of {clients}")
    await rig.server.ask(f"publish {count} {first} {rate:g}", seconds + LATE_S)
    received = await rig.load.answer(seconds + 2 * LATE_S)
    after = await rig.server.ask("usage")
    check_deliveries(rig.title, received, clients * count)
    return Turn(
        user_us=(after["user_us"] - before["user_us"]) / received["delivered"],
        system_us=(after["system_us"] - before["system_us"]) / received["delivered"],
        p50_ms=received["p50_us"] / 1000,
        p99_ms=received["p99_us"] / 1000,
        last_ms=tuple(each / 1000 for each in received["last_us"]),
        frame_bytes=received["bytes"] / received["delivered"],
    )


def check_deliveries(title: str, received: dict[str, Any], wanted: int) -> None:
    """Raise BrokenError unless every client received every message once and in order."""
    wrong = {key: received[key] for key in ("duplicates", "gaps", "strays", "lost") if received[key]}
    if received["delivered"] != wanted or received["wanted"] != wanted or wrong:
        raise BrokenError(f"{title}: {received['delivered']} of {wanted} deliveries, {wrong or 'the rest is missing'}")


def section(plan: Plan, rigs: Sequence[Rig]) -> Section:
    """Return the table and the aims. A ratio is the median of the ratios of the single turns."""
    c_limit, whaled, compressed, broadcast = rigs[:4]
    delivered = len(rigs) * plan.clients * (plan.rounds * plan.messages + plan.warm_up)
    rows = [
        (
            rig.title,
            f"{rig.typical('cpu_us'):.2f}",
            f"{rig.typical('user_us'):.2f}",
            f"{rig.typical('system_us'):.2f}",
            f"{ratio(rig, c_limit):.2f}",
            f"{rig.typical('p50_ms'):.1f}",
            f"{rig.typical('p99_ms'):.1f}",
            f"{rig.typical('frame_bytes'):.0f}",
            f"{rig.memory_kib:.1f}",
            f"{rig.handshakes_per_s:,.0f}",
        )
        for rig in rigs
    ]
    return Section(
        title=f"Fan-out: {plan.clients} clients, {plan.rate:g} messages/s of {messages.FRAME_BYTES} bytes",
        header=(
            "server",
            "CPU us/delivery",
            "user",
            "system",
            "x limit",
            "p50 ms",
            "p99 ms",
            "bytes",
            "KiB/client",
            "handshakes/s",
        ),
        rows=rows,
        notes=(
            f"Medians of {plan.rounds} turns of {plan.messages} messages each; latency is publish to receipt.",
            "CPU ratios in the middle half of the turns:",
            f"whaled / C limit {middle_half(whaled, c_limit)}, whaled / broadcast {middle_half(whaled, broadcast)},",
            f"C limit / broadcast {middle_half(c_limit, broadcast)},",
            f"whaled compressed / plain {middle_half(compressed, whaled)}.",
            f"All {delivered:,} deliveries arrived once and in order.",
        ),
        aims=(
            Aim("CPU per delivery, of the C limit's", ratio(whaled, c_limit), 1.2),
            Aim("CPU per delivery, of websockets.broadcast's", ratio(whaled, broadcast), 0.6),
            Aim("CPU per delivery compressed, of a plain one's", ratio(compressed, whaled), 1.6),
            Aim("memory per connected client", whaled.memory_kib, 10, " KiB"),
            Aim("the same with compression", compressed.memory_kib, 10, " KiB"),
        ),
    )


def ratio(one: Rig, other: Rig) -> float:
    """Return the CPU per delivery of one server as a multiple of another's, as the median over the turns."""
    return statistics.median(ratios(one, other))


def middle_half(one: Rig, other: Rig) -> str:
    """Return the interquartile range of the ratios."""
    return " to ".join(f"{percentile(ratios(one, other), part):.2f}" for part in (0.25, 0.75))


def ratios(one: Rig, other: Rig) -> list[float]:
    """Return the ratio of CPU per delivery for each turn."""
    return [a.cpu_us / b.cpu_us for a, b in zip(one.turns, other.turns, strict=True)]
