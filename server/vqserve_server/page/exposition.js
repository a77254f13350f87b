// Reads Prometheus's text format, version 0.0.4, as /metrics writes it.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)(?: -?\d+)?$/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"(?:,|$)/g;
const ESCAPES = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

/**
 * Parse a whole answer.
 * @param {string} text
 * @returns {Map<string, Map<string, {labels: Object<string, string>, value: number}>>} samples by name, then by their labels as written
 */
export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    if (line === "" || line.startsWith("#")) continue;
    const found = SAMPLE.exec(line);
    if (found === null) throw new Error("/metrics has a line that is no sample");
    const [, name, written = "", value] = found;
    if (!samples.has(name)) samples.set(name, new Map());
    samples.get(name).set(written, { labels: labelsOf(written), value: number(value) });
  }
  return samples;
}

function labelsOf(written) {
  // No prototype: a label may have any name.
  const labels = Object.create(null);
  for (const [, name, value] of written.matchAll(LABEL)) {
    labels[name] = value.replace(/\\[n"\\]/g, (escape) => ESCAPES[escape]);
  }
  return labels;
}

function number(text) {
  if (text === "+Inf") return Infinity;
  if (text === "-Inf") return -Infinity;
  return Number(text);
}
