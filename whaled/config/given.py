"""Values as they were written, and where. Pure."""

from enum import IntEnum

from msgspec import Struct

from whaled.config.scalars import Scalar


class Layer(IntEnum):
    """Where values come from; the higher one counts."""

    FILE = 1
    ENVIRONMENT = 2
    COMMAND_LINE = 3


class Element(Struct, frozen=True):
    """Where an element of a list stands, and how it was written (None: it is no scalar, or that is not known)."""

    source: str
    written: Scalar | None = None


class Given(Struct, frozen=True):
    """A value, how it was written (None: it is no scalar), and where; `elements` are those of a list.

    A list of sections is given as their number; each section and each of its keys is given by its own path. A hidden
    value came from a file that may hold a secret: faults do not quote it.
    """

    value: object
    source: str
    layer: Layer
    written: Scalar | None = None
    elements: tuple[Element, ...] = ()
    is_hidden: bool = False
