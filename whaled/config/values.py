"""Conversion of written values into the values of keys. Faults state what was found and what is allowed. Pure."""

import difflib
import math

import msgspec
import yaml

from whaled.config import units
from whaled.config.given import Given
from whaled.config.keys import Key, plain_number
from whaled.config.origins import origin_fault
from whaled.config.proxies import proxy_fault
from whaled.config.scalars import Scalar, misread, number_meant
from whaled.errors import Fault
from whaled.hosts import listening_fault
from whaled.urls import redacted

# A fault quotes at most this many characters of the value found.
MAX_QUOTED = 80
# Words for true and false. Without quotes, YAML 1.1 reads most of them as booleans.
TRUE_WORDS = frozenset({"true", "yes", "on", "y", "1"})
FALSE_WORDS = frozenset({"false", "no", "off", "n", "0"})


def resolved(text: str) -> object:
    """Return the value of a plain scalar as YAML reads it in a file. Raises ValueError."""
    loader = yaml.SafeLoader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    try:
        value: object = loader.construct_object(yaml.ScalarNode(tag, text))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return value


def plain_value(key: Key, text: str) -> object:
    """Convert a text from outside the file as if it were in the file. Commas separate the elements of a list."""
    if key.base is tuple:
        inner = text.strip().removeprefix("[").removesuffix("]")
        return [item.strip().strip("'\"") for item in inner.split(",") if item.strip()]
    if key.is_text or key.unit is not None:
        return text
    try:
        return resolved(text.strip())
    except ValueError:
        return text


def elements_of(key: Key, given: Given) -> Given:
    """Return the given value; a single host as a list of one."""
    if key.takes_single and not isinstance(given.value, list):
        return msgspec.structs.replace(given, value=[given.value])
    return given


def faults_of_elements(key: Key, given: Given) -> list[Fault]:
    """Return the faults of the elements of a list, each with its source."""
    listed = elements_of(key, given)
    if key.element is None or not isinstance(listed.value, list):
        return []
    faults = []
    for index, found in enumerate(listed.value):
        element = given.elements[index] if given.elements else None
        written = element.written if element is not None else given.written
        try:
            value_of(key.element, found, written)
        except ValueError as error:
            path = key.path if listed is not given else f"{key.path}[{index}]"
            quoted = _quoted(key.element, found, written, is_hidden=given.is_hidden)
            faults.append(
                Fault(path, f"found {quoted}, {error}", element.source if element is not None else given.source)
            )
    return faults


def value_of(key: Key, found: object, written: Scalar | None) -> object:
    """Convert a value found in the configuration to the type of its key. Raises ValueError with what is allowed."""
    if isinstance(found, str) and any(ord(letter) < 32 for letter in found):
        raise ValueError(f"expected {key.allowed}, without control characters")
    if key.unit == "path" and isinstance(found, str) and found.startswith("~"):
        raise ValueError("expected a path; ~ is not expanded, write the whole path")
    value = found
    expected = f"expected {key.allowed}{_near(key, found, written)}"
    try:
        if found is None and key.is_optional:
            pass
        elif key.unit == "duration":
            value = units.duration(found)
        elif key.unit == "size":
            value = units.size(found)
    except ValueError as error:
        raise ValueError(str(error) if "whole number of bytes" in str(error) else expected) from error
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(expected)
    if key.is_number and written is not None and misread(written.text, found) is not None:
        raise ValueError(expected)
    try:
        converted = msgspec.convert(value, key.annotation)
    except msgspec.ValidationError as error:
        raise ValueError(expected) from error
    _check_form(key, converted)
    return converted


def _check_form(key: Key, value: object) -> None:
    """Raise ValueError for an invalid origin, trusted proxy or listening address."""
    if key.unit == "proxy" and isinstance(value, str) and (problem := proxy_fault(value)):
        raise ValueError(problem)
    if key.unit == "origin" and isinstance(value, str) and (problem := origin_fault(value)):
        raise ValueError(problem)
    if key.unit == "host" and isinstance(value, str) and (problem := listening_fault(value)):
        raise ValueError(f"expected {key.allowed}; {problem}")


def _near(key: Key, found: object, written: Scalar | None) -> str:
    """Return a hint at what was probably meant, or an empty string."""
    misreading = misread(written.text, found) if written is not None and not key.is_text else None
    if misreading is not None:
        return f"; {misreading.reading}" + (f": {misreading.remedy}" if key.is_number else "")
    is_number = isinstance(found, int | float) and not isinstance(found, bool) and found > 0
    if key.unit in {"duration", "size"} and is_number:
        return f'; did you mean "{found}{"s" if key.unit == "duration" else "B"}"?'
    if key.choices:
        near = difflib.get_close_matches(found.lower(), key.choices, n=1) if isinstance(found, str) else []
        return f"; did you mean `{near[0]}`?" if near else ""
    if key.is_text:
        return _near_text(key, found, written)
    if key.base is bool:
        return _near_bool(found)
    if key.base is tuple and key.section is None and isinstance(found, str) and 0 < len(found) <= MAX_QUOTED:
        return f"; did you mean [{found!r}], a list of one?"
    return _near_number(key, found, written) if key.is_number and isinstance(found, str) else ""


def _near_text(key: Key, found: object, written: Scalar | None) -> str:
    """Return a hint to quote a string that YAML reads as something else (no as false, 2026-01-01 as a date)."""
    if written is None or isinstance(found, str) or (found is None and key.unit != "origin"):
        return ""
    reading = f"YAML reads {written.text} as {str(found).lower()}; " if isinstance(found, bool) else ""
    return f"; {reading}did you mean {written.text!r}, in quotes?"


def _near_bool(found: object) -> str:
    word = str(found).lower()
    if word in TRUE_WORDS:
        return "; did you mean true?"
    return "; did you mean false?" if word in FALSE_WORDS else ""


def _near_number(key: Key, found: str, written: Scalar | None) -> str:
    meant = number_meant(found)
    if meant is None:
        return ""
    try:
        number = msgspec.convert(meant, key.annotation, strict=False)
    except msgspec.ValidationError:
        return ""
    if number is None:
        return ""
    is_plain = written is not None and written.is_plain
    shown = plain_number(number)
    return f"; write it as {shown}" if is_plain else f"; did you mean {shown}, without quotes?"


def _quoted(key: Key, found: object, written: Scalar | None, *, is_hidden: bool) -> str:
    if is_hidden:
        return f"{len(str(found))} characters"
    if written is not None and not isinstance(found, str):
        text = written.text or "null"
    elif found is None:
        text = "null"
    else:
        shown = redacted(found) if key.unit in {"url", "origin", "host"} and isinstance(found, str) else found
        text = str(shown).lower() if isinstance(shown, bool) else repr(shown)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


def quoted(key: Key, given: Given) -> str:
    """Return the value found as faults quote it."""
    return _quoted(key, given.value, given.written, is_hidden=given.is_hidden)
