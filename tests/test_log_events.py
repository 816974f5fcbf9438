"""Log events: each call names an identifier of the table, and docs/logs.md lists each as the calls have it."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

import whaled
from kit.paths import ROOT
from whaled.log_events import MESSAGES
from whaled.summaries import Summary

PACKAGE = Path(whaled.__file__).parent
PAGE = ROOT / "docs" / "logs.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
# Events that no call names: the output adds the first itself, a Summary logs the second at the level of its own event.
WITHOUT_A_CALL = {"log_entries_lost": "warning", "log_lines_suppressed": "any"}
# The client is a library for other programs, whose lines have no identifiers. The last one summarises lines of
# libraries, by their text.
EXCEPT = {*(PACKAGE / "client").glob("*.py"), PACKAGE / "summaries.py", PACKAGE / "ops" / "logs.py"}


@dataclass
class Use:
    """What the calls of one event have in common."""

    levels: set[str] = field(default_factory=set)
    fields: dict[str, None] = field(default_factory=dict)
    is_open: bool = False  # has fields that the call does not name: those of a mapping, or of a line of a Summary


@dataclass
class Call:
    """A call that logs an event, or that a line of this event will be logged by."""

    event: ast.expr
    method: str
    fields: list[str | None]  # None: those of a mapping


def logging_calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """The calls of a logger, each with its method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS:
            name = ast.unparse(node.func.value)
            if name == "logger" or name.endswith("._logger"):
                yield node, node.func.attr


def wrappers(tree: ast.Module) -> dict[str, tuple[int, str]]:
    """Functions that log their parameter `event`: its position among the arguments, and the method."""
    found = {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [each.arg for each in function.args.args if each.arg not in {"self", "cls"}]
            for call, method in logging_calls(function):
                if isinstance(call.args[0], ast.Name) and call.args[0].id == "event" and "event" in names:
                    found[function.name] = (names.index("event"), method)
    return found


def summarises(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.ImportFrom)
        and node.module == Summary.__module__
        and any(each.name == Summary.__name__ for each in node.names)
        for node in ast.walk(tree)
    )


def calls(tree: ast.Module) -> Iterator[Call]:
    wrapping, has_summaries = wrappers(tree), summarises(tree)
    for call, method in logging_calls(tree):
        event = call.args[0]
        if not (wrapping and isinstance(event, ast.Name) and event.id == "event"):
            yield Call(event, method, [each.arg for each in call.keywords if each.arg != "exc_info"])
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in wrapping:
            position, method = wrapping[name]
            yield Call(node.args[position], method, [*(each.arg for each in node.keywords), None])
        elif name == Summary.__name__ and has_summaries:
            given = {each.arg: each.value for each in node.keywords}
            default = inspect.signature(Summary).parameters["level"].default
            yield Call(node.args[1], ast.literal_eval(given["level"]) if "level" in given else default, [None])


@cache
def uses() -> dict[str, Use]:
    found = {name: Use({level}, is_open=True) for name, level in WITHOUT_A_CALL.items()}
    for path in sorted({*PACKAGE.rglob("*.py")} - EXCEPT):
        for call in calls(ast.parse(path.read_text())):
            place = f"{path.relative_to(ROOT)}:{call.event.lineno}"
            assert isinstance(call.event, ast.Constant), f"{place}: name the event by a literal"
            assert call.event.value in MESSAGES, f"{place}: {call.event.value!r} is not in whaled/log_events.py"
            use = found.setdefault(call.event.value, Use())
            use.levels.add("error" if call.method == "exception" else call.method)
            use.fields.update((name, None) for name in call.fields if name is not None)
            use.is_open |= None in call.fields
    return found


def test_every_event_is_used_and_at_one_level() -> None:
    assert MESSAGES.keys() - uses().keys() == set()
    assert {name: use.levels for name, use in uses().items() if len(use.levels) != 1} == {}


def test_identifiers_have_two_words_or_more_unlike_the_lines_of_a_library() -> None:
    assert [name for name in MESSAGES if not re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", name) or len(name) > 40] == []


def test_messages_differ_and_are_one_line_without_a_period() -> None:
    assert len(set(MESSAGES.values())) == len(MESSAGES)
    assert [text for text in MESSAGES.values() if "\n" in text or text.endswith(".") or text != text.strip()] == []


def test_no_field_has_a_name_that_the_output_needs() -> None:
    taken = {"event", "message", "level", "logger", "timestamp", "exception"}
    assert [name for name, use in uses().items() if taken & use.fields.keys()] == []


# --- docs/logs.md ---


def rows() -> dict[str, list[str]]:
    """The cells of each event on the page: level, message, fields, meaning."""
    pattern = r"^\| `([a-z0-9_]+)` \| (\w+) \| (.*?) \| (.*?) \| (.*) \|$"
    return {name: cells for name, *cells in re.findall(pattern, PAGE.read_text(), re.MULTILINE)}


def test_the_page_has_every_event_in_the_order_of_the_table() -> None:
    assert list(rows()) == list(MESSAGES)


@pytest.mark.parametrize("name", MESSAGES)
def test_the_page_has_an_event_as_it_is(name: str) -> None:
    """A field that the call does not name is listed after the others. The meaning is the page's own."""
    use = uses()[name]
    level, message, cell, _meaning = rows()[name]
    assert ({level}, message) == (use.levels, MESSAGES[name])
    fields = re.findall(r"`(\w+)`", cell)
    assert fields[: len(use.fields)] == list(use.fields)
    assert use.is_open or len(fields) == len(use.fields)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_events_that_commands_on_pages_look_for_exist(page: Path) -> None:
    assert set(re.findall(r"WHALED_EVENT=(\w+)", page.read_text())) - MESSAGES.keys() == set()
