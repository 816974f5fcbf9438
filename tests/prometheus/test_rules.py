"""The alert rules: Prometheus accepts them, and each alert is tested.

Each has a case that fires, one that stays silent, and a section of the runbook; the metrics they read are those that
whaled exports.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kit.daemon import running, write_config
from kit.paths import ROOT
from kit.prometheus import ALERTS, DEPLOY, RECORDINGS, needed, rules_of
from whaled.metrics import Metrics

RUNBOOK = ROOT / "docs" / "runbook.md"
CASES = sorted(Path(__file__).parent.glob("*.test.yml"))
# These replay hours and days of samples.
LONG_CASES = {"clients", "configuration", "days", "delivery", "eventlog", "long", "recording", "upstream"}
LONG = [pytest.mark.slow, pytest.mark.long]
ALERT_RULES = rules_of(ALERTS)
RECORDED = {rule["record"] for rule in rules_of(RECORDINGS)}
SEVERITIES = {"page", "ticket"}


class Case(NamedTuple):
    """What a rule test expects of an alert at a time."""

    alert: str
    fires: bool


def checked(*command: str | Path, text: bytes | None = None) -> str:
    """Run a tool that must be content."""
    ended = subprocess.run(
        [needed(str(command[0])), *command[1:]], input=text, capture_output=True, timeout=60, check=False
    )
    said = (ended.stdout + ended.stderr).decode()
    assert ended.returncode == 0, said
    return said


def cases() -> list[Case]:
    """Every expectation of every rule test."""
    return [
        Case(case["alertname"], bool(case["exp_alerts"]))
        for path in CASES
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test.get("alert_rule_test", [])
    ]


def metric_names(expression: str) -> set[str]:
    """The names of metrics that whaled exports, as they stand in an expression."""
    return set(re.findall(r"(?<![\w:])((?:whaled|process)_\w+)\b(?!:)", expression))


def selectors(expression: str) -> list[tuple[str, str, str]]:
    """Metric, label and value of each value that a matcher names."""
    return [
        (metric, label, value)
        for metric, matchers in re.findall(r"\b((?:whaled|process)_\w+)\{([^}]*)\}", expression)
        for label, values in re.findall(r'(\w+)\s*(?:=~|!=|=)\s*"([^"]*)"', matchers)
        for value in values.split("|")
        if label != "job"
    ]


def expressions() -> list[str]:
    return [rule["expr"] for rule in [*ALERT_RULES, *rules_of(RECORDINGS)]]


def sections() -> dict[str, str]:
    """The runbook's text by alert."""
    found = re.split(r"^### (\w+)$", RUNBOOK.read_text(), flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


# --- the tools ---


def test_promtool_accepts_the_rules() -> None:
    said = checked("promtool", "check", "rules", "--lint=all", "--lint-fatal", RECORDINGS, ALERTS)
    assert f"{len(ALERT_RULES)} rules found" in said


@pytest.mark.parametrize("name", ["prometheus.example.yml", "scrape.yml"])
def test_promtool_accepts_the_configuration(name: str) -> None:
    checked("promtool", "check", "config", DEPLOY / name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=LONG if path.name.split(".")[0] in LONG_CASES else []) for path in CASES],
    ids=lambda path: path.name.split(".")[0],
)
def test_alerts_fire_and_stay_silent_as_the_cases_specify(path: Path) -> None:
    checked("promtool", "test", "rules", path)


def test_promtool_accepts_the_names_and_texts_of_the_metrics() -> None:
    assert checked("promtool", "check", "metrics", text=Metrics().render()) == ""


def test_amtool_accepts_the_example() -> None:
    checked("amtool", "check-config", DEPLOY / "alertmanager.example.yml")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ALERT_RULES, ids=lambda rule: rule["alert"])
def test_the_severity_determines_the_receiver(rule: dict[str, Any]) -> None:
    example = f"--config.file={DEPLOY / 'alertmanager.example.yml'}"
    receiver = {"page": "pager", "ticket": "tickets"}[rule["labels"]["severity"]]
    labels = [f"alertname={rule['alert']}", f"severity={rule['labels']['severity']}"]
    checked("amtool", "config", "routes", "test", example, f"--verify.receivers={receiver}", *labels)


# --- rules, cases and runbook belong together ---


@pytest.mark.slow
def test_every_alert_has_a_case_that_fires_and_one_that_stays_silent() -> None:
    alerts = {rule["alert"] for rule in ALERT_RULES}
    assert len(alerts) == len(ALERT_RULES)
    assert {case.alert for case in cases() if case.fires} == alerts
    assert {case.alert for case in cases() if not case.fires} == alerts


def test_every_recording_is_used_or_for_the_dashboard() -> None:
    used = set(re.findall(r"whaled:\w+:\w+", "\n".join(expressions())))
    assert used <= RECORDED
    assert used == RECORDED - {"whaled:delivery_budget_remaining:ratio30d"}


@pytest.mark.parametrize("rule", ALERT_RULES, ids=lambda rule: rule["alert"])
def test_an_alert_has_a_severity_a_summary_and_a_runbook_link(rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in SEVERITIES
    texts = rule["annotations"]
    assert texts.keys() == {"summary", "description", "runbook_url"}
    assert len(texts["summary"]) < 110
    assert "$labels.instance" in texts["summary"] or rule["alert"] == "WhaledAbsent"
    assert texts["runbook_url"] == f"file:///opt/whaled/share/docs/runbook.md#{rule['alert'].lower()}"
    # 0.9328193832599119 means nothing to anybody at night.
    assert "{{ $value }}" not in texts["description"] or rule["alert"] == "WhaledRestarting"


def test_every_alert_has_a_section_of_the_runbook_and_no_section_is_without() -> None:
    assert list(sections()) == [rule["alert"] for rule in ALERT_RULES]


@pytest.mark.parametrize("rule", ALERT_RULES, ids=lambda rule: rule["alert"])
def test_a_runbook_section_has_the_severity_a_diagnosis_and_steps(rule: dict[str, Any]) -> None:
    text = sections()[rule["alert"]]
    assert text.lstrip().startswith(f"**{rule['labels']['severity']}.** ")
    assert re.search(r"^```(sh|promql)$", text, re.MULTILINE)
    assert re.search(r"^1\. ", text, re.MULTILINE)


@pytest.mark.slow
def test_the_runbook_names_commands_that_whaled_has() -> None:
    pattern = r"(?:^|`)whaled ([a-z-]+(?: (?:generate|list|retire|issue|inspect))?)"
    named = set(re.findall(pattern, RUNBOOK.read_text(), re.MULTILINE))
    assert named
    for command in named:
        asked = [sys.executable, "-m", "whaled", *command.split(), "--help"]
        assert subprocess.run(asked, capture_output=True, check=False).returncode == 0, command


def test_groups_are_evaluated_in_the_order_of_the_cases() -> None:
    groups = [group["name"] for path in (RECORDINGS, ALERTS) for group in yaml.safe_load(path.read_text())["groups"]]
    assert {path.name for path in CASES if yaml.safe_load(path.read_text())["group_eval_order"] != groups} == set()


# --- rules and metrics belong together ---


def test_rules_use_only_documented_metrics() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    types = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", page, re.MULTILINE))
    names = {name for expression in expressions() for name in metric_names(expression)}
    assert names
    parts = {name for name in names if types.get(re.sub(r"_(bucket|count)$", "", name)) == "histogram"}
    assert {name for name in names - parts if name not in types} == set()


def test_counters_are_used_only_with_rate_or_increase() -> None:
    bare = [
        (name, expression)
        for expression in expressions()
        for name in metric_names(expression)
        if name.endswith(("_total", "_bucket", "_count"))
        and len(re.findall(rf"(?:rate|increase)\({name}\b", expression)) != len(re.findall(rf"\b{name}\b", expression))
    ]
    assert bare == []


def first_operand(expression: str) -> str:
    """What stands at the beginning: a number, a metric, or something in parentheses."""
    if not expression.startswith("("):
        return expression.split(maxsplit=1)[0]
    depth = 0
    for index, character in enumerate(expression):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return expression[: index + 1]
    raise AssertionError(f"parentheses do not match: {expression}")


def test_denominators_that_can_be_zero_are_guarded() -> None:
    """A quotient x / 0 is NaN or +Inf: an alert that never fires, or always."""
    limits = {"whaled_memory_limit_bytes", "whaled_connections_limit", 'process_max_fds{job="whaled"}', "0.005"}
    divisions = [part for expression in expressions() for part in re.split(r" / ", expression)[1:]]
    divisors = {" ".join(first_operand(part).split()) for part in divisions}
    assert limits <= divisors
    assert {divisor for divisor in divisors - limits if not re.search(r" (> 0|>= \d+) ?\)$", divisor)} == set()


@pytest.mark.slow
async def test_a_running_whaled_exports_every_series_that_the_rules_name(tmp_path: Path) -> None:
    needed("promtool")
    async with (
        running(write_config(tmp_path, "ws://127.0.0.1:9/"), "--simulate") as daemon,
        aiohttp.ClientSession() as session,
        session.get(f"{daemon.http}/metrics") as answer,
    ):
        text = await answer.text()
    assert checked("promtool", "check", "metrics", text=text.encode()) == ""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    exported = {sample.name for sample in samples}
    valued = {(sample.name, label, value) for sample in samples for label, value in sample.labels.items()}
    missing: set[object] = set()
    for expression in expressions():
        missing |= metric_names(expression) - exported
        missing |= set(selectors(expression)) - valued
    # An issuer has series while it is configured: tests/auth/oidc/test_issuers.py.
    assert missing == {"whaled_issuer_keys_fetched_timestamp_seconds"}
