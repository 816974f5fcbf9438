"""Fan-out: what a delivery costs the server, beside a program that only sends and beside websockets.broadcast().

The servers run at the same time, each with its own load client and its own connections, and publish in turns:
what else happens on the machine then falls on all alike. Every delivery is counted, in order, once.
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
# How long deliveries may take beyond the time of publishing until they count as lost.
LATE_S = 20.0
# Memory per client is the slope from the first few clients on, so that what the first one brings is not divided up.
FIRST_CLIENTS = 50


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured: `rounds` turns of `messages` messages for each server.

    `with_tasks` adds a server with a queue and a task for each client. It is off by default because it cannot keep up
    with the others at 5000 clients, and keeps a core busy while it tries.
    """

    clients: int
    rounds: int
    messages: int
    rate: float = 10.0
    warm_up: int = 10
    with_tasks: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """One server's turn. CPU per delivery in microseconds, latencies from publish to receipt in milliseconds."""

    user_us: float
    system_us: float
    p50_ms: float
    p99_ms: float
    last_ms: tuple[float, ...]  # of each message, to the last client
    frame_bytes: float  # of a delivery

    @property
    def cpu_us(self) -> float:
        """User and system together."""
        return self.user_us + self.system_us


@dataclass
class Rig:
    """A server, its load client, and what came out."""

    title: str
    server: Program
    load: Program
    number: int = 1
    memory_kib: float = 0.0
    handshakes_per_s: float = 0.0
    turns: list[Turn] = field(default_factory=list)

    def typical(self, of: str) -> float:
        """The median over the turns."""
        return statistics.median(float(getattr(turn, of)) for turn in self.turns)


async def measure(plan: Plan, directory: Path) -> Section:
    """CPU, latency and memory per client of the servers. Raises BrokenError if anything is lost or doubled."""
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
    """The servers, each with a load client."""
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
    """The program that only sends."""
    frame = directory / "frame"
    frame.write_bytes(messages.frame(0, EPOCH, messages.padding(EPOCH)))
    return rig_of("C limit", directory, compile_c("limit", directory), frame)


@asynccontextmanager
async def rig_of(title: str, directory: Path, *command: str | Path, deflates: bool = False) -> AsyncIterator[Rig]:
    """A server and its load client, which asks for compression or not."""
    load = compile_c("load", directory)
    async with running(title, *command) as server:
        port = (await server.answer())["port"]
        async with running("load", load, str(port), *(["deflate"] if deflates else [])) as client:
            yield Rig(title, server, client)


async def connect(rig: Rig, clients: int) -> None:
    """Open the connections, and note what they cost."""
    few = min(FIRST_CLIENTS, clients // 2)
    await opened(rig.load, few, few)
    before_kib = resident_kib(rig.server.pid)
    answer = await opened(rig.load, clients - few, clients)
    rig.memory_kib = (resident_kib(rig.server.pid) - before_kib) / (clients - few)
    rig.handshakes_per_s = (clients - few) / answer["seconds"]


async def opened(load: Program, more: int, in_all: int) -> dict[str, Any]:
    """Open more connections; all must be there then."""
    answer = await load.ask(f"open {more}", OPEN_LIMIT_S)
    if answer["open"] != in_all or answer["lost"]:
        raise BrokenError(f"{in_all} connections wanted, {answer['open']} open, {answer['lost']} refused or lost")
    return answer


async def publish(rig: Rig, clients: int, count: int, rate: float) -> Turn:
    """One turn: `count` messages to every client."""
    first, rig.number = rig.number, rig.number + count
    seconds = count / rate
    await rig.load.ask(f"expect {count} {first} {(seconds + LATE_S) * 1000:g}")
    before = await rig.server.ask("usage")
    if before["clients"] != clients:
        raise BrokenError(f"{rig.title} knows {before['clients']} clients instead of {clients}")
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
    """Everything arrived at everybody, once and in order. Raises BrokenError."""
    wrong = {key: received[key] for key in ("duplicates", "gaps", "strays", "lost") if received[key]}
    if received["delivered"] != wanted or received["wanted"] != wanted or wrong:
        raise BrokenError(f"{title}: {received['delivered']} of {wanted} deliveries, {wrong or 'the rest is missing'}")


def section(plan: Plan, rigs: Sequence[Rig]) -> Section:
    """The table and the aims. Ratios are medians of the ratios turn by turn."""
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
    """CPU per delivery of one server as a multiple of another's: the median turn."""
    return statistics.median(ratios(one, other))


def middle_half(one: Rig, other: Rig) -> str:
    """Between which ratios half of the turns lie: how much to make of the median."""
    return " to ".join(f"{percentile(ratios(one, other), part):.2f}" for part in (0.25, 0.75))


def ratios(one: Rig, other: Rig) -> list[float]:
    """CPU per delivery, turn by turn."""
    return [a.cpu_us / b.cpu_us for a, b in zip(one.turns, other.turns, strict=True)]
