// The tiles at the top: one figure, its curve, and what it is made of.

import { curves } from "./curves.js";
import { element, say, set } from "./dom.js";
import { percent, seconds, short } from "./format.js";

const QUEUES = [["queue_requests", "requests"], ["queue_rows", "rows"], ["queue_bytes", "bytes"]];
const operations = (what) => [
  { key: `encode_${what}`, label: "encode", class: "first" },
  { key: `decode_${what}`, label: "decode", class: "second" },
];

const TILES = [
  { id: "requests", heading: "Requests", unit: "per second", write: short, lines: operations("requests") },
  { id: "tokens", heading: "Tokens", unit: "per second", write: short, lines: operations("tokens") },
  {
    id: "p99", heading: "Latency", unit: "p99", write: seconds,
    lines: [{ key: "p50", label: "p50", class: "first" }, { key: "p99", label: "p99", class: "second" }],
  },
  { id: "queue", heading: "Queue", unit: "of its limit", write: percent, top: 1, lines: [{ key: "queue", label: "", class: "first" }], note: (point) => point.queued },
  { id: "busy", heading: "Device busy", unit: "of the time", write: percent, top: 1, lines: [{ key: "busy", label: "", class: "first" }], note: (point) => point.devices },
  { id: "failed", heading: "Failed requests", unit: "per second", write: short, lines: [{ key: "failed", label: "", class: "bad" }], note: (point) => point.failures },
];

/** Compute what the tiles show of two scrapes; null is what is not known. */
export function pointOf(scrapes) {
  const sum = (name) => Object.fromEntries(["encode", "decode"].map((operation) => [operation, scrapes.rate(name, { operation })]));
  const requests = sum("requests_total");
  const tokens = sum("tokens_total");
  const latency = scrapes.histogram("request_seconds");
  const answered = scrapes.rate("requests_total", { status: "OK" });
  const all = scrapes.rate("requests_total");
  const refused = scrapes.added("refused_total");
  const expired = scrapes.added("expired_total");
  const busy = scrapes.labels("device_busy_seconds_total", "worker")
    .map((worker) => scrapes.rate("device_busy_seconds_total", { worker }));
  const fullest = fullestQueue(scrapes);
  return {
    encode_requests: requests.encode, decode_requests: requests.decode, requests: all,
    encode_tokens: tokens.encode, decode_tokens: tokens.decode, tokens: scrapes.rate("tokens_total"),
    p50: latency.quantile(0.5), p99: latency.quantile(0.99),
    queue: fullest?.share ?? null, queued: fullest?.text ?? "",
    busy: busy.length && busy[0] !== null ? busy.reduce((a, b) => a + b) / busy.length : null,
    devices: scrapes.labels("device_busy_seconds_total", "device").join(", "),
    failed: all === null ? null : all - answered,
    failures: refused === null ? "" : `${short(refused)} refused, ${short(expired)} expired`,
  };
}

/** Return the share of the queue's limit that is nearest to it, in any worker. */
function fullestQueue(scrapes) {
  const found = QUEUES.flatMap(([name, noun]) => scrapes.samples(name).map(({ labels, value }) => {
    const limit = scrapes.value(`${name}_limit`, labels);
    return { share: limit ? value / limit : 0, text: `${short(value)} of ${short(limit)} ${noun}` };
  }));
  return found.reduce((most, one) => (most === null || one.share > most.share ? one : most), null);
}

/** Fill the overview; its function shows a point and the curves of all. */
export function overview(parent) {
  const tiles = TILES.map((tile) => {
    const value = element("span", { class: "value" });
    const chart = curves(tile.heading, tile.lines, tile.write, tile.top);
    const below = tile.lines.map((line) => element("span", { class: tile.note ? "" : line.class }));
    parent.append(element("article", { class: "tile", id: `tile-${tile.id}` },
      element("h3", {}, tile.heading), element("p", { class: "figure" }, value, " ", element("span", { class: "unit" }, tile.unit)),
      chart.node, element("p", { class: "note" }, ...below)));
    return { ...tile, value, below, chart };
  });
  return (point, points, now) => {
    for (const tile of tiles) {
      say(tile.value, tile.write(point[tile.id]));
      tile.lines.forEach(({ key, label }, i) => say(tile.below[i], tile.note ? tile.note(point) : `${label} ${tile.write(point[key])}`));
      tile.chart.update(points, now);
    }
    set(parent.querySelector("#tile-failed"), "data-bad", point.failed > 0 ? "yes" : null);
    set(parent.querySelector("#tile-queue"), "data-bad", point.queue >= 0.8 ? "yes" : null);
  };
}
