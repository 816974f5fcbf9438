// The page: all panels of the dashboard at their positions, drawn by Grafana's published components from Prometheus data.
import React from 'react';
import { createRoot } from 'react-dom/client';
import {
  BigValue, BigValueColorMode, BigValueGraphMode, BigValueTextMode, GlobalStyles, PanelChrome, ThemeContext, TimeSeries,
} from '@grafana/ui';
import { createTheme, dateTime, FieldColorModeId, FieldType, getDisplayProcessor, toDataFrame } from '@grafana/data';

const WIDTH = 1600, COLUMN = WIDTH / 24, ROW = 38, GAP = 8;
const theme = createTheme({ colors: { mode: 'dark' } });
const { dashboard, answers, range: [from, to] } = window.__PICTURE__;
const range = { from: dateTime(from), to: dateTime(to), raw: { from: 'now', to: 'now' } };
// Grafana's defaults for options that a panel does not set.
const custom = {
  drawStyle: 'line', lineWidth: 1, fillOpacity: 0, showPoints: 'auto', pointSize: 5, axisPlacement: 'auto', spanNulls: false,
  stacking: { mode: 'none', group: 'A' }, scaleDistribution: { type: 'linear' }, thresholdsStyle: { mode: 'off' },
  hideFrom: { viz: false, legend: false, tooltip: false },
};

const named = (format, labels) => (format ? format.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, key) => labels[key] ?? '') : ' ');

function framesOf(panel) {
  const defaults = panel.fieldConfig?.defaults ?? {}, overrides = panel.fieldConfig?.overrides ?? [];
  const frames = answers[panel.id].flatMap(({ legend, series }) => series.map(({ metric, values }) => {
    const name = named(legend, metric);
    const config = { color: { mode: FieldColorModeId.PaletteClassic }, ...defaults, displayName: name, custom: { ...custom, ...defaults.custom } };
    for (const { matcher, properties } of overrides) {
      if (matcher.id === 'byName' && matcher.options === name) properties.forEach(({ id, value }) => { config[id] = value; });
    }
    return toDataFrame({ fields: [
      { name: 'Time', type: FieldType.time, values: values.map(([at]) => at * 1000), config: {} },
      { name: 'Value', type: FieldType.number, labels: metric, values: values.map(([, value]) => (value === 'NaN' ? null : +value.replace('Inf', 'Infinity'))), config },
    ] });
  }));
  frames.forEach(({ fields: [time, value] }, index) => {
    const numbers = value.values.filter((one) => one !== null);
    const min = Math.min(...numbers), max = Math.max(...numbers);
    value.state = { seriesIndex: index, range: { min, max, delta: max - min } };
    time.display = getDisplayProcessor({ field: time, theme, timeZone: 'utc' });
    value.display = getDisplayProcessor({ field: value, theme, timeZone: 'utc' });
  });
  return frames;
}

function Body({ panel, width, height }) {
  const frames = framesOf(panel), options = panel.options ?? {};
  if (!frames.length) return <div style={{ textAlign: 'center', color: theme.colors.text.secondary }}>No data</div>;
  if (panel.type === 'stat') {
    const { fields: [x, y] } = frames[0];
    const last = y.values.filter((one) => one !== null).at(-1);
    const sparkline = options.graphMode === 'none' ? undefined : { x, y };
    return <BigValue theme={theme} width={width} height={height} value={{ ...y.display(last), title: '' }} textMode={BigValueTextMode.Value}
      colorMode={options.colorMode ?? BigValueColorMode.Value} graphMode={options.graphMode ?? BigValueGraphMode.None} sparkline={sparkline} />;
  }
  if (panel.type === 'timeseries') {
    return <TimeSeries frames={frames} timeRange={range} timeZone="utc" width={width} height={height} structureRev={1}
      legend={options.legend} options={{}} replaceVariables={(text) => text}>{() => null}</TimeSeries>;
  }
  return <div style={{ color: theme.colors.text.secondary }}>({panel.type}: not among the published components)</div>;
}

class Caught extends React.Component {
  state = {};
  static getDerivedStateFromError(error) { return { error }; }
  componentDidCatch(error) { console.error(`PANEL ${this.props.title}: ${error}`); }
  render() { return this.state.error ? null : this.props.children; }
}

function Placed({ panel }) {
  const { x = 0, y = 0, w, h } = panel.gridPos, width = w * COLUMN - GAP, height = h * ROW - GAP;
  const box = { position: 'absolute', left: x * COLUMN + GAP / 2, top: y * ROW + GAP / 2, width, height };
  if (panel.type === 'row') {
    return <div style={{ ...box, color: theme.colors.text.primary, fontSize: 16, fontWeight: 500, lineHeight: `${ROW}px` }}>{panel.title}</div>;
  }
  return <div style={box}><PanelChrome title={panel.title} description={panel.description} width={width} height={height}>
    {(innerWidth, innerHeight) => <Body panel={panel} width={innerWidth} height={innerHeight} />}
  </PanelChrome></div>;
}

const bottom = Math.max(...dashboard.panels.map(({ gridPos: { y = 0, h } }) => (y + h) * ROW));
createRoot(document.getElementById('root')).render(
  <ThemeContext.Provider value={theme}><GlobalStyles />
    <div style={{ position: 'relative', background: theme.colors.background.canvas, width: WIDTH, height: bottom + GAP }}>
      {dashboard.panels.map((panel) => <Caught key={panel.id} title={panel.title}><Placed panel={panel} /></Caught>)}
    </div>
  </ThemeContext.Provider>,
);
