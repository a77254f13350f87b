// Requests by codebook and operation, and how times and batch sizes are distributed.

import { bars } from "./curves.js";
import { Keyed, row, say } from "./dom.js";
import { seconds, short } from "./format.js";

/** Fill the section; its function shows two scrapes. */
export function traffic(body, figures) {
  const rows = new Keyed(body, () => {
    const { node, cells } = row(12, { heads: 2, numbers: [2, 3, 4, 5, 6, 7, 8, 9, 10, 11] });
    return { node, update: (texts) => texts.forEach((text, i) => say(cells[i], text)) };
  });
  const times = (histogram) => `p50 ${seconds(histogram.quantile(0.5))}, p99 ${seconds(histogram.quantile(0.99))}, mean ${seconds(histogram.mean)}`;
  // A quantile between two whole numbers would be no size of a batch.
  const sizes = (histogram) => `${short(histogram.count)} batches, mean ${short(histogram.mean)}`;
  const distributions = [
    ["request_seconds", bars("Time of a request", "Requests of the last 10 seconds by their time", seconds, times)],
    ["queue_seconds", bars("Time in the queue", "Requests of the last 10 seconds by their time in the queue", seconds, times)],
    ["batch_requests", bars("Requests of a batch", "Batches of the last 10 seconds by their requests", short, sizes)],
    ["batch_rows", bars("Rows of a batch", "Batches of the last 10 seconds by their rows", short, sizes)],
  ];
  figures.append(...distributions.map(([, figure]) => figure.node));
  return (scrapes) => {
    rows.update(pairs(scrapes).map(([codebook, operation]) => [`${operation} ${codebook}`, texts(scrapes, codebook, operation)]));
    for (const [name, figure] of distributions) figure.update(scrapes.histogram(name));
  };
}

/** Return what had requests since the start of the server: [codebook, operation]. */
function pairs(scrapes) {
  return scrapes.labels("requests_total", "codebook").flatMap((codebook) =>
    scrapes.labels("requests_total", "operation", { codebook })
      .filter((operation) => scrapes.total("requests_total", { codebook, operation }) > 0)
      .map((operation) => [codebook, operation]));
}

function texts(scrapes, codebook, operation) {
  const where = { codebook, operation };
  const times = ["request_seconds", "queue_seconds", "compute_seconds"].flatMap((name) => {
    const histogram = scrapes.histogram(name, where);
    return [seconds(histogram.quantile(0.5)), seconds(histogram.quantile(0.99))];
  });
  return [
    codebook || "none (not found)", operation, short(scrapes.rate("requests_total", where)), short(scrapes.rate("tokens_total", where)),
    ...times, short(scrapes.histogram("batch_requests", where).mean), short(scrapes.histogram("batch_rows", where).mean),
  ];
}
