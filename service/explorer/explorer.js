// The page: what the user chooses, and what is drawn for it.

import { ApiError, Unreachable, evaluate, getJson, key, request } from "./api.js";
import { figures, parseMetrics } from "./figures.js";
import { eigen, norm } from "./linear.js";
import * as methods from "./paths.js";
import { drawHessian, drawSlice } from "./picture.js";
import { FIELDS, field, points, pointsPerSide, quantitiesOf } from "./slice.js";
import * as snippets from "./snippets.js";

const POLL_MS = 2000;
const WINDOW = 5; // readings that live figures span
const FOLLOW_POLLS = 3; // polls between two looks at the list of models
const FEW = 6; // models that are listed with all their facts and without a search
const PATH_METHODS = { newton: "Newton", minimise: "Minimise" };

const $ = (id) => document.getElementById(id);
const make = (tag, text = "", attributes = {}) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.textContent = text;
  return element;
};
const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const show = (number, digits = 6) => (Number.isFinite(number) ? String(Number(number.toPrecision(digits))) : "–");

let models = []; // as the service lists them, each with its details
let chosen = null; // the model in the picture
let picture = null; // what is drawn
let view = null; // {axes, ranges, base}: where the slice lies
let point = null; // {x, value, gradient, hessian}
let path = null; // {method, iterates, outcome}
let needsKey = false;
let isGone = false;
let remembered = new URLSearchParams(location.hash.slice(1)); // of the address that the page was opened with

// ---- errors, keys, state -------------------------------------------------------------------------------------------

function report(error) {
  if (error.name === "AbortError") return;
  if (error instanceof Unreachable) {
    isGone = true;
    setState("not reachable", "bad");
  } else if (error instanceof ApiError && error.status === 401) {
    needsKey = true;
    $("key-form").hidden = false;
    $("change-key").hidden = false;
    setState("needs a key", "bad");
    if (!key.get()) return;
  } else if (!(error instanceof ApiError)) console.error(error);
  const about = [error.code, error.requestId && `request ${error.requestId}`].filter(Boolean).join(", ");
  const message = error.status === 401 ? "The service does not accept this key." : error.message;
  $("problem").textContent = error instanceof Unreachable ? `${message} Trying again.` : `${message}${about ? ` (${about})` : ""}`;
  $("problem").hidden = false;
  if (error.status === 401) key.set(""); // a refused key is not sent again and again
}

function clearProblem() {
  $("problem").hidden = true;
}

function setState(text, kind) {
  $("state").textContent = text;
  $("state").className = `pill ${kind}`;
}

/** Runs what the user asked for; its errors are shown. */
async function attempt(action) {
  try {
    await action();
    clearProblem();
  } catch (error) {
    report(error);
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  attempt(async () => {
    await loadModels();
    $("key").value = "";
    $("key-form").hidden = true;
  });
});
$("change-key").addEventListener("click", () => {
  $("key-form").hidden = !$("key-form").hidden;
  if (!$("key-form").hidden) $("key").focus();
});

// ---- models --------------------------------------------------------------------------------------------------------

async function loadModels() {
  const { models: listed } = await getJson("/v1/models");
  isGone = false; // not before: a service that starts has metrics, but no models yet
  models = await Promise.all(
    listed.map((one) => (one.state === "ready" ? getJson(`/v1/models/${one.name}?version=${one.default_version}`) : one)),
  );
  setState(models.some(({ state }) => state === "ready") ? "ready" : "no model is ready", models.length ? "good" : "bad");
  const ready = models.filter(({ state }) => state === "ready");
  const again = ready.find(({ name }) => name === chosen?.name);
  const wanted = ready.find(({ name }) => name === remembered.get("model"));
  const next = again ?? wanted ?? ready.find(({ d }) => d === 2) ?? ready[0];
  if (!next) {
    listModels();
  } else if (again && picture?.asked.model === again.name && picture.sha256 === again.sha256) {
    chosen = again;
    listModels();
  } else {
    const from = next === wanted ? remembered : undefined;
    remembered = new URLSearchParams(); // the address that the page was opened with counts once
    await choose(next, from);
  }
}

/** Loads the models again when the service lists others, other versions or other states. */
async function followModels() {
  const { models: listed } = await getJson("/v1/models");
  const facts = (one) => [one.name, one.state, one.default_version, one.versions.join(), one.parameters].join(" ");
  if (listed.map(facts).join("\n") !== models.map(facts).join("\n")) await attempt(loadModels);
}

function listModels() {
  $("model-search").hidden = models.length <= FEW;
  const sought = $("model-search").value.toLowerCase();
  const isSought = (model) => model.name === chosen?.name || `${model.name} ${model.metadata?.description ?? ""}`.toLowerCase().includes(sought);
  $("model-list").classList.toggle("compact", models.length > FEW);
  $("model-list").replaceChildren(
    ...models.filter((model) => models.length <= FEW || isSought(model)).map((model) => {
      const button = make("button", "", { type: "button", disabled: model.state !== "ready" });
      button.dataset.model = model.name;
      button.setAttribute("aria-pressed", String(model.name === chosen?.name));
      const title = make("strong", model.name);
      title.append(make("span", model.state, { className: `pill ${model.state === "ready" ? "good" : "bad"}` }));
      button.append(title, ...describe(model).map((line) => make("span", line, { className: "line" })));
      button.addEventListener("click", () => {
        $("slice").scrollIntoView({ block: "nearest" });
        attempt(() => choose(model));
      });
      const item = make("li");
      item.append(button);
      return item;
    }),
  );
}

function describe(model) {
  if (model.state !== "ready") return [model.reason ?? ""];
  const { metadata = {} } = model;
  const errors = ["value", "gradient", "hessian"]
    .map((name) => [name, metadata.training?.[`${name}_relative_error`]])
    .filter(([, error]) => error !== undefined)
    .map(([name, error]) => `${name} ${show(100 * error, 2)} %`);
  return [
    metadata.description ?? "",
    model.members > 1 ? `ensemble of ${model.members} networks` : "",
    `${model.d} → ${model.m}, ${model.parameters} parameters, ${model.dtype} on ${model.device}` +
      (model.versions.length > 1 ? `, version ${model.default_version} of ${model.versions.join(", ")}` : ""),
    metadata.lower_bounds ? `domain: ${domainText(model)}` : "domain: not stated",
    errors.length ? `relative errors: ${errors.join(", ")}` : "training errors: not stated",
    isConvex(model.architecture) ? "convex by construction" : "not known to be convex",
  ].filter(Boolean);
}

function domainText({ metadata: { lower_bounds: lower, upper_bounds: upper } }) {
  const intervals = lower.map((low, k) => `[${show(low)}, ${show(upper[k])}]`);
  if (new Set(intervals).size === 1) return intervals.length > 1 ? `${intervals[0]} in each of ${intervals.length}` : intervals[0];
  return intervals.length > 3 ? `${intervals.slice(0, 2).join(" × ")} × …` : intervals.join(" × ");
}

/** Input-convex layers (Amos, Xu & Kolter 2017) with an activation that is convex and never falls. */
function isConvex(architecture) {
  if (architecture.type === "NN") return architecture.layers.every(isConvex);
  if (architecture.type === "quadraticICNNLayer") return true;
  return ["ICNN", "ICNNLayer"].includes(architecture.type) && architecture.act?.type === "softplusActivation";
}

const inputNames = (model) => Array.from({ length: model.d }, (_, k) => model.metadata?.input_names?.[k] ?? `input ${k + 1}`);
const bounds = (model, k) => [model.metadata?.lower_bounds?.[k] ?? -1, model.metadata?.upper_bounds?.[k] ?? 1];

/** The bounds that a model states, [low, high] of each input; null if it states none. */
const boxOf = ({ d, metadata: { lower_bounds: lower, upper_bounds: upper } = {} }) =>
  lower && upper ? Array.from({ length: d }, (_, k) => [lower[k], upper[k]]) : null;

const widths = (model) => Array.from({ length: model.d }, (_, k) => bounds(model, k)[1] - bounds(model, k)[0]);

async function choose(model, from) {
  chosen = model;
  point = path = null;
  const box = Array.from({ length: model.d }, (_, k) => bounds(model, k));
  const axes = model.d > 1 ? [0, 1] : [0];
  view = {
    axes,
    ranges: axes.map((k) => [...box[k]]),
    base: box.map(([low, high]) => (low + high) / 2),
  };
  listModels();
  fillControls();
  if (from) recall(from);
  showPoint();
  await redraw();
  const at = from?.get("at")?.split(",").map(Number) ?? [];
  if (at.length === model.d && at.every(Number.isFinite)) await look(at);
}

// ---- the address ---------------------------------------------------------------------------------------------------

/** Keeps what is looked at in the address, so that it can be sent to others. */
function remember() {
  const state = { model: chosen.name, show: $("field").value, as: $("kind").value, axes: view.axes.join() };
  if (chosen.m > 1) state.output = $("output").selectedIndex;
  if (point) state.at = point.x.join();
  history.replaceState(null, "", `#${new URLSearchParams(state)}`);
}

/** Sets the controls as an address has them; what does not fit the model is left out. */
function recall(from) {
  const axes = (from.get("axes") ?? "").split(",").map(Number);
  const fits = axes.length === view.axes.length && new Set(axes).size === axes.length && axes.every((k) => Number.isInteger(k) && k >= 0 && k < chosen.d);
  if (fits) view = { ...view, axes, ranges: axes.map((k) => [...bounds(chosen, k)]) };
  fillControls();
  for (const [id, name] of [["field", "show"], ["kind", "as"]]) {
    if ([...$(id).options].some(({ value }) => value === from.get(name))) $(id).value = from.get(name);
  }
  const output = Number(from.get("output"));
  if (output < chosen.m) $("output").selectedIndex = output;
}

// ---- the slice -----------------------------------------------------------------------------------------------------

function fillControls() {
  const names = inputNames(chosen);
  const fields = Object.entries(FIELDS).filter(([, { isOfEnsembles }]) => !isOfEnsembles || chosen.members > 1);
  const shown = fields.some(([value]) => value === $("field").value) ? $("field").value : "value";
  $("field").replaceChildren(...fields.map(([value, { label }]) => make("option", label, { value, selected: value === shown })));
  const options = (labels, selected) => labels.map((label, value) => make("option", label, { value, selected: value === selected }));
  $("axis-x").replaceChildren(...options(names, view.axes[0]));
  $("axis-y").replaceChildren(...options(names, view.axes[1]));
  const outputs = Array.from({ length: chosen.m }, (_, k) => chosen.metadata?.output_names?.[k] ?? `output ${k + 1}`);
  $("output").replaceChildren(...options(outputs, 0));
  $("output-label").hidden = chosen.m === 1;
  $("point-x-name").textContent = names[view.axes[0]];
  $("point-y-name").textContent = names[view.axes[1]] ?? "";
  for (const id of ["axis-y", "kind", "arrows", "point-y"]) {
    $(id).closest("label").hidden = chosen.d === 1;
    $(id).disabled = chosen.d === 1;
  }
  $("input-rows").replaceChildren(...names.map((name, k) => (view.axes.includes(k) ? rangeRow(name, k) : sliderRow(name, k))));
}

/** From – to, for an input that the picture runs over. */
function rangeRow(name, k) {
  const side = view.axes.indexOf(k);
  const row = make("div", "", { className: "input-row" });
  const range = make("span", "", { className: "range" });
  const ends = ["from", "to"].map((label, end) => {
    const input = make("input", "", { type: "number", step: "any", value: view.ranges[side][end] });
    input.setAttribute("aria-label", `${name}, ${label}`);
    input.addEventListener("change", () => {
      const ends = [...view.ranges[side]];
      ends[end] = input.valueAsNumber;
      const fits = ends.every(Number.isFinite) && ends[0] < ends[1];
      input.setCustomValidity(fits ? "" : "expected a number, and from less than to");
      if (!input.reportValidity()) return;
      view.ranges[side] = ends;
      attempt(redraw);
    });
    return input;
  });
  range.append(ends[0], make("span", "to"), ends[1]);
  row.append(make("span", `${name} (${side === 0 ? "across" : "up"})`), range);
  return row;
}

/** A slider with its number, for an input that is held. */
function sliderRow(name, k) {
  const [low, high] = bounds(chosen, k);
  const row = make("div", "", { className: "input-row" });
  const slider = make("input", "", { type: "range", min: low, max: high, step: "any", value: view.base[k] });
  const number = make("input", "", { type: "number", step: "any", value: Number(show(view.base[k])) });
  slider.setAttribute("aria-label", name);
  number.setAttribute("aria-label", `${name}, number`);
  const move = (value) => {
    if (!Number.isFinite(value)) return;
    view.base[k] = value;
    attempt(redraw);
  };
  slider.addEventListener("input", () => {
    number.value = show(slider.valueAsNumber);
    move(slider.valueAsNumber);
  });
  slider.addEventListener("keydown", (event) => {
    // Without a step of its own a slider moves by 1, whatever its width.
    const direction = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    if (!direction) return;
    event.preventDefault();
    slider.value = slider.valueAsNumber + (direction * (high - low)) / 50;
    slider.dispatchEvent(new Event("input"));
  });
  number.addEventListener("change", () => {
    slider.value = number.value;
    move(number.valueAsNumber);
  });
  const middle = make("span");
  const ends = make("span", "", { className: "bounds" });
  ends.append(make("span", show(low)), make("span", show(high)));
  middle.append(slider, ends);
  row.append(make("span", name), middle, number);
  return row;
}

const weights = () => (chosen.m === 1 ? null : Array.from({ length: chosen.m }, (_, k) => Number(k === $("output").selectedIndex)));

let isDrawing = false;
let isWanted = false;

/** Draws what is chosen now. While a slice is under way later wishes wait, and only the last is drawn. */
async function redraw() {
  isWanted = true;
  if (isDrawing) return;
  isDrawing = true;
  try {
    while (isWanted) {
      isWanted = false;
      await drawOnce();
    }
  } finally {
    isDrawing = isWanted = false;
    $("plot").classList.remove("stale");
  }
}

async function drawOnce() {
  const model = chosen;
  const slice = {
    axes: [...view.axes],
    ranges: view.ranges.map((range) => [...range]),
    base: [...view.base],
    field: $("field").value,
    hasArrows: $("arrows").checked && $("kind").value === "contour" && model.d > 1,
  };
  const count = pointsPerSide(slice, model.d, model.limits);
  const asked = {
    model: model.name,
    version: model.version,
    quantities: quantitiesOf(slice),
    weights: weights(),
  };
  $("plot").classList.add("stale");
  const began = performance.now();
  const tensors = await evaluate({ ...asked, inputs: points(slice, count), d: model.d });
  const answered = performance.now();
  const z = field(slice, tensors, model.d, count);
  if (chosen !== model) return;
  picture = { slice, asked, sha256: model.sha256, box: boxOf(model), names: inputNames(model), z, gradient: slice.hasArrows ? tensors.gradient.data : null, d: model.d, count };
  await paint();
  const drawn = performance.now();
  $("slice-note").textContent =
    `${slice.axes.map(() => count).join(" × ")} points in one request: answered in ${show(answered - began, 3)} ms, drawn in ${show(drawn - began, 3)} ms`;
  $("plot").dataset.drawnMs = String(drawn - began);
  $("plot").setAttribute("aria-label", `${FIELDS[slice.field].label} of ${model.name} over ${slice.axes.map((k) => picture.names[k]).join(" and ")}`);
  showSnippet();
}

/** Draws again what has been answered already. */
async function paint() {
  const isFirst = !$("plot").on;
  await drawSlice($("plot"), { ...picture, isSurface: $("kind").value === "surface", point, path, showsModel: $("show-model").checked });
  if (isFirst) $("plot").on("plotly_click", ({ points: [{ x, y }] }) => attempt(() => look(onSlice(x, y))));
}

/** The point of the slice at two coordinates. */
function onSlice(x, y) {
  const full = [...picture.slice.base];
  full[picture.slice.axes[0]] = x;
  if (chosen.d > 1) full[picture.slice.axes[1]] = y;
  return full;
}

for (const [side, id] of ["axis-x", "axis-y"].entries()) {
  $(id).addEventListener("change", () => {
    const other = 1 - side;
    const taken = $(id).selectedIndex;
    if (view.axes[other] === taken && chosen.d > 1) {
      view.axes[other] = view.axes[side]; // the two change places
    }
    view.axes[side] = taken;
    view.ranges = view.axes.map((k) => [...bounds(chosen, k)]);
    point = path = null;
    fillControls();
    showPoint();
    attempt(redraw);
  });
}
for (const id of ["field", "kind", "arrows"]) $(id).addEventListener("change", () => attempt(redraw));
$("output").addEventListener("change", () => attempt(async () => {
  const at = point?.x;
  point = path = null;
  showPoint();
  await redraw();
  if (at) await look(at);
}));
$("show-model").addEventListener("change", () => attempt(paint));
for (const id of ["controls", "inputs"]) $(id).addEventListener("submit", (event) => event.preventDefault());

// ---- a point -------------------------------------------------------------------------------------------------------

const POINT_QUANTITIES = ["value", "gradient", "hessian"];

/** Value, gradient and Hessian at points, in float64, all in one request. */
async function askAt(xs) {
  const d = chosen.d;
  const asked = { model: chosen.name, version: chosen.version, quantities: POINT_QUANTITIES, weights: weights(), dtype: "float64" };
  const { value, gradient, hessian } = await evaluate({ ...asked, inputs: Float64Array.from(xs.flat()), d });
  return xs.map((x, r) => ({
    x,
    value: value.data[r],
    gradient: Array.from(gradient.data.subarray(r * d, (r + 1) * d)),
    hessian: Array.from(hessian.data.subarray(r * d * d, (r + 1) * d * d)),
  }));
}

async function look(x) {
  const model = chosen;
  const [found] = await askAt([x]);
  if (chosen !== model) return;
  point = found;
  path = null;
  await showPoint();
}

async function showPoint() {
  $("point-facts").hidden = !point;
  $("point-hint").hidden = Boolean(point);
  $("path").hidden = !path;
  if (!point) {
    $("point-x").value = $("point-y").value = "";
    showSnippet();
    return;
  }
  const names = inputNames(chosen);
  $("point-x").value = Number(show(point.x[view.axes[0]], 9));
  if (chosen.d > 1) $("point-y").value = Number(show(point.x[view.axes[1]], 9));
  const { values } = eigen(point.hessian, chosen.d, false);
  const laplacian = values.reduce((sum, value) => sum + value, 0);
  const facts = { value: point.value, "‖∇f‖": norm(point.gradient), Laplacian: laplacian };
  $("point-value").replaceChildren(
    ...Object.entries(facts).map(([name, number]) => {
      const pair = make("div");
      pair.append(make("dt", name), make("dd", show(number, 7)));
      return pair;
    }),
  );
  $("gradient-rows").replaceChildren(
    ...names.map((name, k) => {
      const row = make("tr");
      row.append(make("th", name, { scope: "row" }), make("td", show(point.gradient[k], 7)));
      return row;
    }),
  );
  if (path) {
    $("path-outcome").textContent = `${PATH_METHODS[path.method]}: ${path.outcome}, ${counted(path.iterates.length - 1, "step")}`;
    $("path-rows").replaceChildren(
      ...path.iterates.map(({ value, slope }, k) => {
        const row = make("tr");
        row.append(make("th", String(k), { scope: "row" }), make("td", show(value, 8)), make("td", show(slope, 3)));
        return row;
      }),
    );
    $("slice-through-end").hidden = chosen.d < 3;
  }
  const isScaled = new Set(widths(chosen)).size > 1;
  const units = isScaled ? widths(chosen) : names.map(() => 1);
  const inUnits = point.hessian.map((entry, k) => entry * units[Math.floor(k / chosen.d)] * units[k % chosen.d]);
  const said = isScaled ? ", each input in widths of its domain" : "";
  $("hessian-title").textContent = `Hessian${said}`;
  $("eigenvalues-title").textContent = `Eigenvalues of the Hessian${said}`;
  $("eigenvalues").textContent = eigen(inUnits, chosen.d, false).values.map((value) => show(value, 5)).join(",  ");
  await Promise.all([drawHessian($("hessian"), point.hessian, names, units), paint()]);
  showSnippet();
}

$("point-form").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(() => look(onSlice($("point-x").valueAsNumber, $("point-y").valueAsNumber)));
});

for (const method of Object.keys(PATH_METHODS)) {
  $(method).addEventListener("click", () => attempt(async () => {
    const model = chosen;
    const buttons = Object.keys(PATH_METHODS).map($);
    buttons.forEach((button) => (button.disabled = true));
    try {
      const domain = {
        lower: Array.from({ length: model.d }, (_, k) => bounds(model, k)[0]),
        upper: Array.from({ length: model.d }, (_, k) => bounds(model, k)[1]),
        width: widths(model),
        isStated: boxOf(model) !== null,
      };
      const { iterates, outcome } = await methods[method](point.x, askAt, domain);
      if (chosen !== model) return;
      path = { method, outcome, iterates: iterates.map(({ x, unscaled, slope }) => ({ ...unscaled, x, slope })) };
      point = path.iterates.at(-1);
      await showPoint();
    } finally {
      buttons.forEach((button) => (button.disabled = false));
    }
  }));
}
$("slice-through-end").addEventListener("click", () => attempt(async () => {
  view.base = [...point.x];
  fillControls();
  await redraw();
}));

// ---- the request ---------------------------------------------------------------------------------------------------

function showSnippet() {
  if (!picture) return;
  remember();
  const isPoint = $("snippet-of").value === "point" && point;
  const { slice, asked, count } = picture;
  $("snippet").textContent = snippets[$("snippet-as").value]({
    origin: location.origin,
    needsKey,
    ...asked,
    ...(isPoint ? { point: point.x, quantities: POINT_QUANTITIES } : { grid: { ...slice, count } }),
  });
}
for (const id of ["snippet-of", "snippet-as"]) $(id).addEventListener("change", showSnippet);
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("snippet").textContent);
  } catch {
    // Browsers offer the clipboard on https and localhost only: select the text instead.
    getSelection().selectAllChildren($("snippet"));
    return;
  }
  $("copy").textContent = "Copied";
  setTimeout(() => ($("copy").textContent = "Copy"), 1500);
});

// ---- live figures --------------------------------------------------------------------------------------------------

let readings = [];
let polls = 0;

async function poll() {
  if (document.hidden || (needsKey && !key.get())) return;
  try {
    const text = await (await request("/metrics")).text();
    readings = [...readings.slice(1 - WINDOW), { time: performance.now() / 1000, samples: parseMetrics(text) }];
    if (isGone) {
      readings = readings.slice(-1);
      await attempt(loadModels);
    }
    else if (++polls % FOLLOW_POLLS === 0) await followModels();
    if (readings.length > 1) showFigures(figures(readings[0], readings.at(-1)));
  } catch (error) {
    report(error);
  }
}

function showFigures(now) {
  const shown = {
    "requests/s": show(now.requestsPerSecond, 3),
    "points/s": show(now.rowsPerSecond, 3),
    "latency p50": Number.isFinite(now.latency50) ? `${show(1e3 * now.latency50, 2)} ms` : "–",
    "latency p99": Number.isFinite(now.latency99) ? `${show(1e3 * now.latency99, 2)} ms` : "–",
    "requests/batch": show(now.requestsPerBatch, 3),
    "points/batch": show(now.rowsPerBatch, 3),
    queue: `${show(now.queueRequests)} (${show(now.queueRows)} points)`,
    workers: show(now.workers),
  };
  $("figures").replaceChildren(
    ...Object.entries(shown).map(([name, text]) => {
      const pair = make("div");
      pair.append(make("dt", name), make("dd", text));
      return pair;
    }),
  );
}

// ---- start ---------------------------------------------------------------------------------------------------------

$("model-search").addEventListener("input", listModels);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => picture && showOrPaint());
const showOrPaint = () => attempt(point ? showPoint : paint);

await attempt(loadModels);
await poll();
setInterval(poll, POLL_MS);
