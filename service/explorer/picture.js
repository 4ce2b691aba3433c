// Drawing, by Plotly (a global of /explorer/plotly.min.js).

import { FIELDS, arrows, grid, quadraticModel } from "./slice.js";

const LEVELS = 14;
// ColorBrewer's RdBu: what is below zero is red, above zero blue.
const SIGNED = ["#b2182b", "#ef8a62", "#fddbc7", "#f7f7f7", "#d1e5f0", "#67a9cf", "#2166ac"].map((colour, k) => [k / 6, colour]);
const PATH_COLOURS = { newton: "#ff2e88", minimise: "#ff8c1a" };

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Names come from model files; Plotly would read markup in them. */
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const shortened = (text, length = 46) => plain(text.length > length ? `${text.slice(0, length - 1)}…` : text);

function layout(extra) {
  const grid = style("--line");
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: style("--font"), size: 12.5, color: style("--text") },
    margin: { l: 62, r: 8, t: 10, b: 50 },
    showlegend: false,
    modebar: { bgcolor: "rgba(0,0,0,0)" },
    hovermode: "closest",
    dragmode: "zoom",
    ...extra(axis),
  };
}

// On phones the buttons would cover the picture.
const config = { responsive: true, displaylogo: false, displayModeBar: matchMedia("(max-width: 52rem)").matches ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

/** The slice with arrows, the chosen point, its quadratic model and a path. */
export async function drawSlice(element, picture) {
  const { slice, box, names, z, gradient, d, count, isSurface, point, showsModel, path } = picture;
  const { axes: [i, j], ranges: [x, y], field } = slice;
  const { xs, ys } = grid(slice, count);
  const [low, high] = extent(z);
  const { isSigned } = FIELDS[field];
  const bound = Math.max(-low, high);
  const shared = {
    x: xs,
    y: ys,
    z,
    name: FIELDS[field].label,
    colorscale: isSigned ? SIGNED : "Viridis",
    colorbar: { title: { text: FIELDS[field].label, side: "right" }, thickness: 12, len: 1, outlinewidth: 0, tickformat: ".4~g" },
    hovertemplate: `%{x:.5g}, %{y:.5g}<br><b>%{z:.7g}</b><extra></extra>`,
  };
  const colours = isSigned ? { zmin: -bound, zmax: bound } : {};
  const levels = niceLevels(low, high);
  const model = showsModel && point ? quadraticModel(slice, point, count) : null;
  const ink = isSigned ? "40,40,60" : "255,255,255";
  if (j === undefined) return drawCurve(element, { xs, z, model, point, label: FIELDS[field].label, name: names[i], i, shapes: outside(box, [i], [x]) });
  const traces = isSurface
    ? surfaceTraces({ shared, isSigned, bound, model, point, path, i, j, field })
    : contourTraces({ shared, colours, levels, model, point, path, i, j, ink });
  if (gradient && !isSurface) traces.splice(2, 0, arrowTrace(arrows(slice, gradient, d, count), x, y, ink));
  const titles = [shortened(names[i]), shortened(names[j])];
  await Plotly.react(
    element,
    traces,
    layout((axis) =>
      isSurface
        ? { margin: { l: 0, r: 0, t: 0, b: 0 }, scene: { aspectmode: "manual", aspectratio: { x: 1, y: 1, z: 0.6 }, camera: { eye: { x: 1.15, y: 1.15, z: 0.75 }, center: { x: 0, y: 0, z: -0.12 } }, xaxis: { ...axis, title: { text: titles[0] } }, yaxis: { ...axis, title: { text: titles[1] } }, zaxis: { ...axis, title: { text: FIELDS[field].label }, ...(model && field === "value" ? { range: [low, high] } : {}) } }, uirevision: "scene" }
        : {
            shapes: outside(box, [i, j], [x, y]),
            xaxis: { ...axis, title: { text: titles[0], standoff: 8 }, range: [...x], constrain: "domain" },
            yaxis: { ...axis, title: { text: titles[1], standoff: 4 }, range: [...y] },
          },
    ),
    config,
  );
}

/** A model of one input: a curve, its parabola, its point. */
function drawCurve(element, { xs, z, model, point, label, name, i, shapes }) {
  const line = (y, extra) => ({ type: "scatter", mode: "lines", x: xs, y, ...extra });
  const traces = [line(z[0], { name: label, line: { color: style("--accent-line"), width: 2.5 }, hovertemplate: "%{x:.5g}<br><b>%{y:.7g}</b><extra></extra>" })];
  if (model) traces.push(line(clipped(model, z)[0], { name: "quadratic model", hoverinfo: "skip", line: { dash: "4px,3px", color: style("--text") } }));
  if (point && label === "value") traces.push({ type: "scatter", mode: "markers", name: "point", x: [point.x[i]], y: [point.value], hoverinfo: "skip", marker: { size: 11, color: PATH_COLOURS.minimise } });
  const titled = (text) => (axis) => ({ ...axis, title: { text } });
  return Plotly.react(element, traces, layout((axis) => ({ shapes, hovermode: "x", xaxis: titled(shortened(name))(axis), yaxis: titled(label)(axis) })), config);
}

/** Shades over what lies outside a model's bounds. */
function outside(box, axes, [x, y]) {
  if (!box) return [];
  const shade = (x0, x1, y0, y1) => ({
    type: "rect", name: "outside", xref: "x", yref: y ? "y" : "paper", x0, x1, y0, y1, line: { width: 0 }, fillcolor: style("--text"), opacity: 0.35, layer: "above",
  });
  const [low, high] = [Math.max(x[0], Math.min(box[axes[0]][0], x[1])), Math.min(x[1], Math.max(box[axes[0]][1], x[0]))];
  const [bottom, top] = y ?? [0, 1];
  const shades = [
    x[0] < low && shade(x[0], low, bottom, top),
    high < x[1] && shade(high, x[1], bottom, top),
    y && bottom < box[axes[1]][0] && shade(low, high, bottom, Math.min(top, box[axes[1]][0])),
    y && box[axes[1]][1] < top && shade(low, high, Math.max(bottom, box[axes[1]][1]), top),
  ];
  return shades.filter(Boolean);
}

/** About LEVELS levels at round numbers, the same for a field and its model. */
function niceLevels(low, high) {
  const raw = (high - low) / LEVELS || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const size = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  return { start: Math.ceil(low / size) * size, end: high, size };
}

function contourTraces({ shared, colours, levels, model, point, path, i, j, ink }) {
  const traces = [
    { type: "heatmap", ...shared, ...colours, zsmooth: "fast" }, // smoothed by the browser: a contour's own colours take thrice as long
    {
      type: "contour", name: "levels", x: shared.x, y: shared.y, z: shared.z, showscale: false, hoverinfo: "skip",
      autocontour: false, contours: { ...levels, coloring: "none" }, line: { width: 0.6, color: `rgba(${ink},0.5)` },
    },
  ];
  if (model) {
    traces.push({
      type: "contour", name: "quadratic model", x: shared.x, y: shared.y, z: model, showscale: false, hoverinfo: "skip",
      autocontour: false, contours: { ...levels, coloring: "none" }, line: { width: 1.8, color: `rgb(${ink})`, dash: "4px,3px" },
    });
  }
  if (path) {
    const along = path.iterates.map(({ x }) => x);
    traces.push({
      type: "scatter", name: "path", x: along.map((entry) => entry[i]), y: along.map((entry) => entry[j]), hoverinfo: "skip", cliponaxis: false,
      mode: "lines+markers", line: { width: 2.5, color: PATH_COLOURS[path.method] },
      marker: { size: 7, color: PATH_COLOURS[path.method], line: { width: 1, color: "#fff" } },
    });
  }
  if (point) {
    traces.push({
      type: "scatter", name: "point", x: [point.x[i]], y: [point.x[j]], mode: "markers", hoverinfo: "skip", cliponaxis: false,
      marker: { symbol: path ? "star" : "x", size: path ? 15 : 11, color: path ? PATH_COLOURS[path.method] : "#111", line: { width: 1.5, color: "#fff" } },
    });
  }
  return traces;
}

/** Lines in space only where they lie on the surface: on the value. */
function surfaceTraces({ shared, isSigned, bound, model, point, path, i, j, field }) {
  const traces = [{ type: "surface", ...shared, ...(isSigned ? { cmin: -bound, cmax: bound } : {}) }];
  if (field !== "value") return traces;
  if (model) traces.push({ type: "surface", name: "quadratic model", x: shared.x, y: shared.y, z: model, showscale: false, opacity: 0.45, hoverinfo: "skip" });
  const colour = PATH_COLOURS[path?.method] ?? style("--text");
  const on = path ? path.iterates.map(({ x, value }) => [x[i], x[j], value]) : point ? [[point.x[i], point.x[j], point.value]] : [];
  traces.push({
    type: "scatter3d", name: "path", mode: "lines+markers", hoverinfo: "skip", line: { width: 6, color: colour }, marker: { size: 4, color: colour },
    x: on.map(([a]) => a), y: on.map(([, b]) => b), z: on.map(([, , c]) => c),
  });
  return traces;
}

/** A parabola soon leaves the picture: it is drawn where the surface's own range is. */
function clipped(model, z) {
  const [low, high] = extent(z);
  return model.map((row) => row.map((entry) => (entry < low || entry > high ? null : entry)));
}

/** Each arrow is a line whose second marker is a head, turned along the line by Plotly. */
function arrowTrace(found, x, y, ink) {
  const trace = {
    type: "scatter", name: "gradient", x: [], y: [], mode: "lines+markers", hoverinfo: "skip", connectgaps: false,
    line: { width: 1.2, color: `rgba(${ink},0.8)` },
    marker: { symbol: "arrow", angleref: "previous", size: [], color: `rgba(${ink},0.9)`, opacity: 1, line: { width: 0 } },
  };
  for (const [px, py, dx, dy] of found) {
    trace.x.push(px, px + dx * (x[1] - x[0]), null);
    trace.y.push(py, py + dy * (y[1] - y[0]), null);
    trace.marker.size.push(0, 6.5, 0);
  }
  return trace;
}

/** A Hessian as a heat map, zero in the middle; its colours are those of inputs in the given units. */
export async function drawHessian(element, matrix, names, units) {
  const d = names.length;
  const rows = units.map((a, row) => units.map((b, column) => matrix[row * d + column] * a * b));
  const bound = Math.max(...rows.flat().map(Math.abs), Number.MIN_VALUE);
  const every = Math.ceil(d / 12); // more labels would overlap
  const shown = names.map((_, k) => k).filter((k) => k % every === 0);
  const ticktext = shown.map((k) => (d <= 4 ? shortened(names[k], 10) : String(k + 1)));
  const hover = names.map((a, row) => names.map((b, column) => `${shortened(a, 30)}<br>${shortened(b, 30)}<br><b>${matrix[row * d + column].toPrecision(7)}</b>`));
  const axisOf = (axis) => ({ ...axis, tickvals: shown, ticktext, showgrid: false, zeroline: false, ticks: "" });
  await Plotly.react(
    element,
    [{
      type: "heatmap", z: rows, text: hover, zmin: -bound, zmax: bound, colorscale: SIGNED, xgap: 1, ygap: 1,
      texttemplate: d <= 3 ? "%{z:.3~g}" : "", textfont: { size: 13 }, hovertemplate: "%{text}<extra></extra>",
      colorbar: { thickness: 10, len: 1, outlinewidth: 0, tickformat: ".3~g" },
    }],
    layout((axis) => ({
      margin: { l: d <= 4 ? 70 : 28, r: 0, t: 4, b: 34 },
      xaxis: axisOf(axis),
      yaxis: { ...axisOf(axis), autorange: "reversed" },
    })),
    { ...config, displayModeBar: false },
  );
}

function extent(z) {
  const finite = z.flat().filter(Number.isFinite);
  return finite.length ? [finite.reduce((a, b) => Math.min(a, b)), finite.reduce((a, b) => Math.max(a, b))] : [0, 1];
}
