"""The phases of a connection, and the only way from one to the next.

A connection asks `after` at every step, and its phase decides what its bytes mean, what may be written, and which timer
runs. A step that the table does not have is a bug: nothing that a client sends may lead to one.

Pure.
"""

from enum import Enum, IntEnum, auto
from typing import Final


class Phase(IntEnum):
    """The phase of a connection, in the order in which it passes through them. It may skip some, but never returns."""

    AGREEING = auto()  # the TLS handshake is under way; without TLS it ends at once
    REQUESTING = auto()  # waits for the handshake request to be complete
    AUTHENTICATING = auto()  # the WebSocket is open, and no valid credential has arrived
    READY = auto()  # admitted: the client has authenticated, or need not
    CLOSING = auto()  # the last frame or response is written: waits for the client's end, for `gateway.close_timeout`
    CLOSED = auto()  # the socket is closed


class Step(Enum):
    """An event that changes the phase."""

    AGREED = auto()  # TLS is agreed, or there is none
    UPGRADED = auto()  # the response that opens the WebSocket is written
    ADMITTED = auto()  # the session admits the client
    ENDED = auto()  # a close frame or the refusal of the request is written, or cannot be written any more
    LOST = auto()  # the socket is closed


class PhaseError(Exception):
    """A step that is impossible in this phase."""


TABLE: Final[dict[tuple[Phase, Step], Phase]] = {
    (Phase.AGREEING, Step.AGREED): Phase.REQUESTING,
    (Phase.AGREEING, Step.ENDED): Phase.CLOSING,
    (Phase.AGREEING, Step.LOST): Phase.CLOSED,
    (Phase.REQUESTING, Step.UPGRADED): Phase.AUTHENTICATING,
    (Phase.REQUESTING, Step.ENDED): Phase.CLOSING,
    (Phase.REQUESTING, Step.LOST): Phase.CLOSED,
    (Phase.AUTHENTICATING, Step.ADMITTED): Phase.READY,
    (Phase.AUTHENTICATING, Step.ENDED): Phase.CLOSING,
    (Phase.AUTHENTICATING, Step.LOST): Phase.CLOSED,
    (Phase.READY, Step.ENDED): Phase.CLOSING,
    (Phase.READY, Step.LOST): Phase.CLOSED,
    (Phase.CLOSING, Step.LOST): Phase.CLOSED,
}


def after(phase: Phase, step: Step) -> Phase:
    """Return the phase that follows. Raises PhaseError."""
    following = TABLE.get((phase, step))
    if following is None:
        raise PhaseError(f"{step.name} in {phase.name}")
    return following
