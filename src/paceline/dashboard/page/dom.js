// Elements from plain values. Text is always set as text, so nothing of a run is ever taken for markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

export const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
export const at = (id) => document.getElementById(id);

const REACHED = "a, button, input, [tabindex]";

// Puts something else in a place; what has the focus there keeps it.
export function replace(place, nodes) {
  const focused = [...place.querySelectorAll(REACHED)].indexOf(document.activeElement);
  place.replaceChildren(...nodes);
  if (focused >= 0) place.querySelectorAll(REACHED)[focused]?.focus({ preventScroll: true });
}

// Replaces what a place shows, unless it would look the same: a selection in it stays.
export function show(place, ...children) {
  const next = h("div", {}, ...children);
  if (place.dataset.shown === next.innerHTML) return;
  place.dataset.shown = next.innerHTML;
  replace(place, next.childNodes);
}

export function table(caption, heads, rows) {
  return h("table", {},
    h("caption", { class: "hidden" }, caption),
    h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
    h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell, place) =>
      h(place ? "td" : "th", place ? {} : { scope: "row" }, cell))))));
}
