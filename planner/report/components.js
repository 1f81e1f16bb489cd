// What all places are made of: lists with search and sort, names to change in place, dialogs, progress, words that are explained.

import { amount, html, MIB } from "./charts.js";

// --- figures in words -------------------------------------------------------------------------------------------------

export const mib = (bytes, digits) => amount(bytes / MIB, digits);
export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

// A length of time as people say it: `12 s`, `3 min 20 s`, `2 h 5 min`.
export function span(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min${whole % 60 ? ` ${whole % 60} s` : ""}`;
  return `${Math.floor(whole / 3600)} h${Math.floor((whole % 3600) / 60) ? ` ${Math.floor((whole % 3600) / 60)} min` : ""}`;
}

// A moment, `created` in seconds since 1970, as an element: near ones relative, others as a date, all with the whole of it as a title.
export function when(created) {
  const date = new Date(1000 * created), ago = Date.now() / 1000 - created;
  const near = ago < 60 ? "just now" : ago < 3600 ? `${Math.floor(ago / 60)} min ago` : ago < 86400 ? `${Math.floor(ago / 3600)} h ago` : null;
  return html("time", { datetime: date.toISOString(), title: date.toLocaleString() }, near ?? date.toLocaleDateString(undefined, { dateStyle: "medium" }));
}

// --- small parts ------------------------------------------------------------------------------------------------------

export const loading = (text = "loading …") => html("p", { class: "soft busy loading", role: "status" }, text);
export const button = (text, click, kind = "") => html("button", { type: "button", class: kind, click }, text);
export const section = (title, ...children) => html("section", { class: "panel" }, title ? html("h2", {}, title) : null, ...children);
// A place's name, a text or an element of its own, and what can be done there.
export const heading = (title, ...beside) => html("div", { class: "heading" }, title instanceof Element ? title : html("h1", {}, title), html("div", { class: "row" }, ...beside));
// A figure with its name above and what it means below.
export const card = (name, value, more) => html("div", { class: "card" }, html("dt", {}, name), html("dd", {}, html("b", {}, value), html("span", {}, more)));
export const empty = (text, ...actions) => html("div", { class: "empty" }, html("p", {}, text), html("div", { class: "row" }, ...actions));

// A command to be typed elsewhere, with a button that copies it.
export function command(text, label) {
  const copy = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(text);
      announce("copied");
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 2000);
    } catch { // where the clipboard is kept from pages, it is marked to be copied by hand
      getSelection().selectAllChildren(shown);
    }
  }, "quiet");
  const shown = html("code", {}, text);
  copy.setAttribute("aria-label", label);
  return html("div", { class: "command" }, html("pre", { class: "scroll", tabindex: 0, "aria-label": label.replace(/^Copy t/, "T") }, shown), copy);
}

// A control with its label and, below, what it means.
let fields = 0;
export function field(label, control, help = null) {
  const id = control.id || `field-${++fields}`;
  control.id = id;
  if (help) control.setAttribute("aria-describedby", `${id}-help`);
  return html("div", { class: "field" }, html("label", { for: id }, label), control, help ? html("small", { id: `${id}-help` }, help) : null);
}

// A word that is explained where it stands: while it is pointed at, and by a click, a touch or the keyboard until the next one.
let terms = 0;
export function term(word, text) {
  const id = `term-${++terms}`, meaning = html("span", { id, class: "meaning", popover: "manual" }, text);
  const named = html("button", { type: "button", class: "term", "aria-describedby": id, "aria-expanded": "false" }, word);
  let stays = false;
  const show = (pinned) => {
    stays = pinned;
    named.setAttribute("aria-expanded", "true");
    if (!meaning.matches(":popover-open")) meaning.showPopover?.();
  };
  const hide = () => {
    stays = false;
    named.setAttribute("aria-expanded", "false");
    if (meaning.isConnected && meaning.matches(":popover-open")) meaning.hidePopover?.();
  };
  named.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") show(stays); });
  named.addEventListener("pointerleave", () => { if (!stays) hide(); });
  named.addEventListener("click", () => (stays ? hide() : show(true)));
  named.addEventListener("blur", hide);
  meaning.addEventListener("toggle", (event) => {
    if (event.newState !== "open") return;
    const box = named.getBoundingClientRect(), shown = new AbortController();
    addEventListener("pointerdown", ({ target }) => { if (!named.contains(target) && !meaning.contains(target)) hide(); }, { signal: shown.signal });
    addEventListener("keydown", ({ key }) => { if (key === "Escape") hide(); }, { signal: shown.signal });
    meaning.addEventListener("toggle", () => shown.abort(), { once: true });
    meaning.style.left = `${Math.max(8, Math.min(box.left, innerWidth - meaning.offsetWidth - 8))}px`;
    meaning.style.top = `${box.bottom + 6 + meaning.offsetHeight > innerHeight ? box.top - meaning.offsetHeight - 6 : box.bottom + 6}px`;
  });
  return html("span", { class: "with-term" }, named, meaning);
}

// Tell what has happened to those who do not see it.
const voice = document.body.appendChild(html("p", { class: "unseen", role: "status", "aria-live": "polite" }));
export const announce = (text) => { voice.textContent = text; };

// How long work still takes, in seconds, by `done` of `total` and the moments (in seconds) at which it was `from.done` and is `done`; null
// where that does not tell.
const LEAST = 3; // seconds between two moments from which a pace is taken
export function leftOf(done, total, from, at) {
  const passed = at - from.at, moved = done - from.done;
  return total && done < total && passed >= LEAST && moved > 0 ? (passed / moved) * (total - done) : null;
}

// A bar for work that takes a while: `update({stage, done, total})`; where no total is known it moves without one. Where the stage says
// how much is done, it is not `counted` once more. How much is left is said from the second event of a stage on, or where the service
// says when the stage began: `clock` = {began, at}, both by its own clock.
export function progress(what) {
  const bar = html("progress", { max: 1, "aria-label": what }), text = html("span", { class: "soft" }, what);
  const box = html("div", { class: "progress", role: "status" }, bar, text);
  let from = null; // the first event of the stage
  box.update = ({ stage = "", done, total, clock = null, left: told = true, counted = true }) => {
    const now = Date.now() / 1000;
    if (!from || from.stage !== stage || from.total !== total || done < from.done) from = { stage, total, done, at: now };
    if (total) bar.value = done / total;
    else bar.removeAttribute("value");
    const left = !told || !total ? null : clock ? leftOf(done, total, { done: 1, at: clock.began }, clock.at) : leftOf(done, total, from, now);
    text.textContent = `${what}${stage ? `: ${stage}` : ""}${total && counted ? `, ${done} of ${total}` : ""}${left === null ? "" : `, about ${span(left)} left`}`;
  };
  return box;
}

// --- dialogs ----------------------------------------------------------------------------------------------------------

// Open a dialog; resolves with what `close(value)` is called with, null where it is dismissed. `make(close)` gives what stands in it.
export function dialog(title, make) {
  return new Promise((resolve) => {
    const box = html("dialog", { class: "dialog", "aria-label": title });
    let answer = null;
    const close = (value = null) => { answer = value; box.close(); };
    box.append(html("div", { class: "heading" }, html("h2", {}, title), html("button", { type: "button", class: "quiet close", "aria-label": "Close", click: () => close() }, "×")), ...[make(close)].flat());
    box.addEventListener("close", () => { box.remove(); resolve(answer); });
    box.addEventListener("click", (event) => { if (event.target === box) close(); });
    document.body.append(box);
    box.showModal();
  });
}

// Ask before something is done that cannot be undone; `question` names what it is done to.
export const confirmed = (question, deed) => dialog(question, (close) => html("div", { class: "row last" }, button(deed, () => close(true), "danger"), button("Keep", () => close(false))));

const NOTE_MS = 600; // between the last key and saving

// --- a name and a note that a person gives ----------------------------------------------------------------------------

// A heading whose text is changed in place; `save(text)` stores it, an empty one takes the given name away. `action` reports failures.
export function editable(text, save, { label = "Name", tag = "h1", action = (run) => run } = {}) {
  const shown = html(tag, { class: "editable" }), pen = html("button", { type: "button", class: "quiet pen", "aria-label": `Change: ${label}`, title: `Change: ${label}` }, "✎");
  const read = (now) => { shown.replaceChildren(now, " ", pen); };
  pen.addEventListener("click", () => {
    const input = html("input", { class: "wide", value: text, "aria-label": label, maxlength: 200 });
    const end = action(async () => {
      if (!input.isConnected) return;
      const next = input.value.trim();
      read(text);
      if (next !== text) { text = (await save(next || null)) ?? next; read(text); }
      pen.focus();
    });
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") end(event);
      if (event.key === "Escape") { read(text); pen.focus(); }
    });
    input.addEventListener("blur", end);
    shown.replaceChildren(input);
    input.focus();
    input.select();
  });
  read(text);
  return shown;
}

// A note below a heading, saved while it is written, a moment after the last key.
export function note(text, save, action) {
  const area = html("textarea", { class: "note", rows: 1, placeholder: "Add a note", "aria-label": "Note", maxlength: 4000 }), said = html("small", { role: "status" });
  let kept = text ?? "", waiting = 0;
  const keep = action(async () => {
    clearTimeout(waiting);
    const written = area.value.trim();
    if (written === kept) return;
    await save(written || null);
    kept = written;
    said.textContent = "note saved";
  });
  area.value = kept;
  area.addEventListener("input", () => { said.textContent = ""; clearTimeout(waiting); waiting = setTimeout(keep, NOTE_MS); });
  area.addEventListener("change", keep);
  return html("div", { class: "noted-down" }, area, said);
}

// --- tables and lists -------------------------------------------------------------------------------------------------

const LONG = 26, SHORT = 18; // letters; longer texts in tables, and longer ones in lists, are broken into lines
const SEVERAL = 4, MANY = 6; // columns of a table, from which its rows become blocks on a narrow screen, and on one less narrow

// A cell's class if it has more letters than `most`, those of an explanation not counted.
function broken(cell, most = LONG) {
  const unseen = [...(cell?.querySelectorAll?.(".meaning") ?? [])].reduce((sum, meaning) => sum + meaning.textContent.length, 0);
  return (cell?.textContent ?? String(cell ?? "")).length - unseen > most ? "long" : null;
}

export function table(caption, headings, rows) {
  const head = html("tr", {}, ...headings.map((text) => (text ? html("th", { scope: "col" }, text) : html("td"))));
  const body = rows.map(([first, ...rest]) => html("tr", {}, html("th", { scope: "row", class: broken(first) }, first), ...rest.map((text, index) => html("td", { "data-title": headings[index + 1] || null, class: broken(text) }, text))));
  const columns = headings.length >= MANY ? "many" : headings.length >= SEVERAL ? "several" : null;
  return html("table", { class: columns }, html("caption", {}, caption), html("thead", {}, head), html("tbody", {}, ...body));
}

export const scrolling = (label, ...children) => html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, ...children);

// A cell's share as a bar beside its number.
export const bar = (share, colour) => html("span", { class: "bar", "aria-hidden": "true" }, html("span", { style: `width: ${Math.min(100, 100 * share)}%; background: ${colour}` }));

// A chart with its numbers folded below.
export const numbers = (label, made) => html("details", {}, html("summary", {}, "In numbers"), scrolling(label, made));

// A list with search and sort. `columns`: [{title, cell(item) → node or text, value(item) → what it is sorted by, wide, least}]; the first
// column heads its row, one that is `least` goes first where there is no room for all. `load(cursor, search)` → {items, next} gets a page of it, the service searching; `actions(items)` are offered for
// what is ticked.
export function list({ name, columns, load, key = (item) => item.id, actions = null, none, action }) {
  const box = html("div", { class: "list" }), ticked = new Set(), search = html("input", { type: "search", placeholder: `Search ${name}`, "aria-label": `Search ${name}` });
  const bar = html("div", { class: "row list-bar" }, search), body = html("tbody"), more = button("Show more", () => fetchMore(), "quiet"), chosen = html("div", { class: "row" });
  const head = html("tr", {}, actions ? html("td") : null, ...columns.map((column, index) => html("th", { scope: "col", "aria-sort": "none", class: [broken(column.title, SHORT), column.least && "least"].filter(Boolean).join(" ") || null }, column.value ? button(column.title, () => sort(index), "quiet sort") : column.title)));
  const frame = scrolling(name, html("table", { class: "listing" }, html("thead", {}, head), body));
  let items = [], next = null, order = { column: null, down: false }, asked = 0;
  const draw = () => {
    const { column, down } = order, shown = column === null ? items : [...items].sort((a, b) => compared(columns[column].value(a), columns[column].value(b)) * (down ? -1 : 1));
    head.querySelectorAll("th").forEach((cell, index) => cell.setAttribute("aria-sort", index === column ? (down ? "descending" : "ascending") : "none"));
    body.replaceChildren(...shown.map((item) => html("tr", { "data-id": key(item) }, actions ? html("td", {}, tick(item)) : null, ...columns.map((column, index) => cellOf(column, index, column.cell(item))))));
    more.hidden = !next;
    frame.hidden = !items.length;
    box.querySelector(".empty")?.remove();
    if (!items.length) box.append(search.value ? empty(`Nothing here is called “${search.value}”.`) : none());
    bar.hidden = !items.length && !search.value;
    offer();
  };
  const cellOf = (column, index, cell) => (index ? html("td", { "data-title": column.title, class: [column.wide ? "wide" : broken(cell, SHORT), column.least && "least"].filter(Boolean).join(" ") || null }, cell) : html("th", { scope: "row" }, cell));
  const tick = (item) => {
    const input = html("input", { type: "checkbox", "aria-label": `Choose ${columns[0].value?.(item) ?? item.title ?? item.label ?? item.name ?? item.id}` });
    input.checked = ticked.has(key(item));
    input.addEventListener("change", () => { ticked[input.checked ? "add" : "delete"](key(item)); offer(); });
    return input;
  };
  const offer = () => chosen.replaceChildren(...(actions && ticked.size ? [html("span", { class: "soft" }, `${ticked.size} chosen`), ...actions(items.filter((item) => ticked.has(key(item))))] : []));
  const sort = (column) => { order = { column, down: order.column === column && !order.down }; draw(); };
  const fetchMore = action(async () => {
    const mine = ++asked, page = await load(next, search.value.trim());
    if (mine !== asked) return;
    items.push(...page.items);
    next = page.next;
    draw();
  });
  box.reload = action(async () => {
    const mine = ++asked, page = await load(null, search.value.trim());
    if (mine !== asked) return;
    ({ items, next } = page);
    for (const one of ticked) if (!items.some((item) => key(item) === one)) ticked.delete(one);
    draw();
  });
  let typed;
  search.addEventListener("input", () => { clearTimeout(typed); typed = setTimeout(box.reload, 200); });
  bar.append(chosen);
  box.append(bar, frame, html("div", { class: "row" }, more));
  more.hidden = true;
  return box;
}

const compared = (a, b) => (a === b ? 0 : a === null || a === undefined ? 1 : b === null || b === undefined ? -1 : typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
