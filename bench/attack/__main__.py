"""`make attack`: unauthenticated, neighbouring and greedy clients attack the daemon. Exits with 1 on a missed bound."""

import argparse
import asyncio
import contextlib
import json
import math
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench import machine
from bench.attack import history, sizes
from bench.attack.assaults import Did
from bench.attack.catalogue import ATTACKS, Attack
from bench.attack.processes import settle_priorities
from bench.attack.rig import VICTIMS, Place, Rig, prepare, rig
from bench.attack.verdict import GENEROUS, HEADER, STRICT, Bounds, Outcome, Used, rows, total
from bench.programs import BrokenError
from bench.report import table

# An alert counts as lost this long after the attack.
RECOVERY_S = 45.0
CALM_LOOK_S = 0.25
WARM_UP_S = 1.0
QUIET_S, QUICK_QUIET_S = 5.0, 3.0
# Twice the size of the long log.
FREE_BYTES = 3 * 2**30
EVENTS, QUICK_EVENTS = 1_000_000, 100_000
# Estimates: to start and stop a daemon and its clients and wait for memory, and to write a long log.
AROUND_S = 8.0
EVENTS_PER_SECOND = 15_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the attacks. Returns 0 if every bound holds, 1 if one does not or something is broken."""
    options = parser().parse_args(arguments)
    chosen = choose(options.only, is_quick=options.quick)
    if options.list:
        print("\n".join(attack.name for attack in chosen))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the daemon ends with it
    print(f"{machine.kind()}\nload average before: {machine.busy()}", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="whaled-attack-", dir=options.directory) as directory:
            return asyncio.run(run(options, chosen, Path(directory)))
    except BrokenError as error:
        print(f"broken: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    made = argparse.ArgumentParser(prog="python -m bench.attack", description=__doc__)
    made.add_argument("--quick", action="store_true", help="a dozen attacks, shorter, with generous bounds, for CI")
    made.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="only attacks whose names contain one of these"
    )
    made.add_argument("--list", action="store_true", help="print the names and exit")
    made.add_argument("--sizes", action="store_true", help="only measure the memory of connections")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    made.add_argument("--seconds", type=float, default=0, help="duration of each attack (default: specific to it)")
    made.add_argument("--quiet-seconds", type=float, default=0, help="duration of the measurements before and after")
    made.add_argument("--calm", type=float, default=0, help="time within which memory must be released")
    made.add_argument("--events", type=int, default=0, help=f"events in the replayed log ({EVENTS:,})")
    made.add_argument("--victims", type=int, default=VICTIMS, help="clients that must not be affected (%(default)s)")
    made.add_argument("--directory", default=directory(), help="directory for databases (%(default)s)")
    return made


def directory() -> str:
    """Return a directory in memory if there is enough: delays of a disk would look like effects of the attack."""
    memory = Path("/dev/shm")
    with contextlib.suppress(OSError):
        if shutil.disk_usage(memory).free > FREE_BYTES:
            return str(memory)
    return "/var/tmp"


def choose(names: Sequence[str], *, is_quick: bool) -> list[Attack]:
    """Return the selected attacks in the order of the catalogue. Raises SystemExit if a name matches none."""
    if not names:
        return [attack for attack in ATTACKS if attack.quick_s or not is_quick]
    for name in names:
        if not any(name in attack.name for attack in ATTACKS):
            raise SystemExit(f"no attack matches {name!r}; --list prints their names")
    full = {attack.name for attack in ATTACKS}
    return [
        attack
        for attack in ATTACKS
        if any(name == attack.name if name in full else name in attack.name for name in names)
    ]


async def run(options: argparse.Namespace, chosen: Sequence[Attack], directory: Path) -> int:
    """Run the attacks one after another."""
    settle_priorities()
    bounds = GENEROUS if options.quick else STRICT
    if options.calm:
        bounds = replace(bounds, calm_s=options.calm)
    place = prepare(directory, victims=options.victims)
    print(f"expected duration: {duration(expected_s(options, chosen))}, more on a machine that is busy", flush=True)
    if options.sizes:
        print(table(sizes.HEADER, await sizes.measure(place)))
        return 0
    if any(attack.around.history for attack in chosen):
        place = await with_history(place, options.events or (QUICK_EVENTS if options.quick else EVENTS))
    outcomes: list[Outcome] = []
    for number, attack in enumerate(chosen, 1):
        began = time.monotonic()
        seconds, quiet_s = times_of(options, attack)
        try:
            outcome = await attacked(place, attack, seconds, quiet_s, bounds)
        except* BrokenError as broken:
            outcome = Outcome(attack.name, complaints=list(causes(broken)))
        outcomes.append(outcome)
        if options.json:
            options.json.write_text(json.dumps([report(each, bounds) for each in outcomes], indent=1), encoding="utf-8")
        verdict = "; ".join(outcome.broken(bounds)) or "holds"
        took = time.monotonic() - began
        print(f"[{number}/{len(chosen)}] {attack.name}: {verdict} ({took:.0f} s; {'; '.join(outcome.did)})", flush=True)
    print(f"\n{table(HEADER, rows(outcomes, bounds))}\n\nload average after: {machine.busy()}", flush=True)
    print(total(outcomes, bounds), flush=True)
    return 1 if any(outcome.broken(bounds) for outcome in outcomes) else 0


def times_of(options: argparse.Namespace, attack: Attack) -> tuple[float, float]:
    """Return the seconds of an attack, and of the quiet periods before and after it."""
    seconds = options.seconds or ((options.quick and attack.quick_s) or attack.seconds)
    return seconds, options.quiet_seconds or (QUICK_QUIET_S if options.quick else QUIET_S)


def expected_s(options: argparse.Namespace, chosen: Sequence[Attack]) -> float:
    """Estimate the duration on an otherwise idle machine."""
    if options.sizes:
        return sizes.expected_s()
    spent_s = 0.0
    for attack in chosen:
        seconds, quiet_s = times_of(options, attack)
        spent_s += AROUND_S + WARM_UP_S + 2 * quiet_s + seconds
    if any(attack.around.history for attack in chosen):
        spent_s += (options.events or (QUICK_EVENTS if options.quick else EVENTS)) / EVENTS_PER_SECOND
    return spent_s


def duration(seconds: float) -> str:
    """Format a duration: seconds below two minutes, else minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def causes(group: BaseExceptionGroup[BaseException]) -> Iterator[str]:
    """Yield the messages in nested exception groups."""
    for each in group.exceptions:
        if isinstance(each, BaseExceptionGroup):
            yield from causes(each)
        else:
            yield str(each)


async def with_history(place: Place, events: int) -> Place:
    """Return the place with a long log."""
    path = place.directory / "history.db"
    began = time.monotonic()
    await asyncio.to_thread(history.build, path, events)
    print(f"a log of {events:,} events: {path.stat().st_size / 2**20:.0f} MiB in {time.monotonic() - began:.0f} s")
    return replace(place, history=path)


async def attacked(place: Place, attack: Attack, seconds: float, quiet_s: float, bounds: Bounds) -> Outcome:
    """Measure a quiet period, an attack, and another quiet period."""
    async with rig(place, attack.around) as running:
        daemon = running.daemon
        await running.window(WARM_UP_S)
        began, waited = time.monotonic(), daemon.waited_s()
        quiet = await running.window(quiet_s)
        memory_before, descriptors_before = daemon.resident_mib(), daemon.descriptors
        daemon.forget_peak()
        log_before = daemon.log.stat().st_size
        daemon.deafen()
        await running.begin_newcomers()
        first, count = await running.send_during(
            running.attack([replace(each, seconds=seconds) for each in attack.orders])
        )
        arrivals = await running.arrivals()
        under_attack = await running.gather(first, count, RECOVERY_S)
        memory_peak, log_bytes = daemon.peak_mib(), daemon.log.stat().st_size - log_before
        descriptors_peak = max(daemon.most_descriptors, descriptors_before)
        await calm(running, memory_before * (1 + bounds.memory_part), descriptors_before, bounds.calm_s)
        memory_after, descriptors_after = daemon.resident_mib(), daemon.descriptors
        after = await running.window(quiet_s)
        is_alive = daemon.is_alive
        waited_part = (daemon.waited_s() - waited) / (time.monotonic() - began)
    return Outcome(
        attack.name,
        is_flood=attack.is_flood,
        quiet=quiet,
        attacked=under_attack,
        after=after,
        arrivals=arrivals,
        memory_mib=Used(memory_before, memory_peak, memory_after),
        descriptors=Used(descriptors_before, descriptors_peak, descriptors_after),
        log_bytes=log_bytes,
        is_alive=is_alive,
        exit_status=daemon.exit_status,
        unsent=running.unsent,
        waited_part=max(0.0, waited_part),
        did=[
            summary(order.payload or order.message or order.opening or "silent", did)
            for order, did in zip(attack.orders, running.did, strict=True)
        ],
        complaints=[f"no attack: {did.error}" for did in running.did if not did.opened],
    )


async def calm(running: Rig, memory_mib: float, descriptors: int, within_s: float) -> None:
    """Wait until memory and descriptors are at most these values."""
    end = time.monotonic() + within_s
    daemon = running.daemon
    while time.monotonic() < end and daemon.is_alive:
        if daemon.descriptors <= descriptors and daemon.resident_mib() <= memory_mib:
            return
        await asyncio.sleep(CALM_LOOK_S)


def summary(name: str, did: Did) -> str:
    """Summarise what an attacking process did."""
    rate = did.opened / did.seconds if did.seconds else 0.0
    parts = [f"{did.opened} opened ({rate:.0f}/s)"]
    parts += [f"{count} {what}" for count, what in ((did.replies, "replies"), (did.refused, "refused"),
              (did.closed, "closed"), (did.failed, "failed"), (did.sent, "sent")) if count]  # fmt: skip
    return f"{name}: {', '.join(parts)}"


def report(outcome: Outcome, bounds: Bounds) -> dict[str, object]:
    """Return an outcome for --json."""
    ratio = outcome.ratio if math.isfinite(outcome.ratio) else None
    return asdict(outcome) | {"ratio": ratio, "broken": outcome.broken(bounds)}


if __name__ == "__main__":
    sys.exit(main())
