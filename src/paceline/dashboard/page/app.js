// What the address names is shown: all runs, or one of them. The server tells what is new.

import { lineChart, positionBars } from "./chart.js";
import { at, h, replace, show, table } from "./dom.js";
import { drawFlow, drawHeadline, drawNotes, drawProcesses, drawWaiting, state } from "./flow.js";
import { NONE, fixed, whole } from "./format.js";
import { drawLineage, startLineage } from "./lineage.js";
import { drawAnswers } from "./texts.js";
import { drawTimeline } from "./timeline.js";

const COMPARED = 6, HISTORY_MS = 3000;
let runs = [], source = null, opened = null, drawnLineage = "";
const histories = new Map(); // by run: {key, asked, history}
const chosen = new Set();
const answers = new Map(); // by run: {key, found, refused}
let choseOnce = false;

const named = () => new URLSearchParams(location.hash.slice(1));
function navigate(more) {
  const hash = `#${new URLSearchParams({ run: opened, ...more })}`;
  if (location.hash === hash) { drawnLineage = ""; draw(); } else location.hash = hash;
}
const only = () => runs.length === 1 ? runs[0].run : null;

function listen(run) {
  source?.close();
  source = new EventSource(`/api/events?${new URLSearchParams({ run: run ?? "" })}`);
  source.addEventListener("open", () => connected("live"));
  source.addEventListener("error", () => connected("lost"));
  source.addEventListener("runs", (event) => { runs = JSON.parse(event.data); draw(); });
}

function connected(how) {
  at("connection").className = how;
  at("connection").textContent = how === "live" ? "up to date" : "connection lost; trying again";
}

// The curves of a run, read again when it has moved. The last known ones are drawn meanwhile.
function historyOf(one) {
  const kept = histories.get(one.run) ?? { key: "", asked: -HISTORY_MS, history: null };
  histories.set(one.run, kept);
  const s = one.status, key = s ? `${s.lsn} ${s.step.number} ${s.evaluation.curve.length} ${s.state} ${s.processes.map((p) => p.pid)}` : "";
  if (s && key !== kept.key && performance.now() - kept.asked >= HISTORY_MS) {
    Object.assign(kept, { key, asked: performance.now() });
    fetch(`/api/runs/${one.run}/history`).then((answer) => answer.ok ? answer.json() : null)
      .then((history) => { if (history) { kept.history = history; draw(); } }).catch(() => { kept.key = ""; });
  }
  return kept.history;
}

// The answers of the newest measurement, read again when there is another one; if they could not be read, when
// the run has moved.
function answersOf(one) {
  const kept = answers.get(one.run) ?? { key: "", found: null, refused: null };
  answers.set(one.run, kept);
  const moment = `${one.status.step.number} ${one.status.state}`;
  const key = `${one.status.evaluation.curve.map((point) => point.step)} ${one.status.evaluation.speed_up}`;
  if (key !== kept.key || (kept.refused ?? moment) !== moment) {
    Object.assign(kept, { key, refused: null });
    fetch(`/api/runs/${one.run}/answers`)
      .then((answer) => { kept.refused = answer.ok ? null : moment; return answer.ok ? answer.json() : null; })
      .then((found) => { kept.found = found; draw(); }).catch(() => { kept.key = ""; });
  }
  return kept.found;
}

const widthOf = (place) => Math.max(260, Math.floor(place.clientWidth) - 32);
function columnWidth(place) {
  const columns = getComputedStyle(place).gridTemplateColumns.split(" ").map(parseFloat);
  return Math.max(240, Math.floor(columns[0]) - 32);
}

// Charts are drawn anew only when their data or their width has changed, so that a reading of one stays.
function drawCharts(place, data, make) {
  const width = columnWidth(place), key = JSON.stringify([width, data]);
  if (place.chartKey === key) return;
  place.chartKey = key;
  replace(place, make(width));
}

function drawRun(one) {
  const s = one.status;
  if (!s) return;
  drawHeadline(at("headline"), one.folder, one.problem, s);
  drawFlow(at("flow"), s); drawWaiting(at("waiting"), s); drawProcesses(at("processes"), s); drawNotes(at("notes"), s);
  const { trained = [], measured = [], timeline = [] } = historyOf(one) ?? {};
  const ends = measured.length > 1 ? [measured[0], measured.at(-1)] : measured;
  drawCharts(at("curves"), [trained, measured], (width) => [
    lineChart("Loss", "by step", [{ name: "loss", points: trained.map((p) => [p.step, p.loss]) }], width),
    lineChart("Acceptance length", "by step", [
      { name: "held-out, chain", dots: true, points: measured.map((p) => [p.step, p.acceptance_length]) },
      { name: "held-out, tree", dots: true, points: measured.map((p) => [p.step, p.tree_acceptance_length ?? NaN]) },
      { name: "estimate from training", faint: true, points: trained.map((p) => [p.step, p.acceptance_length ?? NaN]) }], width),
    positionBars("Acceptance by position", "share of cycles in which a chain's nth draft token is accepted", ends.map((p) => ({ name: `step ${p.step}`, values: p.by_position })), width)]);
  drawAnswers(at("answers"), answersOf(one), draw);
  drawTimeline(at("drawing"), at("happened"), timeline, widthOf(at("timeline")));
  const asked = `${one.run} ${named().get("step")} ${named().get("sample")}`;
  if (asked !== drawnLineage) { drawnLineage = asked; drawLineage(one.run, named().get("step"), named().get("sample")); }
}

function drawOverview() {
  if (!choseOnce) { runs.filter((one) => one.status).slice(0, COMPARED).forEach((one) => chosen.add(one.run)); choseOnce = runs.length > 0; }
  const picked = runs.filter((one) => chosen.has(one.run) && one.status);
  show(at("runs"), table("Runs", ["run", "state", "step", "loss", "acceptance length", "best", "restarts", "compare"], runs.map((one) => {
    const s = one.status, title = h("a", { href: `#run=${one.run}` }, s?.run ?? one.folder), where = h("span", { class: "dim path" }, one.folder);
    if (!s) return [[title, where], state("unreadable"), one.problem, "", "", "", "", ""];
    const last = s.evaluation.curve.at(-1), place = picked.indexOf(one);
    return [[title, where], state(s.state), `${whole(s.step.number)}${s.step.planned ? ` / ${whole(s.step.planned)}` : ""}`, fixed(s.step.loss, 3), last ? fixed(last.acceptance_length) : NONE,
      s.evaluation.best ? fixed(s.evaluation.best.acceptance_length) : NONE, whole(s.restarts),
      h("input", { type: "checkbox", "data-run": one.run, "aria-label": `Draw the curves of ${s.run}`, checked: chosen.has(one.run), class: place < 0 ? null : `c${place}`, disabled: !chosen.has(one.run) && picked.length >= COMPARED })];
  })));
  const known = picked.map((one) => [one.status.run, historyOf(one)]);
  drawCharts(at("compared"), known, (width) => [
    lineChart("Loss", "by step", known.map(([name, past]) => ({ name, points: (past?.trained ?? []).map((p) => [p.step, p.loss]) })), width),
    lineChart("Acceptance length", "on held-out prompts, by step", known.map(([name, past]) => ({ name, dots: true, points: (past?.measured ?? []).map((p) => [p.step, p.acceptance_length]) })), width)]);
}

function draw() {
  const wanted = named().get("run") ?? only(), one = runs.find((run) => run.run === wanted);
  if ((one?.run ?? null) !== opened) { opened = one?.run ?? null; listen(opened); }
  at("run").hidden = !one?.status;
  at("overview").hidden = Boolean(one) || !runs.length;
  at("empty").hidden = !at("run").hidden || !at("overview").hidden;
  at("why").textContent = one ? one.problem : wanted && runs.length ? "There is no such run here any more." : "There is no run here yet. One begins with: paceline train RUN.yaml";
  show(at("crumb"), one && runs.length > 1 ? h("a", { href: "#" }, "← all runs") : `${runs.length} ${runs.length === 1 ? "run" : "runs"}`);
  document.title = one?.status ? `${one.status.run}, ${one.status.state}: Paceline` : "Paceline";
  if (one) drawRun(one); else if (runs.length) drawOverview();
}

at("runs").addEventListener("change", (event) => {
  const run = event.target.dataset.run;
  if (event.target.checked) chosen.add(run); else chosen.delete(run);
  draw();
  at("runs").querySelector(`[data-run="${CSS.escape(run)}"]`)?.focus();
});
addEventListener("hashchange", () => { draw(); if (!named().get("step") && !named().get("sample")) scrollTo(0, 0); });
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); at("main").focus(); });
let resized;
addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(draw, 100); });
startLineage(navigate);
listen(null);
