// The request that made a picture, as commands to copy.

const list = (numbers) => `[${numbers.join(", ")}]`;
const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The command line for a request about a grid or about one point. */
export function curl({ origin, needsKey, model, version, quantities, weights, grid, point }) {
  const rest = [
    `"quantities": [${quantities.map((name) => `"${name}"`).join(", ")}]`,
    ...(weights ? [`"weights": ${list(weights)}`] : []),
  ].join(", ");
  const head = `curl --fail-with-body -sS ${quote(`${origin}/v1/models/${model}/evaluate?version=${version}`)} \\\n`;
  const lines = ["-H 'Content-Type: application/json'", ...(needsKey ? ['-H "Authorization: Bearer $HESSQUIK_API_KEY"'] : [])];
  const options = lines.map((line) => `  ${line} \\\n`).join("");
  if (point) return `${head}${options}  -d ${quote(`{"inputs": [${list(point)}], ${rest}}`)}\n`;
  const { axes: [i, j], ranges: [x, y], base, count } = grid;
  const rows = y ? "n" : "1";
  const entries = base.map((_, k) => `x[${k}]`).join(", ");
  const format = base.map(() => "%.17g").join(", ");
  return `awk 'BEGIN {
  n = ${count}; split("${base.join(" ")}", b, " "); for (k in b) x[k - 1] = b[k] + 0
  printf "{${rest.replaceAll('"', '\\"')}, \\"inputs\\": ["
  for (row = 0; row < ${rows}; row++) for (column = 0; column < n; column++) {
    x[${i}] = ${x[0]} + ${x[1] - x[0]} * column / (n - 1)
${y ? `    x[${j}] = ${y[0]} + ${y[1] - y[0]} * row / (n - 1)\n` : ""}    printf "%s[${format}]", row + column ? ", " : "", ${entries}
  }
  printf "]}"
}' | ${head}${options}  --data-binary @-
`;
}

/** The same with the Python client. */
export function python({ origin, needsKey, model, version, quantities, weights, grid, point }) {
  const names = `[${quantities.map((name) => `"${name}"`).join(", ")}]`;
  const key = needsKey ? ', api_key=os.environ["HESSQUIK_API_KEY"]' : "";
  const x = point ? `x = np.array(${list(point)})\n` : pythonGrid(grid);
  return `${needsKey ? "import os\n\n" : ""}import numpy as np

from hessquik_client import Client

${x}
with Client("${origin}"${key}) as client:
    out = client.model("${model}", version="${version}").evaluate(x, ${names}${weights ? `, weights=${list(weights)}` : ""})
print(out.${quantities[0]}.shape)
`;
}

function pythonGrid({ axes: [i, j], ranges: [x, y], base, count }) {
  const along = ([low, high]) => `${low} + ${high - low} * np.arange(n) / (n - 1)`;
  if (!y) return `n = ${count}\nx = (${along(x)})[:, None]\n`;
  return `n = ${count}
x = np.tile(np.array(${list(base)}, dtype=float), (n * n, 1))
x[:, ${i}] = np.tile(${along(x)}, n)
x[:, ${j}] = np.repeat(${along(y)}, n)
`;
}
