"""File descriptors: the number of client connections that the current limit allows."""

import resource

import structlog

from whaled.errors import DescriptorsError

logger: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The descriptors of the daemon itself: event log, listeners, the backend's WebSocket and REST, epoll.
OWN = 128


def check(*, beside: int) -> None:
    """Raise DescriptorsError if the hard limit leaves no descriptor for a client.

    `beside` is the number of descriptors needed in addition to those of clients and OWN.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = beside + OWN + 1
    if hard != resource.RLIM_INFINITY and hard < least:
        raise DescriptorsError(hard, least)


def connections_possible(wanted: int, *, beside: int) -> int:
    """Raise this process's soft limit as far as `wanted` connections and `beside` descriptors need.

    Return the number of connections that fit within the limit, at least 1.
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
            "descriptor_limit_low",
            connections_possible=possible,
            max_connections=wanted,
            descriptors=soft,
            needed=needed,
        )
    return possible
