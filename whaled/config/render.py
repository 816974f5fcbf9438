"""The effective configuration as YAML. Pure."""

from collections.abc import Iterator, Sequence

import msgspec
import yaml

from whaled.config import units
from whaled.config.keys import Key, keys, section_keys, value_at
from whaled.config.parse import Loaded
from whaled.urls import redacted


def render(loaded: Loaded) -> str:
    """Return the effective configuration with the source of each value. Possible secrets in URLs are left out."""
    lines: list[str] = []
    section = ""
    for path, key in keys().items():
        parent, _, name = path.rpartition(".")
        depth = parent.count(".")
        if parent != section:
            section = parent
            lines.append(f"{'  ' * depth}{parent.rpartition('.')[2]}:")
        value = value_at(loaded.config, path)
        indent = "  " * (depth + 1)
        if key.section is not None and isinstance(value, tuple) and value:
            lines.append(_noted(f"{indent}{name}:", path, loaded))
            lines.extend(_sections(key, value, indent, loaded))
        else:
            lines.append(_noted(f"{indent}{name}: {written(key, value)}", path, loaded))
    return "\n".join(lines) + "\n"


def _sections(key: Key, sections: Sequence[object], indent: str, loaded: Loaded) -> Iterator[str]:
    """Yield the lines of a list of sections, one per key."""
    for index, section in enumerate(sections):
        start = "- "
        for path, inner in section_keys(key, index).items():
            name = path.rpartition(".")[2]
            yield _noted(f"{indent}  {start}{name}: {written(inner, getattr(section, name))}", path, loaded)
            start = "  "


def _noted(line: str, path: str, loaded: Loaded) -> str:
    """Append the source of its value to a line, unless it is the default."""
    origin = loaded.origins.get(path)
    return f"{line}  # {origin}" if origin else line


def written(key: Key, value: object) -> str:
    """Return a value as it would be written in the file."""
    if key.unit == "duration" and isinstance(value, float):
        return units.show_duration(value)
    if key.unit == "size" and isinstance(value, int):
        return units.show_size(value)
    if key.takes_single and isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    plain = msgspec.to_builtins(value)
    if key.unit == "url" and isinstance(plain, str):
        plain = redacted(plain)
    return str(yaml.safe_dump(plain, default_flow_style=True, width=10**6)).removesuffix("\n...\n").strip()
