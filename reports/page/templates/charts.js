// Draws the page's charts from its data; page.js goes on. Every text from a row is set as text, never as markup: by
// textContent here, by Vega in charts and tooltips.
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

// Counts of images or pixels are shown in full: rounded, they would be others.
const written = (chart, value) => (chart.counts && Number.isFinite(value) ? String(value) : number(value));

function words(chart, datum) {
  if (datum.y === null || datum.y === undefined) return datum.word || "–";
  const spread = datum.low !== null && datum.low !== undefined && datum.low !== datum.high;
  const [y, low, high] = [datum.y, datum.low, datum.high].map((value) => written(chart, value));
  return y + (spread ? ` [${low}, ${high}]` : "");
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

function values(chart, panel) {
  return panel.data.map((datum, place) => ({ ...datum, place, at: String(datum.x), said: words(chart, datum),
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

// Those of points over one place whose labels don't lie on each other; what is left out can be hovered over.
function apart(data, tall) {
  const heights = data.map((each) => Math.log(each.y));
  const scale = 0.85 * tall / (Math.max(...heights) - Math.min(...heights) || 1);
  const kept = [];
  for (const each of [...data].sort((a, b) => b.y - a.y))
    if (kept.every((other) => other.x !== each.x || Math.abs(Math.log(other.y / each.y)) * scale > 13)) kept.push(each);
  return kept;
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
  const data = values(chart, panel);
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
    { transform: [{ filter: "datum.assumed && isValid(datum.y)" }],
      mark: { type: "text", text: "*", dx: 9, fontSize: 14, fontWeight: 700 }, encoding: { x, y, color } },
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
  const labelled = apart(data.filter((each) => each.label && each.y), tall);
  if (labelled.length && width > 480)
    layers.push({ data: { values: labelled },
      mark: { type: "text", align: "left", dx: 9, dy: 11, fontSize: 10.5, opacity: 0.85 },
      encoding: { x, y, text: { field: "label" } } });
  return { data: { values: data }, height: tall, layer: layers, resolve: { scale: { y: "shared" } } };
}

// Text is measured as Vega does.
const pen = document.createElement("canvas").getContext("2d");
function wide(text, size, weight = 400) {
  pen.font = `${weight} ${size}px ${config.font}`;
  return pen.measureText(text).width;
}

// A text in lines of not more than so many pixels: broken between words, or within one that is wider by itself.
function wrap(text, pixels, size) {
  const made = [""];
  for (const word of text.split(/\s+/)) {
    const longer = made.at(-1) ? `${made.at(-1)} ${word}` : word;
    if (wide(longer, size) <= pixels) { made[made.length - 1] = longer; continue; }
    if (made.at(-1)) made.push("");
    for (const letter of word) {
      if (made.at(-1) && wide(made.at(-1) + letter, size) > pixels) made.push("");
      made[made.length - 1] += letter;
    }
    if (made.length > mostLines) return [...made.slice(0, mostLines - 1), `${made[mostLines - 1].slice(0, -1)}…`];
  }
  return made;
}
const mostLines = 8; // a longer text is nobody's name

// The axis of bars' names, wrapped where they would take more than a share of the width; how tall that makes the bars,
// and how wide it leaves them.
function names(data, width, { share, size = 12, least }) {
  const own = new Map(data.map((each) => [String(each.x), wrap(String(each.x), share * width, size)]));
  for (const each of data) each.name = own.get(String(each.x)).join("\n");
  const line = Math.round(1.2 * size);
  const most = Math.max(...[...own.values()].map((each) => each.length));
  const left = Math.max(...[...own.values()].flat().map((each) => wide(each, size)));
  const up = `-${line / 2} * (length(split(datum.value, '\\n')) - 1)`; // so that a name's middle is at its bar's
  return { of: (x) => own.get(x).join("\n"), plot: width - left - 24,
    tall: own.size * Math.max(least, line * (most + 0.6)),
    y: { field: "name", type: "nominal", sort: null, title: null,
      axis: { labelExpr: "split(datum.value, '\\n')", labelLineHeight: line, labelFontSize: size, labelLimit: 0,
        labelOverlap: false, labelOffset: { expr: up }, domain: false, ticks: false,
        grid: false } } };
}

// Where an axis from 0 has to end, that the text behind every bar is inside.
function end(bars, plot, weight) {
  const room = (text) => Math.max(plot - wide(text, config.text.fontSize, weight) - 8, 0.2 * plot);
  return Math.max(...bars.map(([value, text]) => value * plot / room(text)), 1e-9);
}

function bars(chart, panel, width) {
  const data = values(chart, panel);
  const scale = scales(chart, data);
  const { y, plot, tall } = names(data, width, { share: 0.42, least: 38 });
  for (const each of data) {
    each.edge = each.high ?? each.y ?? 0;
    each.label = each.word || written(chart, each.y);
  }
  const x = { field: "y", type: "quantitative", title: chart.y,
    axis: { tickCount: 4, labelBound: 4, ...(chart.counts ? { format: "d", tickMinStep: 1 } : { format: "~s" }) },
    scale: { domain: [0, end(data.map((each) => [each.edge, each.label]), plot, 600)], nice: false } };
  const color = { field: "series", type: "nominal", scale: scale.color, legend: null };
  const layer = [
    { mark: { type: "bar", height: { band: 0.62 }, cursor: "pointer", cornerRadiusEnd: 2 },
      encoding: { y, x, color, tooltip: tip("Bar", chart.y) } },
    { transform: [{ filter: "isValid(datum.low) && isValid(datum.high)" }], mark: { type: "rule", strokeWidth: 2.5,
        color: text }, encoding: { y, x: { ...x, field: "low" }, x2: { field: "high" } } },
    { mark: { type: "text", align: "left", dx: 6, fontWeight: 600 },
      encoding: { y, x: { ...x, field: "edge" }, text: { field: "label" } } },
  ];
  return { data: { values: data }, height: tall, layer };
}

function stack(chart, panel, width) {
  const data = values(chart, panel);
  const whole = {};
  for (const each of data) whole[each.x] = (whole[each.x] || 0) + (each.y || 0);
  const { y, of, plot, tall } = names(data, width, { share: 0.42, least: 40 });
  const ends = Object.entries(whole).map(([name, total]) => ({ name: of(name),
    label: number(total) + (name in panel.marks ? ` · ${number(panel.marks[name])}` : ""),
    total: Math.max(total, panel.marks[name] || 0) }));
  const most = end(ends.map((each) => [each.total, each.label]), plot, 700);
  for (const each of data) {
    each.order = chart.parts.indexOf(each.part);
    each.label = each.y / most * plot > 34 ? number(each.y) : "";
    each.ink = page.parts[each.order].ink;
  }
  const parts = chart.parts.filter((part) => data.some((each) => each.part === part));
  const x = { field: "y", type: "quantitative", title: chart.y, stack: "zero",
    axis: { tickCount: 4, labelBound: 4, format: "~s" },
    scale: { domain: [0, most], nice: false } };
  const order = { field: "order", type: "quantitative" };
  const color = { field: "part", type: "nominal", sort: parts, legend: null,
    scale: { domain: parts, range: parts.map((part) => page.parts[chart.parts.indexOf(part)].color) } };
  const marks = Object.entries(panel.marks).map(([name, value]) => ({ name: of(name), mark: value }));
  return { data: { values: data }, height: tall, layer: [
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
  const data = values(chart, panel);
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
  const data = values(chart, panel);
  const scale = scales(chart, data);
  const { y, tall } = names(data, width, { share: 0.5, size: width < 520 ? 9 : 11, least: 22 });
  const x = { field: "y", type: "quantitative", title: chart.y, axis: { tickCount: 5, format: "~g" },
    scale: { zero: false, nice: true, padding: 10 } };
  const color = { field: "series", type: "nominal", scale: scale.color, legend: null };
  return { data: { values: data }, height: tall, layer: [
    { data: { values: [{ y: panel.level ?? 1 }] }, mark: { type: "rule", color: text }, encoding: { x } },
    { mark: { type: "rule", strokeWidth: 5, opacity: 0.4 },
      encoding: { y, x: { ...x, field: "low" }, x2: { field: "high" }, color } },
    { mark: { type: "point", size: 60, opacity: 1, cursor: "pointer" },
      encoding: { y, x, color, shape: { field: "series", type: "nominal", scale: scale.shape, legend: null },
        fill: { field: "series", type: "nominal", scale: scale.fill, legend: null }, tooltip: tip("Case", chart.y) } },
  ] };
}

const kinds = { lines, bars, stack, points, ratios };

// What a screen reader says of a chart: title, marks, axes. Vega would call every one "Vega visualization".
function described(chart, panel) {
  const some = (test) => panel.data.some(test);
  const named = (key) => [...new Set(panel.data.map((each) => String(each[key])))].join(", ");
  const axis = (title, log) => title + (log ? " (logarithmic)" : "");
  const over = `${axis(chart.y, chart.logY)} over ${axis(chart.x, chart.logX)}`;
  const spread = some((each) => each.low !== null && each.low !== undefined && each.low !== each.high);
  const failed = some((each) => each.word);
  const marks = {
    lines: () => `Lines with points, one a series: ${named("series")}. ${over}.${failed ? " Crosses at the edge: failed." : ""}`,
    bars: () => `Bars, one a line: ${named("x")}. Length: ${chart.y}.`,
    stack: () => `Stacked bars, one a line: ${named("x")}. Parts: ${named("part")}. Length: ${chart.y}.`
      + (Object.keys(panel.marks).length ? " Ticks: what the caption says." : ""),
    points: () => `Points, one a step: ${named("series")}, under the line of what ${panel.roof.name} could do. ${over}.`,
    ratios: () => `Points, one a case, ${panel.data.length} in all, beside the line of ${panel.level ?? 1}. Place: ${chart.y}.`,
  };
  const title = [chart.title, panel.name].filter(Boolean).join(": ");
  return `${title}. ${marks[chart.kind]()}${spread ? " Ranges: intervals." : ""}`;
}

async function draw(chart, panel) {
  const place = $(`chart-${chart.name}`);
  const width = Math.floor(place.clientWidth);
  if (!width) return;
  shown[chart.name] = panel.data;
  const whole = $(`whole-${chart.name}`);
  if (whole) {
    whole.textContent = panel.name;
    whole.hidden = wide(panel.name, 15) < width - 40; // a select cuts what is wider
  }
  if (!panel.data.some((each) => each.y !== null && each.y !== undefined)) {
    const nothing = "No row with a number matches.";
    place.replaceChildren(element("p", { className: "status", textContent: nothing }));
    place.setAttribute("aria-label", `${chart.title}. ${nothing}`);
    return;
  }
  const spec = { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width,
    description: described(chart, panel),
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
    if (datum) pick(chart, datum);
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

function pick(chart, datum) {
  const what = [datum.series, String(datum.x), words(chart, datum), datum.text].filter(Boolean).join(" · ");
  const place = $(`picked-${chart.name}`);
  place.replaceChildren(element("p", { textContent: what }), ...(datum.command ? [copyLine(datum.command)] : []));
  place.hidden = false;
}

function fillNumbers(details) {
  const chart = details.dataset.chart === "explore" ? explorer.chart : byName[details.dataset.chart];
  const body = element("tbody");
  for (const datum of shown[chart.name] || []) {
    body.append(element("tr", {}, element("th", { scope: "row", textContent: datum.series }),
      ...[String(datum.x) === datum.series ? "" : String(datum.x), datum.part || "", words(chart, datum)].map((value) =>
        element("td", { textContent: value })), element("td", {}, datum.command ? copyButton(datum.command) : "")));
  }
  details.querySelector(".scroll")?.remove();
  details.append(element("div", { className: "scroll" }, element("table", {}, body)));
}

