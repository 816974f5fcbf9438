"""Conversion of YAML text, environment and command line into a Config. Finds all faults at once, with their sources."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
import yaml
from msgspec import Struct

from whaled.config.environment import from_environment
from whaled.config.given import Element, Given, Layer
from whaled.config.keys import MAX_SECTIONS, Key, keys, options, reloadable, section_keys, value_at
from whaled.config.rules import conflicts
from whaled.config.scalars import Scalar
from whaled.config.sections import Config
from whaled.config.values import elements_of, faults_of_elements, plain_value, quoted, value_of
from whaled.errors import ConfigError, Fault
from whaled.hosts import is_loopback

# A list in a section of a list of sections needs 6. The YAML library's time grows with the square of the depth.
MAX_DEPTH = 16
LOOPBACK = "127.0.0.1"


class Loaded(Struct, frozen=True):
    """The configuration, and the source of each value that is set, also of each element of a list.

    `warnings` do not prevent a start.
    """

    config: Config
    origins: dict[str, str]
    path: str | None = None
    warnings: tuple[Fault, ...] = ()

    @property
    def keys_set(self) -> int:
        """Return the number of keys that are set."""
        return sum(not path.endswith("]") for path in self.origins)


def parse(text: str, *, source: str, environ: Mapping[str, str], flags: Mapping[str, object]) -> Loaded:
    """Merge the layers: the command line overrides the environment, which overrides the file and the defaults.

    Raises ConfigError with every fault.
    """
    schema = keys()
    faults: list[Fault] = []
    given = _from_file(text, source, schema, faults)
    warnings: list[Fault] = []
    given |= from_environment(environ, schema, faults, warnings)
    given |= _from_flags(flags, schema, given)
    wrong: set[str] = set()
    config = _build(Config(), "", _values(schema, given, faults, wrong))
    for conflict in conflicts(config):
        if wrong.isdisjoint({conflict.path, *conflict.others}):
            named = next((given[path] for path in (conflict.path, *conflict.others) if path in given), None)
            is_shown = conflict.found is not None and not (named is not None and named.is_hidden)
            found = f"found {conflict.found!r}, " if is_shown else ""
            faults.append(Fault(conflict.path, found + conflict.problem, named.source if named else ""))
    faults.extend(_opened(config, given))
    if faults:
        raise ConfigError(tuple(faults))
    origins = {path: found.source for path, found in given.items() if not path.endswith("]")}
    for path, value in given.items():
        origins |= {f"{path}[{index}]": element.source for index, element in enumerate(value.elements)}
    return Loaded(config, origins, warnings=tuple(warnings))


def diff(old: Config, new: Config) -> tuple[str, ...]:
    """Return the paths of the keys that differ."""
    return tuple(path for path in keys() if value_at(old, path) != value_at(new, path))


def not_reloadable(old: Config, new: Config) -> tuple[str, ...]:
    """Return the paths of the keys that differ and that a running daemon cannot change.

    It can change certificates, but it cannot switch TLS on or off.
    """
    changing = reloadable()
    switched = (old.gateway.tls.certificate is None) != (new.gateway.tls.certificate is None)
    return tuple(
        path for path in diff(old, new) if path not in changing or (switched and path.startswith("gateway.tls."))
    )


# --- the file ---------------------------------------------------------------------------------------------------------


def _from_file(text: str, source: str, schema: Mapping[str, Key], faults: list[Fault]) -> dict[str, Given]:
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                faults.append(Fault("", "aliases (`*name`) are not supported: write the value", _at(source, event)))
                return {}
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                faults.append(Fault("", "not valid YAML: nested too deeply", _at(source, event)))
                return {}
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark is not None else source
        faults.append(Fault("", f"not valid YAML: {error.problem or error.context}{_unquoted(text, error)}", where))
        return {}
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        faults.append(Fault("", f"not valid YAML: {error.reason}", f"{source}:{line}"))
        return {}
    given: dict[str, Given] = {}
    if root is not None:
        _walk(root, "", source, schema, given, faults)
    return given


def _unquoted(text: str, error: yaml.MarkedYAMLError) -> str:
    """Return a hint to quote a text with YAML syntax in it: a star begins an alias, a colon ends a key."""
    mark = error.problem_mark or error.context_mark
    if error.context == "while scanning an alias":
        return '; to write a star, put it in quotes: "*"'
    lines = text.splitlines()
    if mark is not None and mark.line < len(lines) and "::" in lines[mark.line]:
        return '; an address with two colons needs quotes: "::1"'
    return ""


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
    for index, (key_node, value_node) in enumerate(node.value):
        if not isinstance(key_node, yaml.ScalarNode):
            faults.append(Fault(prefix.removesuffix("."), "a key must be a plain word", _at(source, key_node)))
            continue
        path = prefix + key_node.value
        found = given
        if path in seen:
            faults.append(Fault(path, f"duplicate key, first at line {seen[path]}", _at(source, key_node)))
            found = {}  # its faults are reported too, but its value is not used
        seen.setdefault(path, key_node.start_mark.line + 1)
        if f"{path}." in sections:
            _walk(value_node, f"{path}.", source, schema, found, faults)
        elif path not in schema:
            meant = _split_number(node, index) or _meant(path, [*schema, *sections])
            faults.append(Fault(path, f"no such key{meant}", _at(source, key_node)))
        elif schema[path].section is not None:
            _walk_sections(schema[path], value_node, source, found, faults)
        else:
            try:
                value = yaml.SafeLoader("").construct_object(value_node, deep=True)
            except (yaml.YAMLError, ValueError) as error:
                what = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
                faults.append(Fault(path, f"not a valid YAML value: {what}", _at(source, value_node)))
                continue
            nodes = value_node.value if isinstance(value_node, yaml.SequenceNode) else ()
            elements = tuple(Element(_at(source, node), _written(node)) for node in nodes)
            found[path] = Given(value, _at(source, value_node), Layer.FILE, _written(value_node), elements)


def _walk_sections(key: Key, node: yaml.Node, source: str, given: dict[str, Given], faults: list[Fault]) -> None:
    """Walk through each section of a list as through any other section; the paths of its keys contain its index."""
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
        return  # a list whose sections are all commented out
    if not isinstance(node, yaml.SequenceNode):
        faults.append(Fault(key.path, "expected a list of sections (`- key: value`)", _at(source, node)))
        return
    if len(node.value) > MAX_SECTIONS:
        problem = f"found {len(node.value)} sections, expected at most {MAX_SECTIONS}"
        faults.append(Fault(key.path, problem, _at(source, node)))
        return
    given[key.path] = Given(len(node.value), _at(source, node), Layer.FILE)
    for index, item in enumerate(node.value):
        path = f"{key.path}[{index}]"
        given[path] = Given(None, _at(source, item), Layer.FILE)
        _walk(item, f"{path}.", source, section_keys(key, index), given, faults)


def _written(node: yaml.Node) -> Scalar | None:
    return Scalar(node.value, node.style is None) if isinstance(node, yaml.ScalarNode) else None


def _at(source: str, node: Any) -> str:
    return f"{source}:{node.start_mark.line + 1}"


def _split_number(node: yaml.MappingNode, index: int) -> str:
    """Return a hint for a key of three digits that YAML makes of `{key: 1,000}`, or an empty string."""
    is_group = [str(key.value).isdecimal() and len(key.value) == 3 and not value.value for key, value in node.value]
    if not node.flow_style or not is_group[index]:
        return ""
    first = next((place for place in range(index, -1, -1) if not is_group[place]), None)
    if first is None or not str(node.value[first][1].value).isdecimal():
        return ""
    end = next((place for place in range(index, len(is_group)) if not is_group[place]), len(is_group))
    groups = "".join(key.value for key, _ in node.value[first + 1 : end])
    name, number = node.value[first]
    return f"; if it belongs to the number of `{name.value}`, write it as {number.value}{groups}"


def _meant(path: str, known: Iterable[str]) -> str:
    """Return a hint at the key probably meant: one with a similar spelling, or with the same name elsewhere."""
    prefix, _, name = path.rpartition(".")
    split = [key.removesuffix(".").rpartition(".") for key in known]
    siblings = [last for parent, _, last in split if parent == prefix]
    near = difflib.get_close_matches(name, siblings, n=1)
    if near:
        return f"; did you mean `{near[0]}`?"
    elsewhere = [f"{parent}.{last}" for parent, _, last in split if last == name]
    if elsewhere:
        return f"; did you mean `{elsewhere[0]}`?"
    return f"; known keys here: {', '.join(sorted(siblings))}" if siblings else ""


# --- command line -----------------------------------------------------------------------------------------------------


def _from_flags(flags: Mapping[str, object], schema: Mapping[str, Key], below: Mapping[str, Given]) -> dict[str, Given]:
    options_of = options()
    given = {
        path: Given(
            plain_value(schema[path], value) if isinstance(value, str) else value,
            f"option {options_of[path].name}",
            Layer.COMMAND_LINE,
            Scalar(value.strip(), True) if isinstance(value, str) and schema[path].base is not tuple else None,
        )
        for path, value in flags.items()
    }
    if flags.get("auth.enabled") is False and "gateway.host" not in flags:
        # A host in the file was chosen for a server that authenticates its clients.
        hosts = elements_of(schema["gateway.host"], below["gateway.host"]).value if "gateway.host" in below else ()
        if isinstance(hosts, list) and not all(is_loopback(str(host)) for host in hosts):
            given["gateway.host"] = Given(LOOPBACK, "option --no-auth", Layer.COMMAND_LINE)
    return given


# --- values -----------------------------------------------------------------------------------------------------------


def _values(
    schema: Mapping[str, Key], given: Mapping[str, Given], faults: list[Fault], wrong: set[str]
) -> dict[str, object]:
    """Return the value of every key. For a wrong one, add to `faults` and `wrong`, and return its default."""
    values: dict[str, object] = {}
    for path, key in schema.items():
        values[path] = key.default
        try:
            if key.section is not None:
                values[path] = _sections(key, given, faults, wrong)
            elif path in given and (problems := faults_of_elements(key, given[path])):
                faults.extend(problems)
                wrong.add(path)
            elif path in given:
                found = elements_of(key, given[path])
                values[path] = value_of(key, found.value, found.written)
            elif key.default is msgspec.NODEFAULT:
                section = given[path.rpartition(".")[0]]
                faults.append(Fault(path, f"missing, expected {key.allowed}", section.source))
                wrong.add(path)
        except ValueError as error:
            faults.append(Fault(path, f"found {quoted(key, given[path])}, {error}", given[path].source))
            wrong.add(path)
    return values


def _sections(key: Key, given: Mapping[str, Given], faults: list[Fault], wrong: set[str]) -> tuple[Struct, ...]:
    """Return a list of sections; an empty one if anything in it is wrong."""
    count = given[key.path].value if key.path in given else 0
    assert key.section is not None
    assert isinstance(count, int)
    built = []
    for index in range(count):
        schema = section_keys(key, index)
        mistakes: set[str] = set()
        values = _values(schema, given, faults, mistakes)
        if mistakes:
            wrong |= {key.path, *mistakes}
        else:
            built.append(key.section(**{path.rpartition(".")[2]: value for path, value in values.items()}))
    return () if key.path in wrong else tuple(built)


def _build(section: Struct, prefix: str, values: Mapping[str, object]) -> Any:
    fields: dict[str, object] = {}
    for name in section.__struct_fields__:
        default = getattr(section, name)
        path = f"{prefix}{name}"
        fields[name] = _build(default, path + ".", values) if isinstance(default, Struct) else values[path]
    return type(section)(**fields)


def _opened(config: Config, given: Mapping[str, Given]) -> Iterator[Fault]:
    """Yield a fault if a higher layer disables authentication while a lower layer sets a host that others can reach."""
    enabled, host = given.get("auth.enabled"), given.get("gateway.host")
    hosts = config.gateway.host
    if config.auth.enabled or all(map(is_loopback, hosts)) or enabled is None or host is None:
        return
    if host.layer < enabled.layer:
        yield Fault(
            "auth.enabled",
            f"turned off here while gateway.host {', '.join(hosts)} ({host.source}) lets others connect: give the "
            "host here too (WHALED_GATEWAY_HOST)",
            enabled.source,
        )
