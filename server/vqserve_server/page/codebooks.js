// The table of codebooks: what they are, their digests to copy, and how well they fit what is asked of them.

import { element, Keyed, row, say, set } from "./dom.js";
import { NONE, percent, short, whole } from "./format.js";

/** From this drift on, in bits of at most one, usage is another than the file's; the alert rule has the same limit. */
export const DRIFT_LIMIT = 0.1;
/** From this on, the error is notably larger than the file's; the alert rule has the same limit. */
export const ERROR_LIMIT = 1.5;

/** Fill the section; its function shows two scrapes and the health of all codebooks by name. `tell` says a sentence. */
export function codebooks(body, tell) {
  const rows = new Keyed(body, (name) => {
    const { node, cells } = row(9, { numbers: [2, 3, 5, 6, 7, 8] });
    const link = element("a", {}, name);
    cells[0].append(link);
    const digest = digestCell(cells[4], name, tell);
    return {
      node,
      update({ anchor, texts, hash, drifted, wrong }) {
        set(link, "href", anchor);
        texts.forEach(([i, text]) => say(cells[i], text));
        digest(hash);
        set(cells[7], "data-bad", drifted ? "yes" : null);
        set(cells[8], "data-bad", wrong ? "yes" : null);
      },
    };
  });
  return (infos, health) => rows.update(infos.map((info) => [info.codebook, about(info, health.get(info.codebook))]));
}

/** Return the labels of all codebooks that are served now, in the order of their names. */
export const served = (scrapes) =>
  scrapes.samples("codebook_info").filter(({ value }) => value > 0).map(({ labels }) => labels).sort((a, b) => (a.codebook < b.codebook ? -1 : 1));

/** Return the anchor of a codebook's pictures: names may hold any character. */
export const anchorOf = (name) => `usage-${encodeURIComponent(name)}`;

/** Return the greatest drift of a codebook's stages, or null if its file has no statistics. */
export function drift(health) {
  const known = health?.stages.map((stage) => stage.drift_bits).filter((bits) => bits !== null) ?? [];
  return known.length ? Math.max(...known) : null;
}

/** Return the share of a stage's codes that are used; of very many codes, neighbours are counted as one. */
export const usedShare = ({ used, dead }) => used / (used + dead);

function about(info, health) {
  const sampled = health?.stages[0]?.sampled_rows ?? null;
  const shares = sampled ? health.stages.map(usedShare) : [];
  const bits = drift(health);
  const ratio = health?.error_ratio ?? null;
  return {
    anchor: `#${anchorOf(info.codebook)}`,
    hash: info.digest,
    texts: [
      [1, info.kind], [2, whole(Number(info.num_codes))], [3, info.code_dim ?? NONE], [5, short(sampled)],
      [6, shares.length ? percent(Math.min(...shares)) : NONE], [7, bits === null ? NONE : `${bits.toFixed(3)} bit`],
      [8, ratio === null ? NONE : `${ratio.toFixed(2)} ×`],
    ],
    drifted: bits !== null && bits >= DRIFT_LIMIT,
    wrong: ratio !== null && ratio >= ERROR_LIMIT,
  };
}

function digestCell(cell, name, tell) {
  const code = element("code", { class: "digest" });
  const button = element("button", { type: "button", class: "copy", "aria-label": `Copy the digest of ${name}` }, "Copy");
  cell.append(element("span", { class: "copied" }, code, button));
  let digest = "";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(digest);
      tell(`The digest of ${name} is copied.`);
      say(button, "Copied");
    } catch {
      // Browsers give no clipboard to plain HTTP beyond loopback.
      getSelection().selectAllChildren(code);
      tell(`The digest of ${name} is selected.`);
      say(button, "Selected");
    }
    setTimeout(() => say(button, "Copy"), 2000);
  });
  return (hash) => {
    digest = hash;
    say(code, hash);
    set(code, "title", hash);
  };
}
