// Figures of several things side by side: what differs comes first, what is the same is folded below. Each thing has a letter; on a narrow
// screen each figure is a block of its own, with a value for each letter.

import { html } from "./charts.js";
import { scrolling } from "./components.js";

const NOTHING = "–";
export const letter = (i) => (i < 26 ? "" : letter(Math.floor(i / 26) - 1)) + String.fromCharCode(65 + (i % 26));

// `names`: of the things, as text or as elements; `figures`: [{label, values, text(value), better: -1 | 1 | 0}], of which a value that is null
// is not known; `better`: whether less (-1) or more (1) is better, which marks the best.
export function sideBySide(caption, names, figures) {
  const known = figures.filter(({ values }) => values.some((value) => value !== null && value !== undefined));
  const told = ({ values, text = String }) => values.map((value) => (value === null || value === undefined ? NOTHING : text(value)));
  const differ = known.filter((figure) => { const given = told(figure).filter((text) => text !== NOTHING); return given.length === 1 || new Set(given).size > 1; }), same = known.filter((figure) => !differ.includes(figure));
  const box = html("div", { class: "side-by-side" });
  box.append(differ.length ? scrolling(caption, grid(caption, names, differ.map((figure) => row(figure, told(figure))))) : html("p", {}, "They have the same figures."));
  if (same.length) box.append(html("details", {}, html("summary", {}, `The same in all: ${same.length}`), scrolling("The same in all", grid("The same in all", names, same.map((figure) => row({ ...figure, better: 0 }, told(figure)))))));
  return box;
}

function row({ label, values, better = 0 }, texts) {
  const numbers = values.filter((value) => typeof value === "number"), best = better && numbers.length > 1 ? (better < 0 ? Math.min(...numbers) : Math.max(...numbers)) : null;
  return html("tr", {}, html("th", { scope: "row" }, label), ...texts.map((text, i) => html("td", { "data-title": letter(i), class: best !== null && values[i] === best ? "best" : null }, text)));
}

const grid = (caption, names, rows) => html("table", { class: "listing figures" }, html("caption", {}, caption), html("thead", {}, html("tr", {}, html("td"), ...names.map((name, i) => html("th", { scope: "col" }, `${letter(i)}: `, name.cloneNode ? name.cloneNode(true) : name)))), html("tbody", {}, ...rows));
