// Figures in words. A figure that is not known is a dash, never 0.

export const NONE = "–";
const known = (value) => typeof value === "number" && Number.isFinite(value);

export const whole = (value) => known(value) ? Math.round(value).toLocaleString("en") : NONE;
export const fixed = (value, digits = 2) => known(value) ? value.toFixed(digits) : NONE;
export const percent = (share) => known(share) ? `${Math.round(100 * share)} %` : NONE;
export const rate = (value, of) => known(value) ? `${value >= 10 ? value.toFixed(0) : value.toFixed(2)} ${of}/s` : NONE;
export const clock = (time) => new Date(1000 * time).toLocaleTimeString("en-GB");

export function short(value) {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return String(+value.toPrecision(4));
}

export function bytes(value) {
  if (!known(value)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${unit ? value.toFixed(1) : value} ${units[unit]}`;
}

export function duration(seconds) {
  if (!known(seconds)) return NONE;
  if (seconds < 1) return `${seconds.toFixed(2)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}
