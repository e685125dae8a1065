// Draws the page's charts from its data, filters and sorts its rows, copies its commands. Every text from a row is set
// as text, never as markup: by textContent here, by Vega in charts and tooltips.
const page = JSON.parse(document.getElementById("data").textContent);
const byName = Object.fromEntries(page.charts.map((chart) => [chart.name, chart]));
const shown = {}; // name -> the data that its chart shows now
const $ = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0 || !Number.isFinite(value)) return String(value);
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(Number(value.toPrecision(3))))));
  return Number(value.toPrecision(3)).toFixed(Math.min(digits, 12));
}

function words(datum) {
  if (datum.y === null || datum.y === undefined) return datum.word || "–";
  const spread = datum.low !== null && datum.low !== undefined && datum.low !== datum.high;
  return number(datum.y) + (spread ? ` [${number(datum.low)}, ${number(datum.high)}]` : "");
}

// Charts -------------------------------------------------------------------------------------------------------------
const text = "currentColor"; // so that charts follow the page's colours, on paper too
const config = {
  background: null,
  font: getComputedStyle(document.body).fontFamily,
  view: { stroke: null },
  axis: { labelColor: text, titleColor: text, domainColor: text, tickColor: text, gridColor: "var(--grid)",
    labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500, domainOpacity: 0.35, tickOpacity: 0.35, titlePadding: 8,
    labelOverlap: true, labelOpacity: 0.85 },
  text: { color: text, font: getComputedStyle(document.body).fontFamily, fontSize: 11.5 },
};
const tip = (xTitle, yTitle) => [
  { field: "series", title: "Model" }, { field: "at", title: xTitle }, { field: "said", title: yTitle },
  { field: "more", title: "Row" },
];

function scales(chart, data) {
  const domain = Object.keys(chart.styles).filter((name) => data.some((each) => each.series === name));
  const of = (key) => domain.map((name) => chart.styles[name][key]);
  return { domain, color: { domain, range: of("color") }, shape: { domain, range: of("shape") },
    dash: { domain, range: of("dash") },
    fill: { domain, range: domain.map((name) => (chart.styles[name].hollow ? "var(--card)" : chart.styles[name].color)) } };
}

function values(panel) {
  return panel.data.map((datum, place) => ({ ...datum, place, at: String(datum.x), said: words(datum),
    more: [datum.part, datum.assumed ? "assumed size" : "", datum.text].filter(Boolean).join(" · ") }));
}

const height = (width) => Math.max(260, Math.min(380, width * 0.62));

// 1, 2 and 5 of every power of ten; over little, as many as Vega likes.
function ticks(data) {
  const found = data.flatMap((each) => [each.y, each.low, each.high]).filter((value) => value > 0);
  const [low, high] = [Math.min(...found) / 1.3, Math.max(...found) * 1.3];
  const made = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    made.push(...[1, 2, 5].map((digit) => Number(`${digit}e${power}`)));
  const inside = made.filter((value) => value >= low && value <= high);
  return inside.length > 3 ? { values: inside } : { tickCount: 6 };
}

// A legend of HTML, which wraps, prints and shows marker, dashes and fill alike.
function legend(place, keys) {
  const made = element("div", { className: "legend" });
  for (const key of keys) {
    const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    picture.setAttribute("viewBox", "-17 -8 34 16");
    const add = (tag, attributes) => {
      const child = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(attributes)) child.setAttribute(name, value);
      picture.append(child);
    };
    if (key.dash) add("line", { x1: -17, x2: 17, y1: 0, y2: 0, stroke: key.color, "stroke-width": key.width,
      "stroke-dasharray": key.dash.length > 1 && key.dash[1] ? key.dash.join(" ") : "none" });
    add("path", { d: key.shape, transform: `scale(${key.dash ? 5 : 6.5})`, fill: key.hollow ? "var(--card)" : key.color,
      stroke: key.color, "stroke-width": 0.3 });
    made.append(element("span", {}, picture, key.name));
  }
  place.prepend(made);
}

const square = "M-1,-1L1,-1L1,1L-1,1Z";
const keysOf = (chart, data, withLines) => scales(chart, data).domain.map((name) => ({ name, ...chart.styles[name],
  dash: withLines ? chart.styles[name].dash : null }));

function lines(chart, panel, width) {
  const data = values(panel);
  const scale = scales(chart, data);
  const numeric = data.every((each) => typeof each.x === "number");
  const tall = height(width);
  // What failed lies in lanes along the edge that failing leads to: the top for memory, else the bottom.
  for (const each of data) each.main = chart.styles[each.series].width > 2;
  const failing = scale.domain.filter((name) => data.some((each) => each.series === name && each.word));
  const top = /GiB|memory|ms\b/.test(chart.y);
  const failed = data.filter((each) => each.word).map((each) => {
    const lane = failing.indexOf(each.series);
    return { ...each, lane: top ? 8 + 14 * lane : tall - 8 - 14 * lane, what: "✕" };
  });
  const sides = [...new Set(data.map((each) => each.x))].sort((a, b) => a - b);
  const span = numeric ? [sides[0], sides.at(-1)] : [];
  const pad = chart.logX ? [span[0] / 1.12, span[1] * 1.12]
    : [span[0] - 0.06 * (span[1] - span[0] || 1), span[1] + 0.06 * (span[1] - span[0] || 1)];
  const x = numeric
    ? { field: "x", type: "quantitative", title: chart.x, axis: { values: sides, format: "d", grid: false },
        scale: { type: chart.logX ? "log" : "linear", domain: pad, nice: false } }
    : { field: "x", type: "ordinal", title: chart.x, sort: null, axis: { labelAngle: 0, grid: false },
        scale: { type: "point", padding: 0.4 } };
  const room = 14 * failing.length + (failing.length ? 8 : 0);
  const range = top ? [tall, room] : [tall - room, 0];
  const y = { field: "y", type: "quantitative", title: chart.y,
    axis: { ...(chart.logY ? ticks(data) : { tickCount: 6 }), format: ".4~g", labelFlush: false },
    scale: { type: chart.logY ? "log" : "linear", ...(chart.logY ? {} : { zero: true }), nice: false, padding: 12, range } };
  const color = { field: "series", type: "nominal", scale: scale.color, legend: null };
  const layers = [
    { transform: [{ filter: "isValid(datum.low) && isValid(datum.high)" }],
      mark: { type: "rule", strokeWidth: 6, opacity: 0.35, strokeCap: "butt" },
      encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" }, color } },
    { mark: { type: "line", invalid: "break-paths-filter-domains" },
      encoding: { x, y, color, strokeDash: { field: "series", type: "nominal", scale: scale.dash, legend: null },
        strokeWidth: { condition: { test: "datum.main", value: 3 }, value: 1.8 },
        order: { field: "x", type: numeric ? "quantitative" : "ordinal", sort: null } } },
    { transform: [{ filter: "isValid(datum.y)" }],
      mark: { type: "point", size: 62, strokeWidth: 1.8, opacity: 1 },
      encoding: { x, y, color, shape: { field: "series", type: "nominal", scale: scale.shape, legend: null },
        fill: { field: "series", type: "nominal", scale: scale.fill, legend: null } } },
    { transform: [{ filter: "isValid(datum.y)" }],
      mark: { type: "point", size: 420, opacity: 0, filled: true, cursor: "pointer" },
      encoding: { x, y, tooltip: tip(chart.x, chart.y) } },
  ];
  if (!numeric) delete layers[1].encoding.order;
  if (panel.level !== null && panel.level !== undefined)
    layers.unshift({ data: { values: [{ y: panel.level }] }, mark: { type: "rule", strokeWidth: 1.2, color: text },
      encoding: { y } });
  if (failed.length)
    layers.push({ data: { values: failed },
      mark: { type: "text", align: "center", fontWeight: 700, fontSize: 13, cursor: "pointer", baseline: "middle" },
      encoding: { x, y: { field: "lane", type: "quantitative", scale: null, axis: null },
        text: { field: "what" }, color, tooltip: tip(chart.x, chart.y) } });
  // Each lane is named once, left of its first cross.
  const named = failing.map((name) => failed.find((each) => each.series === name));
  if (named.length)
    layers.push({ data: { values: named.map((each) => ({ ...each, what: `${each.series}: ${each.word}` })) },
      mark: { type: "text", align: numeric && named[0].x === sides[0] ? "left" : "right", fontSize: 11,
        dx: numeric && named[0].x === sides[0] ? 10 : -10, baseline: "middle" },
      encoding: { x, y: { field: "lane", type: "quantitative", scale: null, axis: null }, text: { field: "what" }, color } });
  if (data.some((each) => each.label))
    layers.push({ transform: [{ filter: "isValid(datum.label) && isValid(datum.y)" }],
      mark: { type: "text", align: "left", dx: 9, dy: 11, fontSize: 10.5, opacity: 0.85 },
      encoding: { x, y, text: { field: "label" } } });
  return { data: { values: data }, height: tall, layer: layers, resolve: { scale: { y: "shared" } } };
}

function bars(chart, panel, width) {
  const data = values(panel);
  const scale = scales(chart, data);
  const y = { field: "x", type: "nominal", sort: null, title: null,
    axis: { labelLimit: width * 0.42, domain: false, ticks: false, grid: false } };
  const most = Math.max(...data.map((each) => each.high ?? each.y ?? 0), 1e-9);
  const x = { field: "y", type: "quantitative", title: chart.y, axis: { tickCount: 4, format: "~s" },
    scale: { domain: [0, most * (1 + 60 / (0.6 * width))], nice: false } };
  const color = { field: "series", type: "nominal", scale: scale.color, legend: null };
  const layer = [
    { mark: { type: "bar", height: { band: 0.62 }, cursor: "pointer", cornerRadiusEnd: 2 },
      encoding: { y, x, color, tooltip: tip("Bar", chart.y) } },
    { transform: [{ filter: "isValid(datum.low) && isValid(datum.high)" }], mark: { type: "rule", strokeWidth: 2.5,
        color: text }, encoding: { y, x: { ...x, field: "low" }, x2: { field: "high" } } },
    { mark: { type: "text", align: "left", dx: 6, fontWeight: 600 },
      encoding: { y, x: { ...x, field: "edge" }, text: { field: "label" } } },
  ];
  for (const each of data) {
    each.edge = each.high ?? each.y ?? 0;
    each.label = each.word || number(each.y);
  }
  return { data: { values: data }, height: 38 * new Set(data.map((each) => each.x)).size, layer };
}

function stack(chart, panel, width) {
  const data = values(panel);
  const whole = {};
  for (const each of data) whole[each.x] = (whole[each.x] || 0) + (each.y || 0);
  const most = Math.max(...Object.values(whole), ...Object.values(panel.marks), 1e-9);
  for (const each of data) {
    each.order = chart.parts.indexOf(each.part);
    each.label = each.y / most > 34 / (width * 0.75) ? number(each.y) : "";
    each.ink = page.parts[each.order].ink;
  }
  const parts = chart.parts.filter((part) => data.some((each) => each.part === part));
  const y = { field: "x", type: "nominal", sort: null, title: null,
    axis: { labelLimit: width * 0.42, domain: false, ticks: false, grid: false } };
  const x = { field: "y", type: "quantitative", title: chart.y, stack: "zero", axis: { tickCount: 4, format: "~s" },
    scale: { domain: [0, most * (1 + 50 / (0.6 * width))], nice: false } };
  const order = { field: "order", type: "quantitative" };
  const color = { field: "part", type: "nominal", sort: parts, legend: null,
    scale: { domain: parts, range: parts.map((part) => page.parts[chart.parts.indexOf(part)].color) } };
  const ends = Object.entries(whole).map(([name, total]) => ({ x: name, label: number(total),
    total: Math.max(total, panel.marks[name] || 0) }));
  const marks = Object.entries(panel.marks).map(([name, value]) => ({ x: name, mark: value }));
  return { data: { values: data }, height: 40 * Object.keys(whole).length, layer: [
    { mark: { type: "bar", height: { band: 0.66 }, stroke: "var(--card)", strokeWidth: 1, cursor: "pointer" },
      encoding: { y, x, color, order, tooltip: tip("Bar", chart.y) } },
    { mark: { type: "text", fontSize: 11 },
      encoding: { y, x: { ...x, bandPosition: 0.5 }, order, detail: { field: "part" }, text: { field: "label" },
        color: { field: "ink", type: "nominal", scale: null, legend: null } } },
    { data: { values: ends }, mark: { type: "text", align: "left", dx: 6, fontWeight: 700 },
      encoding: { y, x: { field: "total", type: "quantitative" }, text: { field: "label" } } },
    { data: { values: marks }, mark: { type: "tick", thickness: 2, color: text, height: { band: 0.8 } },
      encoding: { y, x: { field: "mark", type: "quantitative" } } },
  ] };
}

function points(chart, panel, width) {
  const data = values(panel);
  for (const each of data) each.at = number(each.x);
  const scale = scales(chart, data);
  const { roof } = panel;
  const ridge = roof.flop_rate / roof.byte_rate;
  const low = Math.min(ridge / 4, ...data.map((each) => each.x / 2));
  const high = Math.max(ridge * 4, ...data.map((each) => each.x * 2));
  const roofs = [low, ridge, high].map((at) => ({ x: at, y: Math.min(roof.flop_rate, at * roof.byte_rate) / 1e12 }));
  const x = { field: "x", type: "quantitative", title: chart.x, axis: { format: "~g", tickCount: 5 },
    scale: { type: "log", domain: [low, high], nice: false } };
  const y = { field: "y", type: "quantitative", title: chart.y, axis: { format: ".4~g", tickCount: 6 },
    scale: { type: "log", nice: false, padding: 14 } };
  const color = { field: "series", type: "nominal", scale: scale.color, legend: null };
  return { data: { values: data }, height: height(width), layer: [
    { data: { values: roofs }, mark: { type: "line", color: text, strokeWidth: 1.6, interpolate: "linear" },
      encoding: { x, y } },
    { mark: { type: "point", size: 90, strokeWidth: 1.8, opacity: 1 },
      encoding: { x, y, color, shape: { field: "series", type: "nominal", scale: scale.shape, legend: null },
        fill: { field: "series", type: "nominal", scale: scale.fill, legend: null } } },
    { mark: { type: "point", size: 420, opacity: 0, filled: true, cursor: "pointer" },
      encoding: { x, y, tooltip: tip(chart.x, chart.y) } },
  ] };
}

function ratios(chart, panel, width) {
  const data = values(panel);
  const scale = scales(chart, data);
  const narrow = width < 520;
  const y = { field: "x", type: "nominal", sort: null, title: null,
    axis: { labelLimit: narrow ? width * 0.45 : 460, domain: false, ticks: false, labelFontSize: narrow ? 9 : 11 } };
  const x = { field: "y", type: "quantitative", title: chart.y, axis: { tickCount: 5, format: "~g" },
    scale: { zero: false, nice: true, padding: 10 } };
  const color = { field: "series", type: "nominal", scale: scale.color, legend: null };
  return { data: { values: data }, height: 22 * new Set(data.map((each) => each.x)).size, layer: [
    { data: { values: [{ y: panel.level ?? 1 }] }, mark: { type: "rule", color: text }, encoding: { x } },
    { mark: { type: "rule", strokeWidth: 5, opacity: 0.4 },
      encoding: { y, x: { ...x, field: "low" }, x2: { field: "high" }, color } },
    { mark: { type: "point", size: 60, opacity: 1, cursor: "pointer" },
      encoding: { y, x, color, shape: { field: "series", type: "nominal", scale: scale.shape, legend: null },
        fill: { field: "series", type: "nominal", scale: scale.fill, legend: null }, tooltip: tip("Case", chart.y) } },
  ] };
}

const kinds = { lines, bars, stack, points, ratios };

async function draw(chart, panel) {
  const place = $(`chart-${chart.name}`);
  const width = Math.floor(place.clientWidth);
  if (!width) return;
  shown[chart.name] = panel.data;
  if (!panel.data.some((each) => each.y !== null && each.y !== undefined)) {
    place.replaceChildren(element("p", { className: "status", textContent: "No row with a number matches." }));
    return;
  }
  const spec = { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width,
    autosize: { type: "fit-x", contains: "padding" }, ...kinds[chart.kind](chart, panel, width) };
  const result = await window.vegaEmbed(place, spec, { renderer: "svg", actions: false, ast: true, config, logLevel: 1,
    loader: { load: () => Promise.reject(new Error("nothing is loaded here")) } });
  if (chart.kind === "stack")
    legend(place, chart.parts.filter((part) => panel.data.some((each) => each.part === part && each.y))
      .map((name) => ({ name, shape: square, ...page.parts[chart.parts.indexOf(name)] })));
  else if (chart.kind !== "bars") legend(place, keysOf(chart, panel.data, chart.kind === "lines"));
  result.view.addEventListener("click", (event, item) => {
    const place = item && item.datum && item.datum.place;
    const datum = place === undefined ? null : panel.data[place];
    if (datum) pick(chart.name, datum);
  });
  place.dataset.drawn = chart.kind;
}

function copyLine(command) {
  return element("div", { className: "repeat" }, element("code", { textContent: command }), copyButton(command));
}

function copyButton(command) {
  const button = element("button", { type: "button", className: "copy", textContent: "Copy" });
  button.dataset.command = command;
  return button;
}

function pick(name, datum) {
  const what = [datum.series, String(datum.x), words(datum), datum.text].filter(Boolean).join(" · ");
  const place = $(`picked-${name}`);
  place.replaceChildren(element("p", { textContent: what }), ...(datum.command ? [copyLine(datum.command)] : []));
  place.hidden = false;
}

function fillNumbers(details) {
  const chart = details.dataset.chart === "explore" ? explorer.chart : byName[details.dataset.chart];
  const body = element("tbody");
  for (const datum of shown[chart.name] || []) {
    body.append(element("tr", {}, element("th", { scope: "row", textContent: datum.series }),
      ...[String(datum.x) === datum.series ? "" : String(datum.x), datum.part || "", words(datum)].map((value) =>
        element("td", { textContent: value })), element("td", {}, datum.command ? copyButton(datum.command) : "")));
  }
  details.querySelector(".scroll")?.remove();
  details.append(element("div", { className: "scroll" }, element("table", {}, body)));
}

// The explorer -------------------------------------------------------------------------------------------------------
const measures = { fps: "Images/s", ms: "ms a step", gib: "Peak memory, GiB" };
const axes = { px: ["Resolution", "Image side in pixels"], size: ["Model size", "Model size"], batch: ["Batch", "Images a step"] };
const newest = "newest of all files", fastest = "each at its fastest";
const explorer = { chart: { name: "explore", kind: "lines", styles: page.styles, logY: true, x: "", y: "" },
  keys: ["file", "machine", "mode", "size", "px", "batch", "way", "precision"] };

function option(value, label = String(value)) {
  return element("option", { value: String(value), textContent: label });
}

function chosen(name) {
  return $(`pick-${name}`).value;
}

function matches(entry, but = "") {
  return explorer.keys.every((key) => {
    if (key === but || key === chosen("x")) return true;
    const value = chosen(key);
    return value === newest || value === fastest || String(entry[key]) === value;
  });
}

function explore() {
  const axis = chosen("x"), measure = chosen("y");
  for (const key of explorer.keys) {
    const select = $(`pick-${key}`);
    select.disabled = key === axis;
    for (const each of select.options)
      each.disabled = ![newest, fastest].includes(each.value) && each.value !== select.value
        && !page.entries.some((entry) => String(entry[key]) === each.value && matches(entry, key));
  }
  // Of a series at a place one row: the newest of files, the fastest of ways, and what has a number before what has none.
  const kept = new Map();
  const better = (one, other) => {
    if ((one.ms === null) !== (other.ms === null)) return other.ms === null;
    return chosen("way") === fastest && one.ms !== null ? one.ms < other.ms : one.date >= other.date;
  };
  const found = page.entries.filter((entry) => matches(entry));
  for (const entry of found) {
    const key = JSON.stringify([entry.series, entry[axis]]);
    if (!kept.has(key) || better(entry, kept.get(key))) kept.set(key, entry);
  }
  const images = (ms, entry) => 1000 * entry.batch / ms;
  const data = [...kept.values()].map((entry) => ({
    series: entry.series, x: entry[axis], y: entry[measure], command: entry.command, assumed: entry.assumed,
    low: measure === "ms" ? entry.low : measure === "fps" && entry.high ? images(entry.high, entry) : entry[measure],
    high: measure === "ms" ? entry.high : measure === "fps" && entry.low ? images(entry.low, entry) : entry[measure],
    word: entry.word,
    text: [entry.ms === null ? entry.message : `${number(entry.ms)} ms [${number(entry.low)}, ${number(entry.high)}], `
      + entry.interval, entry.gib === null ? "" : `${number(entry.gib)} GiB`, entry.way, entry.precision, entry.marks,
      `${entry.file}, ${entry.date}, ${entry.commit}`].filter(Boolean).join(" · "),
  }));
  const sizes = [...$("pick-size").options].map((each) => each.value);
  data.sort((a, b) => (axis === "size" ? sizes.indexOf(a.x) - sizes.indexOf(b.x) : a.x - b.x));
  Object.assign(explorer.chart, { x: axes[axis][1], y: measures[measure], logX: axis === "batch" });
  $("explore-status").textContent = `${data.length} of ${page.entries.length} rows shown`;
  $("picked-explore").hidden = true;
  for (const each of document.querySelectorAll("details.numbers[data-chart=explore][open]")) each.open = false;
  return draw(explorer.chart, { data, level: null, marks: {} });
}

function startExplorer() {
  if (!$("explorer")) return;
  $("pick-x").append(...Object.entries(axes).map(([value, [label]]) => option(value, label)));
  $("pick-y").append(...Object.entries(measures).map(([value, label]) => option(value, label)));
  const sizes = ["S", "B", "L", "XL"];
  const rank = (value) => (sizes.indexOf(String(value).split("/")[0]) + 1 || 9);
  for (const key of explorer.keys) {
    const found = [...new Set(page.entries.map((entry) => entry[key]))];
    if (typeof found[0] === "number") found.sort((a, b) => a - b);
    if (key === "size") found.sort((a, b) => rank(a) - rank(b));
    const select = $(`pick-${key}`);
    if (key === "file" && found.length > 1) select.append(option(newest));
    if (key === "way" && found.length > 1) select.append(option(fastest));
    select.append(...found.map((value) => option(value)));
  }
  // The first view: the combination that most rows with numbers have.
  const counts = new Map();
  const keys = explorer.keys.filter((key) => key !== "px");
  for (const entry of page.entries) {
    if (entry.ms === null) continue;
    const key = JSON.stringify(keys.map((name) => String(entry[name])));
    counts.set(key, (counts.get(key) || 0) + 1 + (entry.mode === "train") / 2);
  }
  const most = [...counts].sort((a, b) => b[1] - a[1])[0];
  if (most) JSON.parse(most[0]).forEach((value, place) => { $(`pick-${keys[place]}`).value = value; });
  $("explorer").querySelector("form").addEventListener("change", explore);
}

// Rows ---------------------------------------------------------------------------------------------------------------
function startRows() {
  const table = $("row-table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const filters = [...document.querySelectorAll("select[data-filter]")];
  for (const select of filters) {
    const found = [...new Set(page.entries.map((entry) => entry[select.dataset.filter]))];
    if (typeof found[0] === "number") found.sort((a, b) => a - b); else found.sort();
    select.append(...found.filter((value) => value !== "").map((value) => option(value)));
  }
  const filter = () => {
    const wanted = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const entry = page.entries[row.dataset.i];
      const line = row.textContent.toLowerCase();
      row.hidden = !(filters.every((select) => !select.value || String(entry[select.dataset.filter]) === select.value)
        && wanted.every((word) => line.includes(word)));
      count += !row.hidden;
    }
    $("row-count").textContent = `${count} of ${rows.length} rows`;
  };
  const form = document.querySelector(".rows form");
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-key]");
    if (!button) return;
    const cell = button.parentElement;
    const sign = cell.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    cell.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const value = (row) => page.entries[row.dataset.i][button.dataset.key];
    rows.sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === null || b === null) return (a === null) - (b === null); // without a number: last, either way
      return sign * (button.dataset.kind === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
    });
    body.append(...rows);
  });
}

// Copying ------------------------------------------------------------------------------------------------------------
async function copy(button) {
  try {
    await navigator.clipboard.writeText(button.dataset.command);
  } catch {
    // A page that was opened from a file may not be trusted with the clipboard.
    const area = element("textarea", { value: button.dataset.command });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "Copied";
  button.classList.add("done");
  setTimeout(() => { button.textContent = "Copy"; button.classList.remove("done"); }, 1500);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button.copy");
  if (button) copy(button);
});
document.addEventListener("toggle", (event) => {
  if (event.target.matches?.("details.numbers") && event.target.open) fillNumbers(event.target);
}, true);

function panelOf(chart) {
  const select = document.querySelector(`select[data-panel="${chart.name}"]`);
  return chart.panels[select ? Number(select.value) : 0];
}

for (const select of document.querySelectorAll("select[data-panel]"))
  select.addEventListener("change", () => {
    const chart = byName[select.dataset.panel];
    $(`picked-${chart.name}`).hidden = true;
    draw(chart, panelOf(chart)).then(() => {
      const open = document.querySelector(`details.numbers[data-chart="${chart.name}"][open]`);
      if (open) fillNumbers(open);
    });
  });

async function drawAll() {
  const charts = page.charts.map((chart) => draw(chart, panelOf(chart)));
  await Promise.all([...charts, ...($("explorer") ? [explore()] : [])]);
  document.body.dataset.ready = "yes";
}

startExplorer();
startRows();
await drawAll();
let waiting = 0, last = document.documentElement.clientWidth;
addEventListener("resize", () => {
  if (document.documentElement.clientWidth === last) return;
  last = document.documentElement.clientWidth;
  clearTimeout(waiting);
  waiting = setTimeout(drawAll, 150);
});
