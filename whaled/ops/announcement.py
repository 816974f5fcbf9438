"""The log lines of a daemon that has become ready."""

from collections.abc import Sequence

import structlog

from whaled import __version__
from whaled.auth.tokens import KeyRing
from whaled.config.sections import Config
from whaled.ops.systemd import Passed
from whaled.urls import redacted

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def announce(
    config: Config, ring: KeyRing | None, passed: Passed, *, clients: Sequence[str], http: Sequence[str]
) -> None:
    """Log the addresses on which the daemon listens, and its keys."""
    scheme = "wss" if config.gateway.tls.certificate else "ws"
    listen = ", ".join(f"{scheme}://{address}" for address in clients)
    if not config.auth.enabled:
        logger.warning("authentication_disabled", listen=listen)
    if ring is not None:
        logger.info("signing_keys_loaded", source=ring.source, keys=len(ring.verifying))
    for name, sockets in (("gateway", passed.clients), ("http", passed.metrics), ("admin", passed.admin)):
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
