"""`whaled check-config`: report every fault of a configuration before the daemon uses it."""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from whaled.addressbook.loading import idle_rules, read_address_book
from whaled.auth.ring import KeyRing
from whaled.auth.sources import load_ring
from whaled.cli import unit
from whaled.cli.options import Subparsers
from whaled.cli.settings import load_for, working_directory
from whaled.config.parse import Loaded
from whaled.config.render import render
from whaled.config.sections import DetectionSettings
from whaled.errors import ConfigError, ExitStatus, Fault, KeyRingError
from whaled.listening import missing_hosts
from whaled.ops.certificates import tls_context
from whaled.urls import redacted
from whaled.whales.labels import AddressBook
from whaled.whales.owners import summary


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "check-config",
        help="check a configuration file and the files it names",
        description="Check a configuration file, and the key ring, address book and certificate it names. The event "
        "log and the ports are not opened. For the configuration file of whaled.service, the settings of the unit and "
        "the addresses of whaled.socket are checked and shown as well.",
        epilog="exit status: 0 no faults; 78 faults, all of which are printed",
    )
    parser.add_argument(
        "config", type=Path, nargs="?", metavar="FILE", help="default: /etc/whaled/whaled.yaml if it exists"
    )
    parser.add_argument("--print", action="store_true", help="show the effective configuration, without secrets")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the configuration. Raises ConfigError with every fault."""
    loaded = load_for(arguments)
    faults, ring, book = faults_of_files(loaded)
    served = _served(loaded)
    if served is not None:
        faults += tuple(fault for fault in served.faults if fault not in faults)
    for warning in (*loaded.warnings, *asyncio.run(_warnings_of_hosts(loaded))):
        print(f"whaled: warning: {warning}", file=sys.stderr)
    if faults:
        raise ConfigError(faults)
    deviation = unit.sentence(served, unit.clients(loaded.config)) if served is not None else ""
    if arguments.print:
        sys.stdout.write(render(loaded) + (f"# {deviation}\n" if deviation else ""))
    else:
        print(_summary(loaded, ring, book, deviation))
        for warning in idle_rules(loaded.config.detection, book, loaded.origins):
            print(f"whaled: warning: {warning}", file=sys.stderr)
        for note in book.owners.notes:
            print(f"whaled: warning: {note}", file=sys.stderr)
    return ExitStatus.STOPPED


def _served(loaded: Loaded) -> unit.Served | None:
    """Return how whaled.service uses this file, None if it does not or is not installed."""
    found = unit.installed() if loaded.path is not None else None
    return unit.served(found, Path(loaded.path), loaded.config) if found is not None and loaded.path else None


def faults_of_files(loaded: Loaded) -> tuple[tuple[Fault, ...], KeyRing | None, AddressBook]:
    """Return the faults of the files that a configuration names, the key ring in effect, and the address book."""
    config = loaded.config
    faults: list[Fault] = []
    ring = None
    book = AddressBook()
    if config.auth.enabled:
        try:
            ring = load_ring(config.auth, os.environ, working_directory())
        except KeyRingError as error:
            faults.append(Fault("auth", str(error)))
    try:
        book = read_address_book(config.detection, loaded.origins)
    except ConfigError as error:
        faults.extend(error.faults)
    try:
        tls_context(config.gateway.tls)
    except ConfigError as error:
        faults.extend(error.faults)
    return tuple(faults), ring, book


async def _warnings_of_hosts(loaded: Loaded) -> list[Fault]:
    """Return a warning for each host that this machine lacks.

    It is not a fault: whaled listens on the other hosts, or on sockets from systemd.
    """
    config = loaded.config
    sections = [
        ("gateway.host", config.gateway.host),
        *([("http.host", config.http.host)] if config.http.enabled else []),
    ]
    return [
        Fault(key, f"nobody can connect to {missing.host}: {missing.reason}", loaded.origins.get(key, ""))
        for key, hosts in sections
        for missing in await missing_hosts(hosts)
    ]


def _rules(detection: DetectionSettings) -> str:
    watched = len(detection.watch)
    return ", ".join(
        [
            *([f"from {detection.threshold_btc:g} BTC"] if detection.threshold_btc is not None else []),
            *([f"from ${detection.threshold_usd:,.0f}"] if detection.threshold_usd is not None else []),
            *([f"of {watched} watch rule{'s' * (watched > 1)}"] if watched else []),
        ]
    )


def _labels(paths: Sequence[str], book: AddressBook) -> str:
    if not paths:
        return "no address book"
    return f"address book: {summary(book.owners)} in {', '.join(paths)}"


def _summary(loaded: Loaded, ring: KeyRing | None, book: AddressBook, deviation: str) -> str:
    config = loaded.config
    return ". ".join(
        (
            f"{loaded.path or 'the defaults'}: fine, {loaded.keys_set} keys set",
            f"whales {_rules(config.detection)}",
            _labels(config.detection.books, book),
            f"upstream {redacted(config.upstream.url)}",
            f"clients at {', '.join(unit.clients(config))}",
            *([deviation] if deviation else []),
            f"authentication {'OFF' if ring is None else f'on, keys: {ring.source}'}",
        )
    )
