"""`whaled run`: the daemon."""

import argparse
import asyncio
import os
import signal

import structlog

from whaled.auth.sources import load_ring
from whaled.cli.options import Subparsers
from whaled.cli.settings import add_config_option, add_run_options, load_for, working_directory
from whaled.errors import ExitStatus, WhaledError
from whaled.ops import dumps, logs, memory
from whaled.ops.systemd import Passed, passed_sockets
from whaled.reloading import Boot
from whaled.service import Service

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def register(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "run",
        help="run the daemon",
        description="Run the daemon until SIGTERM or SIGINT; SIGHUP reloads, SIGUSR1 and SIGUSR2 are ignored. "
        "Options override environment variables (WHALED_SECTION_KEY), which override the configuration file.",
        epilog="exit status: 0 stopped by a signal; 78 a fault of the configuration, key ring or port; 1 a failure of "
        "the event log, a second signal, or a bug",
    )
    add_config_option(parser)
    add_run_options(parser)
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="use the bundled simulated mempool backend: whales within seconds, with invented owners; it needs an "
        "event log of its own, which is recreated at each start",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the daemon. Raises OperatorError if it cannot start, EventLogError if the log fails."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # by default they end the process, and log rotation often sends them
    dumps.forbid()
    memory.keep_large_apart()
    memory.share_heap()
    loaded = load_for(arguments)
    logs.configure(loaded.config.log)
    logger.info("configuration_read", file=loaded.path or "none, all defaults", keys_set=loaded.keys_set)
    for warning in loaded.warnings:
        logger.warning("configuration_warning", problem=str(warning))
    memory.set_modules_apart()
    memory.collect_all_seldom()
    try:
        asyncio.run(_run(arguments, passed_sockets(os.environ)))
    except WhaledError:
        raise
    except Exception:
        # Logged here, since the interpreter would print it and block on a reader of stderr that does not read.
        logger.critical("daemon_crashed", exc_info=True)
        return ExitStatus.FAILED
    return ExitStatus.STOPPED


async def _run(arguments: argparse.Namespace, passed: Passed) -> None:
    def load() -> Boot:
        loaded = load_for(arguments)
        ring = load_ring(loaded.config.auth, os.environ, working_directory()) if loaded.config.auth.enabled else None
        return Boot(loaded.config, ring, loaded.origins)

    if not arguments.simulate:
        await Service(load(), reread=load, passed=passed).run()
        return
    from whaled.cli import demo  # noqa: PLC0415 - only here: the daemon of a real backend loads no code of the simulator

    async with demo.backend() as simulated:
        arguments.mempool_url = simulated.url
        boot = demo.with_owners(load())
        await demo.begin_log(boot.config.eventlog, simulated.world)
        await Service(boot, reread=lambda: demo.with_owners(load()), passed=passed).run()
