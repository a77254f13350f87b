// Curves of the last minutes, and bars of a histogram, each with its text alternative.

import { element, say, set, svg } from "./dom.js";
import { CURVE_S } from "./timeline.js";

const WIDTH = 300;
const HEIGHT = 60;
// Scrapes further apart than this are not joined: the page was hidden or the server did not answer.
const GAP_S = 15;
// One bar is not as wide as the picture.
const FEWEST_BARS = 5;

/** Make a picture of one or more curves: `lines` are {key, label, class}, `unit` writes a number, `top` ends the scale if it is fixed. */
export function curves(subject, lines, unit, top = null) {
  const paths = lines.map((line) => svg("path", { class: `curve ${line.class}` }));
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", class: "curves" },
    svg("path", { class: "grid", d: `M0 ${HEIGHT}H${WIDTH}M0 ${HEIGHT / 2}H${WIDTH}M0 1H${WIDTH}` }), ...paths);
  const scale = element("span", { class: "top-of-scale", "aria-hidden": "true" });
  const node = element("div", { class: "chart" }, scale, picture);
  return {
    node,
    update(points, now) {
      const values = points.flatMap((point) => lines.map(({ key }) => point[key])).filter((value) => value !== null);
      const most = top ?? nice(Math.max(0, ...values));
      say(scale, values.length ? unit(most) : "");
      lines.forEach(({ key }, i) => set(paths[i], "d", pathOf(points, key, now, most)));
      set(picture, "aria-label", `${subject} in the last 5 minutes: ${lines.map((line) => course(line, points, unit)).join("; ")}`);
    },
  };
}

function pathOf(points, key, now, most) {
  let path = "";
  let last = -Infinity;
  for (const point of points) {
    if (point[key] === null) continue;
    const x = WIDTH * (1 - (now - point.time) / CURVE_S);
    const y = HEIGHT - (point[key] / most) * (HEIGHT - 1);
    path += `${point.time - last > GAP_S ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}`;
    last = point.time;
  }
  return path;
}

function course({ key, label }, points, unit) {
  const values = points.map((point) => point[key]).filter((value) => value !== null);
  const name = label ? `${label} ` : "";
  if (!values.length) return `${name}not known yet`;
  return `${name}now ${unit(values.at(-1))}, least ${unit(Math.min(...values))}, most ${unit(Math.max(...values))}`;
}

/** Return the next of 1, 2, 5, 10, 20 ... above a value, so that the scale seldom changes. */
export function nice(value) {
  if (value <= 0) return 1;
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * size).find((step) => step >= value);
}

/** Make a picture of a histogram's buckets: `unit` writes their bounds, `told` what is said of all below. */
export function bars(heading, subject, unit, told) {
  const picture = svg("svg", { preserveAspectRatio: "none", role: "img", class: "histogram" });
  const from = element("span");
  const to = element("span");
  const note = element("span", { class: "note" });
  const ends = element("div", { class: "ends", "aria-hidden": "true" }, from, to);
  const plot = element("div", { class: "plot" }, picture, ends);
  const node = element("figure", {}, element("h3", {}, heading), plot, element("figcaption", {}, note));
  return {
    node,
    update(histogram) {
      const parts = trimmed(histogram.parts());
      const most = Math.max(1, ...parts.map(([, , count]) => count));
      const room = Math.max(FEWEST_BARS, parts.length);
      plot.style.maxInlineSize = `${room * 2.6}rem`;
      ends.style.inlineSize = `${(100 * parts.length) / room}%`;
      set(picture, "viewBox", `0 0 ${room} 100`);
      picture.replaceChildren(...parts.map(([, , count], i) =>
        svg("rect", { x: i + 0.08, width: 0.84, y: 100 - (96 * count) / most, height: (96 * count) / most })));
      say(from, parts.length ? `over ${unit(parts[0][0])}` : "");
      say(to, parts.length ? upTo(parts.at(-1), unit) : "");
      say(note, histogram.count ? told(histogram) : "none in the last 10 seconds");
      set(picture, "aria-label", parts.length
        ? `${subject}: ${parts.filter(([, , count]) => count).map((part) => `${upTo(part, unit)}: ${part[2]}`).join("; ")}`
        : `${subject}: none in the last 10 seconds`);
    },
  };
}

const upTo = ([lower, upper], unit) => (upper === Infinity ? `above ${unit(lower)}` : `up to ${unit(upper)}`);

/** Leave out the empty buckets at both ends. */
function trimmed(parts) {
  const filled = parts.map(([, , count]) => count > 0);
  return parts.slice(Math.max(0, filled.indexOf(true)), filled.lastIndexOf(true) + 1);
}
