"""The daemon as an operator runs it: its start time, its idle memory and CPU, and the latency from frame to sockets."""

import asyncio
import json
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from bench import fanout, upstream
from bench.fanout import LATE_S, check_deliveries, opened
from bench.programs import BrokenError, Program, compile_c, cpu_s, resident_kib, running
from bench.report import Aim, Section, percentile
from bench.upstream import CONNECT_LIMIT_S, Relay

START_LIMIT_S = 30.0
STOP_LIMIT_S = 30.0
FIRST_CLIENTS = 50
SAMPLE = re.compile(r"(whaled_\w+)(?:\{le=\"([^\"]+)\"\})? (\S+)")


@dataclass(frozen=True, slots=True)
class Plan:
    """The number and duration of the measurements."""

    starts: int
    idle_s: float
    clients: int
    messages: int
    rate: float = 10.0
    warm_up: int = 10


@dataclass(frozen=True, slots=True)
class Ready:
    """A running daemon that is ready."""

    pid: int
    port: int
    metrics_url: str
    after_s: float


async def measure(plan: Plan, directory: Path) -> list[Section]:
    """Measure starts, idling and latency. Raises BrokenError if the daemon fails or a client misses an alert."""
    starts = await start_times(plan.starts, directory)
    idle_mib, idle_cpu = await idling(plan.idle_s, directory)
    alone = Section(
        title="The daemon by itself",
        header=("", "measured"),
        rows=[
            ("start to ready, s (median)", f"{statistics.median(starts):.2f}"),
            ("start to ready, s (slowest)", f"{max(starts):.2f}"),
            ("resident memory idle, MiB", f"{idle_mib:.1f}"),
            ("CPU idle, % of a core", f"{idle_cpu:.2f}"),
        ],
        notes=(
            f"{plan.starts} starts with a new database; idle for {plan.idle_s:g} s without clients, on a backend with",
            "the main network's 7 transactions a second and no whales.",
        ),
        aims=(Aim("start to ready", statistics.median(starts), 1, " s"), Aim("idle CPU", idle_cpu, 1, " %")),
    )
    return [alone, await latency(plan, directory)]


async def start_times(starts: int, directory: Path) -> list[float]:
    """Measure the seconds from spawning the process to its `daemon_ready`, each time with a new database."""
    times = []
    async with upstream.relaying() as relay:
        for number in range(starts):
            config = write_config(directory, f"start-{number}", relay.url, relay.rest_url)
            async with daemon(config) as ready:
                times.append(ready.after_s)
    return times


async def idling(seconds: float, directory: Path) -> tuple[float, float]:
    """Return resident MiB and CPU in percent of a core, without clients."""
    async with upstream.main_network() as backend:
        config = write_config(directory, "idle", backend.url, backend.rest_url)
        async with daemon(config) as ready:
            # Wait until the work after the start (first connect, mempool comparison) is done.
            await asyncio.sleep(seconds / 4)
            before_s, began = cpu_s(ready.pid), time.monotonic()
            await asyncio.sleep(seconds)
            cpu = 100 * (cpu_s(ready.pid) - before_s) / (time.monotonic() - began)
            return resident_kib(ready.pid) / 1024, cpu


async def latency(plan: Plan, directory: Path) -> Section:
    """Measure from a frame of the backend to every client's socket, including detection, fsync and the hub."""
    load = compile_c("load", directory)
    disk_ms = await asyncio.to_thread(fsync_ms, directory, plan.messages)
    limit_ms = await sending_ms(plan, directory)
    async with upstream.relaying() as relay:
        config = write_config(directory, "latency", relay.url, relay.rest_url)
        async with daemon(config) as ready, running("load", load, str(ready.port)) as clients:
            few = min(FIRST_CLIENTS, plan.clients // 2)
            await opened(clients, few, few)
            before_kib = resident_kib(ready.pid)
            await opened(clients, plan.clients - few, plan.clients)
            per_client_kib = (resident_kib(ready.pid) - before_kib) / (plan.clients - few)
            async with asyncio.timeout(CONNECT_LIMIT_S):
                await relay.subscribed.wait()
            await send_whales(relay, clients, plan.warm_up, 1, plan.rate)
            metrics, cpu = await scrape(ready.metrics_url), cpu_s(ready.pid)
            received = await send_whales(relay, clients, plan.messages, 1 + plan.warm_up, plan.rate)
            cpu = cpu_s(ready.pid) - cpu
            after = await scrape(ready.metrics_url)
    check_deliveries("whaled", received, plan.clients * plan.messages)
    inside = {key: value - metrics.get(key, 0.0) for key, value in after.items()}
    last_ms = [each / 1000 for each in received["last_us"]]
    p99_ms = percentile(last_ms, 0.99)
    return Section(
        title=f"Frame to sockets: {plan.clients} clients, {plan.rate:g} whales/s, each committed with fsync",
        header=("", "mean ms", "p50 ms", "p99 ms"),
        rows=[
            spread("the disk alone: append 4 KiB, fsync", disk_ms),
            spread("the C limit alone: sent -> received by the last client", limit_ms),
            inside_row("frame received -> committed (whaled's own)", "whaled_frame_to_commit_seconds", inside),
            inside_row("frame received -> all sockets written (whaled's own)", "whaled_frame_to_sent_seconds", inside),
            (
                "frame sent by the backend -> received by any client",
                "",
                f"{received['p50_us'] / 1000:.1f}",
                f"{received['p99_us'] / 1000:.1f}",
            ),
            spread("frame sent by the backend -> received by the last client", last_ms),
        ],
        notes=(
            f"{plan.messages} whales, all {plan.clients * plan.messages:,} deliveries arrived once and in order.",
            "whaled's own numbers are bounds of its histogram's buckets; the last line includes the backend's send and",
            "the client's receipt, so it is more than what the aim asks for.",
            f"CPU per delivery, everything included: {1e6 * cpu / (plan.clients * plan.messages):.1f} us.",
            f"Memory: {per_client_kib:.1f} KiB per client. Database on {file_system(directory)}.",
        ),
        aims=(Aim("frame to the last of 1000 clients, p99", p99_ms, 15, " ms"),) if plan.clients == 1000 else (),
    )


async def sending_ms(plan: Plan, directory: Path) -> list[float]:
    """Return how long the C limit takes per message until the last client has it: no server on one core is faster."""
    async with fanout.limit(directory) as rig:
        await fanout.connect(rig, plan.clients)
        await fanout.publish(rig, plan.clients, plan.warm_up, plan.rate)
        turn = await fanout.publish(rig, plan.clients, plan.messages, plan.rate)
    return list(turn.last_ms)


async def send_whales(relay: Relay, clients: Program, count: int, first: int, rate: float) -> dict[str, Any]:
    """Send whales at a rate and wait until all clients have received all of them."""
    seconds = count / rate
    await clients.ask(f"expect {count} {first} {(seconds + LATE_S) * 1000:g}")
    loop = asyncio.get_running_loop()
    began = loop.time()
    for index in range(count):
        await asyncio.sleep(began + index / rate - loop.time())
        await relay.send_whale(first + index)
    return await clients.answer(seconds + 2 * LATE_S)


# --- the daemon's process ---


def write_config(directory: Path, name: str, url: str, rest_url: str) -> Path:
    """Write a configuration with the defaults, except loopback, any port, no tokens, all clients from one address."""
    config = {
        "upstream": {"url": url, "rest_url": rest_url},
        "eventlog": {"path": str(directory / f"{name}.db")},
        "gateway": {"port": 0, "max_connections_per_address": 1_000_000, "max_unauthenticated": 1_000_000},
        "auth": {"enabled": False},
        "http": {"port": 0, "render_interval": "1ms"},  # scrapes directly before and after the messages must be exact
        "log": {"format": "json"},
    }
    path = directory / f"{name}.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


@asynccontextmanager
async def daemon(config: Path, *, limit_s: float = START_LIMIT_S, log: Path = Path(os.devnull)) -> AsyncIterator[Ready]:
    """Run `whaled run` and yield once it is ready. Raises BrokenError if it is not ready within `limit_s`.

    On exit it is sent SIGTERM and must stop with status 0. Its log is copied to `log`.
    """
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "whaled", "run", "--config", str(config),
        stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, cwd=config.parent,
        env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert process.stderr is not None
    unusual: list[str] = []
    ready: asyncio.Future[tuple[float, dict[str, str]]] = asyncio.get_running_loop().create_future()
    reader = asyncio.create_task(_read_log(process.stderr, unusual, ready, log))
    try:
        try:
            async with asyncio.timeout(limit_s):
                at, line = await ready
        except (TimeoutError, EOFError):
            raise BrokenError("whaled is not ready:\n" + "\n".join(unusual)) from None
        yield Ready(process.pid, int(line["listen"].rsplit(":", 1)[1]), line["metrics"], at - began)
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_LIMIT_S):
                status = await process.wait()
        except TimeoutError:
            raise BrokenError("whaled does not stop:\n" + "\n".join(unusual)) from None
        if status != 0:
            raise BrokenError(f"whaled ended with status {status}:\n" + "\n".join(unusual))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reader


async def _read_log(
    lines: asyncio.StreamReader,
    unusual: list[str],
    ready: "asyncio.Future[tuple[float, dict[str, str]]]",
    log: Path,
) -> None:
    """Read the daemon's log to its end, and keep the latest lines above level info in `unusual`."""
    with log.open("ab", buffering=0) as copy:
        async for raw in lines:
            copy.write(raw)
            line = json.loads(raw) if raw.startswith(b"{") else {}
            if line.get("event") == "daemon_ready" and not ready.done():
                ready.set_result((time.monotonic(), line))
            if line.get("level") != "info":
                unusual.append(raw.decode().rstrip())
                del unusual[:-50]
    if not ready.done():
        ready.set_exception(EOFError())


# --- its metrics ---


async def scrape(url: str) -> dict[str, float]:
    """Return the samples without labels and the buckets of histograms, by `sample_key`."""
    async with aiohttp.ClientSession(trust_env=False) as session, session.get(url) as response:
        lines = (await response.text()).splitlines()
    return {key: float(line.rsplit(" ", 1)[1]) for line in lines if (key := sample_key(line))}


def sample_key(line: str) -> str:
    """Return the name of a sample, `name bound` for a bucket, "" for any other line."""
    found = SAMPLE.fullmatch(line)
    return " ".join(filter(None, found.group(1, 2))) if found else ""


def spread(title: str, values_ms: Sequence[float]) -> tuple[str, ...]:
    """Return a row of mean and percentiles."""
    numbers = (statistics.mean(values_ms), percentile(values_ms, 0.5), percentile(values_ms, 0.99))
    return (title, *(f"{number:.1f}" for number in numbers))


def inside_row(title: str, histogram: str, samples: Mapping[str, float]) -> tuple[str, ...]:
    """Return a row of the mean of a histogram, and the buckets that contain the percentiles."""
    count = samples[f"{histogram}_count"]
    mean_ms = 1000 * samples[f"{histogram}_sum"] / count
    return (title, f"{mean_ms:.1f}", *(bucket(histogram, samples, part * count) for part in (0.5, 0.99)))


def bucket(histogram: str, samples: Mapping[str, float], rank: float) -> str:
    """Return the upper bound, in ms, of the bucket that contains a rank."""
    prefix = f"{histogram}_bucket "
    for key, value in samples.items():
        if key.startswith(prefix) and value >= rank:
            return f"<= {1000 * float(key.removeprefix(prefix)):g}"
    return "?"


def fsync_ms(directory: Path, times: int) -> list[float]:
    """Measure an append of a page with fsync: no commit is faster."""
    page, taken = b"x" * 4096, []
    with (directory / "fsync").open("wb", buffering=0) as file:
        for _ in range(times):
            began = time.perf_counter()
            file.write(page)
            os.fsync(file.fileno())
            taken.append(1000 * (time.perf_counter() - began))
    return taken


def file_system(directory: Path) -> str:
    """Return the type of the file system, so that the report shows whether the database was on a disk."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    here = directory.resolve()
    fitting = [(mount, kind) for mount, kind in mounts if here.is_relative_to(mount)]
    return max(fitting, key=lambda each: len(each[0]))[1]
