"""The parts common to all dashboards: variables, links to the other dashboards, marks of restarts and reloads."""

import itertools
from collections.abc import Sequence
from typing import TypeAlias

from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.cog import builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

from tools.dashboards.kit import SOURCE, of

Row: TypeAlias = tuple[str, Sequence[builder.Builder[model.Panel]]]


class _Annotation(model.AnnotationQuery):
    """The SDK's annotation query, with a field of Prometheus annotations that it lacks: the text next to the mark."""

    def to_json(self) -> dict[str, object]:
        return {**super().to_json(), "titleFormat": f"{self.name} {{{{instance}}}}"}


class _Mark(board.AnnotationQuery):
    def __init__(self, name: str, expression: str, color: str) -> None:
        super().__init__()
        self._internal = _Annotation(
            name=name, datasource=SOURCE, enable=True, hide=False, icon_color=color, built_in=0, expr=expression
        )


def _variable(name: str, label: str, series: str) -> board.QueryVariable:
    return (
        board.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(f"label_values({series}, {name})")
        .multi(True)
        .all_value(".+")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
    )


def dashboard(uid: str, title: str, description: str, rows: Sequence[Row]) -> model.Dashboard:
    """Build a dashboard from rows; panels get ids and positions."""
    started = f"changes({of('process_start_time_seconds')}[$__rate_interval]) > 0"
    reloaded = f"changes({of('whaled_config_last_reload_success_timestamp_seconds')}[$__rate_interval]) > 0"
    frame = (
        board.Dashboard(f"whaled: {title}")
        .uid(uid)
        .description(description)
        .tags(["whaled"])
        .readonly()
        .time("now-6h", "now")
        .refresh("30s")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(board.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        # Without "All": it would include `up` and process_* of everything that Prometheus scrapes.
        .with_variable(
            _variable("job", "Job", "whaled_build_info")
            .include_all(False)
            .current(model.VariableOption(selected=True, text=["whaled"], value=["whaled"]))
        )
        # From `up`, which also exists for a whaled that does not respond.
        .with_variable(
            _variable("instance", "Instance", 'up{job=~"$job"}')
            .include_all(True)
            .current(model.VariableOption(selected=True, text=["All"], value=["$__all"]))
        )
        .annotation(_Mark("Restart", started, "orange"))
        .annotation(_Mark("Reload", f"{reloaded} unless {started}", "blue"))
        .link(
            board.DashboardLink("whaled")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags(["whaled"])
            .include_vars(True)
            .keep_time(True)
        )
    )
    ids = itertools.count(1)
    for name, panels in rows:
        frame.with_row(board.Row(name).id(next(ids)))
        for panel in panels:
            frame.with_panel(panel)
    built = frame.build()
    # The SDK sets no ids, which Grafana needs to distinguish panels.
    for placed in built.panels or []:
        if isinstance(placed, model.Panel):
            placed.id_val = next(ids)
    return built


def render(built: model.Dashboard) -> str:
    """Return the JSON in the form that is committed."""
    return JSONEncoder(sort_keys=True, indent=2).encode(built) + "\n"
