"""`python -m bench`: measure, print tables, and report which aims are met. Fails only if something is broken."""

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from bench import daemon, decode, fanout, machine
from bench.programs import BrokenError
from bench.report import Aim, Section, aims_table

NAMES = ("decode", "daemon", "fanout")
# Longer than any measurement takes; a hung child process must not hang CI.
LIMIT_S = 900.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the selected measurements. Returns 0 if they ran, whatever the numbers; 1 if something is broken."""
    options = parser().parse_args(arguments)
    try:
        asyncio.run(run(options))
    except BrokenError as error:
        print(f"broken: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    made = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    made.add_argument(
        "only", nargs="*", choices=[*NAMES, []], help=f"what to measure: {', '.join(NAMES)} (default: all)"
    )
    made.add_argument("--quick", action="store_true", help="short runs for CI, which show only that everything works")
    made.add_argument("--clients", type=int, default=5000, help="connections in the fan-out (%(default)s)")
    made.add_argument("--rate", type=float, default=10, help="messages per second in the fan-out (%(default)g)")
    made.add_argument("--rounds", type=int, default=15, help="rounds of each server in the fan-out (%(default)s)")
    made.add_argument("--with-tasks", action="store_true", help="add a server with a queue and a task per client")
    # /tmp is often in memory, where an fsync costs nothing.
    made.add_argument("--directory", default="/var/tmp", help="directory for databases, on a disk (%(default)s)")
    return made


async def run(options: argparse.Namespace) -> None:
    """Run the measurements one after another, and print each result at once."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    print(f"{machine.kind()}\nload average before: {machine.busy()}\n", flush=True)
    aims: list[Aim] = []
    with tempfile.TemporaryDirectory(prefix="whaled-bench-", dir=options.directory) as directory:
        async with asyncio.timeout(LIMIT_S):
            async for section in sections(options, Path(directory)):
                print(section.text(), flush=True)
                aims += section.aims
    if options.quick:
        print(f"It works. --quick is too short to measure speed; load average after: {machine.busy()}")
    else:
        print(f"{aims_table(aims)}\n\nload average after: {machine.busy()}")


async def sections(options: argparse.Namespace, directory: Path) -> AsyncIterator[Section]:
    """Run the selected measurements and yield their results."""
    wanted = options.only or NAMES
    if "decode" in wanted:
        yield decode.measure(rounds=3 if options.quick else 25)
    if "daemon" in wanted:
        if options.quick:
            small = daemon.Plan(starts=2, idle_s=4, clients=100, messages=20, rate=20, warm_up=5)
        else:
            small = daemon.Plan(starts=7, idle_s=20, clients=machine.clients_possible(1000), messages=300)
        for section in await daemon.measure(small, directory):
            yield section
    if "fanout" in wanted:
        if options.quick:
            plan = fanout.Plan(clients=min(200, options.clients), rounds=2, messages=10, rate=20, warm_up=2)
        else:
            clients = machine.clients_possible(options.clients)
            plan = fanout.Plan(
                clients=clients,
                rounds=options.rounds,
                messages=20,
                rate=options.rate,
                with_tasks=options.with_tasks,
            )
        yield await fanout.measure(plan, directory)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
