// The life of every process: bars, with kills and takeovers, and the same as a list of what happened.

import { h, show, svg } from "./dom.js";
import { clock, duration } from "./format.js";

const ROW = 30, TOP = 8, BOTTOM = 24;
const LOUD = new Set(["taken_over", "group_failed", "step_failed", "quarantined", "checkpoint_damaged", "fall_back", "rolled_forward", "resumed"]);
const LISTED = 40;

export function drawTimeline(place, list, timeline, width) {
  if (!timeline.length) return show(place, h("p", { class: "empty" }, "No process has told of itself yet."));
  const left = width < 480 ? 78 : 104, right = 14, spans = timeline.flatMap((one) => one.spans);
  const begin = Math.min(...spans.map((one) => one.begin)), end = Math.max(...spans.map((one) => one.end));
  const x = (time) => left + (time - begin) / (end - begin || 1) * (width - left - right);
  const height = TOP + ROW * timeline.length + BOTTOM;
  const marked = (one, row) => one.marks.filter((mark) => mark.event === "checkpoint" || LOUD.has(mark.event)).map((mark) =>
    mark.event === "checkpoint" ? svg("line", { class: "tick", x1: x(mark.time), x2: x(mark.time), y1: TOP + ROW * row + 7, y2: TOP + ROW * row + 23 })
      : svg("path", { class: `mark ${mark.event}`, d: `M${x(mark.time)} ${TOP + ROW * row + 9}l6 6l-6 6l-6 -6z` }, svg("title", {}, `${clock(mark.time)}: ${mark.words}`)));
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `Timeline of ${timeline.length} processes over ${duration(end - begin)}; what happened is listed below` },
    timeline.map((one, row) => [
      svg("text", { x: 0, y: TOP + ROW * row + 19 }, one.role),
      svg("line", { class: "grid", x1: left, x2: width - right, y1: TOP + ROW * row + 15, y2: TOP + ROW * row + 15 }),
      one.spans.map((span) => svg("rect", { class: `span ${span.ended || "live"}`, x: x(span.begin), y: TOP + ROW * row + 6, width: Math.max(3, x(span.end) - x(span.begin)), height: 18, rx: 3 },
        svg("title", {}, `${one.role}${span.pid ? `, process ${span.pid}` : ""}: ${clock(span.begin)} to ${clock(span.end)}, ${span.ended || "live"}`))),
      marked(one, row),
      one.spans.filter((span) => span.ended === "killed" || span.ended === "error").map((span) => {
        const at = Math.max(x(span.end), x(span.begin) + 3), y = TOP + ROW * row + 15;
        return svg("path", { class: "cross", d: `M${at - 5} ${y - 5}l10 10m0 -10l-10 10` });
      }),
    ]),
    [0, 0.5, 1].map((share) => svg("text", { x: left + share * (width - left - right), y: height - 6, "text-anchor": ["start", "middle", "end"][2 * share] }, clock(begin + share * (end - begin)))));
  const happened = timeline.flatMap((one) => [
    ...one.spans.map((span, number) => [span.begin, `${one.role} ${number ? "started again" : "started"}${span.pid ? ` as process ${span.pid}` : ""}`, ""]),
    ...one.spans.filter((span) => span.ended).map((span) => [span.end, `${one.role} ${{ done: "was done", stopped: "was stopped", error: "ended with an error", killed: "was killed, or fell silent" }[span.ended]}${span.message ? `: ${span.message}` : ""}`, span.ended]),
    ...one.marks.filter((mark) => LOUD.has(mark.event)).map((mark) => [mark.time, `${one.role} ${mark.words}`, mark.event]),
  ]).sort((a, b) => b[0] - a[0]);
  show(place, drawing,
    h("ul", { class: "legend" }, [["live", "at work"], ["done", "done"], ["stopped", "stopped"], ["killed", "killed or failed ✕"], ["taken_over", "◆ took over, went on"], ["tick", "checkpoint"]].map(([kind, words]) => h("li", { class: `k-${kind}` }, words))));
  show(list, h("h3", {}, "What happened"),
    h("ol", { class: "happened", tabindex: 0, "aria-label": "What happened, newest first" }, happened.slice(0, LISTED).map(([time, words, kind]) => h("li", { class: kind }, h("time", { datetime: new Date(1000 * time).toISOString() }, clock(time)), words))),
    happened.length > LISTED ? h("p", { class: "dim" }, `and ${happened.length - LISTED} earlier ones`) : null);
}
