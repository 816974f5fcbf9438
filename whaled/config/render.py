"""The effective configuration as YAML. Pure."""

import msgspec
import yaml

from whaled.config import units
from whaled.config.keys import Key, keys, value_at
from whaled.config.parse import Loaded
from whaled.config.rules import redacted


def render(loaded: Loaded) -> str:
    """The effective configuration, with where each value came from. What may be secret in a URL is left out."""
    lines: list[str] = []
    section = ""
    for path, key in keys().items():
        parent, _, name = path.rpartition(".")
        depth = parent.count(".")
        if parent != section:
            section = parent
            lines.append(f"{'  ' * depth}{parent.rpartition('.')[2]}:")
        origin = loaded.origins.get(path)
        lines.append(
            f"{'  ' * (depth + 1)}{name}: {written(key, value_at(loaded.config, path))}"
            + (f"  # {origin}" if origin else "")
        )
    return "\n".join(lines) + "\n"


def written(key: Key, value: object) -> str:
    """A value as it would be written in the file."""
    if key.unit == "duration" and isinstance(value, float):
        return units.show_duration(value)
    if key.unit == "size" and isinstance(value, int):
        return units.show_size(value)
    plain = msgspec.to_builtins(value)
    if key.unit == "url" and isinstance(plain, str):
        plain = redacted(plain)
    return str(yaml.safe_dump(plain, default_flow_style=True, width=10**6)).removesuffix("\n...\n").strip()
