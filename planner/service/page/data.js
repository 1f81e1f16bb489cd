// Data for a run: files that lie on the service's machine, files that are uploaded, or random tokens to try a plan; and a look at them
// as they are read for training.

import { get, plainly, upload, work } from "./api.js";
import { html } from "./charts.js";
import { button, dialog, empty, list, mib, percent, progress, scrolling, table, when } from "./components.js";
import { action } from "./addresses.js";

export const RANDOM = "random";
const SHOWN = 12; // samples of a preview at first
const TRAIN = /(^|[^a-z])(train|training|sft|finetune)([^a-z]|$)/i, HELD = /(^|[^a-z])(held[-_ ]?out|eval|valid|validation|dev|test)([^a-z]|$)/i;
const KINDS = { jsonl: "JSON lines", json: "JSON", csv: "CSV", text: "text", parquet: "Parquet", folder: "folder" };

// What data are called: a file's name, not its id.
export const dataName = (data, uploads = []) => (data === RANDOM ? "random tokens" : uploads.find((one) => `upload:${one.id}` === data)?.name ?? data.split("/").pop());

// A button that says which data are chosen and opens the choice; `control.value` is what a run is asked with. `changed(value, byPerson)`
// is told of another choice; with `optional`, none is a choice too.
export function dataChooser({ name, value = "", none = "Choose or upload a file", random = false, optional = false, changed = () => {} }) {
  const control = button("", action(async () => {
    const chosen = await choose(name, random, optional);
    if (chosen) set(chosen.value, chosen.name, true);
  }), "chooser");
  const read = (next, text) => control.replaceChildren(html("span", {}, next ? text : none), html("span", { class: "soft" }, next ? "change or upload" : ""));
  const set = (next, text = next && dataName(next), byPerson = false) => {
    control.value = next;
    read(next, text);
    changed(next, byPerson);
  };
  control.set = set;
  control.value = value;
  read(value, value && dataName(value));
  if (value.startsWith("upload:")) get("/v1/uploads").then(({ items: uploads }) => read(value, dataName(value, uploads)), () => {});
  return control;
}

// Open the choice; resolves with {value, name}, or null.
function choose(title, random, optional) {
  return dialog(title, (close) => {
    const taken = async (file) => {
      const bar = progress(`Uploading ${file.name}`);
      drop.replaceChildren(bar);
      try {
        const kept = await upload(`/v1/uploads/samples?name=${encodeURIComponent(file.name)}`, file);
        close({ value: `upload:${kept.id}`, name: kept.name });
      } finally {
        drop.replaceChildren(...offered);
      }
    };
    const input = html("input", { type: "file", accept: ".jsonl,.json,.csv,.txt,.parquet", "aria-label": "File of samples", change: action(async () => { if (input.files[0]) await taken(input.files[0]); }) });
    const offered = [html("p", {}, "Drop a file of samples here, or choose one. It is sent to the service and to nowhere else."), input];
    const drop = html("div", { class: "drop", dragover: (event) => { event.preventDefault(); drop.classList.add("over"); }, dragleave: () => drop.classList.remove("over"), drop: action(async (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      if (event.dataTransfer.files[0]) await taken(event.dataTransfer.files[0]);
    }) }, ...offered);
    let all = null; // the service looks through its folders once
    const files = list({
      name: "files", action, key: (one) => one.value,
      columns: [
        { title: "File", value: (one) => one.name, cell: (one) => button(one.name, () => close(one), "link") },
        { title: "Kind", value: (one) => one.kind, cell: (one) => one.kind },
        { title: "Size, MiB", value: (one) => one.bytes, cell: (one) => mib(one.bytes) },
        { title: "From", value: (one) => one.created, cell: (one) => when(one.created) },
      ],
      load: async (_, search) => ({ items: (all ??= await known()).filter((one) => one.name.toLowerCase().includes(search.toLowerCase())), next: null }),
      none: () => empty("No file of samples lies on the service's machine where it may look."),
    });
    files.reload();
    return [drop, ...(optional ? [html("p", { class: "row last" }, button("Use none", () => close({ value: "", name: "" })))] : []), ...(random ? [html("p", { class: "row last" }, button("Use random tokens, to try the plan", () => close({ value: RANDOM, name: "random tokens" }), "quiet"))] : []), files];
  });
}

async function known() {
  const [{ files }, { items: uploads }] = await Promise.all([get("/v1/files?kind=data"), get("/v1/uploads")]);
  return [
    ...uploads.map((one) => ({ value: `upload:${one.id}`, name: one.name, kind: "uploaded", bytes: one.bytes, created: one.created })),
    ...files.map((one) => ({ value: one.path, name: one.path, kind: KINDS[one.kind] ?? one.kind, bytes: one.bytes, created: one.modified })),
  ];
}

// The data that are likeliest meant, so that nobody has to look for them: {train, held}, what the names of files say, else the latest
// upload; null where nothing says so.
export async function likely() {
  const items = (await known()).filter((one) => one.kind !== "folder"), uploaded = items.filter((one) => one.value.startsWith("upload:"));
  const held = items.find((one) => HELD.test(one.name)) ?? null, others = items.filter((one) => !HELD.test(one.name));
  return { train: others.find((one) => TRAIN.test(one.name)) ?? uploaded.find((one) => others.includes(one)) ?? (others.length === 1 ? others[0] : null), held };
}

// What a look at data has to say of them: the job's result.
export async function counted(request, signal, tell = () => {}) {
  return (await work("/v1/previews", request, tell, signal)).result;
}

// A look at data as a plan's training reads them: prompts grey, what is trained on marked, what is cut or refused with its line; `offers`
// are buttons that follow from it. Gives the preview; null where the place was left.
export async function preview(box, request, signal, offers = () => []) {
  const bar = progress("Reading the data");
  box.replaceChildren(bar);
  const seen = await counted(request, signal, (latest) => bar.update(latest));
  if (signal.aborted) return null;
  const { samples, refused, counted: lines, padding_share: padding, cut } = seen, many = samples.length > SHOWN;
  const shown = html("ol", { class: "samples" }, ...samples.slice(0, SHOWN).map(sample));
  const more = many ? button(`Show ${samples.length - SHOWN} more`, () => { shown.append(...samples.slice(SHOWN).map(sample)); more.remove(); }, "quiet") : null;
  const words = [`${lines.toLocaleString("en")} samples`, padding === null || padding === undefined ? null : `${percent(padding, 0)} of the places are padding`, cut ? `${cut.toLocaleString("en")} are longer than the plan's length and would be cut` : null].filter(Boolean), buttons = offers(seen);
  box.replaceChildren(...[
    html("p", {}, words.join("; "), ".", buttons.length ? " Padding is computed like anything else:" : ""),
    buttons.length ? html("div", { class: "row", id: "against-padding" }, ...buttons) : null,
    refused.length ? html("div", { class: "refused" }, html("h3", { class: "not" }, `${refused.length} cannot be used`), scrolling("What cannot be used", table("", ["line", "why"], refused.map((one) => [String(one.line), plainly(one.why)])))) : null,
    html("p", { class: "soft" }, "What the model is shown is grey; what it learns to write is ", html("mark", {}, "marked"), "."),
    shown, more,
  ].filter(Boolean));
  return seen;
}

// Shorter lengths at which a step would hold these samples, from a preview: the shortest that holds all of them, and one that holds nearly
// all where that is shorter: [{seq, cuts}], `cuts` samples of `of`.
const NEARLY = 0.05; // share of the samples that may be cut
export function shorterLengths({ longer = [], counted: lines, refused_count: refused = 0 }) {
  const of = lines - refused, all = longer.find(([, over]) => over === 0), most = longer.find(([, over]) => over <= NEARLY * of);
  return [all, most].filter((one, index, both) => one && (!index || !both[0] || one[0] < both[0][0])).map(([seq, cuts]) => ({ seq, cuts, of }));
}

const sample = ({ line, pieces, tokens, cut }) => html("li", {}, html("span", { class: "soft where" }, `line ${line}, ${tokens} tokens${cut ? ", cut" : ""}`), html("p", {}, ...pieces.map(({ text, trained }) => html(trained ? "mark" : "span", trained ? {} : { class: "soft" }, text))));
