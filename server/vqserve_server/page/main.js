// Asks the server every two seconds and shows what it says; not while the page is hidden or its updates are paused.

import { codebooks, served } from "./codebooks.js";
import { element, say, set } from "./dom.js";
import { parse } from "./exposition.js";
import { failures } from "./failures.js";
import { clock, duration } from "./format.js";
import { overview, pointOf } from "./overview.js";
import { Timeline } from "./timeline.js";
import { traffic } from "./traffic.js";
import { usage } from "./usage.js";
import { workers } from "./workers.js";

const EVERY_MS = 2000;
const ANSWER_MS = 5000;
const SQUARES = "Each square is a code, or a group of neighbouring codes, in the order of the codebook. Its colour tells how often the sampled traffic chose it.";

const at = (id) => document.getElementById(id);
const tell = (sentence) => say(at("said"), sentence);
const timeline = new Timeline();
const show = {
  overview: overview(at("tiles")),
  traffic: traffic(at("traffic-rows"), at("distributions")),
  codebooks: codebooks(at("codebook-rows"), tell),
  usage: usage(at("usage-list")),
  workers: workers(at("worker-rows")),
  failures: failures(at("failure-rows"), at("no-failures"), at("certificates"), at("certificates-heading")),
};

let timer = null;
let paused = false;
let asking = false;
let answered = null;

async function get(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(ANSWER_MS), cache: "no-store" });
  // A server that samples no traffic has no /codebooks.json.
  if (answer.status === 404) return null;
  if (!answer.ok) throw new Error(`${path} answers with the status ${answer.status}`);
  return answer;
}

async function ask() {
  const [samples, health] = await Promise.all([
    get("metrics").then((answer) => answer?.text() ?? "").then(parse),
    get("codebooks.json").then((answer) => answer?.json() ?? []),
  ]);
  return { samples, health };
}

async function poll() {
  // An answer that overtook another one would make counters go back.
  if (asking) return;
  asking = true;
  try {
    const { samples, health } = await ask();
    answered = Date.now();
    draw(timeline.add(performance.now() / 1000, samples), health);
    noAnswer(null);
  } catch (error) {
    noAnswer(error);
  }
  asking = false;
  plan();
}

function plan() {
  clearTimeout(timer);
  if (!paused && !document.hidden) timer = setTimeout(poll, EVERY_MS);
}

function draw(scrapes, health) {
  const now = performance.now() / 1000;
  const point = pointOf(scrapes);
  timeline.draw(now, point);
  state(scrapes);
  show.overview(point, timeline.points, now);
  show.traffic(scrapes);
  show.codebooks(served(scrapes), new Map(health.map((one) => [one.name, one])));
  show.usage(health);
  say(at("usage-hint"), health.length ? SQUARES : "The server samples no traffic.");
  show.workers(scrapes);
  show.failures(scrapes, answered / 1000);
  about(scrapes);
  say(at("updated"), `Updated ${clock(answered)}`);
}

function state(scrapes) {
  const all = scrapes.samples("serving");
  const serving = all.filter(({ value }) => value === 1).length;
  const wanted = scrapes.value("workers") ?? all.length;
  if (serving === 0) badge("bad", "Not serving");
  else if (serving < wanted) badge("near", `Serving with ${serving} of ${wanted} workers`);
  else badge("good", "Serving");
}

function badge(kind, text) {
  set(at("state"), "data-state", kind);
  say(at("state-text"), text);
  document.title = `${text} · vqserve ${location.host}`;
}

function about(scrapes) {
  const build = scrapes.samples("build_info")[0]?.labels;
  const started = scrapes.value("start_time_seconds");
  const uptime = started === null ? "" : `, up for ${duration(answered / 1000 - started)}`;
  say(at("about"), `Version ${build?.version ?? "unknown"}${uptime}`);
  say(at("versions"), build ? `Python ${build.python}, torch ${build.torch}, grpcio ${build.grpcio}.` : "");
}

/** Tell that the server does not answer, once; null: it does. */
function noAnswer(error) {
  set(document.body, "data-stale", error === null ? null : "yes");
  if (error === null) {
    at("alert").replaceChildren();
    return;
  }
  badge("bad", "No answer");
  const shown = answered === null ? "Nothing was received yet." : `What is shown is of ${clock(answered)}.`;
  const reason = error instanceof TypeError || error.name === "TimeoutError" ? "The server does not answer." : `The server's answer cannot be shown: ${error.message}.`;
  const text = `${reason} ${shown} The page goes on asking every two seconds.`;
  if (at("alert").textContent !== text) at("alert").replaceChildren(element("p", { class: "notice bad" }, text));
}

at("pause").addEventListener("click", () => {
  paused = !paused;
  set(at("pause"), "aria-pressed", String(paused));
  if (paused) plan();
  else poll();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden || paused) plan();
  else poll();
});
say(at("host"), location.host);
poll();
