// Line charts and bars as SVG, drawn for the width that they have. Pointer or arrow keys read a point.

import { h, svg } from "./dom.js";
import { short } from "./format.js";

const HEIGHT = 200, LEFT = 44, RIGHT = 12, TOP = 10, BOTTOM = 26;

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((one) => one * power).find((one) => one >= raw);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.max(0, Math.floor(high / step + 1e-9) - first + 1) }, (_, place) => (first + place) * step);
}

function extent(values) {
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) { low -= Math.abs(low) / 10 || 1; high += Math.abs(high) / 10 || 1; }
  const room = (high - low) * 0.06;
  return [low - room, high + room];
}

function card(title, hint, legend, body, readout) {
  return h("figure", { class: "card" }, h("figcaption", {}, h("strong", {}, title), h("span", { class: "dim" }, hint), legend), body, readout ?? null);
}

// series: [{name, points: [[x, y], ...], faint, dots}]; `hint`: what the axes are.
export function lineChart(title, hint, allSeries, width, xName = "step") {
  const series = allSeries.map((one, place) => ({ ...one, place, points: one.points.filter(([, y]) => Number.isFinite(y)) })).filter((one) => one.points.length);
  if (!series.length) return card(title, hint, null, h("p", { class: "empty" }, "Nothing yet."));
  const first = Math.min(...series.map((one) => one.points[0][0])), end = Math.max(...series.map((one) => one.points.at(-1)[0]));
  const [x0, x1] = first < end ? [first, end] : extent([first]);
  const [y0, y1] = extent(series.flatMap((one) => one.points.map(([, y]) => y)));
  const x = (value) => LEFT + (value - x0) / (x1 - x0 || 1) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, x1: -9, x2: -9 });
  const legend = h("ul", { class: "legend" }, series.map((one) => h("li", { class: `c${one.place % 6}${one.faint ? " faint" : ""}` }, one.name)));
  const last = series.map((one) => `${one.name} ${short(one.points.at(-1)[1])} at ${xName} ${short(one.points.at(-1)[0])}`).join("; ");
  const readout = h("output", { class: "readout dim" }, last);
  const xs = [...new Set(series.flatMap((one) => one.points.map(([value]) => value)))].sort((a, b) => a - b);
  let chosen = xs.length - 1;
  const choose = (place) => {
    chosen = Math.max(0, Math.min(xs.length - 1, place));
    cursor.setAttribute("x1", x(xs[chosen])); cursor.setAttribute("x2", x(xs[chosen]));
    const told = series.map((one) => [one.name, one.points.find(([value]) => value === xs[chosen])]).filter(([, point]) => point);
    readout.textContent = `${xName} ${short(xs[chosen])}: ${told.map(([name, point]) => `${name} ${short(point[1])}`).join(", ")}`;
  };
  const drawing = svg("svg", {
    viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", tabindex: 0, "aria-label": `${title}: ${last}. Arrow keys read points.`,
    onpointermove: (event) => {
      const value = x0 + (event.offsetX - LEFT) / (width - LEFT - RIGHT) * (x1 - x0);
      choose(xs.reduce((best, one, place) => Math.abs(one - value) < Math.abs(xs[best] - value) ? place : best, 0));
    },
    onkeydown: (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -xs.length, End: xs.length }[event.key];
      if (move) { event.preventDefault(); choose(chosen + move); }
    },
  },
  ticks(y0, y1, 4).map((value) => [svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }), svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, short(value))]),
  ticks(x0, x1, width / 90).map((value) => svg("text", { x: x(value), y: HEIGHT - 8, "text-anchor": "middle" }, short(value))),
  series.map((one) => [
    svg("polyline", { class: `line c${one.place % 6}${one.faint ? " faint" : ""}`, points: one.points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ") }),
    one.dots || one.points.length === 1 ? one.points.map(([a, b]) => svg("circle", { class: `dot c${one.place % 6}`, cx: x(a), cy: y(b), r: 3.2 })) : [],
  ]), cursor);
  return card(title, hint, series.length > 1 ? legend : null, drawing, readout);
}

// bars: [{name, values: [share, ...]}]: groups by position.
export function positionBars(title, hint, bars, width) {
  const positions = Math.max(0, ...bars.map((one) => one.values.length));
  if (!positions) return card(title, hint, null, h("p", { class: "empty" }, "No checkpoint was measured yet."));
  const group = (width - LEFT - RIGHT) / positions, bar = Math.min(26, group * 0.8 / bars.length);
  const y = (share) => HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM);
  const told = bars.map((one) => `${one.name}: ${one.values.map((share) => `${Math.round(100 * share)} %`).join(", ")}`).join("; ");
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": `${title}. ${told}` },
    [0, 0.5, 1].map((share) => [svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(share), y2: y(share) }), svg("text", { x: LEFT - 6, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`)]),
    Array.from({ length: positions }, (_, place) => {
      const middle = LEFT + group * (place + 0.5);
      return [svg("text", { x: middle, y: HEIGHT - 8, "text-anchor": "middle" }, String(place + 1)), bars.map((one, which) => {
        const share = one.values[place] ?? 0, left = middle + (which - bars.length / 2) * bar;
        return svg("rect", { class: `bar c${bars.length > 1 && !which ? "grey" : 0}`, x: left + 1, width: bar - 2, y: y(share), height: Math.max(1, y(0) - y(share)), rx: 2 });
      })];
    }));
  const legend = h("ul", { class: "legend" }, bars.map((one, which) => h("li", { class: `c${bars.length > 1 && !which ? "grey" : 0}` }, one.name)));
  return card(title, hint, legend, drawing, h("output", { class: "readout dim" }, told));
}
