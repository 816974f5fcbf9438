"""The daemon, and the only module that wires the packages together.

The nesting of the context managers is the order of the start, and its reverse the order of the shutdown.
"""

import asyncio
import os
import secrets
import signal
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import structlog

from whaled import __version__
from whaled.addressbook.loading import read_address_book_apart
from whaled.addressbook.reports import BookReports
from whaled.auth.ring import KeyRing
from whaled.auth.tokens import TokenAuthenticator
from whaled.backfill.context import Context
from whaled.backfill.worker import Worker
from whaled.canary import Canary, Subscriber
from whaled.errors import ExitStatus, most_informative
from whaled.eventlog import queries
from whaled.eventlog.store import EventLog
from whaled.gateway.admission import TURNED_AWAY
from whaled.gateway.listener import Reserve
from whaled.gateway.server import Gateway
from whaled.ingest.committer import Committer
from whaled.ingest.ingest import Ingest
from whaled.ingest.intake import Inputs, Intake
from whaled.metrics import Metrics
from whaled.model import Alert
from whaled.ops import descriptors, logs, memory, reloads
from whaled.ops.certificates import certificate_expiry, tls_context
from whaled.ops.memory_watch import MemoryWatch
from whaled.ops.starts import Starts
from whaled.ops.status import Status, report_status
from whaled.ops.systemd import Notifier, Passed
from whaled.ops.watchdog import LoopWatch, feed_watchdog
from whaled.reloading import Boot, InForce, Reloads
from whaled.source import Stream
from whaled.sources.mempool_space.backend import Backend
from whaled.sources.mempool_space.changes import canary_change
from whaled.sources.mempool_space.feed import Feed
from whaled.sources.mempool_space.rest import Rest
from whaled.sources.mempool_space.survey import Survey
from whaled.urls import redacted
from whaled.web import app as web
from whaled.whales.detect import Detector, Rules

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The longest time that a stop waits for the message being handled to be committed.
FINISH_MESSAGE_S = 3.0
# The longest time that a second signal waits for log lines that are not written yet.
LAST_LINES_S = 0.5


class _Running(NamedTuple):
    """The parts of the running daemon that its tasks use and a reload changes."""

    gateway: Gateway
    ingest: Ingest
    intake: Intake
    committer: Committer
    event_log: EventLog
    canary: Canary
    memory_watch: MemoryWatch
    tls: ssl.SSLContext | None
    backfill: Worker | None
    survey: Survey
    http: web.HttpServer


class Service:
    """One run of the daemon, from the start to the end of the drain.

    `reread` loads the configuration and the keys again for a reload; it raises OperatorError. `passed` are the sockets
    that systemd listens on; they take precedence over the hosts and ports of the configuration.
    """

    def __init__(self, boot: Boot, *, reread: Callable[[], Boot], passed: Passed) -> None:
        self.config = boot.config
        self._origins = boot.origins
        self._ring = boot.ring
        self._passed = passed
        self.metrics = Metrics()
        self.notifier = Notifier()
        self._authenticator = (
            TokenAuthenticator(boot.ring, boot.config.auth, new_token_id=lambda: secrets.token_urlsafe(16))
            if boot.ring is not None
            else None
        )
        self._stop = asyncio.Event()
        self._reloads = Reloads(
            reread,
            self.notifier,
            self.metrics.config,
            reloads.outcome_path(os.environ, Path(boot.config.eventlog.path)),
        )
        self._books = BookReports(self.metrics.config)

    def stop(self) -> None:
        """Request the end of the run: drain the clients, then return from `run`. A second call ends the process."""
        if self._stop.is_set():
            # Committed events are safe, and the operator who sends a second signal accepts that clients are cut off.
            logger.warning("stop_forced")
            logs.flush(LAST_LINES_S)
            os._exit(ExitStatus.FAILED)
        self._stop.set()

    async def run(self) -> None:
        """Run until `stop`. Raises OperatorError if it cannot start, EventLogError if the log fails."""
        try:
            with self._signals():
                await self._run()
        except BaseExceptionGroup as group:
            raise most_informative(group) from group

    async def _run(self) -> None:
        config = self.config
        descriptors.check(beside=self._other_descriptors())
        tls = tls_context(config.gateway.tls)
        book = await read_address_book_apart(config.detection, self._origins)
        self._books.report(config.detection, book, self._origins)
        detector = Detector(Rules.of(config.detection), book, seen_limit=config.detection.seen_limit)
        async with (
            EventLog.open(config.eventlog, self.metrics.eventlog) as event_log,
            Rest.open(config.upstream, self.metrics.rest) as rest,
        ):
            gateway = Gateway(
                config.gateway,
                config.auth,
                event_log=event_log,
                authenticator=self._authenticator,
                meter=self.metrics.gateway,
                tls=tls,
                connections_possible=self._connections_possible(),
            )
            ingest = Ingest(detector)
            committer = Committer(
                event_log=event_log,
                publisher=gateway,
                meter=self.metrics.detection,
                settled=ingest.forget,
                last_whale=await self._newest_whale(event_log),
            )
            intake = Intake(
                ingest=ingest,
                committer=committer,
                event_log=event_log,
                publisher=gateway,
                priority=gateway.share,
                meter=self.metrics.detection,
                inputs=self._inputs(rest),
            )
            starts = await Starts.recalled(event_log, self.metrics.starts)  # before /metrics is served
            del book, detector  # a reload replaces them: this stack frame must not keep the old ones in memory
            with Subscriber.connected(gateway.rehearsal) as subscriber:
                backfill = self._worker(rest, event_log, committer, ingest)
                canary = Canary(
                    config.canary,
                    send=lambda txid: intake.rehearse(partial(canary_change, txid)),
                    subscriber=subscriber,
                    meter=self.metrics.canary,
                )
                memory_watch = MemoryWatch(config.memory, gateway, self.metrics.memory, memory.Gauge())
                survey = Survey(
                    config.upstream,
                    rest,
                    event_log,
                    self.metrics.survey,
                    is_backfilling=config.backfill.enabled,
                    on_network=lambda network: self._books.on_network(network, ingest.detector.book),
                )
                http = self._http_server(gateway, canary, intake)
                running = _Running(
                    gateway, ingest, intake, committer, event_log, canary, memory_watch, tls, backfill, survey, http
                )
                async with (
                    gateway.serving(self._passed.clients),
                    http.serving(self._passed.metrics),
                ):
                    self._observe_keys(self._ring)
                    await starts.began()
                    self._announce(gateway.addresses, http.addresses)
                    await self._work(running)
                await starts.ended()
        logger.info("daemon_stopped")

    async def _work(self, running: "_Running") -> None:
        gateway, event_log, backfill = running.gateway, running.event_log, running.backfill
        survey = running.survey
        feed = Feed(self.config.upstream, self.metrics.feed, surveyor=survey)
        loop_watch = LoopWatch(self.metrics.loop)
        async with asyncio.TaskGroup() as tasks:
            until_stop = [
                tasks.create_task(self._ingest(feed, running.intake, backfill), name="ingest"),
                tasks.create_task(self._retain(event_log), name="retention"),
                tasks.create_task(survey.run(), name="survey"),
                tasks.create_task(running.canary.run(), name="canary"),
                *([tasks.create_task(backfill.run(), name="backfill")] if backfill is not None else []),
                tasks.create_task(report_status(self.notifier, lambda: self._status(running))),
                tasks.create_task(self._reload(running), name="reload"),
            ]
            # These also run during the drain, so that the watchdog ends a loop that hangs in it.
            until_end = [
                tasks.create_task(loop_watch.run(), name="loop watch"),
                tasks.create_task(running.memory_watch.run(), name="memory watch"),
                tasks.create_task(feed_watchdog(self.notifier, loop_watch, running.canary.is_alive), name="watchdog"),
            ]
            await self._stop.wait()
            self.notifier.stopping()
            logger.info("daemon_stopping", clients=gateway.connections)
            try:
                async with asyncio.timeout(FINISH_MESSAGE_S):
                    await running.committer.idle()
            except TimeoutError:
                logger.warning("stop_message_abandoned")
            for task in until_stop:
                task.cancel()
            await gateway.drain(self.config.gateway.drain_window)
            for task in until_end:
                task.cancel()

    @staticmethod
    async def _ingest(stream: Stream, intake: Intake, backfill: Worker | None) -> None:
        """Take one message after the other. The backfill observes each after its events were committed."""
        async with aclosing(stream.messages()) as messages:
            async for message in messages:
                await intake.take(message)
                if backfill is not None:
                    backfill.observe(message)

    async def _newest_whale(self, event_log: EventLog) -> tuple[Alert, float] | None:
        """Return the newest whale of earlier runs and the time of its alert, for the status line and the metric."""
        newest = await event_log.read(queries.newest_alert)
        if newest is None:
            return None
        self.metrics.detection.last_whale(newest.at)
        return newest.whale.alert, newest.at

    def _status(self, running: "_Running") -> str:
        gateway = running.gateway
        text = Status(
            upstream=gateway.upstream,
            shortfall=running.intake.shortfall,
            clients=gateway.connections,
            last_whale=running.committer.last_whale,
            head=running.event_log.head,
            addresses=gateway.addresses,
            owners=running.ingest.detector.book.owners,
            is_short_of_memory=gateway.is_short_of_memory,
        ).line()
        return text if self._reloads.problem is None else f"{text}; the last reload was refused"

    def _connections_possible(self) -> int:
        return descriptors.connections_possible(self.config.gateway.max_connections, beside=self._other_descriptors())

    def _other_descriptors(self) -> int:
        """Return the number of descriptors for refused and HTTP connections and the reserve; see docs/operations.md."""
        return TURNED_AWAY + Reserve.SIZE + self.config.http.max_connections

    def _inputs(self, rest: Rest) -> Inputs | None:
        detection = self.config.detection
        return partial(rest.prevouts, deadline_s=detection.inputs_wait) if detection.fetch_inputs else None

    def _worker(self, rest: Rest, event_log: EventLog, committer: Committer, ingest: Ingest) -> Worker | None:
        settings = self.config.backfill
        if not settings.enabled:
            return None
        return Worker(
            Context(
                settings=settings,
                backend=Backend(rest, settings.requests_per_second, settings.concurrency),
                event_log=event_log,
                committer=committer,
                ingest=ingest,
                meter=self.metrics.backfill,
            )
        )

    async def _retain(self, event_log: EventLog) -> None:
        while True:
            await event_log.prune(time.time(), follows_blocks=self.config.backfill.enabled)
            await asyncio.sleep(self.config.eventlog.prune_interval)

    def _http_server(self, gateway: Gateway, canary: Canary, intake: Intake) -> web.HttpServer:
        def health() -> web.Health:
            return web.Health(
                status="stopping" if self._stop.is_set() else "ok" if canary.is_alive() else "stalled",
                upstream=gateway.upstream,
                shortfall=intake.shortfall,
                connections=gateway.connections,
                position=gateway.position(),
                version=__version__,
            )

        return web.HttpServer(self.config.http, metrics=self.metrics.render, health=health, meter=self.metrics.http)

    def _observe_keys(self, ring: KeyRing | None) -> None:
        self.metrics.credentials.ring(ring)
        certificate = self.config.gateway.tls.certificate
        if certificate is not None:
            self.metrics.credentials.certificate(certificate_expiry(certificate))

    def _announce(self, clients: Sequence[str], http: Sequence[str]) -> None:
        config = self.config
        scheme = "wss" if config.gateway.tls.certificate else "ws"
        listen = ", ".join(f"{scheme}://{address}" for address in clients)
        if not config.auth.enabled:
            logger.warning("authentication_disabled", listen=listen)
        if self._ring is not None:
            logger.info("signing_keys_loaded", source=self._ring.source, keys=len(self._ring.verifying))
        for name, sockets in (("gateway", self._passed.clients), ("http", self._passed.metrics)):
            if sockets:
                logger.info("systemd_sockets_used", section=name)
        logger.info(
            "daemon_ready",
            version=__version__,
            listen=listen,
            metrics=", ".join(f"http://{address}/metrics" for address in http) or None,
            upstream=redacted(config.upstream.url),
            threshold_btc=config.detection.threshold_btc,
        )
        self.notifier.ready()

    # --- signals and reload ---

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Handle signals from the first file opened to the last one closed.

        The default action of each of these signals would kill the process.
        """
        loop = asyncio.get_running_loop()
        handlers: dict[signal.Signals, Callable[[], None]] = {
            signal.SIGTERM: self.stop,
            signal.SIGINT: self.stop,
            signal.SIGHUP: self._request_reload,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def _request_reload(self) -> None:
        if self._stop.is_set():
            logger.warning("reload_ignored")
            return
        self._reloads.request()

    async def _reload(self, running: "_Running") -> None:
        """Reload on each request, until cancelled."""

        def in_force() -> InForce:
            return InForce(self.config, running.ingest.detector, running.tls)

        await self._reloads.run(in_force, partial(self._apply, running), running.http.render_anew)

    def _apply(self, running: "_Running", boot: Boot, detector: Detector) -> None:
        """Apply the new configuration in one step."""
        self.config = boot.config
        if self._authenticator is not None and boot.ring is not None:
            self._authenticator.replace_ring(boot.ring, boot.config.auth)
        logs.configure(self.config.log)
        running.ingest.detector = detector
        running.gateway.reconfigure(
            self.config.gateway, self.config.auth, self._authenticator, self._connections_possible()
        )
        running.canary.reconfigure(self.config.canary)
        running.memory_watch.reconfigure(self.config.memory)
        running.http.reconfigure(self.config.http)
        self._observe_keys(boot.ring)
        self._books.report(boot.config.detection, detector.book, boot.origins)
        logger.info("reload_finished", addresses=len(detector.book.owners))
