"""The house: which module may import which, where tests are, and whether the maintainers' pages describe the code.

Imports go down the ranks, never sideways between capabilities.
"""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import whaled
from whaled.config.keys import keys

PACKAGE = Path(whaled.__file__).parent
ROOT = PACKAGE.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
INDEX = ROOT / "docs" / "README.md"
TREES = {path.name for path in ROOT.iterdir() if path.is_dir()}
# The pages for maintainers: what they name has to exist.
MAINTAINERS_PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ARCHITECTURE, INDEX]

# By package or top-level module. Modules of one package may import each other; otherwise only lower ranks.
RANKS = {
    "errors": 0,
    "log_events": 0,
    "registry": 0,
    "model": 1,
    "config": 2,
    "hosts": 1,
    "pause": 1,
    "urls": 1,
    "durable": 0,
    "listening": 2,
    "summaries": 2,
    "addresses": 2,
    "tables": 2,
    "times": 2,
    "bookmarks": 2,
    "source": 2,
    "sampling": 1,
    "retry_after": 1,
    "websocket_client": 0,
    "whales": 3,
    "sources": 3,
    "auth": 3,
    "eventlog": 4,
    "gateway": 4,
    "web": 4,
    "ops": 5,
    "client": 6,
    "simulator": 6,
    "addressbook": 4,
    "backfill": 6,
    "backoff": 3,
    "ingest": 5,
    "canary": 6,
    "detection_meters": 4,
    "metrics": 7,
    "reloading": 7,
    "service": 8,
    "cli": 9,
    "__main__": 10,
}

# Modules that hold rules: they take `now` and values, and do no I/O.
PURE = (
    "addressbook.bip329", "addressbook.rows", "addressbook.walletexplorer", "addresses", "auth.eddsa", "auth.families",
    "auth.ring", "auth.signature", "auth.tokens", "auth.tokentext", "backfill.coverage", "bookmarks", "cli.tail_lines",
    "client.cursor", "config.fields", "config.given", "config.keys", "config.origins", "config.render",
    "config.rules", "config.scalars", "config.sections", "config.units", "config.values", "errors",
    "gateway.actions", "gateway.clients", "gateway.commands", "gateway.credential", "gateway.deflate",
    "gateway.framing", "gateway.incoming", "gateway.interest", "gateway.limits", "gateway.messages",
    "gateway.phase", "gateway.positions", "gateway.session", "gateway.shedding", "gateway.websocket", "hosts",
    "ingest.ingest", "log_events", "model", "retry_after", "source", "sources.mempool_space.canary_frame",
    "sources.mempool_space.changes", "sources.mempool_space.continuity", "sources.mempool_space.dialect",
    "sources.mempool_space.fields", "sources.mempool_space.identity", "sources.mempool_space.proxy",
    "sources.mempool_space.rawblock", "sources.mempool_space.rbf", "sources.mempool_space.rescue",
    "sources.mempool_space.responses", "sources.mempool_space.routes", "sources.mempool_space.shapes",
    "sources.mempool_space.silence", "sources.mempool_space.snapshot", "sources.mempool_space.surrogates",
    "sources.mempool_space.transactions", "tables", "times", "urls", "whales.accuracy", "whales.amounts",
    "whales.bookkeys", "whales.booklines", "whales.books", "whales.coinjoins", "whales.conflicts", "whales.detect",
    "whales.fees", "whales.filekinds", "whales.filters", "whales.labels", "whales.lifecycle", "whales.owners",
    "whales.prices", "whales.watch",
)  # fmt: skip
IMPURE_MODULES = {
    "asyncio",
    "socket",
    "time",
    "os",
    "logging",
    "structlog",
    "sqlite3",
    "aiohttp",
    "threading",
    "random",
}


@cache
def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module} at line {node.lineno}: name the whole path"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def room(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


# A module beyond MOST_LINES has two subjects. The reason why these are one each:
MOST_LINES = 385
LONG_MODULES = {
    "config.sections": "one table: a line for each key",
    "source": "the whole seam to a source, which is read as one page",
}


def test_modules_are_short() -> None:
    long = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if path.read_text().count("\n") > MOST_LINES
    }
    assert long == LONG_MODULES.keys()


def test_every_module_has_a_rank() -> None:
    assert {room(name) for name in modules()} - {"__init__"} == RANKS.keys()


def test_imports_go_down_the_ranks_only() -> None:
    wrong = []
    for name, tree in modules().items():
        if name == "__init__":
            continue
        mine = room(name)
        for imported in imports(tree):
            if not imported.startswith("whaled."):
                continue
            theirs = room(imported.removeprefix("whaled."))
            if theirs not in RANKS or theirs == mine:
                continue
            if RANKS[theirs] >= RANKS[mine]:
                wrong.append(f"{name} (rank {RANKS[mine]}) imports {imported} (rank {RANKS[theirs]})")
    assert not wrong


def test_pure_modules_do_no_io() -> None:
    known = modules()
    claims = {name for name, tree in known.items() if re.search(r"\bPure\b", ast.get_docstring(tree) or "")}
    assert claims == set(PURE)
    wrong = [
        f"{name} imports {imported}"
        for name in PURE
        for imported in imports(known[name])
        if imported.split(".", maxsplit=1)[0] in IMPURE_MODULES
    ]
    assert not wrong


# `service` wires the source; `metrics` builds its meters.
KNOW_A_SOURCE = {"service", "metrics"}


def test_only_the_wiring_imports_a_source() -> None:
    importing = {
        name
        for name, tree in modules().items()
        if room(name) != "sources" and any(each.startswith("whaled.sources") for each in imports(tree))
    }
    assert importing == KNOW_A_SOURCE


# --- the tests ---

TESTS = ROOT / "tests"
# Directories of `tests` that mirror no package: promises that no single module keeps, with what they need.
PROMISES = {"suites", "faults", "grafana", "prometheus", "systemd"}


def is_mirror(test: Path) -> bool:
    """Whether `<room>/test_<module>.py` or `<room>/test_<module>_<aspect>.py` names a module of that room."""
    words = test.stem.removeprefix("test_").split("_")
    room_of_test = PACKAGE / test.relative_to(TESTS).parent
    return any((room_of_test / ("_".join(words[:count]) + ".py")).exists() for count in range(1, len(words) + 1))


def test_tests_mirror_the_rooms() -> None:
    tests = [path for path in TESTS.rglob("test_*.py") if path.relative_to(TESTS).parts[0] not in PROMISES]
    strays = sorted(str(path.relative_to(ROOT)) for path in tests if not is_mirror(path))
    assert not strays, f"no module of whaled has this name; a promise of several modules goes to tests/suites: {strays}"
    assert {name for name in PROMISES if not any((TESTS / name).glob("test_*.py"))} == set()


def test_what_test_modules_share_is_in_the_kit() -> None:
    rigs = {"kit", *PROMISES - {"suites"}}
    helpers = [path.relative_to(TESTS) for path in TESTS.rglob("*.py") if not path.name.startswith("test_")]
    assert [str(path) for path in helpers if path.parts[0] not in rigs and path.name != "conftest.py"] == []
    borrowed = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path in TESTS.rglob("*.py")
        for imported in imports(parsed(path))
        if re.search(r"(^|\.)test_\w+", imported)
    ]
    assert borrowed == []


# The kit's modules that build values: a test has one way to make a whale or a transaction.
BUILDERS = ("whales.py", "transactions.py")


def functions(path: Path) -> set[str]:
    """Return the names of a module's functions."""
    return {node.name for node in parsed(path).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_builders_have_one_definition() -> None:
    defined = [
        (name, str(path.relative_to(ROOT)))
        for path in sorted(TESTS.rglob("*.py"))
        for name in functions(path) & set().union(*(functions(TESTS / "kit" / each) for each in BUILDERS))
    ]
    twice = [place for place in defined if [name for name, _ in defined].count(place[0]) > 1]
    assert not twice, f"the kit has this builder, or give another one another name: {twice}"


def test_no_exception_of_the_linter_is_unused() -> None:
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    unused = []
    for pattern, codes in rules["per-file-ignores"].items():
        command = [sys.executable, "-m", "ruff", "check", pattern.removesuffix("/**"), "--select", ",".join(codes)]
        options = ["--no-cache", "--exit-zero", "--output-format", "json", "--config", "lint.per-file-ignores = {}"]
        done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, check=True)
        found = {each["code"] for each in json.loads(done.stdout)} - set(rules["ignore"])
        unused += [
            f"{pattern}: {code}" for code in codes if not any(re.fullmatch(rf"{code}\d*", each) for each in found)
        ]
    assert unused == []


# --- the maintainers' pages ---


def ranks_table() -> str:
    """RANKS as docs/architecture.md has them."""
    rows = ["| rank | packages and modules |", "|---:|---|"]
    for rank in sorted(set(RANKS.values())):
        names = sorted(name for name, each in RANKS.items() if each == rank)
        shown = (f"`{name}/`" if (PACKAGE / name).is_dir() else f"`{name}`" for name in names)
        rows.append(f"| {rank} | {', '.join(shown)} |")
    return "\n".join(rows)


def test_the_architecture_page_has_the_ranks() -> None:
    found = re.search(
        r"^<!-- ranks: begin -->\n(.*?)\n?^<!-- ranks: end -->$", ARCHITECTURE.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"{ARCHITECTURE} has no table between <!-- ranks: begin --> and <!-- ranks: end -->"
    assert found[1].strip() == ranks_table(), f"put this between the markers in {ARCHITECTURE}:\n\n{ranks_table()}\n"


def test_every_package_has_a_docstring() -> None:
    packages = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name == "__init__.py"]
    silent = [str(path.relative_to(ROOT)) for path in packages if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not silent, f"state in a docstring what the package does: {', '.join(silent)}"


def test_every_page_is_in_the_index() -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", INDEX.read_text()))
    assert listed == {path.name for path in INDEX.parent.glob("*.md")} - {INDEX.name}


def named(page: Path) -> list[str]:
    """What a page quotes as code within a line."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def expanded(pattern: str) -> Iterator[str]:
    """The paths that a pattern with at most one pair of braces means."""
    braces = re.search(r"\{([^}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    for each in braces[1].split(","):
        yield pattern[: braces.start()] + each + pattern[braces.end() :]


def members(tree: ast.AST) -> dict[str, ast.AST]:
    """What a module or class defines by name; of a class also what its methods set on `self`."""
    found: dict[str, ast.AST] = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found.update((target.id, node) for target in targets if isinstance(target, ast.Name))
    if isinstance(tree, ast.ClassDef):
        for each in ast.walk(tree):
            if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "self":
                found.setdefault(each.attr, each)
    return found


@cache
def parsed(source: Path) -> ast.Module:
    """A module's tree."""
    return ast.parse(source.read_text())


def is_in_the_code(name: str) -> bool:
    """Whether `package/module.Class.method`, or a part of such a name, leads to something below `whaled/`."""
    path, *parts = name.rstrip("/").split(".")
    place = PACKAGE / path
    source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not source.exists():
        return False
    node: ast.AST = parsed(source)
    for part in parts:
        known = members(node)
        if part not in known:
            return False
        node = known[part]
    return True


def is_in_the_repository(pattern: str) -> bool:
    """Whether every path that a pattern means leads to a file or directory; they count from the root."""
    return all(any(ROOT.glob(each.rstrip("/"))) for each in expanded(pattern))


@pytest.mark.parametrize("page", MAINTAINERS_PAGES, ids=lambda page: page.name)
def test_files_and_names_that_maintainers_pages_quote_exist(page: Path) -> None:
    """A path from the root (`tests/gateway/test_{hub,wire}.py`), a name in the code (`gateway/hub.Hub`), or a key."""
    wrong = []
    for text in map(str.strip, named(page)):
        name = text.removesuffix("()")
        first = re.split(r"[./]", name, maxsplit=1)[0]
        if re.fullmatch(r"[\w.{},*-]+(?:/[\w.{},*-]*)+", name) and (first in RANKS or first in TREES):
            is_known = is_in_the_code(name) or is_in_the_repository(name)
        elif re.fullmatch(r"\w+(?:\.\w+)+", name) and first in RANKS:
            is_known = name in keys() or is_in_the_code(name) or is_in_the_repository(name)
        else:
            continue
        if not is_known:
            wrong.append(text)
    assert wrong == []


@cache
def identifiers() -> set[str]:
    """Every word in the sources, the tests and what runs them; of a test only its definition counts."""
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    text = "\n".join(path.read_text() for path in paths)
    defined = set(re.findall(r"^(?:async )?def (test_\w+)", text, re.MULTILINE))
    return defined | {word for word in re.findall(r"\w+", text) if not word.startswith("test_")}


@pytest.mark.parametrize("page", MAINTAINERS_PAGES, ids=lambda page: page.name)
def test_identifiers_that_maintainers_pages_quote_are_in_the_sources(page: Path) -> None:
    """Each part of `Rig.value`, `RELOAD`, `register(subparsers)` or the name of a test."""
    quoted = [text.partition("(")[0] for text in named(page) if re.fullmatch(r"\w+(?:\.\w+)*(?:\(.*\))?", text)]
    parts = {part for name in quoted for part in name.split(".") if not part.isdecimal()}
    assert parts - identifiers() == set()
