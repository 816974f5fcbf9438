"""`python -m bench.book`: the cost of a large address book for the start, memory, and alerts during a reload.

Runs the real daemon with a generated book on a simulated backend. Ten whales a second are timed from the sending of the
frame to the receipt of the alert, first without other work, then during a reload.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from websockets.asyncio.client import ClientConnection, connect

from bench import machine, upstream
from bench.daemon import Ready, daemon, scrape, write_config
from bench.programs import BrokenError, resident_kib
from bench.report import Row, percentile, table
from bench.upstream import CONNECT_LIMIT_S, Relay
from whaled.addresses import base58check
from whaled.model import OwnerType

RATE = 10.0
QUIET_S = 15.0
OWNERS = 40
RELOADED = "whaled_config_last_reload_success_timestamp_seconds"
LIMIT_S = 300.0


def write_book(path: Path, addresses: int, owners: int) -> None:
    """Write a book with this number of valid addresses."""
    kinds = list(OwnerType)
    with path.open("w", encoding="utf-8") as file:
        for number in range(addresses):
            owner = number % owners
            file.write(f"Owner {owner},{base58check(0, number.to_bytes(20))},{kinds[owner % len(kinds)]}\n")


def peak_mib(pid: int) -> float:
    """Return the peak resident memory of a process, 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def readers(parent: int) -> list[int]:
    """Return the child processes of `parent` that read an address book."""
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208
        with suppress(OSError):
            if name.isdecimal() and "whaled.addressbook.bookfile" in Path(f"/proc/{name}/cmdline").read_text(
                encoding="utf-8"
            ):
                fields = Path(f"/proc/{name}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                if int(fields[1]) == parent:
                    found.append(int(name))
    return found


class Watch:
    """A load that sends whales and times their alerts."""

    def __init__(self, relay: Relay, client: ClientConnection) -> None:
        self.taken_s: list[float] = []
        self._relay = relay
        self._client = client

    async def run(self) -> None:
        """Send whales until cancelled."""
        loop = asyncio.get_running_loop()
        number, due = 0, loop.time()
        while True:
            number, due = number + 1, max(due + 1 / RATE, loop.time())
            await asyncio.sleep(due - loop.time())
            began = time.monotonic()
            await self._relay.send_whale(number)
            while json.loads(await self._client.recv())["type"] != "whale_alert":
                pass
            self.taken_s.append(time.monotonic() - began)

    def row(self, what: str) -> Row:
        """Return the table row of the times since the last call."""
        taken_ms, self.taken_s = [1000 * each for each in self.taken_s], []
        if not taken_ms:
            raise BrokenError(f"no alert arrived: {what}")
        parts = (percentile(taken_ms, 0.5), percentile(taken_ms, 0.99), max(taken_ms))
        return (what, str(len(taken_ms)), *(f"{each:.1f}" for each in parts))


@asynccontextmanager
async def watching(relay: Relay, ready: Ready) -> AsyncIterator[Watch]:
    """Send whales and time their alerts while the body runs."""
    async with (
        connect(f"ws://127.0.0.1:{ready.port}", proxy=None, compression=None, max_queue=None) as client,
        asyncio.TaskGroup() as tasks,
    ):
        async with asyncio.timeout(CONNECT_LIMIT_S):
            await relay.subscribed.wait()
        watch = Watch(relay, client)
        job = tasks.create_task(watch.run())
        yield watch
        job.cancel()


async def reloaded(ready: Ready) -> tuple[float, float]:
    """Reload the daemon. Return the seconds it took and the peak memory of the process that reads the book, in MiB."""
    before = (await scrape(ready.metrics_url))[RELOADED]
    began, most_mib = time.monotonic(), 0.0
    os.kill(ready.pid, signal.SIGHUP)
    async with asyncio.timeout(LIMIT_S):
        while (await scrape(ready.metrics_url))[RELOADED] == before:
            most_mib = max([most_mib, *map(peak_mib, readers(ready.pid))])
            await asyncio.sleep(0.1)
    return time.monotonic() - began, most_mib


async def measure(addresses: int, owners: int, directory: Path) -> str:
    """Run the measurement and return both tables."""
    async with upstream.relaying() as relay:
        config = write_config(directory, "book", relay.url, relay.rest_url)
        async with daemon(config) as ready:
            without_mib, without_s = resident_kib(ready.pid) / 1024, ready.after_s
        relay.subscribed.clear()
        path = directory / "book.csv"
        write_book(path, addresses, owners)
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings["detection"] = {"address_book": str(path), "max_book_addresses": addresses}
        config.write_text(json.dumps(settings), encoding="utf-8")
        async with daemon(config, limit_s=LIMIT_S) as ready:
            with_mib = resident_kib(ready.pid) / 1024
            async with watching(relay, ready) as watch:
                await asyncio.sleep(QUIET_S)
                rows = [watch.row("nothing else")]
                took_s, reader_mib = await reloaded(ready)
                rows.append(watch.row("during the reload"))
            after = (resident_kib(ready.pid) / 1024, peak_mib(ready.pid))
    facts = [
        ("start to ready without a book, s", f"{without_s:.1f}"),
        (f"with {addresses:,} addresses of {owners:,} owners, s", f"{ready.after_s:.1f}"),
        ("reload, s", f"{took_s:.1f}"),
        ("resident without a book, MiB", f"{without_mib:.1f}"),
        ("with it, MiB", f"{with_mib:.1f}"),
        ("most during the reload, MiB", f"{after[1]:.1f}"),
        ("after it, MiB", f"{after[0]:.1f}"),
        ("the process that reads it, at most, MiB", f"{reader_mib:.1f}"),
    ]
    timed = table(("frame sent -> alert received, ms", "alerts", "p50", "p99", "worst"), rows)
    return f"{table(('', 'measured'), facts)}\n\n{timed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 1 if something is broken, else 0."""
    made = argparse.ArgumentParser(prog="python -m bench.book", description=__doc__)
    made.add_argument("--addresses", type=int, default=1_000_000, help="addresses in the book (%(default)s)")
    made.add_argument("--owners", type=int, default=OWNERS, help="owners in the book (%(default)s)")
    made.add_argument("--directory", default="/var/tmp", help="directory for the book and the database (%(default)s)")
    options = made.parse_args(arguments)
    print(f"{machine.kind()}\nload average before: {machine.busy()}", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="whaled-book-", dir=options.directory) as directory:
            print(asyncio.run(measure(options.addresses, options.owners, Path(directory))))
    except BrokenError as error:
        print(f"broken: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
