// The scrapes of the last seconds and the curves of the last minutes.

import { Scrapes } from "./scrapes.js";

const WINDOW_S = 10;
export const CURVE_S = 300;

/** Remembers scrapes as long as rates need them, and one point of every curve for each. */
export class Timeline {
  constructor() {
    this.scrapes = [];
    this.points = [];
  }

  /**
   * Add a scrape.
   * @param {number} time in seconds, of a clock that never goes back
   * @param {Map} samples
   * @returns {Scrapes}
   */
  add(time, samples) {
    const started = (of) => of.get("vqserve_start_time_seconds")?.values().next().value?.value;
    if (this.scrapes.length && started(this.scrapes.at(-1).samples) !== started(samples)) {
      // Another run of the server: its counters begin at zero.
      this.scrapes = [];
    }
    this.scrapes.push({ time, samples });
    while (this.scrapes.length > 2 && this.scrapes[1].time <= time - WINDOW_S) this.scrapes.shift();
    // After a pause the oldest scrape is long ago: rates begin again.
    const [oldest] = this.scrapes;
    if (time - oldest.time > 2 * WINDOW_S) this.scrapes = [{ time, samples }];
    const before = this.scrapes.length > 1 ? this.scrapes[0] : null;
    return new Scrapes(samples, before?.samples ?? null, before === null ? 0 : time - before.time);
  }

  /** Add one point of every curve: an object of numbers, null where there is none. */
  draw(time, point) {
    this.points.push({ time, ...point });
    while (this.points[0].time < time - CURVE_S) this.points.shift();
  }
}
