"""The building blocks of the dashboards: expressions over the selected instances of whaled, and panels."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmap_options
from grafana_foundation_sdk.models import prometheus as prometheus_options
from grafana_foundation_sdk.models import units

SOURCE = model.DataSourceRef(type_val="prometheus", uid="$datasource")
CHOSEN = ('job=~"$job"', 'instance=~"$instance"')

GREEN, YELLOW, RED, BLUE, GREY = "green", "yellow", "red", "blue", "text"
# (lower bound, colour). The first one has no bound: it is the colour below all others.
Steps: TypeAlias = Sequence[tuple[float | None, str]]
GOOD_IF_ZERO: Steps = ((None, GREEN), (1, RED))
NEUTRAL: Steps = ((None, BLUE),)
# A timestamp of 0 means "none yet": its age exceeds any real one. An expiry of +Inf means "never".
NEVER_HAPPENED = 1e9
NEVER_ENDS = 1e12


# --- expressions ---


def of(metric: str, *matchers: str) -> str:
    """Return a selector for a metric of the selected instances."""
    return f"{metric}{{{', '.join((*CHOSEN, *matchers))}}}"


def rate(metric: str, *matchers: str, by: str = "") -> str:
    """Return the rate per second, summed over the selected instances, by a label if given."""
    return f"sum{f' by ({by})' if by else ''} (rate({of(metric, *matchers)}[$__rate_interval]))"


def per_hour(metric: str, by: str = "") -> str:
    """Return the rate per hour."""
    return f"3600 * {rate(metric, by=by)}"


def quantile(share: float, histogram: str) -> str:
    """Return a quantile of a histogram."""
    return f"histogram_quantile({share}, {rate(f'{histogram}_bucket', by='le')})"


def age(timestamp: str) -> str:
    """Return the seconds since a timestamp, the oldest one of several instances."""
    return f"time() - min({of(timestamp)})"


# --- panels ---


def query(expression: str, legend: str = "") -> prometheus.Dataquery:
    """Return a query over the displayed time range."""
    return prometheus.Dataquery().expr(expression).legend_format(legend).datasource(SOURCE).range()


def _thresholds(steps: Steps) -> board.ThresholdsConfig:
    return (
        board.ThresholdsConfig()
        .mode(model.ThresholdsMode.ABSOLUTE)
        .steps([model.Threshold(value, color) for value, color in steps])
    )


def value_map(texts: Mapping[int, tuple[str, str]]) -> model.ValueMap:
    """Map single values to a text and a colour."""
    return model.ValueMap(
        {
            str(value): model.ValueMappingResult(text=text, color=color, index=index)
            for index, (value, (text, color)) in enumerate(texts.items())
        }
    )


def from_on(begin: float, text: str, color: str) -> model.RangeMap:
    """Map all values from `begin` on to a text and a colour."""
    return model.RangeMap(
        model.DashboardRangeMapOptions(
            from_val=begin, to=None, result=model.ValueMappingResult(text=text, color=color, index=0)
        )
    )


def number(
    title: str,
    description: str,
    expression: str,
    unit: str,
    steps: Steps = NEUTRAL,
    *,
    texts: Sequence[model.ValueMapping] = (),
    trend: bool = False,
    decimals: int | None = None,
    width: int = 3,
) -> stat.Panel:
    """Return a panel of a single number, coloured by `steps`; with `trend` it includes a sparkline."""
    data = query(expression).ref_id("A")
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .datasource(SOURCE)
        .thresholds(_thresholds(steps))
        .color_scheme(board.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .color_mode(options.BigValueColorMode.BACKGROUND)
        .graph_mode(options.BigValueGraphMode.AREA if trend else options.BigValueGraphMode.NONE)
        .mappings(list(texts))
        .with_target(data if trend else data.instant())
        .height(4)
        .span(width)
    )
    return panel if decimals is None else panel.decimals(decimals)


def lines(
    title: str,
    description: str,
    unit: str,
    queries: Mapping[str, str],
    *,
    stacked: bool = False,
    many: bool = False,
    steps: Steps = (),
    logarithmic: bool = False,
    floating: bool = False,
    limit: float | None = None,
    width: int = 8,
    colors: Mapping[str, str] | None = None,
    counts: str = "",
) -> timeseries.Panel:
    """Return a panel of lines over time, with one query per legend.

    With `many` the legend is a table, largest values first. With `floating` the axis does not start at 0, for values
    that only grow. `limit` is the upper end of the axis. Legends that start with `counts` are plain numbers, on an axis
    of their own at the right.
    """
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .datasource(SOURCE)
        .color_scheme(board.FieldColor().mode(model.FieldColorModeId.PALETTE_CLASSIC))
        .line_width(1)
        .fill_opacity(25 if stacked else 0 if logarithmic or floating else 8)
        .show_points(options.VisibilityMode.AUTO)
        .tooltip(
            common.VizTooltipOptions()
            .mode(options.TooltipDisplayMode.MULTI)
            .sort(options.SortOrder.DESCENDING)
            .hide_zeros(many)
        )
        .legend(_legend(many=many))
        .height(8)
        .span(width)
    )
    if not floating:
        panel.min(0)
    if limit is not None:
        panel.max(limit)
    if stacked:
        panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL).group("A"))
    if steps:
        panel.thresholds(_thresholds(steps)).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(options.GraphThresholdsStyleMode.DASHED)
        )
    if logarithmic:
        panel.scale_distribution(common.ScaleDistributionConfig().type(options.ScaleDistribution.LOG).log(10))
    for name, color in (colors or {}).items():
        fixed = model.FieldColor(mode=model.FieldColorModeId.FIXED, fixed_color=color)
        panel.override_by_name(name, [model.DynamicConfigValue("color", fixed.to_json())])
    if counts:
        properties = {"unit": units.Short, "custom.axisPlacement": options.AxisPlacement.RIGHT, "custom.fillOpacity": 0}
        panel.override_by_regexp(f"/^{counts}/", [model.DynamicConfigValue(*each) for each in properties.items()])
    for index, (legend, expression) in enumerate(queries.items()):
        panel.with_target(query(expression, legend).ref_id(chr(ord("A") + index)))
    return panel


def _legend(*, many: bool) -> common.VizLegendOptions:
    legend = common.VizLegendOptions().show_legend(True)
    if many:
        return (
            legend.display_mode(options.LegendDisplayMode.TABLE)
            .placement(options.LegendPlacement.RIGHT)
            .calcs(["max"])
            .sort_by("Max")
            .sort_desc(True)
        )
    return legend.display_mode(options.LegendDisplayMode.LIST).placement(options.LegendPlacement.BOTTOM).calcs([])


def buckets(title: str, description: str, histogram: str, *, width: int = 12) -> heatmap.Panel:
    """Return a heat map of a histogram over time."""
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .unit(units.Seconds)
        .datasource(SOURCE)
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heatmap_options.HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .fill("dark-orange")
            .scale(heatmap_options.HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
        )
        .y_axis(heatmap.YAxisConfig().unit(units.Seconds).axis_placement(options.AxisPlacement.LEFT))
        .cell_gap(1)
        .with_target(
            query(rate(f"{histogram}_bucket", by="le"), "{{le}}")
            .format(prometheus_options.PromQueryFormat.HEATMAP)
            .ref_id("A")
        )
        .height(8)
        .span(width)
    )


def states(
    title: str, description: str, expression: str, legend: str, texts: Mapping[int, tuple[str, str]], *, width: int = 12
) -> statetimeline.Panel:
    """Return a panel of states over time, with one bar per legend."""
    return (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .unit(units.Short)
        .datasource(SOURCE)
        .mappings([value_map(texts)])
        .color_scheme(board.FieldColor().mode(model.FieldColorModeId.THRESHOLDS))
        .legend(_legend(many=False))
        .show_value(options.VisibilityMode.AUTO)
        .merge_values(True)
        .with_target(query(expression, legend).ref_id("A"))
        .height(6)
        .span(width)
    )
