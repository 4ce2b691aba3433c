// Paths of optimizers over a model, from answers of the public interface only.
//
// Both work in inputs scaled by the widths of the domain, stay inside it, and try all step lengths of one iterate in
// one request: a batch of points costs one round trip.

import { applyFunction, dot, eigen, norm } from "./linear.js";

const STEP_LENGTHS = Array.from({ length: 12 }, (_, k) => 2 ** -k);
const MAX_ITERATES = 60;
const SMALL = 1e-6; // of the largest slope or curvature on the way: what is below is rounding, or flat
const NEAR = 1e-4; // of the domain's widths: what is nearer to a saddle point is at it
const ESCAPE = 0.1; // of the domain's widths: the longest step off a saddle point
const REACH = 2; // widths of the picture that inputs without bounds may go beyond it
const SUFFICIENT = 1e-4; // Armijo's constant, as Nocedal & Wright, Numerical Optimization, 3.1
const ROUNDING = 1e-14; // of a value, in float64

/** Newton's method on ∇f = 0: finds the stationary point nearby, be it a minimum, maximum or saddle. */
export const newton = (start, ask, domain) =>
  follow(start, ask, domain, {
    error: (at) => norm(at.gradient),
    isEnd: () => true,
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
    error: slopeOf,
    isEnd: (at, scale) => !fallsOff(at, scale),
    direction: (at, scale) => {
      const moving = free(at);
      const step = new Array(at.u.length).fill(0);
      if (moving.length === 0) return step;
      if (fallsOff(at, scale)) {
        // At a saddle point the slope is rounding: down the most negative curvature instead.
        const { vectors } = eigen(moving.flatMap((i) => moving.map((j) => at.hessian[i * at.u.length + j])), moving.length);
        const side = dot(vectors[0], moving.map((k) => at.gradient[k])) > 0 ? -1 : 1;
        vectors[0].forEach((entry, k) => (step[moving[k]] = side * ESCAPE * entry));
        return step;
      }
      const hessian = moving.flatMap((i) => moving.map((j) => at.hessian[i * at.u.length + j]));
      const pairs = eigen(hessian, moving.length);
      const floor = 1e-8 * Math.max(...pairs.values.map(Math.abs));
      const gradient = moving.map((k) => at.gradient[k]);
      applyFunction(pairs, (value) => -1 / Math.max(Math.abs(value), floor), gradient).forEach((s, k) => (step[moving[k]] = s));
      return step;
    },
    isBetter: (now, next) => {
      const slope = dot(now.gradient, next.u.map((entry, k) => entry - now.u[k]));
      return next.value <= now.value + SUFFICIENT * slope + ROUNDING * Math.abs(now.value) && next.u.some((entry, k) => entry !== now.u[k]);
    },
    merit: (at) => at.value,
  });

const slopeOf = (at) => norm(free(at).map((k) => at.gradient[k]));

/** Whether the slope has all but vanished, beside the curvature, at a point that is no minimum. */
function fallsOff(at, { curvature }) {
  const moving = free(at);
  if (moving.length === 0) return false;
  const { values } = eigen(moving.flatMap((i) => moving.map((j) => at.hessian[i * at.u.length + j])), moving.length, false);
  return values[0] < -SMALL * curvature && slopeOf(at) <= NEAR * -values[0];
}

const free = ({ u, gradient, lower, upper }) =>
  u.map((_, k) => k).filter((k) => !((u[k] <= lower[k] && gradient[k] > 0) || (u[k] >= upper[k] && gradient[k] < 0)));

/**
 * Iterates from `start` until the error has fallen to rounding.
 *
 * @param start a point
 * @param ask (points) → for each {value, gradient, hessian}
 * @param domain {lower, upper, width, isStated}; of a model that states no bounds, those of the picture
 * @returns {iterates, outcome}
 */
async function follow(start, ask, { lower: low, upper: high, width, isStated }, method) {
  const lower = low.map((entry, k) => (isStated ? entry : Math.min(entry, start[k]) - REACH * width[k]));
  const upper = high.map((entry, k) => (isStated ? entry : Math.max(entry, start[k]) + REACH * width[k]));
  const scaled = (x, answer) => ({
    x,
    ...answer,
    unscaled: answer,
    slope: norm(answer.gradient.map((entry, k) => entry * width[k])),
    u: x.map((entry, k) => entry / width[k]),
    gradient: answer.gradient.map((entry, k) => entry * width[k]),
    hessian: answer.hessian.map((entry, k) => entry * width[Math.floor(k / x.length)] * width[k % x.length]),
    lower: lower.map((entry, k) => entry / width[k]),
    upper: upper.map((entry, k) => entry / width[k]),
  });
  const inside = (x) => x.map((entry, k) => Math.min(Math.max(entry, lower[k]), upper[k]));
  let now = scaled(inside(start), (await ask([inside(start)]))[0]);
  const iterates = [now];
  const scale = { slope: Math.abs(1e-3 * now.value), curvature: 0 };
  const end = () => ({ iterates, outcome: kind(now, scale, isStated) });
  while (iterates.length < MAX_ITERATES) {
    scale.slope = Math.max(scale.slope, now.slope, Number.MIN_VALUE);
    scale.curvature = Math.max(scale.curvature, norm(now.hessian));
    if (method.error(now) <= 1e-9 * scale.slope && method.isEnd(now, scale)) return end();
    const direction = method.direction(now, scale);
    const trials = STEP_LENGTHS.map((length) => inside(now.x.map((entry, k) => entry + length * direction[k] * width[k])));
    if (!trials.flat().every(Number.isFinite)) return { iterates, outcome: "stopped: the Hessian is singular" };
    const answers = (await ask(trials)).map((answer, k) => scaled(trials[k], answer));
    const better = answers.filter((next, k) => method.isBetter(now, next, STEP_LENGTHS[k]));
    if (better.length === 0) {
      return method.error(now) <= SMALL * scale.slope ? end() : { iterates, outcome: "stopped: no step within the domain is better" };
    }
    now = better.reduce((best, next) => (method.merit(next) < method.merit(best) ? next : best));
    iterates.push(now);
  }
  return { iterates, outcome: `stopped after ${MAX_ITERATES} iterates` };
}

/** What kind of point this is, by its gradient's and Hessian's signs. */
function kind(at, { curvature }, isStated) {
  if (free(at).length < at.u.length || at.u.some((entry, k) => entry <= at.lower[k] || entry >= at.upper[k])) {
    return isStated ? "minimum on the domain's edge" : "stopped far outside the picture, since the model states no domain";
  }
  const { values } = eigen(at.hessian, at.u.length, false);
  if (norm(values) <= SMALL * curvature) return "stopped where the model is flat";
  if (values[0] > 0) return "minimum";
  return values.at(-1) < 0 ? "maximum" : "saddle point";
}
