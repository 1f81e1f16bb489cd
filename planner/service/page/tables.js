// Figures in MiB, and tables of them.

import { amount, html, MIB } from "./charts.js";

export const mib = (bytes, digits) => amount(bytes / MIB, digits);
export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

export function table(caption, headings, rows) {
  const head = html("tr", {}, ...headings.map((text) => (text ? html("th", { scope: "col" }, text) : html("td"))));
  const body = rows.map(([first, ...rest]) => html("tr", {}, html("th", { scope: "row" }, first), ...rest.map((text) => html("td", {}, text))));
  return html("table", {}, html("caption", {}, caption), html("thead", {}, head), html("tbody", {}, ...body));
}

// A cell's share as a bar beside its number.
export const bar = (share, colour) => html("span", { class: "bar", "aria-hidden": "true" }, html("span", { style: `width: ${Math.min(100, 100 * share)}%; background: ${colour}` }));
