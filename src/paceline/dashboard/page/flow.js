// A sample's way as eight stages, and which side waits for the other.

import { h, show, table } from "./dom.js";
import { NONE, bytes, duration, fixed, percent, rate, whole } from "./format.js";

const STAGE_OF_LIMIT = { capture: "Capture", turn: "Capture", training: "Step", room: "Features", checkpoints: "Checkpoint" };
const sum = (values) => values.filter((one) => one !== null).reduce((all, one) => (all ?? 0) + one, null);

function stages(s) {
  const producers = s.processes.filter((one) => one.role.startsWith("producer"));
  const live = producers.filter((one) => one.state !== "ended").length, over = s.state === "complete";
  const freed = Math.max(0, s.samples.committed - s.features.samples - s.samples.lost);
  const failed = s.prompts.failed ? `${whole(s.prompts.failed)} failed` : "";
  const captured = over || (live === 0 && s.prompts.planned !== null && s.prompts.done + s.prompts.failed >= s.prompts.planned);
  return [
    ["Prompts", whole(s.prompts.planned ?? s.prompts.done + s.prompts.pending), [`${whole(s.prompts.done)} captured`, over ? "" : `${whole(s.prompts.pending)} registered and waiting`, failed]],
    ["Capture", captured ? "done" : rate(sum(producers.map((one) => one.samples_per_second)), "samples"), [captured ? "" : `${live} ${live === 1 ? "producer" : "producers"} live`, s.prompts.leased && !over ? `${whole(s.prompts.leased)} being captured` : ""]],
    ["Features", bytes(s.features.bytes), [`${whole(s.features.samples)} samples resident`, s.features.budget_bytes ? `of ${bytes(s.features.budget_bytes)}` : ""], s.features.budget_bytes ? (s.features.bytes + s.features.reserved_bytes) / s.features.budget_bytes : null],
    ["Ledger", whole(s.samples.committed), ["samples committed", s.samples.quarantined ? `${whole(s.samples.quarantined)} in quarantine` : ""]],
    ["Plan", over ? "done" : `step ${whole(s.step.number + 1)}`, [over ? (s.samples.waiting ? `${whole(s.samples.waiting)} samples left over` : "every sample trained") : `${whole(s.samples.waiting)} samples wait for a step`]],
    ["Step", whole(s.step.number), [s.step.per_second ? rate(s.step.per_second, "steps") : `of ${whole(s.step.planned)} steps`, s.step.seconds ? `${duration(s.step.seconds)} each` : ""]],
    ["Checkpoint", s.checkpoint.step === null ? "none yet" : `step ${whole(s.checkpoint.step)}`, [`${whole(s.samples.provisional)} samples since`, s.checkpoint.stall_seconds ? `${duration(s.checkpoint.stall_seconds)} stall` : ""]],
    ["Release", whole(freed), ["samples freed", s.samples.lost ? `${whole(s.samples.lost)} to be captured again` : ""]],
  ];
}

export function drawFlow(place, s) {
  const slow = s.state === "live" ? STAGE_OF_LIMIT[s.waiting.limits] : undefined;
  show(place, stages(s).map(([name, figure, lines, share = null]) => h("li", { class: name === slow ? "limits" : null },
    h("h3", {}, name, name === slow ? h("span", { class: "tag" }, "limits the run") : null), h("p", { class: "figure" }, figure),
    lines.filter(Boolean).map((line) => h("p", { class: "dim" }, line)),
    share === null ? null : meter(share, `${percent(share)} of the budget`))));
}

export const meter = (share, label) => h("meter", { min: 0, max: 1, value: Math.max(0, Math.min(1, share)), "aria-label": label });

export function drawWaiting(place, s) {
  const w = s.waiting;
  const rows = [["Trainer, for samples", w.consumer_share], ["Producers, for room", w.producer_share], ["Training, for checkpoints", w.checkpoint_share]].filter(([, share]) => share !== null);
  show(place, h("p", {}, w.words || (s.state === "live" ? "Not measured yet: a few seconds of training are needed." : `Nothing runs.${rows.length ? " The shares are of its last minute." : ""}`)),
    h("dl", { class: "shares" }, rows.map(([name, share]) => h("div", {}, h("dt", {}, name), h("dd", {}, meter(share, name), h("span", {}, percent(share)))))),
    s.waits_for ? h("p", { class: "dim" }, `Training waits for ${s.waits_for}.`) : null);
}

export function drawProcesses(place, s) {
  show(place, table("Processes of the run", ["process", "state", "does", "starts", "waits"], s.processes.map((one) => [
    one.role, state(one.state), `${one.doing}${one.host ? ` on ${one.host}` : ""}${one.pid ? ` (${one.pid})` : ""}`,
    one.starts ? whole(one.starts) : NONE, one.waiting_share === null ? NONE : percent(one.waiting_share)])));
}

export const state = (name) => h("span", { class: `state ${name}` }, name);

export function drawHeadline(place, folder, problem, s) {
  const last = s.evaluation.curve.at(-1), best = s.evaluation.best, share = s.step.planned ? s.step.number / s.step.planned : null;
  const facts = [
    ["step", `${whole(s.step.number)}${s.step.planned ? ` of ${whole(s.step.planned)}` : ""}`, s.seconds_left === null ? "" : `about ${duration(s.seconds_left)} left`],
    ["loss", fixed(s.step.loss, 3), s.step.acceptance_length ? `estimated acceptance ${fixed(s.step.acceptance_length)}` : ""],
    ["acceptance length", last ? fixed(last.acceptance_length) : NONE, last ? `held-out prompts, at step ${whole(last.step)}` : "not measured yet"],
    ["best", best ? fixed(best.acceptance_length) : NONE, best ? `at step ${whole(best.step)}${s.evaluation.speed_up ? `; speed-up ${fixed(s.evaluation.speed_up)}${best.tree_acceptance_length === null ? "" : " with the tree"}` : ""}` : ""],
    ["restarts", whole(s.restarts), s.restarts ? "starts of roles beyond the first" : ""],
  ];
  show(place, h("div", { class: "title" }, h("h1", { id: "run-title" }, s.run), state(s.state), h("span", { class: "dim path" }, s.directory)),
    problem ? h("p", { class: "problem" }, problem) : null, s.error ? h("p", { class: "problem" }, s.error) : null,
    s.state === "live" && s.waiting.words ? h("p", { class: "words" }, s.waiting.words) : null,
    share === null ? null : meter(share, "Steps done"),
    h("dl", { class: "facts" }, facts.map(([name, figure, more]) => h("div", {}, h("dt", {}, name), h("dd", {}, figure), more ? h("dd", { class: "dim" }, more) : null))));
}

export function drawNotes(place, s) {
  const groups = [["Failed prompts", Object.values(s.failed_prompts)], ["Quarantined samples", Object.entries(s.quarantined).map(([id, why]) => `${id}: ${why}`)],
    ["Notes", [s.stopped_flat, s.ranks, s.ledger && `The ledger is at ${s.ledger}`, ...s.notes].filter(Boolean)]].filter(([, lines]) => lines.length);
  show(place, groups.map(([title, lines]) => [h("h2", {}, title), h("ul", { class: "card" }, lines.map((line) => h("li", {}, line)))]));
}
