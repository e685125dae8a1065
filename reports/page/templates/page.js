// The explorer, the rows' table and copying; charts.js stands before it in one script.
// The explorer -------------------------------------------------------------------------------------------------------
const measures = { fps: "Images/s", ms: "ms a step", gib: "Peak memory, GiB" };
const axes = { px: ["Resolution", "Image side in pixels"], size: ["Model size", "Model size"], batch: ["Batch", "Images a step"] };
const newest = "newest of all files", fastest = "each at its fastest";
const explorer = { chart: { name: "explore", title: "The chosen rows", kind: "lines", styles: page.styles, logY: true, x: "", y: "" },
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
    return chosen("way") === fastest && one.ms !== null ? one.ms < other.ms : one.started >= other.started;
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
// Paper has nothing to click: claims that are folded away are printed too.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details.own:not([open])")];
  for (const each of folded) each.open = true;
});
addEventListener("afterprint", () => { for (const each of folded) each.open = false; });
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
