// Linear algebra for small symmetric matrices, stored row by row.

/**
 * Eigenvalues, rising, and eigenvectors of a symmetric d × d matrix by cyclic Jacobi rotations
 * (Golub & Van Loan, Matrix Computations, 8.5). Non-finite matrices give NaN.
 */
export function eigen(matrix, d, wantVectors = true) {
  const a = Float64Array.from(matrix);
  const v = wantVectors ? Float64Array.from({ length: d * d }, (_, k) => (k % (d + 1) === 0 ? 1 : 0)) : null;
  if (!a.every(Number.isFinite)) return { values: new Array(d).fill(NaN), vectors: null };
  for (let sweep = 0; sweep < 40; sweep++) {
    let off = 0;
    let all = 0;
    for (let p = 0; p < d; p++) for (let q = 0; q < d; q++) {
      const square = a[p * d + q] ** 2;
      all += square;
      if (p !== q) off += square;
    }
    if (off <= 1e-30 * all) break;
    for (let p = 0; p < d - 1; p++) for (let q = p + 1; q < d; q++) rotate(a, v, d, p, q);
  }
  const order = Array.from({ length: d }, (_, k) => k).sort((i, j) => a[i * (d + 1)] - a[j * (d + 1)]);
  return {
    values: order.map((k) => a[k * (d + 1)]),
    vectors: v && order.map((k) => Array.from({ length: d }, (_, row) => v[row * d + k])),
  };
}

/** One rotation that makes a[p, q] zero. */
function rotate(a, v, d, p, q) {
  const apq = a[p * d + q];
  if (apq === 0) return;
  const theta = (a[q * d + q] - a[p * d + p]) / (2 * apq);
  const t = (theta >= 0 ? 1 : -1) / (Math.abs(theta) + Math.hypot(theta, 1));
  const c = 1 / Math.hypot(t, 1);
  const s = t * c;
  for (let k = 0; k < d; k++) {
    const x = a[k * d + p];
    const y = a[k * d + q];
    a[k * d + p] = c * x - s * y;
    a[k * d + q] = s * x + c * y;
  }
  for (let k = 0; k < d; k++) {
    const x = a[p * d + k];
    const y = a[q * d + k];
    a[p * d + k] = c * x - s * y;
    a[q * d + k] = s * x + c * y;
  }
  if (!v) return;
  for (let k = 0; k < d; k++) {
    const x = v[k * d + p];
    const y = v[k * d + q];
    v[k * d + p] = c * x - s * y;
    v[k * d + q] = s * x + c * y;
  }
}

/** Σ over eigenpairs of change(λ) (vᵀb) v: with 1/λ it solves H x = b. */
export function applyFunction({ values, vectors }, change, b) {
  const x = new Array(b.length).fill(0);
  values.forEach((value, k) => {
    const part = change(value) * dot(vectors[k], b);
    vectors[k].forEach((entry, row) => (x[row] += part * entry));
  });
  return x;
}

export const dot = (a, b) => a.reduce((sum, entry, k) => sum + entry * b[k], 0);
export const norm = (a) => Math.hypot(...a);
