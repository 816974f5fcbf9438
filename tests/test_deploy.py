"""What is shipped beside the program names only what the program has."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parent.parent / "deploy"
METRICS_PAGE = DEPLOY.parent / "docs" / "metrics.md"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def expressions(dashboard: Any) -> list[str]:
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return targets + [annotation["expr"] for annotation in dashboard["annotations"]["list"]]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_ask_for_metrics_that_exist(path: Path) -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", METRICS_PAGE.read_text(), re.MULTILINE))
    for expression in expressions(load(path)):
        named = re.findall(r"\b((?:whaled|process)_[a-z_]+)\b", expression)
        assert named, expression
        assert {name.removesuffix("_bucket") for name in named} <= documented, expression


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_say_what_they_show_and_select_the_instance(path: Path) -> None:
    dashboard = load(path)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "job", "instance"}
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            selectors = re.findall(r"\b(?:whaled|process)_[a-z_]+(\{[^}]*\})?", target["expr"])
            assert all('instance=~"$instance"' in selector for selector in selectors), target["expr"]


def test_there_are_dashboards() -> None:
    assert DASHBOARDS


def test_shipped_yaml_is_yaml() -> None:
    for path in DEPLOY.rglob("*.y*ml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
