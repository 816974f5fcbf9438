"""`whaled check-config`: says everything that is wrong with a configuration, before a daemon would."""

import argparse
import os
import sys
from pathlib import Path

from whaled.auth.keys import load_ring
from whaled.auth.tokens import KeyRing
from whaled.cli import unit
from whaled.cli.settings import Subparsers, load_for
from whaled.config.parse import Loaded
from whaled.config.render import render
from whaled.config.rules import redacted
from whaled.config.sections import Config, Detection
from whaled.errors import ConfigError, ExitStatus, Fault, KeyRingError
from whaled.files import read_address_book, tls_context


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "check-config",
        help="check a configuration file and what it names",
        description="Check a configuration file, and the key ring, address book and certificate it names. Exit status "
        "0 if all of that is fine, 78 and every fault if not. The event log and the ports are not opened. Of the file "
        "of whaled.service, what its unit sets and where whaled.socket listens are checked and shown as well.",
    )
    parser.add_argument(
        "config", type=Path, nargs="?", metavar="FILE", help="default: /etc/whaled/whaled.yaml if it exists"
    )
    parser.add_argument("--print", action="store_true", help="show the effective configuration, without secrets")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check. Raises ConfigError with every fault."""
    loaded = load_for(arguments)
    faults, ring = faults_of_files(loaded.config)
    served = _served(loaded)
    if served is not None:
        faults += tuple(fault for fault in served.faults if fault not in faults)
    if faults:
        raise ConfigError(faults)
    deviation = unit.sentence(served, _clients(loaded.config)) if served is not None else ""
    if arguments.print:
        sys.stdout.write(render(loaded) + (f"# {deviation}\n" if deviation else ""))
    else:
        print(_summary(loaded, ring, deviation))
    return ExitStatus.STOPPED


def _served(loaded: Loaded) -> unit.Served | None:
    """What whaled.service does with this file, where systemd has it."""
    found = unit.installed() if loaded.path is not None else None
    return unit.served(found, Path(loaded.path), loaded.config) if found is not None and loaded.path else None


def faults_of_files(config: Config) -> tuple[tuple[Fault, ...], KeyRing | None]:
    """What is wrong with the files a configuration names, and the key ring in force."""
    faults: list[Fault] = []
    ring = None
    if config.auth.enabled:
        try:
            ring = load_ring(config.auth, os.environ, Path.cwd())
        except KeyRingError as error:
            faults.append(Fault("auth", str(error)))
    for check in (lambda: read_address_book(config.detection), lambda: tls_context(config.gateway.tls)):
        try:
            check()
        except ConfigError as error:
            faults.extend(error.faults)
    return tuple(faults), ring


def _rules(detection: Detection) -> str:
    watched = len(detection.watch)
    return ", ".join(
        [
            *([f"from {detection.threshold_btc:g} BTC"] if detection.threshold_btc is not None else []),
            *([f"from ${detection.threshold_usd:,.0f}"] if detection.threshold_usd is not None else []),
            *([f"of {watched} watch rule{'s' * (watched > 1)}"] if watched else []),
        ]
    )


def _clients(config: Config) -> str:
    gateway = config.gateway
    return f"{'wss' if gateway.tls.certificate else 'ws'}://{gateway.host}:{gateway.port}"


def _summary(loaded: Loaded, ring: KeyRing | None, deviation: str) -> str:
    config = loaded.config
    return ". ".join(
        (
            f"{loaded.path or 'the defaults'}: fine, {len(loaded.origins)} keys set",
            f"whales {_rules(config.detection)}",
            f"upstream {redacted(config.upstream.url)}",
            f"clients at {_clients(config)}",
            *([deviation] if deviation else []),
            f"authentication {'OFF' if ring is None else f'on, keys: {ring.source}'}",
        )
    )
