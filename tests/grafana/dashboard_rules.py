"""What every dashboard must hold: the rules that Grafana's dashboard-linter has, its schema, and metrics that exist."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from kit.paths import ROOT

GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
# Of every target, and from the alert rules that are shipped.
NOT_OURS = {"up", "ALERTS"}
UNITS = {value for name, value in vars(units).items() if isinstance(value, str) and not name.startswith("_")}
CHOSEN = ('job=~"$job"', 'instance=~"$instance"')
# The SDK knows annotations of no particular data source; this one is of Prometheus's.
BEYOND_THE_SDK = re.compile(r"\.annotations\.list\[\d+\]\.titleFormat")


def load(path: Path) -> Any:
    """A dashboard."""
    return json.loads(path.read_text())


def panels(dashboard: Any) -> list[Any]:
    """Everything but the rows, which must not hide panels."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: Any) -> Iterator[tuple[str, str]]:
    """Every expression that a dashboard sends, with the name of what sends it."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        yield f"annotation {annotation['name']}", annotation["expr"]


@cache
def documented() -> frozenset[str]:
    """The metrics of docs/metrics.md, histograms by what is asked of them."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    parts = {"histogram": ("_bucket", "_sum", "_count")}
    return frozenset(f"{name}{part}" for name, kind in rows for part in parts.get(kind, ("",)))


@cache
def excluded() -> frozenset[tuple[str, str, str]]:
    """Rule, dashboard and panel of what is excused."""
    rules = yaml.safe_load((GRAFANA / "dashboards" / ".lint").read_text())["exclusions"]
    return frozenset(
        (rule, entry["dashboard"], entry["panel"]) for rule, excuse in rules.items() for entry in excuse["entries"]
    )


def faults(dashboard: Any) -> list[str]:
    """Everything that is wrong, a line each."""
    return [
        *_of_the_frame(dashboard),
        *_of_variables(dashboard),
        *_of_panels(dashboard),
        *(f"{name}: {fault}" for name, expression in expressions(dashboard) for fault in _of_expression(expression)),
        *(
            f"target-rate-interval-rule: {panel['title']}: [{window}]"
            for panel in panels(dashboard)
            if ("target-rate-interval-rule", dashboard["title"], panel["title"]) not in excluded()
            for target in panel["targets"]
            for window in re.findall(r"\[([^\]]+)\]", target["expr"])
            if window != "$__rate_interval"
        ),
        *(f"unknown to Grafana: {path}" for path in unknown_keys(dashboard)),
    ]


def _of_the_frame(dashboard: Any) -> Iterator[str]:
    if dashboard.get("editable", True):
        yield "uneditable-dashboard: editable is not false"
    if not dashboard.get("uid"):
        yield "no uid"
    if "__inputs" in dashboard:
        yield "__inputs: an export, which provisioning does not fill in"
    if not dashboard.get("description"):
        yield "no description"
    if [link["tags"] for link in dashboard.get("links", [])] != [["whaled"]] or "whaled" not in dashboard["tags"]:
        yield "no links to the other dashboards"
    if {"Restart", "Reload"} != {annotation["name"] for annotation in dashboard["annotations"]["list"]}:
        yield "no marks of restarts and reloads"
    ids = [panel.get("id") for panel in dashboard["panels"]]
    if None in ids or len(set(ids)) < len(ids):
        yield f"panel ids are not all there or not distinct: {ids}"


def _of_variables(dashboard: Any) -> Iterator[str]:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    if variables.get("datasource", {}).get("type") != "datasource":
        yield "template-datasource-rule: no variable $datasource"
    for name in ("job", "instance"):
        variable = variables.get(name, {})
        if not (variable.get("multi") and variable.get("allValue") == ".+" and variable.get("label")):
            yield f"template-{name}-rule: ${name} must be there with a label, multi and allValue .+"
        if variable.get("refresh") != 2:
            yield f"template-on-time-change-reload-rule: ${name}"
        if variable.get("datasource", {}).get("uid") != "$datasource":
            yield f"template-datasource-rule: ${name} has a data source of its own"
    if variables.get("job", {}).get("includeAll"):
        yield "$job has All, which would take in the up and process_* of everything that Prometheus scrapes"


def _of_panels(dashboard: Any) -> Iterator[str]:
    for panel in panels(dashboard):
        title = panel.get("title")
        if not title or not panel.get("description"):
            yield f"panel-title-description-rule: {title!r}"
        unit = panel["fieldConfig"]["defaults"].get("unit")
        if unit not in UNITS:
            yield f"panel-units-rule: {title}: {unit!r}"
        if {panel["datasource"]["uid"], *(target["datasource"]["uid"] for target in panel["targets"])} != {
            "$datasource"
        }:
            yield f"panel-datasource-rule: {title}"


def _of_expression(expression: str) -> Iterator[str]:
    known = documented() | NOT_OURS
    for name, selector in re.findall(r"\b((?:whaled_|process_)\w+|up|ALERTS)\b(\{[^}]*\})?", expression):
        if name not in known:
            yield f"{name} is not in docs/metrics.md"
        for matcher in CHOSEN:
            if matcher not in selector:
                yield f"target-job-rule, target-instance-rule: {name}{selector} has no {matcher}"
    if not re.search(r"[a-zA-Z_]\w*\{", expression):
        yield f"asks for nothing: {expression}"


def unknown_keys(dashboard: Any) -> list[str]:
    """The keys that Grafana's own types do not know: read into them and written again, they are gone."""
    register_default_plugins()
    back = json.loads(JSONEncoder().encode(Dashboard.from_json(json.loads(json.dumps(dashboard)))))
    lost = set(_paths(dashboard)) - set(_paths(back))
    return sorted(path for path in lost if not BEYOND_THE_SDK.fullmatch(path))


def _paths(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _paths(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _paths(value, f"{path}[{index}]")
    else:
        yield path
