// Lineage both ways: a step's samples; a sample's steps, checkpoint, fate and text.

import { at, h, show, table } from "./dom.js";
import { whole } from "./format.js";
import { legend, textBox, tokensOf } from "./texts.js";

let go = () => {};

// `navigate`: changes the address; what it names is drawn then.
export function startLineage(navigate) {
  go = navigate;
  for (const what of ["step", "sample"]) {
    at(`ask-${what}`).addEventListener("submit", (event) => { event.preventDefault(); go({ [what]: at(what).value.trim() }); });
  }
}

export async function drawLineage(run, step, sample) {
  at("step").value = step ?? ""; at("sample").value = sample ?? "";
  if (!step && !sample) return show(at("found"), h("p", { class: "dim" }, "A step leads to its samples, and a sample to its steps."));
  const address = step ? `/api/runs/${run}/steps/${encodeURIComponent(step)}` : `/api/runs/${run}/samples?${new URLSearchParams({ id: sample })}`;
  const answer = await fetch(address).catch(() => null);
  const found = answer?.headers.get("content-type")?.startsWith("application/json") ? await answer.json() : null;
  if (!answer?.ok || !found) return show(at("found"), h("p", { class: "problem" }, found?.what ?? "That cannot be read now."), h("p", { class: "dim" }, found?.why ?? ""));
  show(at("found"), step ? ofStep(found) : found.map(ofSample));
  wire(at("found"));
}

const toSample = (id) => h("button", { class: "link", type: "button", "data-sample": id }, id);
const toStep = (step) => h("button", { class: "link", type: "button", "data-step": step }, `step ${step}`);

function wire(place) {
  for (const one of place.querySelectorAll("button.link")) one.onclick = () => go(one.dataset.step ? { step: one.dataset.step } : { sample: one.dataset.sample });
}

function ofStep(found) {
  const covered = found.checkpoint ? `in checkpoint ${found.checkpoint}` : "in no checkpoint yet";
  return [h("h3", {}, `Step ${whole(found.step)}: ${found.fate}, ${covered}${found.rev ? `, plan revision ${found.rev}` : ""}`),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Samples of the step" }, table("Samples of the step", ["sample", "place", "visit", "state"], found.samples.map((one) => [toSample(one.sample_id), whole(one.place), `${one.visit}${one.is_last ? ", last" : ""}`, one.state])))];
}

function ofSample({ lineage, text, problem }) {
  return h("article", {},
    h("h3", {}, lineage.sample_id), h("p", {}, `${lineage.place === null ? "not in the log" : `place ${whole(lineage.place)}`}; ${lineage.state}`),
    lineage.failed ? h("p", { class: "problem" }, `Its prompt failed: ${lineage.failed}`) : null,
    lineage.visits.length ? h("ul", { class: "visits" }, lineage.visits.map((one) => h("li", {}, toStep(one.step), ` ${one.fate}, ${one.checkpoint ? `in checkpoint ${one.checkpoint}` : "in no checkpoint yet"}`))) : h("p", { class: "dim" }, "No step has visited it yet."),
    text ? [h("p", { class: "dim" }, `${tokensOf(text)}; the shaded ones are the answer, which is trained on.`),
      text.drafted ? [h("p", {}, `Underlined: ${text.drafted}.`), legend()] : h("p", { class: "dim" }, `Which of them a draft guesses is not known yet: paceline evaluate RUN --sample ${lineage.sample_id}`), textBox(text, "Text of the sample")]
      : h("p", { class: problem ? "problem" : "dim" }, problem || "The run keeps no tokens of it."));
}
