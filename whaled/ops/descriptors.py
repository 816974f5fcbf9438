"""File descriptors: how many client connections there may be below the limit in force."""

import resource

import structlog

from whaled.errors import DescriptorsError

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Those of the daemon itself: log, listeners, upstream, REST, epoll.
OWN = 128


def check(*, beside: int) -> None:
    """Raise DescriptorsError if the limit leaves no descriptor for a client besides `beside` and the daemon's own."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = beside + OWN + 1
    if hard != resource.RLIM_INFINITY and hard < least:
        raise DescriptorsError(hard, least)


def connections_possible(wanted: int, *, beside: int) -> int:
    """Raise this process's limit as far as `wanted` connections and `beside` descriptors need; returns how many
    connections fit below what the hard limit allows, 1 at least.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + beside + OWN
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    possible = wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - beside - OWN))
    if possible < wanted:
        logger.error(
            "fewer client connections are possible than gateway.max_connections: file descriptors are limited; raise "
            "LimitNOFILE= (without systemd: ulimit -n)",
            connections_possible=possible,
            max_connections=wanted,
            descriptors=soft,
            needed=needed,
        )
    return possible
