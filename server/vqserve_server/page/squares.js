// Pictures of shares as squares: one path for each colour, so that a picture of a thousand codes is a handful of elements.

import { set, svg } from "./dom.js";

/** Colours of usage, from the greatest share down; a share is relative to that of equal use. */
export const USAGE = [
  { class: "u5", text: "over 4 ×", holds: (share) => share > 4 },
  { class: "u4", text: "2 to 4 ×", holds: (share) => share > 2 },
  { class: "u3", text: "1 to 2 ×", holds: (share) => share > 1 },
  { class: "u2", text: "¼ to 1 ×", holds: (share) => share > 0.25 },
  { class: "u1", text: "below ¼ ×", holds: (share) => share > 0 },
  { class: "u0", text: "not used", holds: () => true },
];

/** Colours of a change: the live share over the file's. */
export const CHANGE = [
  { class: "c0", text: "no longer used", holds: (ratio) => ratio === 0 },
  { class: "c1", text: "below ¼ ×", holds: (ratio) => ratio < 0.25 },
  { class: "c2", text: "¼ to ½ ×", holds: (ratio) => ratio < 0.5 },
  { class: "c3", text: "about as often", holds: (ratio) => ratio <= 2 },
  { class: "c4", text: "2 to 4 ×", holds: (ratio) => ratio <= 4 },
  { class: "c5", text: "over 4 ×", holds: () => true },
];

// The space between squares, in their sizes.
const SPACE = 0.12;

/** Make a picture of squares in rows; its function shows one value a square with the colours `scale`. */
export function squares(scale) {
  const paths = scale.map((colour) => svg("path", { class: colour.class }));
  const node = svg("svg", { role: "img", class: "squares" }, ...paths);
  return {
    node,
    update(values, label) {
      const columns = columnsOf(values.length);
      const drawn = scale.map(() => "");
      values.forEach((value, i) => {
        const colour = scale.findIndex(({ holds }) => holds(value));
        drawn[colour] += square(i % columns, Math.floor(i / columns), scale[colour].class.endsWith("0"));
      });
      drawn.forEach((path, i) => set(paths[i], "d", path));
      set(node, "viewBox", `0 0 ${columns} ${Math.max(1, Math.ceil(values.length / columns))}`);
      set(node, "aria-label", label);
    },
  };
}

/** A square, or a cross in its place, which needs no colour to be told from one. */
function square(x, y, crossed) {
  if (crossed) return `M${(x + 0.3).toFixed(2)} ${(y + 0.3).toFixed(2)}l.4 .4m0-.4l-.4 .4`;
  const size = (1 - SPACE).toFixed(2);
  return `M${x + SPACE / 2} ${y + SPACE / 2}h${size}v${size}h-${size}z`;
}

/** As square as a power of two lets it be, so that rows are the codebook's own. */
export const columnsOf = (number) => Math.min(64, 2 ** Math.ceil(Math.log2(Math.max(1, number)) / 2));
