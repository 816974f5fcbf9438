"""Values from environment variables and from the files they name; ignores variables that are not meant for whaled."""

import difflib
import ipaddress
import os
import re
import stat
from collections.abc import Callable, Mapping

from whaled.config import units
from whaled.config.given import Given, Layer
from whaled.config.keys import Key
from whaled.config.scalars import Scalar
from whaled.config.values import plain_value
from whaled.errors import Fault, reason_of

PREFIX = "WHALED_"
# A variable with this suffix names a file that holds the value: Docker and Kubernetes provide secrets as files.
FILE_SUFFIX = "_FILE"
# Variables that other commands of whaled use.
RESERVED_VARIABLES = frozenset({"WHALED_TOKEN", "WHALED_URL"})
# A list of 1,000 origins has 32 KiB. The limit rejects a wrong file (a database, /dev/zero) without reading all of it.
MAX_VALUE_BYTES = 64 * 1024
MAX_NAMED = 4

# Kubernetes sets variables for each Service of the namespace in every container, also for one named `whaled` or
# `whaled-gateway` (https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables).
_URL = re.compile(r"(tcp|udp|sctp)://(\[[0-9A-Fa-f:.]+\]|[^:/]+):[0-9]{1,5}")


def _is_address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


def _is_url(value: str) -> bool:
    return _URL.fullmatch(value) is not None


_SERVICE_LINKS: tuple[tuple[re.Pattern[str], Callable[[str], bool]], ...] = tuple(
    (re.compile(rf"WHALED(_[A-Z0-9_]+)?_{ending}"), check)
    for ending, check in (
        ("SERVICE_HOST", _is_address),
        ("SERVICE_PORT(_[A-Z0-9_]+)?", str.isdecimal),
        ("PORT", _is_url),
        ("PORT_[0-9]{1,5}_(TCP|UDP|SCTP)", _is_url),
        ("PORT_[0-9]{1,5}_(TCP|UDP|SCTP)_PROTO", frozenset({"tcp", "udp", "sctp"}).__contains__),
        ("PORT_[0-9]{1,5}_(TCP|UDP|SCTP)_PORT", str.isdecimal),
        ("PORT_[0-9]{1,5}_(TCP|UDP|SCTP)_ADDR", _is_address),
    )
)


def from_environment(
    environ: Mapping[str, str], schema: Mapping[str, Key], faults: list[Fault], warnings: list[Fault]
) -> dict[str, Given]:
    """Return the values that environment variables set, by path. Reads the files that variables name."""
    variables = {key.variable: key for key in schema.values()}
    files = {name + FILE_SUFFIX: key for name, key in variables.items() if name + FILE_SUFFIX not in variables}
    given: dict[str, Given] = {}
    links: list[str] = []
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name in RESERVED_VARIABLES:
            continue
        if is_service_link(name, text):
            links.append(name)
            continue
        source = f"environment variable {name}"
        key = variables.get(name) or files.get(name)
        if key is None:
            faults.append(Fault("", f"no such setting{_meant(name, variables, files)}", source))
        elif key.section is not None:
            faults.append(Fault(key.path, "a variable cannot hold a list of sections: write it in the file", source))
        elif name in variables:
            given[key.path] = _given(key, text, source)
        elif key.variable in environ and not is_service_link(key.variable, environ[key.variable]):
            faults.append(Fault(key.path, f"{key.variable} is set too: unset one of them", source))
        else:
            try:
                value = _fitting(key, read_value(text), text)
                given[key.path] = _given(key, value, f"{source} ({text})", is_hidden=True)
            except ValueError as error:
                faults.append(Fault(key.path, str(error), source))
    if links:
        warnings.append(_about_links(links))
    return given


def is_service_link(name: str, value: str) -> bool:
    """Return whether Kubernetes made a variable for a Service whose name begins with `whaled`."""
    return any(pattern.fullmatch(name) and check(value) for pattern, check in _SERVICE_LINKS)


def read_value(path: str) -> str:
    """Return the text of a file without trailing line ends. Raises ValueError with the reason."""
    if not path:
        raise ValueError("names no file")
    try:
        # A pipe is refused: the configuration is read more than once, and a pipe without a writer would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError(f"{path} is not a regular file")
            raw = os.read(descriptor, MAX_VALUE_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {reason_of(error)}") from error
    if len(raw) > MAX_VALUE_BYTES:
        raise ValueError(f"{path} is larger than {units.show_size(MAX_VALUE_BYTES)}: it cannot be the value of a key")
    try:
        return raw.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start + 1})") from None  # the cause may quote a secret


def _fitting(key: Key, value: str, path: str) -> str:
    """Return the value from a file. Raises ValueError if it is empty, or contents where a path is expected."""
    if not value.strip() and key.base is not tuple:
        raise ValueError(f"{path} is empty")
    if key.unit == "path" and ("\n" in value or value.lstrip().startswith("{")):
        raise ValueError(f"{path} has {len(value)} characters that are not a path: it must contain the path of a file")
    return value


def _given(key: Key, text: str, source: str, *, is_hidden: bool = False) -> Given:
    written = Scalar(text.strip(), True) if key.base is not tuple else None
    return Given(plain_value(key, text), source, Layer.ENVIRONMENT, written, is_hidden=is_hidden)


def _meant(name: str, variables: Mapping[str, Key], files: Mapping[str, Key]) -> str:
    # The common prefix and suffix are removed, because they would make all names similar.
    suffix = FILE_SUFFIX if name.endswith(FILE_SUFFIX) else ""
    known = {each.removeprefix(PREFIX).removesuffix(suffix): each for each in (files if suffix else variables)}
    near = difflib.get_close_matches(name.removeprefix(PREFIX).removesuffix(suffix), known, n=1)
    return f"; did you mean `{known[near[0]]}`?" if near else ""


def _about_links(links: list[str]) -> Fault:
    names = ", ".join(links[:MAX_NAMED]) + (f" and {len(links) - MAX_NAMED} more" if len(links) > MAX_NAMED else "")
    return Fault(
        "",
        f"{names}: ignored, Kubernetes sets them for a Service whose name begins with `whaled`; "
        "`enableServiceLinks: false` in the pod's spec prevents them",
        "environment",
    )
