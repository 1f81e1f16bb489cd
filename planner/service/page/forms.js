// Forms: fields that a form lacks are added under "More options", as the service describes its requests (wire/forms.py); what
// is wrong with a field is told beside it.

import { get } from "./api.js";
import { html } from "./charts.js";

const described = get("/page/forms.json");
described.catch(() => {}); // the failure is shown where a form is used
const HINTS = { map: "NAME=VALUE, one a line", list: "separated by commas" };

// Add to a form what its request takes and it does not ask for yet, but for the fields `without`: in its fold, or in a new one.
export async function complete(form, request, without = []) {
  const fields = (await described)[request].filter(({ name }) => !form.elements[name] && !without.includes(name));
  const controls = fields.map((field) => {
    const id = `about-${form.id}-${field.name}`, input = control(field);
    input.setAttribute("aria-describedby", id);
    return html("div", {}, html("label", {}, field.title, input), html("small", { id }, field.description));
  });
  const fold = form.querySelector(".more .row");
  if (fold) fold.prepend(...controls);
  else form.querySelector("button").before(html("details", { class: "more" }, html("summary", {}, "More options"), html("div", { class: "row" }, ...controls)));
}

function control({ name, kind, choices, default: usual, least, most, above }) {
  if (kind === "choice") {
    const options = choices.map((one) => html("option", one === usual ? { selected: "" } : {}, one));
    return html("select", { name }, ...(usual === null ? [html("option", { value: "" }, "default"), ...options] : options));
  }
  if (kind === "switch") return html("input", { name, type: "checkbox", ...(usual ? { checked: "" } : {}) });
  if (kind === "map") return html("textarea", { name, rows: 2, placeholder: HINTS.map });
  const limits = kind === "whole" || kind === "number" ? { type: "number", step: kind === "whole" ? 1 : "any" } : {};
  if (least !== undefined) limits.min = least;
  if (above !== undefined) limits.min = above;
  if (most !== undefined) limits.max = most;
  return html("input", { name, ...limits, placeholder: HINTS[kind] ?? usual ?? "" });
}

// What a form asks for, by the fields of its request; fields that are left empty or at their defaults are left out.
export async function asked(form, request) {
  const fields = {};
  for (const { name, kind, of, choices, default: usual } of (await described)[request]) {
    const input = form.elements[name];
    if (!input || input.type === "file") continue;
    const text = kind === "switch" ? "" : input.value.trim();
    const value = kind === "switch" ? input.checked : kind === "choice" ? choices.find((one) => String(one) === text) ?? null : valueOf(text, kind, of);
    if (value !== null && value !== usual) fields[name] = value;
  }
  return fields;
}

function valueOf(text, kind, of) {
  if (!text) return null;
  if (kind === "whole" || kind === "number") return Number(text);
  if (kind === "list") return text.split(",").map((one) => one.trim()).filter(Boolean);
  if (kind !== "map") return text;
  return Object.fromEntries(text.split("\n").filter((line) => line.trim()).map((line) => {
    const at = line.lastIndexOf("="), value = line.slice(at + 1).trim();
    return at < 0 ? [line.trim(), ""] : [line.slice(0, at).trim(), of === "text" ? value : Number(value)];
  }));
}

// Tell what is wrong beside the fields that an error names; returns whether all that it names are in the form.
export function beside(form, error) {
  const places = (error.fields ?? []).map(({ field, message }) => [form.elements[field.split(".")[1]], message]);
  if (!places.length || places.some(([input]) => !input)) return false;
  for (const [input, message] of places) {
    const id = `wrong-${form.id}-${input.name}`;
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-errormessage", id);
    for (let fold = input.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    (input.closest(".field") ?? input.closest("label")).append(html("span", { id, class: "wrong", role: "alert" }, message));
  }
  places[0][0].focus();
  return true;
}

// Clear the complaints about an earlier request.
export function forget(form) {
  for (const message of form.querySelectorAll(".wrong")) message.remove();
  for (const input of form.querySelectorAll("[aria-invalid]")) for (const name of ["aria-invalid", "aria-errormessage"]) input.removeAttribute(name);
}
