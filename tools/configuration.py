"""Writes config/whaled.example.yaml and the tables of docs/configuration.md from the declarations of the keys.

`python -m tools.configuration`, or `make configuration`.
"""

from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from whaled.config.keys import keys, options, value_at
from whaled.config.render import written
from whaled.config.sections import Config

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "config" / "whaled.example.yaml"
DOCUMENTATION = ROOT / "docs" / "configuration.md"

# The column in which the comments of the example begin.
COMMENTS_AT = 38
HEAD = """\
# whaled: every key with its default. A key that is left out has the default shown here.
#
# Durations and sizes have a unit ("500ms", "30s", "5m", "2h", "90d"; "16KiB", "1MiB"). Unknown and duplicate keys are
# refused. Check a file with: whaled check-config FILE. SIGHUP reloads the keys marked "(reload)" in a running daemon;
# the others need a restart. Never put secrets into this file.
"""
# What stands below a key whose default does not show how to write it.
SAMPLES = {
    "detection.watch": """\
  #  - name: governments              # appears in the alert as watch:governments
  #    types: [government]            # from the address book; set labels, types, or both
  #    threshold_btc: 0.0             # amount that one label pays or receives; 0: any amount
  #  - name: example
  #    labels: ["Example, Inc. treasury"]
  #    threshold_btc: 10
""",
    "auth.issuers": """\
  #  - name: corp                     # client ids of its tokens begin with corp:
  #    issuer: https://login.example.org/realms/ops
  #    audience: whaled
  #    algorithms: [RS256]
  #    client_id_claim: azp           # which claim names the client
  #    read: [realm_access.roles=whale-reader]   # claims that grant the permission; likewise write and admin
""",
}


def example() -> str:
    """Return the example file."""
    lines: list[str] = [HEAD]
    section = ""
    for path, key in keys().items():
        parent, _, name = path.rpartition(".")
        depth = parent.count(".")
        if parent != section:
            section = parent
            lines.append("\n" if not depth else "")
            lines.append(_noted(f"{'  ' * depth}{parent.rpartition('.')[2]}:", _subject(parent)))
        mark = " (reload)" if key.is_reloadable else ""
        lines.append(_noted(f"{'  ' * (depth + 1)}{name}: {written(key, key.default)}", key.meaning + mark))
        lines.append(SAMPLES.get(path, ""))
    return "".join(lines)


def _noted(line: str, note: str) -> str:
    return f"{line:<{COMMENTS_AT - 1}} # {note}\n"


def _subject(section: str) -> str:
    """Return the docstring of a section as a comment."""
    settings = value_at(Config(), section)
    assert isinstance(settings, Struct)
    text = (type(settings).__doc__ or "").removesuffix(".")
    return text[:1].lower() + text[1:]


def key_table() -> Iterator[str]:
    """Yield the lines of the table of all keys."""
    yield "| key | default | allowed | reload | meaning |"
    yield "|---|---|---|---|---|"
    for path, key in keys().items():
        reload = "yes" if key.is_reloadable else "no"
        meaning = key.meaning.replace("|", "\\|")
        yield f"| `{path}` | `{written(key, key.default)}` | {key.allowed} | {reload} | {meaning} |"


def option_table() -> Iterator[str]:
    """Yield the lines of the table of the options of `whaled run` that set a key."""
    schema = keys()
    yield "| option | key |"
    yield "|---|---|"
    for path, option in options().items():
        if option.metavar is None:
            yield f"| `{option.name}` | `{path}: {written(schema[path], option.sets)}` |"
        else:
            yield f"| `{option.name} {option.metavar}` | `{path}` |"


def documentation(text: str) -> str:
    """Return the page with its tables written anew, each between `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""
    for name, table in (("keys", key_table()), ("options", option_table())):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, _, rest = text.partition(begin)
        _, marked, after = rest.partition(end)
        if not marked:
            raise ValueError(f"{DOCUMENTATION} needs the lines {begin!r} and {end!r}")
        text = before + begin + "".join(f"{line}\n" for line in table) + end + after
    return text


def main() -> None:
    """Write both files."""
    EXAMPLE.write_text(example())
    DOCUMENTATION.write_text(documentation(DOCUMENTATION.read_text()))


if __name__ == "__main__":
    main()
