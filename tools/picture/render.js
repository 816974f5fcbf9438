// node render.js DASHBOARD.json PICTURE.png SECONDS RATE_INTERVAL PROMETHEUS: see docs/grafana.md, "The picture".
// NODE_PATH: directory of the packages of package.json. CHROMIUM: a browser. Exits with 1 if a panel is empty or cannot be drawn.
const fs = require('fs');
const path = require('path');
const esbuild = require('esbuild');
const puppeteer = require('puppeteer-core');

const [source, picture, seconds, rateInterval, prometheus] = process.argv.slice(2);
const ORIGIN = 'http://picture.invalid/';
const faults = [];

async function queryPanel(panel, values, now) {
  return Promise.all((panel.targets ?? []).map(async (target) => {
    const query = target.expr.replace(/\$(\w+)/g, (_, name) => values[name]);
    const body = new URLSearchParams({ query, start: now - seconds, end: now, step: Math.max(1, seconds / 200) });
    const { status, error, data } = await (await fetch(`${prometheus}/api/v1/query_range`, { method: 'POST', body })).json();
    if (status !== 'success') faults.push(`${panel.title}: ${error}`);
    else if (!data.result.some((series) => series.values.some(([, value]) => value !== 'NaN'))) faults.push(`${panel.title}: no data: ${query}`);
    return { legend: target.legendFormat, series: data?.result ?? [] };
  }));
}

(async () => {
  const dashboard = JSON.parse(fs.readFileSync(source)), now = Date.now() / 1000, answers = {};
  const values = { __rate_interval: rateInterval, __range: `${seconds}s` };
  for (const variable of dashboard.templating.list) values[variable.name] = variable.allValue;
  for (const panel of dashboard.panels) answers[panel.id] = await queryPanel(panel, values, now);
  const packages = process.env.NODE_PATH;
  const { outputFiles: [script] } = esbuild.buildSync({
    entryPoints: [path.join(__dirname, 'main.jsx')], bundle: true, write: false, jsx: 'automatic', logLevel: 'error', nodePaths: [packages],
    define: { 'process.env.NODE_ENV': '"production"', global: 'window' },
    loader: { '.svg': 'dataurl', '.png': 'dataurl', '.woff2': 'dataurl', '.css': 'text' },
  });
  const style = fs.readFileSync(require.resolve('uplot/dist/uPlot.min.css'), 'utf8');
  const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: ['--no-sandbox', '--disable-gpu'] });
  const page = await browser.newPage();
  page.on('pageerror', (error) => faults.push(`page: ${error}`));
  page.on('console', (message) => message.text().startsWith('PANEL') && faults.push(message.text()));
  await page.setViewport({ width: 1600, height: 900 });
  await page.setRequestInterception(true); // gives the page an origin, which the components need, and blocks all requests
  page.on('request', (request) => (request.url() === ORIGIN ? request.respond({ contentType: 'text/html', body: '<html></html>' }) : request.abort()));
  await page.goto(ORIGIN);
  await page.setContent(`<style>${style}</style><body style="margin:0;font-family:sans-serif"><div id="root"></div></body>`);
  await page.evaluate((data) => { window.__PICTURE__ = data; }, { dashboard, answers, range: [(now - seconds) * 1000, now * 1000] });
  await page.addScriptTag({ content: script.text });
  await page.waitForNetworkIdle({ idleTime: 1500 });
  await page.screenshot({ path: picture, fullPage: true });
  await browser.close();
  faults.forEach((fault) => console.error(fault));
  process.exit(faults.length ? 1 : 0);
})();
