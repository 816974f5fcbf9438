"""The house: which module may import which. Imports go down the ranks, never sideways between capabilities."""

import ast
from pathlib import Path

import whaled

PACKAGE = Path(whaled.__file__).parent

# The first matching prefix decides. Modules of one prefix may import each other; otherwise only lower ranks.
RANKS = {
    "errors": 0,
    "model": 1,
    "config": 2,
    "hosts": 1,
    "replacing": 1,
    "listening": 2,
    "summaries": 2,
    "addresses": 2,
    "tables": 2,
    "times": 2,
    "whales": 3,
    "upstream": 3,
    "auth": 3,
    "eventlog": 4,
    "gateway": 4,
    "web": 4,
    "ops": 5,
    "client": 6,
    "simulator": 6,
    "bookfile": 4,
    "labelfiles": 4,
    "files": 5,
    "backfill": 4,
    "backoff": 3,
    "pipeline": 6,
    "canary": 6,
    "upkeep": 7,
    "starts": 7,
    "service": 8,
    "cli": 9,
    "__main__": 10,
}
# The gateway performs sessions, and sessions replay from the log.
SIDEWAYS = {("gateway", "eventlog")}

# Modules that hold rules: they take `now` and values, and do no I/O.
PURE = (
    "errors", "model", "config.sections", "config.keys", "config.parse", "config.units", "whales.amounts",
    "whales.coinjoins", "whales.detect", "whales.fees", "whales.labels", "whales.lifecycle", "whales.filters",
    "whales.owners", "whales.books", "whales.booklines", "whales.bookkeys", "addresses", "whales.addresses", "tables",
    "times", "whales.filekinds",
    "upstream.dialect", "upstream.continuity", "upstream.proxy", "upstream.routes", "upstream.identity",
    "upstream.retry_after", "upstream.transactions", "upstream.canary_frame", "auth.tokens", "auth.tokentext",
    "whales.accuracy", "whales.history", "upstream.rawblock", "upstream.surrogates",
    "upstream.rbf", "upstream.snapshot", "backfill.coverage",
    "gateway.wire", "gateway.session", "gateway.limits", "gateway.clients", "gateway.deflate",
    "gateway.interest",
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


def test_every_module_has_a_rank() -> None:
    homeless = {room(name) for name in modules()} - RANKS.keys() - {"__init__"}
    assert not homeless


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
            if theirs not in RANKS or theirs == mine or (mine, theirs) in SIDEWAYS:
                continue
            if RANKS[theirs] >= RANKS[mine]:
                wrong.append(f"{name} (rank {RANKS[mine]}) imports {imported} (rank {RANKS[theirs]})")
    assert not wrong


def test_pure_modules_do_no_io() -> None:
    known = modules()
    assert set(PURE) <= known.keys()
    wrong = [
        f"{name} imports {imported}"
        for name in PURE
        for imported in imports(known[name])
        if imported.split(".", maxsplit=1)[0] in IMPURE_MODULES
    ]
    assert not wrong
