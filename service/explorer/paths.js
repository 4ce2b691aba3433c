// Paths of optimizers over a model, from answers of the public interface only.
//
// Both work in inputs scaled by the widths of the domain, stay inside it, and try all step lengths of one iterate in
// one request: a batch of points costs one round trip.

import { applyFunction, dot, eigen, norm } from "./linear.js";

const STEP_LENGTHS = Array.from({ length: 12 }, (_, k) => 2 ** -k);
const MAX_ITERATES = 60;
const SUFFICIENT = 1e-4; // Armijo's constant, as Nocedal & Wright, Numerical Optimization, 3.1
const ROUNDING = 1e-14; // of a value, in float64

/** Newton's method on ∇f = 0: finds the stationary point nearby, be it a minimum, maximum or saddle. */
export const newton = (start, ask, domain) =>
  follow(start, ask, domain, {
    error: (at) => norm(at.gradient),
    direction: (at) => applyFunction(eigen(at.hessian, at.u.length), (value) => -1 / value, at.gradient),
    isBetter: (now, next, length) => norm(next.gradient) <= (1 - SUFFICIENT * length) * norm(now.gradient),
    merit: (at) => norm(at.gradient),
  });

/**
 * Projected Newton (Bertsekas 1982, doi:10.1137/0320018): inputs that press against their bound rest, for the others
 * the Hessian's eigenvalues are made positive, so that every step leads down.
 */
export const minimise = (start, ask, domain) =>
  follow(start, ask, domain, {
    error: (at) => norm(free(at).map((k) => at.gradient[k])),
    direction: (at) => {
      const moving = free(at);
      const step = new Array(at.u.length).fill(0);
      if (moving.length === 0) return step;
      const hessian = moving.flatMap((i) => moving.map((j) => at.hessian[i * at.u.length + j]));
      const pairs = eigen(hessian, moving.length);
      const floor = 1e-8 * Math.max(...pairs.values.map(Math.abs));
      const gradient = moving.map((k) => at.gradient[k]);
      applyFunction(pairs, (value) => -1 / Math.max(Math.abs(value), floor), gradient).forEach((s, k) => (step[moving[k]] = s));
      return step;
    },
    isBetter: (now, next) => {
      const slope = dot(now.gradient, next.u.map((entry, k) => entry - now.u[k]));
      return next.value <= now.value + SUFFICIENT * slope + ROUNDING * Math.abs(now.value);
    },
    merit: (at) => at.value,
  });

const free = ({ u, gradient, lower, upper }) =>
  u.map((_, k) => k).filter((k) => !((u[k] <= lower[k] && gradient[k] > 0) || (u[k] >= upper[k] && gradient[k] < 0)));

/**
 * Iterates from `start` until the error has fallen to rounding.
 *
 * @param start a point
 * @param ask (points) → for each {value, gradient, hessian}
 * @param domain {lower, upper, width}; unbounded inputs have ±∞
 * @returns {iterates, outcome}
 */
async function follow(start, ask, { lower, upper, width }, method) {
  const scaled = (x, answer) => ({
    x,
    ...answer,
    unscaled: answer,
    u: x.map((entry, k) => entry / width[k]),
    gradient: answer.gradient.map((entry, k) => entry * width[k]),
    hessian: answer.hessian.map((entry, k) => entry * width[Math.floor(k / x.length)] * width[k % x.length]),
    lower: lower.map((entry, k) => entry / width[k]),
    upper: upper.map((entry, k) => entry / width[k]),
  });
  const inside = (x) => x.map((entry, k) => Math.min(Math.max(entry, lower[k]), upper[k]));
  let now = scaled(inside(start), (await ask([inside(start)]))[0]);
  const iterates = [now];
  const enough = 1e-9 * Math.max(method.error(now), 1e-3 * Math.abs(now.value), Number.MIN_VALUE);
  while (iterates.length < MAX_ITERATES) {
    if (method.error(now) <= enough) return { iterates, outcome: kind(now) };
    const direction = method.direction(now);
    const trials = STEP_LENGTHS.map((length) => inside(now.x.map((entry, k) => entry + length * direction[k] * width[k])));
    if (!trials.flat().every(Number.isFinite)) return { iterates, outcome: "stopped: the Hessian is singular" };
    const answers = (await ask(trials)).map((answer, k) => scaled(trials[k], answer));
    const better = answers.filter((next, k) => method.isBetter(now, next, STEP_LENGTHS[k]));
    if (better.length === 0) {
      const outcome = method.error(now) <= 1e3 * enough ? kind(now) : "stopped: no step within the domain is better";
      return { iterates, outcome };
    }
    now = better.reduce((best, next) => (method.merit(next) < method.merit(best) ? next : best));
    iterates.push(now);
  }
  return { iterates, outcome: `stopped after ${MAX_ITERATES} iterates` };
}

/** What kind of point this is, by its gradient's and Hessian's signs. */
function kind(at) {
  if (free(at).length < at.u.length || at.u.some((entry, k) => entry <= at.lower[k] || entry >= at.upper[k])) {
    return "minimum on the domain's edge";
  }
  const { values } = eigen(at.hessian, at.u.length, false);
  if (values[0] > 0) return "minimum";
  return values.at(-1) < 0 ? "maximum" : "saddle point";
}
