// Asks for what is new every two seconds and draws it; what a run wrote reaches the page as text alone.
import { Chart } from "./chart.js";
import { above, curve, short, smoothed } from "./series.js";

const COLOURS = ["#2f6fb5", "#e07b1a", "#2e9449", "#c2352b", "#7d57b8", "#8a5a44", "#d463a8", "#5d6672"];
const DASHES = [undefined, [6, 4], [2, 3], [10, 3, 2, 3]];
const REACHES = [0, 1, 2, 5, 10, 20, 50, 100, 200];
const FAULTS = ["skip", "spike", "rollback", "failed", "save failed", "export failed", "slow rank", "checkpoint passed over"];
const GAP = { name: "gap", title: "Above the run compared with", unit: "nats per token", settles: true, factor: 1 };
const runs = new Map();
const charts = [];
let page, zoomed = null;
const $ = (id) => document.getElementById(id);

function element(kind, text, name = "") {
  const made = document.createElement(kind);
  made.textContent = text;
  made.className = name;
  return made;
}

function take(told) {
  for (const run of runs.values()) run.gone = true;
  for (const { rows, first, ...about } of told.runs) {
    const before = runs.get(about.name) || { shown: true, rows: [], colour: COLOURS[runs.size % COLOURS.length] };
    runs.set(about.name, { ...before, ...about, gone: false, rows: [...before.rows.slice(0, first), ...rows] });
  }
  const waiting = told.waiting.map((place) => `${place} is not there yet.`);
  if (!runs.size) waiting.push("No run has begun yet; it appears here when it does.");
  $("note").textContent = waiting.join(" ");
  $("note").hidden = !waiting.length;
}

function view(all) {
  if (zoomed) return zoomed;
  const xs = all.flatMap((run) => run.rows.map((row) => row[$("axis").value]).filter((x) => x !== null));
  let [low, high] = [Infinity, -Infinity];
  for (const x of xs) [low, high] = [Math.min(low, x), Math.max(high, x)];
  if (low > high) return [0, 1];
  const from = high - (high - low) * Number($("range").value);
  return [from, high === from ? from + 1 : high];
}

// A colour a run and a dash a metric; of many metrics the other way round.
function curves(run, figure, place) {
  const reach = REACHES[$("smooth").value];
  const many = Object.keys(figure.metrics).length > 2;
  return Object.entries(figure.metrics).flatMap(([metric, name], number) => {
    const [xs, ys] = curve(run, $("axis").value, metric, figure.factor);
    if (!xs.length) return [];
    const look = many ? { colour: COLOURS[number], dash: DASHES[place % DASHES.length] } : { colour: run.colour, dash: DASHES[number] };
    const each = { label: [run.name, name].filter(Boolean).join(", "), width: 2, ...look };
    if (!reach || xs.length < 3) return [{ ...each, curve: [xs, ys] }];
    const raw = { ...each, faint: true, width: 1, curve: [xs, ys] };
    return [raw, { ...each, curve: [xs, smoothed(ys, reach)] }];
  });
}

function gaps(shown) {
  const base = runs.get($("base").value);
  if (!base) return [];
  const metric = base.rows.filter((row) => row["valid/loss"] !== null).length > 1 ? "valid/loss" : "train/loss";
  const of = (run) => {
    const [xs, ys] = curve(run, $("axis").value, metric, 1);
    return [xs, smoothed(ys, REACHES[$("smooth").value])];
  };
  const others = shown.filter((run) => run !== base);
  return others.map((run) => ({ label: run.name, colour: run.colour, width: 2, curve: above(of(run), of(base)) }));
}

// The x of a step: of the last line up to there.
function placeOf(run, step) {
  if ($("axis").value === "step") return step;
  const row = run.rows.findLast((each) => each.step <= step);
  return row ? row[$("axis").value] ?? NaN : NaN;
}

function marks(shown) {
  return shown.flatMap((run) => [
    ...run.checkpoints.map((step) => ({ x: placeOf(run, step), colour: "#c9ced8" })),
    ...run.events.filter(({ event }) => FAULTS.includes(event)).map(({ step, spiked }) => ({ x: placeOf(run, spiked ?? step), colour: "#d9534f" })),
  ]);
}

function draw() {
  const shown = [...runs.values()].filter((run) => run.shown);
  const [span, axis] = [view(shown), page.axes[$("axis").value]];
  const reach = REACHES[$("smooth").value];
  $("reach").textContent = reach ? `± ${reach} lines` : "off";
  for (const chart of charts) {
    const isGap = chart.figure === GAP;
    const series = isGap ? gaps(shown) : shown.flatMap((run, place) => curves(run, chart.figure, place));
    chart.draw(series, isGap || chart.figure.name !== "loss" ? [] : marks(shown), axis, span);
  }
}

function listRuns() {
  const left = (s) => (s === null ? "" : s < 3600 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`);
  $("runs").tBodies[0].replaceChildren(...[...runs.values()].map((run) => {
    const row = element("tr", "", run.gone ? "gone" : "");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: run.shown });
    box.ariaLabel = `show ${run.name}`;
    box.onchange = () => { run.shown = box.checked; draw(); };
    const [tick, name] = [element("td", ""), element("td", "")];
    const dot = element("span", "", "dot");
    dot.style.background = run.colour;
    tick.append(box);
    name.append(dot, run.name);
    const state = element("td", run.gone ? "deleted" : run.state, run.gone ? "" : run.state);
    state.title = run.why;
    const settings = Object.entries(run.settings).map(([key, value]) => `${key}=${JSON.stringify(value)}`).join(" ");
    const cells = [`${run.step}/${run.steps ?? "?"}`, short(run.loss), short(run.valid_loss), left(run.seconds_left), settings];
    row.append(tick, name, state, ...cells.map((text) => element("td", text)));
    return row;
  }));
  const names = [...runs.keys()];
  if (names.join("\n") !== [...$("base").options].map((each) => each.value).join("\n")) {
    const chosen = $("base").value;
    $("base").replaceChildren(...names.map((name) => Object.assign(element("option", name), { value: name })));
    if (runs.has(chosen)) $("base").value = chosen;
  }
}

function listEvents() {
  const all = [...runs.values()].flatMap((run) => run.events.map((event) => ({ run, event })));
  all.sort((a, b) => b.event.time - a.event.time);
  $("events").tBodies[0].replaceChildren(...all.slice(0, 100).map(({ run, event: { time, event, step, ...more } }) => {
    const row = document.createElement("tr");
    const said = Object.entries(more).map(([key, value]) => (key === "message" ? value : `${key} ${JSON.stringify(value)}`));
    const what = element("td", event, FAULTS.includes(event) ? "failed" : "");
    row.append(element("td", new Date(time * 1000).toLocaleString()), element("td", run.name), what);
    row.append(element("td", step === undefined ? "" : `step ${step}`), element("td", said.join(", ")));
    return row;
  }));
}

async function look() {
  try {
    const seen = Object.fromEntries([...runs].filter(([, run]) => !run.gone).map(([name, run]) => [name, [run.generation, run.rows.length]]));
    const answer = await fetch("data", { method: "POST", body: JSON.stringify(seen) });
    if (!answer.ok) throw new Error(answer.statusText);
    take(await answer.json());
    $("live").textContent = `live, ${new Date().toLocaleTimeString()}`;
    listRuns();
    listEvents();
    draw();
  } catch (error) {
    $("live").textContent = `not reached: ${error.message}`;
  }
  setTimeout(look, document.hidden ? 10000 : 2000);
}

async function begin() {
  page = await (await fetch("figures")).json();
  $("axis").replaceChildren(...Object.keys(page.axes).map((name) => element("option", name)));
  const zoom = (span) => { zoomed = span; draw(); };
  const [loss, ...others] = page.figures;
  charts.push(...[loss, GAP, ...others].map((figure) => new Chart(figure, zoom)));
  $("figures").append(...charts.map((chart) => chart.element));
  for (const id of ["axis", "range"]) $(id).onchange = () => zoom(null);
  $("smooth").oninput = draw;
  $("base").onchange = draw;
  await look();
}

begin();
