// A 2-D slice through a model: its points, and the field to draw.

import { eigen } from "./linear.js";

export const POINTS_PER_SIDE = 101;

/** What can be drawn: which quantities it needs, and how a number comes from row r of them. */
export const FIELDS = {
  value: { label: "value", needs: ["value"], read: (t, r) => t.value.data[r] },
  gradient: {
    label: "gradient norm",
    needs: ["gradient"],
    read: (t, r, d) => Math.hypot(...t.gradient.data.subarray(r * d, (r + 1) * d)),
  },
  spread: { label: "standard deviation of the value", needs: ["value_std"], read: (t, r) => t.value_std.data[r], isOfEnsembles: true },
  laplacian: { label: "Laplacian", needs: ["laplacian"], read: (t, r) => t.laplacian.data[r], isSigned: true },
  eigenvalue: {
    label: "smallest Hessian eigenvalue",
    needs: ["hessian"],
    read: (t, r, d) => eigen(t.hessian.data.subarray(r * d * d, (r + 1) * d * d), d, false).values[0],
    isSigned: true,
  },
};

/** Points from low to high, both met exactly. */
export const ticks = (low, high, count) => Array.from({ length: count }, (_, k) => low + ((high - low) * k) / (count - 1));

/** The coordinates across and up; a model of one input has a curve, which is a slice with one row. */
export const grid = ({ ranges: [x, y] }, count) => ({ xs: ticks(...x, count), ys: y ? ticks(...y, count) : [0] });

/** The quantities that a slice asks for, in the service's order. */
export const quantitiesOf = ({ field, hasArrows }) =>
  ["value", "gradient", "hessian", "laplacian", "value_std"].filter((q) => FIELDS[field].needs.includes(q) || (hasArrows && q === "gradient"));

/** The most points per side, up to 101, that the service's limits let through in one request. */
export function pointsPerSide(slice, d, limits) {
  const perRow = { value: 1, gradient: d, hessian: d * d, laplacian: 1, value_std: 1 };
  const numbers = quantitiesOf(slice).reduce((sum, quantity) => sum + perRow[quantity], 0);
  const rows = Math.min(limits.rows, limits.reply_bytes / (8 * numbers), (limits.body_bytes - 4096) / (8 * d));
  return Math.max(2, Math.min(POINTS_PER_SIDE, Math.floor(Math.sqrt(rows))));
}

/** All points of a slice, y by y: a Float64Array of rows. */
export function points(slice, count) {
  const { axes: [i, j], base } = slice;
  const { xs, ys } = grid(slice, count);
  const d = base.length;
  const rows = new Float64Array(ys.length * count * d);
  for (let r = 0; r < ys.length * count; r++) {
    rows.set(base, r * d);
    rows[r * d + i] = xs[r % count];
    if (j !== undefined) rows[r * d + j] = ys[Math.floor(r / count)];
  }
  return rows;
}

/** The field of an answer, as rows of y. */
export function field(slice, tensors, d, count) {
  const { read } = FIELDS[slice.field];
  return grid(slice, count).ys.map((_, row) => Array.from({ length: count }, (_, column) => read(tensors, row * count + column, d)));
}

/** About 13 × 13 arrows, [x, y, dx, dy] with lengths in shares of the ranges, the longest filling its cell. */
export function arrows(slice, gradient, d, count) {
  const { axes: [i, j], ranges: [x, y] } = slice;
  const stride = Math.max(1, Math.round((count - 1) / 13));
  const { xs, ys } = grid(slice, count);
  const found = [];
  for (let row = Math.floor(stride / 2); row < count; row += stride) {
    for (let column = Math.floor(stride / 2); column < count; column += stride) {
      const at = (row * count + column) * d;
      const slope = [gradient[at + i] * (x[1] - x[0]), gradient[at + j] * (y[1] - y[0])];
      if (slope.every(Number.isFinite)) found.push([xs[column], ys[row], ...slope]);
    }
  }
  const longest = Math.max(...found.map(([, , dx, dy]) => Math.hypot(dx, dy)));
  const cell = (0.95 * stride) / (count - 1);
  return found.map(([px, py, dx, dy]) => {
    // Square roots keep short arrows visible; directions are exact.
    const length = Math.hypot(dx, dy);
    const scale = length > 0 ? (cell * Math.sqrt(length / longest)) / length : 0;
    return [px, py, dx * scale, dy * scale];
  });
}

/** The local quadratic model f + gᵀs + ½ sᵀHs over the slice. */
export function quadraticModel(slice, point, count) {
  const { axes: [i, j], base } = slice;
  const d = base.length;
  const { xs, ys } = grid(slice, count);
  return ys.map((py) =>
    xs.map((px) => {
      const s = base.map((entry, k) => (k === i ? px : k === j ? py : entry) - point.x[k]);
      let sum = point.value;
      for (let a = 0; a < d; a++) {
        sum += point.gradient[a] * s[a];
        for (let b = 0; b < d; b++) sum += 0.5 * s[a] * point.hessian[a * d + b] * s[b];
      }
      return sum;
    }),
  );
}
