// What the last scrapes say: values now, and what was added to counters and histograms since a moment ago.

const PREFIX = "vqserve_";

const matches = (labels, where) => Object.entries(where).every(([name, value]) => labels[name] === value);

/** Two scrapes, some seconds apart, of one server. Names are without "vqserve_"; `where` is the labels that count. */
export class Scrapes {
  /**
   * @param {Map} now parsed exposition
   * @param {Map|null} before an older one of the same run of the server, or null
   * @param {number} seconds between the two
   */
  constructor(now, before, seconds) {
    this.now = now;
    this.before = before;
    this.seconds = seconds;
  }

  /** Return all samples of a metric. */
  samples(name, where = {}) {
    return [...(this.now.get(PREFIX + name)?.values() ?? [])].filter(({ labels }) => matches(labels, where));
  }

  /** Return a gauge, or null if there is none. */
  value(name, where = {}) {
    return this.samples(name, where)[0]?.value ?? null;
  }

  /** Return the sum of samples, or null if there are none. */
  total(name, where = {}) {
    const samples = this.samples(name, where);
    return samples.length ? samples.reduce((sum, { value }) => sum + value, 0) : null;
  }

  /** Return the different values of a label, in order. */
  labels(name, label, where = {}) {
    return [...new Set(this.samples(name, where).map(({ labels }) => labels[label]))].sort();
  }

  /** Return what was added to a counter since the older scrape, or null if there is none. */
  added(name, where = {}) {
    if (this.before === null) return null;
    const old = this.before.get(PREFIX + name);
    let sum = 0;
    for (const [written, { labels, value }] of this.now.get(PREFIX + name) ?? []) {
      if (!matches(labels, where)) continue;
      const before = old?.get(written)?.value ?? 0;
      // A counter below its old value has begun again.
      sum += value < before ? value : value - before;
    }
    return sum;
  }

  /** Return what is added to a counter a second, or null. */
  rate(name, where = {}) {
    const added = this.added(name, where);
    return added === null ? null : added / this.seconds;
  }

  /** Return what a histogram has seen since the older scrape. */
  histogram(name, where = {}) {
    const bounds = this.labels(`${name}_bucket`, "le", where).sort((a, b) => limit(a) - limit(b));
    const buckets = bounds.map((le) => [limit(le), this.added(`${name}_bucket`, { ...where, le }) ?? 0]);
    return new Histogram(buckets, this.added(`${name}_sum`, where) ?? 0);
  }
}

const limit = (le) => (le === "+Inf" ? Infinity : Number(le));

/** Counts of observations in buckets. */
export class Histogram {
  /**
   * @param {[number, number][]} buckets upper bounds, rising, the last one infinite, and how many observations are not above
   * @param {number} sum of all observations
   */
  constructor(buckets, sum) {
    this.buckets = buckets;
    this.sum = sum;
    this.count = buckets.at(-1)?.[1] ?? 0;
  }

  get mean() {
    return this.count ? this.sum / this.count : null;
  }

  /** Return the quantile q as Prometheus's histogram_quantile does: observations lie evenly within a bucket; null if there are none. */
  quantile(q) {
    if (!this.count) return null;
    const rank = q * this.count;
    let lower = 0;
    let below = 0;
    for (const [upper, count] of this.buckets) {
      if (count >= rank && count > below) {
        return upper === Infinity ? lower : lower + ((upper - lower) * (rank - below)) / (count - below);
      }
      lower = upper;
      below = count;
    }
    return lower;
  }

  /** Return how many observations each bucket has alone: [lower, upper, count]. */
  parts() {
    return this.buckets.map(([upper, count], i) => {
      const [lower, below] = i ? this.buckets[i - 1] : [0, 0];
      return [lower, upper, count - below];
    });
  }
}
