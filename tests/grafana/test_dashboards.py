"""The dashboards are what their program makes, keep the rules, and ask only for what whaled exports."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from grafana.dashboard_rules import DASHBOARDS, GRAFANA, excluded, faults, load, panels
from tools.dashboards.__main__ import main as write


def test_the_committed_dashboards_match_the_programs_output(tmp_path: Path) -> None:
    write(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_text() for path in DASHBOARDS}, "run: make dashboards"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_keeps_the_rules(path: Path) -> None:
    assert faults(load(path)) == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_do_not_overlap_and_fill_their_row(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in load(path)["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place.get("x", 0), place.get("x", 0) + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    assert {x for x, _ in taken} == set(range(24))
    assert len(taken) == 24 * len({y for _, y in taken})


def test_dashboards_have_distinct_uids_and_titles() -> None:
    dashboards = [load(path) for path in DASHBOARDS]
    assert len({dashboard["uid"] for dashboard in dashboards}) == len({dashboard["title"] for dashboard in dashboards})
    assert {dashboard["uid"] for dashboard in dashboards} == {"whaled-overview", "whaled-delivery", "whaled-upstream"}


def test_exclusions_name_panels_that_exist() -> None:
    known = {(dashboard["title"], panel["title"]) for dashboard in map(load, DASHBOARDS) for panel in panels(dashboard)}
    assert {(dashboard, panel) for _, dashboard, panel in excluded()} <= known


def misspell(dashboard: Any) -> None:
    panel = panels(dashboard)[0]
    panel["fieldConfig"]["defaults"]["treshholds"] = panel["fieldConfig"]["defaults"].pop("thresholds")


def misspell_the_query(dashboard: Any) -> None:
    panels(dashboard)[0]["targets"][0]["legendFromat"] = "x"


def change_expression(old: str, new: str) -> Callable[[Any], None]:
    def change(dashboard: Any) -> None:
        for panel in panels(dashboard):
            for target in panel["targets"]:
                target["expr"] = target["expr"].replace(old, new)

    return change


def take(*path: str) -> Callable[[Any], None]:
    def change(dashboard: Any) -> None:
        node = panels(dashboard)[0] if path[0] == "panel" else dashboard
        for key in path[1:-1]:
            node = node[key]
        del node[path[-1]]

    return change


def give(value: Any, *path: str) -> Callable[[Any], None]:
    def change(dashboard: Any) -> None:
        node = panels(dashboard)[0] if path[0] == "panel" else dashboard
        for key in path[1:-1]:
            node = node[key]
        node[path[-1]] = value

    return change


def offer_all_jobs(dashboard: Any) -> None:
    (job,) = (one for one in dashboard["templating"]["list"] if one["name"] == "job")
    job["includeAll"] = True


def fix_the_job(dashboard: Any) -> None:
    dashboard["templating"]["list"] = [one for one in dashboard["templating"]["list"] if one["name"] != "job"]


BROKEN: list[tuple[Callable[[Any], None], str]] = [
    (misspell, "unknown to Grafana: .panels[1].fieldConfig.defaults.treshholds"),
    (misspell_the_query, "unknown to Grafana: .panels[1].targets[0].legendFromat"),
    (change_expression("whaled_connections{", "whaled_conections{"), "whaled_conections is not in docs/metrics.md"),
    (change_expression('instance=~"$instance"', 'instance="a"'), "target-job-rule, target-instance-rule"),
    (change_expression("[$__rate_interval]", "[5m]"), "target-rate-interval-rule"),
    (take("panel", "description"), "panel-title-description-rule"),
    (give("second", "panel", "fieldConfig", "defaults", "unit"), "panel-units-rule"),
    (give({"type": "prometheus", "uid": "abc"}, "panel", "datasource"), "panel-datasource-rule"),
    (give(1, "panel", "id"), "panel ids"),
    (give(True, "dashboard", "editable"), "uneditable-dashboard"),
    (give([], "dashboard", "__inputs"), "__inputs"),
    (give([], "dashboard", "links"), "no links"),
    (take("dashboard", "uid"), "no uid"),
    (fix_the_job, "template-job-rule"),
    (offer_all_jobs, "$job has All"),
]


@pytest.mark.parametrize(("breaks", "told"), BROKEN, ids=[told for _, told in BROKEN])
def test_a_fault_in_a_dashboard_is_found(breaks: Callable[[Any], None], told: str) -> None:
    broken = copy.deepcopy(load(GRAFANA / "dashboards" / "overview.json"))
    breaks(broken)
    assert any(told in fault for fault in faults(broken))


def test_provisioning_leads_to_the_dashboards_and_to_prometheus() -> None:
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "whaled.yaml").read_text())["providers"]
    (source,) = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "whaled.yaml").read_text())["datasources"]
    assert (provider["type"], provider["folder"], provider["allowUiUpdates"]) == ("file", "whaled", False)
    assert (source["type"], source["jsonData"]["timeInterval"]) == ("prometheus", "15s")
