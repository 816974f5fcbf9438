"""Values as they were written, with their sources. Pure."""

from enum import IntEnum

from msgspec import Struct

from whaled.config.scalars import Scalar


class Layer(IntEnum):
    """The layers of the configuration; a higher layer overrides a lower one."""

    FILE = 1
    ENVIRONMENT = 2
    COMMAND_LINE = 3


class Element(Struct, frozen=True):
    """The source of an element of a list, and its text as written; None if it is not a scalar or is unknown."""

    source: str
    written: Scalar | None = None


class Given(Struct, frozen=True):
    """A value, its source, and its text as written (None if it is not a scalar). `elements` are those of a list.

    For a list of sections, the value is their number; each section and each of its keys has its own path. A hidden
    value comes from a file that may hold a secret: faults do not quote it.
    """

    value: object
    source: str
    layer: Layer
    written: Scalar | None = None
    elements: tuple[Element, ...] = ()
    is_hidden: bool = False
