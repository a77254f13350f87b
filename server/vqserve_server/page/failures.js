// What was not answered, by its reason; restarts, reloads and certificates.

import { element, Keyed, row, say, set } from "./dom.js";
import { day, duration, short } from "./format.js";

const SOON_S = 14 * 86400;
const COUNTERS = [
  ["requests_total", "status", "Request failed", (labels) => labels.status !== "OK"],
  ["refused_total", "reason", "Refused", () => true],
  ["expired_total", "where", "Expired", () => true],
  ["worker_restarts_total", null, "Worker started again", () => true],
  ["reloads_total", "result", "Reload", () => true],
];

/** Fill the section; its function shows two scrapes. */
export function failures(body, none, certificates, heading) {
  const rows = new Keyed(body, () => {
    const { node, cells } = row(4, { numbers: [2, 3] });
    return { node, update: (texts) => texts.forEach((text, i) => say(cells[i], text)) };
  });
  const files = new Keyed(certificates, () => {
    const node = element("li");
    return {
      node,
      update([file, until, left]) {
        say(node, `${file}: valid until ${day(until)}${left < 0 ? ", has expired" : `, ${duration(left)} left`}`);
        set(node, "data-near", left < SOON_S ? "yes" : null);
      },
    };
  });
  return (scrapes, unixSeconds) => {
    const found = COUNTERS.flatMap(([name, label, what, counts]) => reasons(scrapes, name, label, counts)
      .map((reason) => [`${name} ${reason}`, texts(scrapes, name, label, reason, what)]));
    rows.update(found);
    body.closest(".scroll").hidden = found.length === 0;
    none.hidden = found.length > 0;
    const known = scrapes.samples("certificate_expiry_timestamp_seconds").map(({ labels, value }) => [labels.file, value, value - unixSeconds]);
    files.update(known.map((one) => [one[0], one]));
    heading.hidden = known.length === 0;
  };
}

/** Return the values of a counter's label of which something was counted. */
function reasons(scrapes, name, label, counts) {
  const found = scrapes.samples(name).filter((sample) => sample.value > 0 && counts(sample.labels));
  return [...new Set(found.map(({ labels }) => (label === null ? "" : labels[label])))].sort();
}

function texts(scrapes, name, label, reason, what) {
  const where = label === null ? {} : { [label]: reason };
  return [what, reason, short(scrapes.added(name, where)), short(scrapes.total(name, where))];
}
