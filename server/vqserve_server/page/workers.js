// One row for each worker process: its device, its memory, and its queue against the limits.

import { element, Keyed, row, say, set } from "./dom.js";
import { bytes, percent, short, whole } from "./format.js";

const NEAR = 0.8;

/** Fill the section; its function shows two scrapes. */
export function workers(body) {
  const rows = new Keyed(body, () => {
    const { node, cells } = row(11, { numbers: [3, 4, 5, 6, 7] });
    const state = element("span", { class: "badge" });
    cells[1].append(state);
    const meters = [8, 9, 10].map((i) => meter(cells[i]));
    return {
      node,
      update({ worker, serving, texts, queues }) {
        say(cells[0], worker);
        say(state, serving ? "Serving" : "Not serving");
        set(state, "data-state", serving ? "good" : "bad");
        texts.forEach((text, i) => say(cells[2 + i], text));
        queues.forEach((queue, i) => meters[i](queue));
      },
    };
  });
  return (scrapes) => {
    rows.update(scrapes.labels("serving", "worker").map((worker) => [worker, about(scrapes, worker)]));
  };
}

/** Make a bar of a value against its limit; the text beside it says the same. */
function meter(cell) {
  const text = element("span", { class: "meter-text" });
  const fill = element("span", { class: "fill" });
  cell.append(element("div", { class: "meter" }, text, element("span", { class: "track", "aria-hidden": "true" }, fill)));
  return ({ value, limit, write }) => {
    const share = limit ? Math.min(1, value / limit) : 0;
    say(text, `${write(value)} of ${write(limit)}`);
    fill.style.inlineSize = `${(100 * share).toFixed(1)}%`;
    set(fill, "data-near", share >= NEAR ? "yes" : null);
  };
}

function about(scrapes, worker) {
  const where = { worker };
  const value = (name) => scrapes.value(name, where);
  const queue = (name, write) => ({ value: value(name), limit: value(`${name}_limit`), write });
  return {
    worker,
    serving: value("serving") === 1,
    texts: [
      scrapes.labels("device_busy_seconds_total", "device", where).join(", ") || "–", percent(scrapes.rate("device_busy_seconds_total", where)),
      bytes(value("device_memory_bytes")), bytes(value("process_resident_bytes")), whole(value("connections")), whole(value("open_calls")),
    ],
    queues: [queue("queue_requests", short), queue("queue_rows", short), queue("queue_bytes", bytes)],
  };
}
