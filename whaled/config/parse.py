"""From YAML text, environment and command line to a Config. Every fault is found at once, with where it stands."""

import difflib
import ipaddress
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import yaml
from msgspec import Struct

from whaled.config import units
from whaled.config.keys import RELOADABLE, Key, keys
from whaled.config.sections import Config
from whaled.errors import ConfigError, Fault

SYSTEM_FILE = Path("/etc/whaled/whaled.yaml")
# Nobody writes a configuration of this size; a wrong file (a log, a database) is named instead of parsed.
MAX_FILE_BYTES = 256 * 1024
# Variables of other commands of whaled.
RESERVED_VARIABLES = frozenset({"WHALED_TOKEN", "WHALED_URL"})


class Given(Struct, frozen=True):
    """A value as it was written, and where."""

    value: object
    source: str


class Loaded(Struct, frozen=True):
    """The configuration, and where each value that is not a default came from."""

    config: Config
    origins: dict[str, str]
    path: str | None = None


def load(path: Path | None, *, environ: Mapping[str, str], flags: Mapping[str, object]) -> Loaded:
    """The configuration in a file, the system's file if `path` is None and it exists, or else the defaults.

    `flags` are values by key path. Raises ConfigError with every fault.
    """
    if path is None and SYSTEM_FILE.exists():
        path = SYSTEM_FILE
    if path is None:
        return parse("", source="", environ=environ, flags=flags)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigError(
                (Fault("", f"larger than {units.show_size(MAX_FILE_BYTES)}: no configuration", str(path)),)
            )
        text = raw.decode("utf-8")
    except OSError as error:
        raise ConfigError((Fault("", f"cannot read it: {error.strerror or error}", str(path)),)) from error
    except UnicodeDecodeError as error:
        raise ConfigError((Fault("", f"not UTF-8 at byte {error.start}", str(path)),)) from error
    loaded = parse(text, source=str(path), environ=environ, flags=flags)
    return Loaded(loaded.config, loaded.origins, str(path))


def parse(text: str, *, source: str, environ: Mapping[str, str], flags: Mapping[str, object]) -> Loaded:
    """Command line over environment over file over defaults. Raises ConfigError with every fault."""
    schema = keys()
    faults: list[Fault] = []
    given = _from_file(text, source, schema, faults)
    given |= _from_environment(environ, schema, faults)
    given |= {path: Given(value, "command line") for path, value in flags.items()}
    values = {}
    for path, key in schema.items():
        if path in given:
            values[path] = _convert(key, given[path], faults)
        else:
            values[path] = key.default
    config = _build(Config(), "", values)
    if not faults:
        faults.extend(_impossible(config, given))
    if faults:
        raise ConfigError(tuple(faults))
    return Loaded(config, {path: found.source for path, found in given.items()})


def changed(old: Config, new: Config) -> tuple[str, ...]:
    """Paths of the keys that differ."""
    return tuple(path for path in keys() if _get(old, path) != _get(new, path))


def not_reloadable(old: Config, new: Config) -> tuple[str, ...]:
    """Paths of the keys that differ and cannot change while whaled runs."""
    return tuple(path for path in changed(old, new) if path not in RELOADABLE)


# --- the file ---------------------------------------------------------------------------------------------------------


def _from_file(text: str, source: str, schema: Mapping[str, Key], faults: list[Fault]) -> dict[str, Given]:
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                faults.append(Fault("", "aliases (`*name`) are not supported: write the value", _at(source, event)))
                return {}
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark is not None else source
        faults.append(Fault("", f"not valid YAML: {error.problem or error.context}", where))
        return {}
    except (yaml.YAMLError, RecursionError) as error:
        faults.append(Fault("", f"not valid YAML: {error}", source))
        return {}
    given: dict[str, Given] = {}
    if root is not None:
        _walk(root, "", source, schema, given, faults)
    return given


def _walk(
    node: yaml.Node,
    prefix: str,
    source: str,
    schema: Mapping[str, Key],
    given: dict[str, Given],
    faults: list[Fault],
) -> None:
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
        return  # a section whose keys are all commented out
    if not isinstance(node, yaml.MappingNode):
        name = prefix.removesuffix(".")
        faults.append(Fault(name, "expected keys and values (`key: value`)", _at(source, node)))
        return
    sections = {path[: index + 1] for path in schema for index, letter in enumerate(path) if letter == "."}
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        name = str(key_node.value)
        path = prefix + name
        if name in seen:
            faults.append(Fault(path, f"stands here again, first at line {seen[name]}", _at(source, key_node)))
            continue
        seen[name] = key_node.start_mark.line + 1
        if f"{path}." in sections:
            _walk(value_node, f"{path}.", source, schema, given, faults)
        elif path in schema:
            try:
                value = yaml.SafeLoader("").construct_object(value_node, deep=True)
            except (yaml.YAMLError, ValueError) as error:
                faults.append(Fault(path, f"not a value YAML knows: {error}", _at(source, value_node)))
                continue
            given[path] = Given(value, _at(source, value_node))
        else:
            faults.append(Fault(path, "no such key" + _meant(path, [*schema, *sections]), _at(source, key_node)))


def _at(source: str, node: Any) -> str:
    return f"{source}:{node.start_mark.line + 1}"


def _meant(path: str, known: Iterable[str]) -> str:
    """What a misspelt key may have meant: near its spelling, or the same name elsewhere."""
    prefix, _, name = path.rpartition(".")
    split = [key.removesuffix(".").rpartition(".") for key in known]
    siblings = [last for parent, _, last in split if parent == prefix]
    near = difflib.get_close_matches(name, siblings, n=1)
    if near:
        return f"; did you mean `{near[0]}`?"
    elsewhere = [parent for parent, _, last in split if last == name]
    if elsewhere:
        return f"; did you mean `{elsewhere[0]}.{name}`?"
    return f"; known here are {', '.join(sorted(siblings))}" if siblings else ""


# --- the environment --------------------------------------------------------------------------------------------------


def _from_environment(environ: Mapping[str, str], schema: Mapping[str, Key], faults: list[Fault]) -> dict[str, Given]:
    variables = {key.variable: key for key in schema.values()}
    given = {}
    for name, text in environ.items():
        if not name.startswith("WHALED_") or name in RESERVED_VARIABLES:
            continue
        key = variables.get(name)
        if key is None:
            near = difflib.get_close_matches(name, variables, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            faults.append(Fault("", f"no such setting{hint}", f"environment variable {name}"))
            continue
        given[key.path] = Given(_scalar(key, text), f"environment variable {name}")
    return given


def _scalar(key: Key, text: str) -> object:
    """A text from outside the file, read as the file would read it."""
    if key.is_text or key.unit is not None:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


# --- values -----------------------------------------------------------------------------------------------------------


def _convert(key: Key, given: Given, faults: list[Fault]) -> object:
    value = given.value
    try:
        if given.source == "command line" and isinstance(value, str):
            value = _scalar(key, value)
        if key.unit == "duration":
            value = units.duration(value)
        elif key.unit == "size":
            value = units.size(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("expected a finite number")
        return msgspec.convert(value, key.type)
    except msgspec.ValidationError as error:
        problem = f"expected one of {', '.join(key.choices)}" if key.choices else str(error).split(" - at ")[0]
        problem = problem[0].lower() + problem[1:]
    except ValueError as error:
        problem = str(error)
    faults.append(Fault(key.path, f"found {given.value!r}, {problem}", given.source))
    return key.default


def _build(section: Struct, prefix: str, values: Mapping[str, object]) -> Any:
    fields: dict[str, object] = {}
    for name in section.__struct_fields__:
        default = getattr(section, name)
        path = f"{prefix}{name}"
        fields[name] = _build(default, path + ".", values) if isinstance(default, Struct) else values[path]
    return type(section)(**fields)


def _get(config: Config, path: str) -> object:
    value: object = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


# --- what cannot be together ------------------------------------------------------------------------------------------


def _impossible(config: Config, given: Mapping[str, Given]) -> Iterator[Fault]:
    for path, problem in (*_bad_urls(config), *_contradictions(config, given)):
        yield Fault(path, problem, given[path].source if path in given else "")


def _bad_urls(config: Config) -> Iterator[tuple[str, str]]:
    upstream = config.upstream
    for path, url, schemes in (
        ("upstream.url", upstream.url, ("ws", "wss")),
        ("upstream.rest_url", upstream.rest_url, ("http", "https")),
        ("upstream.proxy", upstream.proxy, ("http", "https")),
    ):
        if url is not None and (problem := _url_problem(url, schemes)):
            yield path, problem
    for origin in config.gateway.origins:
        if origin != "*" and (_url_problem(origin, ("http", "https")) or urlsplit(origin).path):
            yield "gateway.origins", f"found {origin!r}, expected an origin like https://example.org, or *"


def _contradictions(config: Config, given: Mapping[str, Given]) -> Iterator[tuple[str, str]]:
    upstream, gateway, auth = config.upstream, config.gateway, config.auth
    if upstream.reconnect_initial > upstream.reconnect_max:
        yield "upstream.reconnect_initial", "must not be longer than upstream.reconnect_max"
    if upstream.ping_interval >= upstream.stale_after:
        yield "upstream.stale_after", "must be longer than upstream.ping_interval"
    if (gateway.tls.certificate is None) != (gateway.tls.private_key is None):
        missing = "private_key" if gateway.tls.private_key is None else "certificate"
        yield f"gateway.tls.{missing}", "missing: TLS needs both `certificate` and `private_key`"
    if auth.token_ttl > auth.max_token_ttl:
        yield "auth.token_ttl", "must not be longer than auth.max_token_ttl"
    if not auth.enabled and not is_loopback(gateway.host) and "gateway.host" not in given:
        yield "auth.enabled", "without authentication whaled listens on loopback, unless gateway.host is given"


def _url_problem(url: str, schemes: tuple[str, ...]) -> str | None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if valid:
        return None
    return f"found {redacted(url)!r}, expected {' or '.join(f'{scheme}://host[:port]/...' for scheme in schemes[:2])}"


def redacted(url: str) -> str:
    """A URL without the user and password it may hold."""
    before, at, after = url.rpartition("@")
    scheme, slashes, _ = before.partition("://")
    return f"{scheme}{slashes}***@{after}" if at else url


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can connect to an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- the effective configuration --------------------------------------------------------------------------------------


def render(loaded: Loaded) -> str:
    """The effective configuration as YAML, with where each value came from. Secrets are not part of it."""
    lines: list[str] = []
    section = ""
    for path, key in keys().items():
        parent, _, name = path.rpartition(".")
        if parent != section:
            section = parent
            depth = parent.count(".")
            lines.append(f"{'  ' * depth}{parent.rpartition('.')[2]}:")
        value = _get(loaded.config, path)
        if key.unit == "duration" and isinstance(value, float):
            text = units.show_duration(value)
        elif key.unit == "size" and isinstance(value, int):
            text = units.show_size(value)
        else:
            plain = msgspec.to_builtins(value)
            plain = redacted(plain) if isinstance(plain, str) else plain
            text = yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
        origin = loaded.origins.get(path)
        lines.append(f"{'  ' * (parent.count('.') + 1)}{name}: {text}" + (f"  # {origin}" if origin else ""))
    return "\n".join(lines) + "\n"
