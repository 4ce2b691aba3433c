// The service's public interface, as the page uses it: JSON for what is looked at, safetensors for numbers.

const KEY = "hessquik.key";

/** The key that the user gave; it is forgotten when the tab is closed. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

/** What the service answered instead of numbers: its problem details. */
export class ApiError extends Error {
  constructor(status, problem) {
    super(problem.detail ?? `The service answered with status ${status}.`);
    this.status = status;
    this.code = problem.code ?? "";
    this.requestId = problem.request_id ?? "";
  }
}

/** The service cannot be reached. */
export class Unreachable extends Error {}

export async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Unreachable("The service does not answer.");
  }
  if (response.ok) return response;
  throw new ApiError(response.status, await response.json().catch(() => ({})));
}

export const getJson = async (path) => (await request(path)).json();

/** Reads n points (rows of a Float64Array) off a model in one request: {quantity: {shape, data}}. */
export async function evaluate({ model, version, inputs, d, quantities, weights, dtype }, signal) {
  const query = new URLSearchParams({ version, quantities: quantities.join(",") });
  if (dtype) query.set("dtype", dtype);
  const tensors = { inputs: { shape: [inputs.length / d, d], data: inputs } };
  if (weights) tensors.weights = { shape: [weights.length], data: Float64Array.from(weights) };
  const response = await request(`/v1/models/${model}/evaluate?${query}`, {
    method: "POST",
    headers: { "Content-Type": "application/x-safetensors", Accept: "application/x-safetensors" },
    body: writeSafetensors(tensors),
    signal,
  });
  return readSafetensors(await response.arrayBuffer());
}

/** A safetensors file: 8 bytes of length, a JSON header, the numbers. https://huggingface.co/docs/safetensors */
export function writeSafetensors(tensors) {
  const header = {};
  let end = 0;
  for (const [name, { shape, data }] of Object.entries(tensors)) {
    header[name] = { dtype: "F64", shape, data_offsets: [end, (end += data.byteLength)] };
  }
  let text = JSON.stringify(header);
  text += " ".repeat(-text.length & 7); // numbers begin on a multiple of 8 bytes
  const file = new Uint8Array(8 + text.length + end);
  new DataView(file.buffer).setBigUint64(0, BigInt(text.length), true);
  file.set(new TextEncoder().encode(text), 8);
  for (const [name, { data }] of Object.entries(tensors)) {
    file.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), 8 + text.length + header[name].data_offsets[0]);
  }
  return file;
}

export function readSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const numbers = dtype === "F32" ? Float32Array : Float64Array;
    tensors[name] = { shape, data: new numbers(buffer.slice(8 + length + data_offsets[0], 8 + length + data_offsets[1])) };
  }
  return tensors;
}
