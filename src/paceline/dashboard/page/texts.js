// Prompts and answers: a sample's, and the measured ones with the draft's tokens marked.

import { at, h, show } from "./dom.js";
import { fixed, whole } from "./format.js";

const IDS = ", as ids: the target's tokenizer is not at hand";
let way = 0;

const marked = (piece) => piece.is_answer ? h("mark", { class: piece.is_drafted ? "drafted" : null }, piece.text) : piece.text;

export const textBox = (text, label) => h("pre", { tabindex: 0, role: "region", "aria-label": label },
  text.pieces.map(marked), text.left_out ? ` ... and ${whole(text.left_out)} more tokens` : "");

export const tokensOf = (text) => `${whole(text.tokens)} tokens${text.are_ids ? IDS : ""}`;

export const legend = () => h("ul", { class: "legend marks" }, h("li", {}, h("mark", {}, "shaded"), " the target's own tokens"),
  h("li", {}, h("mark", { class: "drafted" }, "underlined"), " the draft's tokens, which the target accepted"));

function answer(one) {
  const share = one.answer_tokens ? `${whole(one.drafted_tokens)} of ${whole(one.answer_tokens)} tokens are the draft's` : "no answer";
  return h("details", {}, h("summary", {}, h("strong", {}, one.prompt_id), h("span", { class: "dim" }, ` ${share}${one.acceptance_length === null ? "" : `; acceptance length ${fixed(one.acceptance_length)}`}`)),
    h("p", { class: "dim" }, tokensOf(one.text)), textBox(one.text, `Prompt and answer of ${one.prompt_id}`));
}

// `found`: of one measurement, or null.
export function drawAnswers(place, found, again) {
  if (!found?.ways.some((one) => one.answers.length)) return show(place, h("p", { class: "dim" }, "None are kept yet: a measurement keeps them."));
  const chosen = found.ways[way] ?? found.ways[0];
  show(place,
    h("p", {}, `Held-out prompts, decoded with the draft of step ${whole(found.step)}. Each answer is the target's own; the draft only makes it faster.`),
    found.ways.length > 1 ? h("p", {}, h("label", { for: "way" }, "Guessed as a "), h("select", { id: "way" }, found.ways.map((one, number) => h("option", { value: number, selected: one === chosen }, one.guesses)))) : h("p", { class: "dim" }, `Guessed as a ${chosen.guesses}.`),
    legend(), chosen.answers.map(answer), found.left_out ? h("p", { class: "dim" }, `${whole(found.left_out)} more prompts are not kept.`) : null);
  if (at("way")) at("way").onchange = (event) => { way = Number(event.target.value); again(); at("way").focus(); };
}
