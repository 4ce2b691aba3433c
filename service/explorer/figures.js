// Live figures from the service's Prometheus metrics.

/** {name: [{labels, value}]} of Prometheus' text format. */
export function parseMetrics(text) {
  const samples = {};
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map((m) => [m[1], m[2]]));
    (samples[match[1]] ??= []).push({ labels, value: Number(match[3]) });
  }
  return samples;
}

const sum = (samples, name, accept = () => true) =>
  (samples[name] ?? []).filter(({ labels }) => accept(labels)).reduce((total, { value }) => total + value, 0);

// The page's own questions and probes are not what the service is there for.
const isWork = ({ route }) => !["pages", "/metrics", "/livez", "/readyz", "/v1/models", "/v1/models/{model}"].includes(route);

/** The figures between two readings {time (s), samples}. */
export function figures(then, now) {
  const seconds = now.time - then.time;
  const grown = (name, accept) => sum(now.samples, name, accept) - sum(then.samples, name, accept);
  const requests = grown("hessquik_requests_total", isWork);
  const batches = grown("hessquik_batch_rows_count");
  return {
    requestsPerSecond: requests / seconds,
    rowsPerSecond: grown("hessquik_rows_total") / seconds,
    latency50: quantile(0.5, then, now),
    latency99: quantile(0.99, then, now),
    rowsPerBatch: batches > 0 ? grown("hessquik_batch_rows_sum") / batches : NaN,
    requestsPerBatch: batches > 0 ? grown("hessquik_batch_requests_sum") / batches : NaN,
    queueRequests: sum(now.samples, "hessquik_queue_requests"),
    queueRows: sum(now.samples, "hessquik_queue_rows"),
    workers: sum(now.samples, "hessquik_workers", ({ state }) => state === "ready" || state === "busy"),
  };
}

/** Seconds that a share of the requests stayed under, interpolated in histogram buckets as Prometheus does. */
function quantile(share, then, now) {
  const name = "hessquik_request_seconds_bucket";
  const bounds = [...new Set((now.samples[name] ?? []).map(({ labels }) => labels.le))];
  const buckets = bounds
    .map((le) => {
      const accept = (labels) => labels.le === le && isWork(labels);
      return { bound: le === "+Inf" ? Infinity : Number(le), count: sum(now.samples, name, accept) - sum(then.samples, name, accept) };
    })
    .sort((a, b) => a.bound - b.bound);
  const total = buckets.at(-1)?.count ?? 0;
  if (total === 0) return NaN;
  const at = buckets.findIndex(({ count }) => count >= share * total);
  const { bound: low, count: below } = at > 0 ? buckets[at - 1] : { bound: 0, count: 0 };
  if (!Number.isFinite(buckets[at].bound)) return low;
  return low + ((buckets[at].bound - low) * (share * total - below)) / (buckets[at].count - below);
}
