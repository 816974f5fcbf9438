"""Reloads: the configuration is read again, and either all of it is applied or nothing.

Requests, files and the outcome are handled here; `service` applies a new configuration to the parts of the daemon.
"""

import asyncio
import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import structlog
from msgspec import Struct

from whaled.addressbook.loading import read_address_book_apart
from whaled.auth.ring import KeyRing
from whaled.config.meters import ConfigMeter
from whaled.config.parse import not_reloadable
from whaled.config.sections import Config
from whaled.errors import BookError, ConfigError, Fault, OperatorError
from whaled.ops import reloads
from whaled.ops.certificates import load_certificate
from whaled.ops.systemd import Notifier
from whaled.whales.detect import Detector, Rules

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Boot(Struct, frozen=True):
    """The input of a start or a reload: the configuration, and the key ring if authentication is enabled."""

    config: Config
    ring: KeyRing | None
    # The source of each key that is not a default.
    origins: dict[str, str] = {}


class InForce(Struct, frozen=True):
    """The configuration, the detector and the TLS context that a reload replaces; None without TLS."""

    config: Config
    detector: Detector
    tls: ssl.SSLContext | None


class Reloads:
    """The reloads of one run of the daemon.

    `reread` loads the configuration and the keys again; it raises OperatorError. The result of each reload is written
    to `outcome_path`.
    """

    def __init__(self, reread: Callable[[], Boot], notifier: Notifier, meter: ConfigMeter, outcome_path: Path) -> None:
        self._reread = reread
        self._notifier = notifier
        self._meter = meter
        self._outcome_path = outcome_path
        # A request during a reload starts one more reload afterwards: the files may have changed after they were read.
        self._requested = asyncio.Event()
        self._is_reloading = False
        # The reason the last reload was refused; None if it was not.
        self.problem: str | None = None

    def request(self) -> None:
        """Request a reload."""
        if self._is_reloading:
            logger.info("reload_queued")
        self._requested.set()

    async def run(
        self, in_force: Callable[[], InForce], apply: Callable[[Boot, Detector], None], ended: Callable[[], None]
    ) -> None:
        """Reload on each request, until cancelled. `ended` is called at the end of each reload, applied or not."""
        reloads.forget(self._outcome_path)  # not earlier: until the event log is open, another whaled may own the file
        while True:
            await self._requested.wait()
            self._requested.clear()
            self._is_reloading = True
            await self._reload(in_force(), apply, ended)
            self._is_reloading = False

    async def _reload(
        self, in_force: InForce, apply: Callable[[Boot, Detector], None], ended: Callable[[], None]
    ) -> None:
        """Read the configuration again, and apply either all of it or nothing.

        Everything is read outside the event loop before anything is applied. The new values are applied without an
        await in between.
        """
        began_s = time.monotonic()
        self._notifier.reloading()
        logger.info("reload_started")
        self.problem = None
        ring: KeyRing | None = None
        try:
            boot, detector = await self._read(in_force)
        except OperatorError as error:
            about: dict[str, object] = {}
            if isinstance(error, BookError):
                self._meter.book_refused(error.reason)
                about = {"address_book": error.reason, "addresses_in_force": len(in_force.detector.book.owners)}
            logger.error("reload_refused", problem=str(error), **about)  # noqa: TRY400 - the operator's fault, not a bug: no traceback
            self.problem = str(error)
        except Exception as error:
            # A bug, before anything was applied. The reload must still be reported as finished: systemd waits for that.
            logger.exception("reload_failed")
            self.problem = f"a bug, the log has the traceback: {type(error).__name__}"
        else:
            apply(boot, detector)
            ring = boot.ring
        self._meter.reloaded(time.time(), success=self.problem is None)
        ended()
        await asyncio.to_thread(self._leave_outcome, began_s, ring.signing.kid if ring is not None else None)
        self._notifier.ready()

    async def _read(self, in_force: InForce) -> tuple[Boot, Detector]:
        """Read all files. Raises OperatorError for whatever cannot be applied."""
        boot = await asyncio.to_thread(self._reread)
        moved = not_reloadable(in_force.config, boot.config)
        if moved:
            raise ConfigError(
                tuple(Fault(key, "cannot change while running: restart whaled to change it") for key in moved)
            )
        settings, old = boot.config.detection, in_force.detector
        is_same = settings.books == in_force.config.detection.books
        book = await read_address_book_apart(settings, boot.origins, in_force=len(old.book.owners) if is_same else None)
        detector = old.with_rules(Rules.of(settings), book)
        if in_force.tls is not None:
            load_certificate(in_force.tls, boot.config.gateway.tls)
        return boot, detector

    def _leave_outcome(self, began_s: float, signing_key: str | None) -> None:
        """Write the outcome file that `systemctl reload` and `whaled reload` wait for."""
        try:
            reloads.write(self._outcome_path, reloads.Outcome(os.getpid(), began_s, self.problem, signing_key))
        except OSError as error:
            logger.warning("reload_outcome_unstored", path=str(self._outcome_path), problem=error.strerror)
