// For each codebook: which codes the sampled traffic uses, beside the statistics kept in its file.

import { anchorOf, DRIFT_LIMIT, ERROR_LIMIT, usedShare } from "./codebooks.js";
import { element, Keyed, say, set, svg } from "./dom.js";
import { counted, NONE, percent, share, short, whole } from "./format.js";
import { CHANGE, squares, USAGE } from "./squares.js";

// As many codebooks are open at first.
const OPEN = 3;
// A code is missed only if the file's statistics let us expect it this often.
const EXPECTED = 5;
// Added to both counts of a group, so that a few samples make no great change.
const PRIOR = 4;
// Rows of the table of the most used codes.
const MOST_USED = 8;

/** Fill the section; its function shows the health of codebooks in order. */
export function usage(parent) {
  let opened = 0;
  const all = new Keyed(parent, (name) => codebook(name, opened++ < OPEN));
  return (list) => all.update(list.map((health) => [health.name, health]).sort(([a], [b]) => (a < b ? -1 : 1)));
}

function codebook(name, open) {
  const anchor = anchorOf(name);
  const body = element("div", { id: `${anchor}-body` });
  const button = element("button", { type: "button", class: "disclosure", "aria-controls": body.id }, name);
  const facts = element("p", { class: "facts" });
  const node = element("section", { id: anchor, class: "codebook", "aria-label": `Usage of ${name}` },
    element("div", { class: "heading" }, element("h3", {}, button), facts), body);
  const list = element("div", { class: "stages" });
  const usageKeys = keys("Live traffic and the file: how often a code is chosen, to equal use", USAGE);
  const changeKeys = keys("Change: live traffic to the file", CHANGE);
  body.append(list, usageKeys, changeKeys);
  const stages = new Keyed(list, (number) => stage(name, number));
  const toggle = (shown) => {
    set(button, "aria-expanded", String(shown));
    body.hidden = !shown;
  };
  toggle(open);
  let latest = null;
  const draw = () => {
    // What is not shown is not drawn.
    if (latest === null || body.hidden) return;
    changeKeys.hidden = latest.stages.every(({ reference }) => reference === null);
    stages.update(latest.stages.map((one, i) => [String(i), { ...one, of: latest.stages.length }]));
  };
  button.addEventListener("click", () => {
    toggle(body.hidden);
    draw();
  });
  return {
    node,
    update(health) {
      latest = health;
      const error = health.error === null ? "" : ` · error ${short(health.error)} per dimension`;
      const ratio = health.error_ratio === null ? "" : `, ${health.error_ratio.toFixed(2)} × the file's`;
      say(facts, `${counted(health.stages[0]?.sampled_rows ?? 0, "sampled row")}${error}${ratio}`);
      set(facts, "data-bad", health.error_ratio >= ERROR_LIMIT ? "yes" : null);
      draw();
    },
  };
}

function stage(name, number) {
  const heading = element("h4");
  const figures = ["Used", "Not used", "Perplexity", "Drift"].map((term) => ({ term: element("dt", {}, term), value: element("dd") }));
  const live = picture("Live traffic", USAGE);
  const file = picture("In the file", USAGE);
  const change = picture("Change", CHANGE);
  const pictures = element("div", { class: "pictures" }, live.node, file.node, change.node);
  const none = element("p", { class: "hint" }, "The file has no statistics to compare with: ", element("code", {}, "vqserved inspect --save-stats"), " adds them.");
  const rows = new Keyed(element("tbody"), () => {
    const cells = [element("th", { scope: "row" }), element("td", { class: "n" }), element("td", { class: "n" })];
    return { node: element("tr", {}, ...cells), update: (texts) => texts.forEach((text, i) => say(cells[i], text)) };
  });
  const caption = element("caption");
  const table = element("table", {}, caption, element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Codes"),
    element("th", { scope: "col", class: "n" }, "Live"), element("th", { scope: "col", class: "n" }, "File"))), rows.parent);
  const details = element("details", {}, element("summary", {}, "In numbers"), table);
  const facts = element("div", {}, heading, element("dl", {}, ...figures.map(({ term, value }) => element("div", {}, term, value))), none, details);
  const node = element("div", { class: "stage" }, facts, pictures);
  return {
    node,
    update(data) {
      const title = data.of > 1 ? `Stage ${Number(number) + 1} of ${data.of}` : "All codes";
      const subject = data.of > 1 ? `stage ${Number(number) + 1} of ${name}` : name;
      const size = Math.ceil(data.codes / Math.max(1, data.usage.length));
      say(heading, size > 1 ? `${title}, ${size} in a square` : title);
      const counters = whole(data.used + data.dead);
      const noun = data.codes_per_group > 1 ? `groups of ${data.codes_per_group} codes` : "codes";
      const perplexity = data.sampled_rows ? `${short(data.perplexity)} of ${counters}` : NONE;
      const used = data.sampled_rows ? `${percent(usedShare(data))}, ${whole(data.used)} ${noun}` : NONE;
      const drift = data.drift_bits === null ? NONE : `${data.drift_bits.toFixed(3)} bit`;
      [used, data.sampled_rows ? whole(data.dead) : NONE, perplexity, drift].forEach((text, i) => say(figures[i].value, text));
      set(figures[3].value, "data-bad", data.drift_bits >= DRIFT_LIMIT ? "yes" : null);
      set(node, "data-many", data.of > 1 ? "yes" : null);
      const compared = data.reference !== null;
      for (const one of [file, change]) one.node.hidden = !compared;
      none.hidden = compared;
      live.update(relative(data.usage), `Live usage of ${subject}: ${data.sampled_rows ? `${used} of ${counters} used, ${whole(data.dead)} not used, perplexity ${short(data.perplexity)}` : "no rows sampled yet"}`);
      if (compared) {
        file.update(relative(data.reference), `Usage of ${subject} in the file's statistics: ${summary(data.reference)}`);
        const ratios = changes(data);
        change.update(ratios, `Change of the usage of ${subject}: ${ratios.filter((ratio) => ratio === 0).length} squares no longer used, ${ratios.filter((ratio) => ratio > 2).length} more than twice as often, drift ${drift}`);
      }
      say(caption, `The most used codes of ${subject}`);
      rows.update(mostUsed(data, size));
    },
  };
}

function picture(title, scale) {
  const drawn = squares(scale);
  return { node: element("figure", {}, element("figcaption", {}, title), drawn.node), update: drawn.update };
}

function keys(title, scale) {
  const items = scale.map((colour) => {
    const sample = svg("svg", { viewBox: "0 0 1 1", class: "squares key", "aria-hidden": "true" },
      svg("path", { class: colour.class, d: colour.class.endsWith("0") ? "M.25 .25l.5 .5m0-.5l-.5 .5" : "M0 0h1v1h-1z" }));
    return element("li", {}, sample, colour.text);
  });
  return element("div", { class: "keys" }, element("p", {}, `${title}:`), element("ul", { "aria-label": title }, ...items));
}

/** Shares as multiples of what equal use would give. */
const relative = (shares) => shares.map((each) => each * shares.length);

const summary = (shares) => `${shares.filter((each) => each > 0).length} of ${shares.length} squares used`;

/** Return live share over the file's for each group; 0 if the group was expected and never chosen. */
function changes({ usage, reference, sampled_rows: rows }) {
  return usage.map((live, i) => {
    const expected = reference[i] * rows;
    if (live === 0 && expected >= EXPECTED) return 0;
    return (live * rows + PRIOR) / (expected + PRIOR);
  });
}

function mostUsed({ usage, reference, codes }, size) {
  return usage.map((live, i) => [live, i]).filter(([live]) => live > 0).sort(([a], [b]) => b - a).slice(0, MOST_USED)
    .map(([live, i]) => {
      const last = Math.min(codes, (i + 1) * size) - 1;
      const range = size > 1 ? `${i * size} to ${last}` : String(i);
      return [range, [range, share(live), reference === null ? NONE : share(reference[i])]];
    });
}
