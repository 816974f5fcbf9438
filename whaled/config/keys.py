"""The schema of the configuration: every key as it is declared in `sections`. Pure."""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from whaled.config import units
from whaled.config.fields import MAX_BOOKS, MAX_HOSTS, MAX_WATCH_RULES, RULE_NAME, Option, Reload
from whaled.config.sections import Config

# What a string key expects, by its unit.
SORTS = {
    "path": "a path",
    "url": "a URL",
    "host": "an address or a host name",
    "origin": "an origin",
    "proxy": "an address or a network",
}
LISTED = {"origin": "origins", "proxy": "addresses and networks"}
# The limit of every list of sections.
MAX_SECTIONS = MAX_WATCH_RULES


class Key(Struct, frozen=True):
    """One key of the configuration.

    `annotation` is the type that msgspec checks. `unit` is the unit in which the value is written; None if it has none.
    `default` is msgspec.NODEFAULT if the key is required. `base` is the plain type: str, int, float, bool or tuple.
    `element` describes the elements of a list of plain values, `section` is the type of those of a list of sections. A
    key with base str and an `element` takes either one string or a list of them. `is_reloadable` is True if a reload
    changes the key in a running daemon.
    """

    path: str
    annotation: Any
    unit: str | None
    default: object
    base: type
    choices: tuple[str, ...]
    is_optional: bool
    element: "Key | None" = None
    section: type[Struct] | None = None
    meaning: str = ""
    is_reloadable: bool = False
    option: Option | None = None

    @property
    def is_text(self) -> bool:
        """Return whether a value from outside the file is used as a string without YAML interpretation."""
        return self.base is str

    @property
    def is_number(self) -> bool:
        """Return whether the value is a number without a unit."""
        return self.base in {int, float} and self.unit is None

    @property
    def takes_single(self) -> bool:
        """Return whether a single element may be given in place of a list."""
        return self.unit == "hosts"

    @property
    def allowed(self) -> str:
        """Return a description of the allowed values."""
        if self.element is not None and self.base is str and self.is_optional:
            return f"{self.element.allowed}, a list of at most {MAX_BOOKS} of them, or null"
        return self._wanted + (" or null" if self.is_optional else "")

    @property
    def _wanted(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.base is bool:
            return "true or false"
        if self.section is not None:
            names = ", ".join(self.section.__struct_fields__)
            return f"a list of at most {MAX_SECTIONS} sections with {names}; in the file only"
        if self.takes_single:
            return f"an address or a host name, or a list of at most {MAX_HOSTS}"
        if self.element is not None:
            if self.element.choices:
                return f"a list, each element {self.element.allowed}"
            return f"a list of {LISTED.get(self.element.unit or '', 'strings')}"
        if self.base is str:
            return _string(self.annotation, SORTS.get(self.unit or "", "a string"))
        meta = next(part for part in _parts(self.annotation) if isinstance(part, Meta))
        low, high = meta.ge or 0, meta.le or 0
        if self.unit == "duration":
            return f'a duration with its unit, from "{units.show_duration(low)}" to "{units.show_duration(high)}"'
        if self.unit == "size":
            return f'a size with its unit, from "{units.show_size(int(low))}" to "{units.show_size(int(high))}"'
        sort = "a whole number" if self.base is int else "a number"
        return f"{sort} from {plain_number(low)} to {plain_number(high)}"

    @property
    def variable(self) -> str:
        """Return the name of the environment variable that sets the key."""
        return "WHALED_" + self.path.replace(".", "_").upper()


def _keys(section: Struct, prefix: str) -> Iterator[Key]:
    for found in msgspec.structs.fields(type(section)):
        default = getattr(section, found.name)
        path = f"{prefix}{found.name}"
        if isinstance(default, Struct):
            yield from _keys(default, path + ".")
        else:
            yield _key(path, found.type, default)


def _key(path: str, declared: Any, default: object) -> Key:
    annotation, notes = _split(declared)
    base = _base(annotation)
    held = next((get_args(part)[0] for part in _parts(annotation) if get_origin(part) is tuple), None)
    is_section = isinstance(held, type) and issubclass(held, Struct)
    return Key(
        path,
        annotation,
        unit=_unit(annotation),
        default=default,
        base=base,
        choices=_choices(annotation),
        is_optional=type(None) in get_args(annotation),
        element=_key(f"{path}[]", held, msgspec.NODEFAULT) if held is not None and not is_section else None,
        section=held if is_section else None,
        meaning=next((note for note in notes if isinstance(note, str)), ""),
        is_reloadable=any(isinstance(note, Reload) for note in notes),
        option=next((note for note in notes if isinstance(note, Option)), None),
    )


def _split(declared: Any) -> tuple[Any, tuple[object, ...]]:
    """Split a declaration into the type that msgspec checks and the notes on the key."""
    if get_origin(declared) is not Annotated:
        return declared, ()
    plain, *notes = get_args(declared)
    bounds = tuple(note for note in notes if isinstance(note, Meta))
    return Annotated[plain, *bounds] if bounds else plain, tuple(note for note in notes if note not in bounds)


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and its parts: `Annotated[str, Meta(..)] | None` contains a str and a Meta."""
    yield annotation
    if get_origin(annotation) is Annotated or type(None) in get_args(annotation):
        for part in get_args(annotation):
            yield from _parts(part)


def _unit(annotation: Any) -> str | None:
    for part in _parts(annotation):
        if isinstance(part, Meta) and part.extra is not None:
            return str(part.extra["unit"])
    return None


def _base(annotation: Any) -> type:
    for part in _parts(annotation):
        plain = get_origin(part) or part
        for base in (bool, str, int, float, tuple):
            if isinstance(plain, type) and issubclass(plain, base):
                return base
    raise TypeError(f"no key can have the type {annotation}")


def _string(annotation: Any, sort: str) -> str:
    """Return a description of a string, with its length if that has an upper bound."""
    meta = next((part for part in _parts(annotation) if isinstance(part, Meta)), None)
    if meta is None or meta.max_length is None:
        return sort
    letters = (
        "letters A-Z and a-z, digits, dots, underscores and hyphens" if meta.pattern == RULE_NAME else "characters"
    )
    return f"{sort} of {meta.min_length or 0} to {meta.max_length} {letters}"


def plain_number(value: float) -> str:
    """Format a number without an exponent."""
    return f"{value:.8f}".rstrip("0").rstrip(".")


def _choices(annotation: Any) -> tuple[str, ...]:
    return tuple(str(choice) for choice in annotation) if isinstance(annotation, type(StrEnum)) else ()


def keys() -> dict[str, Key]:
    """Return every key of the configuration by its path."""
    return {key.path: key for key in _keys(Config(), "")}


def reloadable() -> frozenset[str]:
    """Return the paths of the keys that a reload changes in a running daemon."""
    return frozenset(path for path, key in keys().items() if key.is_reloadable)


def options() -> dict[str, Option]:
    """Return the options of `whaled run` that set a key, by the key's path."""
    return {path: key.option for path, key in keys().items() if key.option is not None}


def section_keys(key: Key, index: int) -> dict[str, Key]:
    """Return the keys of one section in a list of sections, by path."""
    if key.section is None:
        raise TypeError(f"{key.path} is not a list of sections")
    paths = [(f"{key.path}[{index}].{found.name}", found) for found in msgspec.structs.fields(key.section)]
    return {path: _key(path, found.type, found.default) for path, found in paths}


def value_at(config: Config, path: str) -> object:
    """Return the value of a key."""
    value: object = config
    for name in path.split("."):
        value = getattr(value, name)
    return value
