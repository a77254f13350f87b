// Numbers as people read them: three significant digits and a unit. A dash is what is not known.

export const NONE = "–";
const THREE = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const PERCENT = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });
const SHARE = new Intl.NumberFormat("en", { style: "percent", maximumSignificantDigits: 3 });

const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

function scaled(value, steps) {
  // 999.7 k would be written as 1,000 k.
  const [size, unit] = steps.find(([size]) => Math.abs(value) >= size * 0.9995) ?? steps.at(-1);
  return `${THREE.format(value / size)}${unit}`;
}

/** Any number, with a letter for thousands from ten thousand on. */
export function short(value) {
  if (!known(value)) return NONE;
  if (Math.abs(value) >= 1000 && Math.abs(value) < 9999.5) return WHOLE.format(value);
  return scaled(value, [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"], [1, ""]]);
}

export const whole = (value) => (known(value) ? WHOLE.format(value) : NONE);

export const percent = (value) => (known(value) ? PERCENT.format(value) : NONE);

/** A part of a whole that may be very small. */
export const share = (value) => (known(value) ? SHARE.format(value) : NONE);

export const bytes = (value) =>
  known(value) ? scaled(value, [[2 ** 40, " TiB"], [2 ** 30, " GiB"], [2 ** 20, " MiB"], [2 ** 10, " KiB"], [1, " B"]]) : NONE;

/** A short time in its own unit. */
export const seconds = (value) =>
  known(value) ? scaled(value === 0 ? 0 : value * 1e6, [[1e6, " s"], [1e3, " ms"], [1, " µs"]]) : NONE;

/** A long time in its two largest units. */
export function duration(value) {
  if (!known(value)) return NONE;
  const minutes = Math.floor(value / 60);
  const hours = Math.floor(minutes / 60);
  const days = Math.floor(hours / 24);
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min` : `${Math.floor(value)} s`;
}

export const clock = (milliseconds) => new Date(milliseconds).toLocaleTimeString("en-GB");

export const day = (unixSeconds) => new Date(unixSeconds * 1000).toISOString().slice(0, 10);

/** A count and its noun: "1 row", "2 rows". */
export const counted = (value, noun) => `${short(value)} ${noun}${value === 1 ? "" : "s"}`;
