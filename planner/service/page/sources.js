// How a model comes in, without a typed path: files that are dropped or chosen, what lies on the service's machine, published shapes.

import { get, post } from "./api.js";
import { html, size } from "./charts.js";
import { button, dialog, empty, field, loading, progress } from "./components.js";
import { asked, beside, complete, forget } from "./forms.js";
import { headerOf, parametersOf, precisionOf } from "./headers.js";
import { go } from "./addresses.js";

const HEADERS = [".gguf", ".safetensors"];
const LARGE = 3e9; // parameters from which on measuring with random weights is not what somebody wants first
const LARGEST_JSON = 1 << 28;

const count = (number) => (number >= 9.95e8 ? `${(number / 1e9).toFixed(number >= 1e10 ? 0 : 1)} billion` : `${Math.max(1, Math.round(number / 1e6))} million`);

// --- files ------------------------------------------------------------------------------------------------------------

// A place to drop files, or to choose one; `then` gets the id of the profile that comes of it, or of the measurement.
export function dropZone(then, complain) {
  const input = html("input", { type: "file", class: "unseen", multiple: true, accept: ".json,.gguf,.safetensors,application/json", "aria-label": "Choose a file of a model", tabindex: -1 });
  const said = html("span", { class: "soft", role: "status" });
  const take = async (files) => {
    if (!files.length) return;
    said.textContent = " reading …";
    try {
      await arrive([...files], then);
    } catch (error) {
      complain(error);
    } finally {
      said.textContent = "";
      input.value = "";
    }
  };
  const box = html("div", { class: "drop" }, html("p", {}, "Drop a file here, or ", html("button", { type: "button", class: "link", click: () => input.click() }, "choose one"), said), html("small", {}, "profile.json, plan.json, a graph, config.json, GGUF or safetensors. Weights are not uploaded."), input);
  input.addEventListener("change", () => take(input.files));
  box.addEventListener("dragover", (event) => { event.preventDefault(); box.classList.add("over"); });
  for (const end of ["dragleave", "drop"]) box.addEventListener(end, () => box.classList.remove("over"));
  box.addEventListener("drop", (event) => { event.preventDefault(); take(event.dataTransfer.files); });
  return box;
}

// What is in a file: {kind, …}, where kind is profile, graph, plan, adapter, config, header.
export async function recognised(file) {
  const name = file.name.toLowerCase();
  if (HEADERS.some((end) => name.endsWith(end))) return { kind: "header", file, header: await headerOf(file) };
  if (file.size > LARGEST_JSON) throw new Error(`${file.name} has ${size(file.size)}; a profile or plan is smaller. Of a model's weights a GGUF or safetensors file is read`);
  const text = await file.text();
  let data;
  try { data = JSON.parse(text); } catch (error) { throw new Error(`${file.name} is neither JSON (${error.message}) nor a GGUF or safetensors file; drop one of these`); }
  if (data === null || typeof data !== "object" || Array.isArray(data)) throw new Error(`${file.name} is JSON, but no profile, plan, graph or config.json`);
  if (data.format === "tightfit-graph" || (Array.isArray(data.operators) && !data.layers)) return { kind: "graph", file, text };
  if (data.profile_fingerprint && data.budget_bytes) return { kind: "plan", file, plan: data };
  if (Array.isArray(data.layers) && data.device) return { kind: "profile", file, text };
  if (data.peft_type) return { kind: "adapter", file };
  if (data.model_type || data.architectures || data.text_config) return { kind: "config", file, config: data };
  throw new Error(`${file.name} is JSON, but no profile, plan, graph or config.json: ${Object.keys(data).length ? `its fields are called ${Object.keys(data).slice(0, 5).join(", ")}` : "nothing is in it"}`);
}

const ORDER = ["profile", "graph", "plan", "config", "header", "adapter"]; // of several files the first of these says most

async function arrive(files, then) {
  const known = [];
  let wrong = null;
  for (const file of files) {
    try { known.push(await recognised(file)); } catch (error) { wrong = error; }
  }
  if (!known.length) throw wrong;
  known.sort((a, b) => ORDER.indexOf(a.kind) - ORDER.indexOf(b.kind));
  const [first] = known;
  if (first.kind === "profile" || first.kind === "graph") return then((await post("/v1/uploads/profile", first.text)).id);
  if (first.kind === "plan") return plan(first);
  if (first.kind === "adapter") throw new Error(`${first.file.name} describes an adapter, not a model. Choose its base model, and name the adapter among more options`);
  const header = known.find(({ kind, file }) => kind === "header" && file.name.endsWith(".gguf")) ?? first;
  const started = await offer(first.kind === "config" ? first : header, known.find(({ kind }) => kind === "header"));
  if (started) then(started);
}

// A plan names the profile that it was made of: where that is here, the plan or its model is opened.
async function plan({ file, plan: { profile_fingerprint: of, fingerprint, budget_bytes: budget, policy, model } }) {
  const { items: profiles } = await get("/v1/profiles?limit=1000"), profile = profiles.find(({ summary }) => summary.fingerprint === of);
  if (profile) {
    const { items: plans } = await get(`/v1/plans?${new URLSearchParams({ profile: profile.id, limit: 1000 })}`), same = plans.find(({ summary }) => summary.fingerprint === fingerprint);
    return same ? go("plans", same.id) : go("models", profile.id, { budget, policy });
  }
  await dialog("A plan", (close) => [
    html("p", {}, `${file.name} is a plan of ${model?.name ?? "a model"} in ${size(budget)}. What it was made of is not here: a plan is opened by way of its profile.`),
    html("p", { class: "soft" }, "Drop the profile.json that lies beside it; the plan is then made again in the same memory. Or measure the model here."),
    html("div", { class: "row last" }, button("Choose a model", async () => { close(); await choose(); }), button("Close", () => close(), "main")),
  ]);
}

// --- what a model can be made of --------------------------------------------------------------------------------------

// What is known of a model: `sources` [{label, request}] are ways to measure it, the best first; `facts` say what it is.
const underRoot = (file) => ({
  title: file.name, facts: facts(file), large: false,
  sources: [{ label: "", request: { path: file.path } }],
});
const published = (shape) => ({
  title: shape.name, facts: `${facts(shape)} Its weights are not here: random ones stand for them, which need the same memory and time.`, large: shape.parameters > LARGE,
  sources: [{ label: "", request: { config: shape.config } }],
});

function facts({ family, parameters, layers, precision, bytes }) {
  const parts = [family, parameters ? `${count(parameters)} parameters` : null, layers ? `${layers} layers` : null, precision ? `mostly ${precision}` : null, bytes ? size(bytes) : null];
  return `${parts.filter(Boolean).join(", ")}.`;
}

async function offer(first, weights) {
  const { files } = await get("/v1/files?kind=models").catch((error) => { if (error.status === 404) return { files: [] }; throw error; });
  const header = weights?.header, parameters = header ? parametersOf(header) : null;
  const names = (file) => file.path.split("/").at(-1) === weights?.file.name || (file.kind === "folder" && parameters && file.parameters === parameters);
  const here = files.filter(names).sort((a, b) => (b.bytes === weights.file.size) - (a.bytes === weights.file.size));
  const sources = here.map((file) => ({ label: `with its weights: ${file.path} on the service's machine`, request: { path: file.path } }));
  if (first.kind === "config") sources.push({ label: "with random weights of this shape", request: { config: first.config } });
  // Of safetensors files the header does not say how the model computes; its config.json does.
  if (header && (weights.file.name.toLowerCase().endsWith(".gguf") || !sources.length)) sources.push({ label: "with random weights of this shape, as the file's header has it", request: { header: weights.header } });
  const config = first.config?.text_config ?? first.config ?? {}, metadata = header?.metadata ?? {};
  const family = metadata["general.architecture"] ?? config.model_type ?? null;
  const about = facts({ family, parameters, layers: metadata[`${family}.block_count`] ?? config.num_hidden_layers ?? null, precision: header ? precisionOf(header) : null, bytes: weights?.file.size });
  const stays = weights ? " Only its header was read, in this browser; the weights stayed where they are." : "";
  const title = metadata["general.name"] ?? first.config?._name_or_path ?? first.file.name;
  return dialog(String(title), (close) => settings({ title, facts: about + stays, sources, large: parameters > LARGE }, close, null));
}

// --- choosing ---------------------------------------------------------------------------------------------------------

// A dialog with all that can be chosen; what is chosen is measured, and the page goes to its measurement.
export async function choose() {
  const started = await dialog("Choose a model", (close) => {
    const box = html("div", { class: "choosing" }, loading("looking what lies here …"));
    fill(box, close).catch((error) => box.replaceChildren(html("p", { class: "wrong", role: "alert" }, error.message)));
    return box;
  });
  if (started) go("models", started);
}

async function fill(box, close) {
  const [{ roots, files, cut }, { shapes }] = await Promise.all([get("/v1/files?kind=models"), get("/v1/gallery")]);
  box.closest("dialog")?.classList.add("large");
  const search = html("input", { type: "search", placeholder: "Search models", "aria-label": "Search models", class: "wide" }), found = html("div");
  const pick = (model) => box.replaceChildren(...settings(model, close, () => { box.replaceChildren(...all); search.focus(); }));
  const rows = (items, make) => html("ul", { class: "bare picks" }, ...items.map((item) => html("li", {}, html("button", { type: "button", class: "pick", click: () => pick(make(item)) }, html("strong", {}, item.name), html("span", { class: "soft" }, facts(item)), item.path && item.path !== item.name ? html("small", {}, item.path) : null))));
  const draw = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean), hit = (item) => words.every((word) => `${item.name} ${item.family} ${item.path ?? ""}`.toLowerCase().includes(word));
    const here = files.filter(hit), shown = shapes.filter(hit);
    found.replaceChildren(...[
      html("h3", {}, roots?.length ? `On the service's machine, under ${roots.join(" and ")}` : "On the service's machine"),
      here.length ? rows(here, underRoot) : empty(!roots?.length ? "No folder of models is open to this page. Whoever started the service opens one; published models below need none." : words.length ? "No model here is called so." : "No model lies in the open folders."),
      cut ? html("p", { class: "soft" }, "There is more than was looked at.") : null,
      html("h3", {}, "Published models, by their shape"),
      shown.length ? rows(shown, published) : empty("No published model here is called so."),
    ].filter(Boolean));
  };
  const all = [search, found];
  search.addEventListener("input", draw);
  // Enter takes what is left where nothing else is.
  search.addEventListener("keydown", (event) => {
    const hits = found.querySelectorAll(".pick");
    if (event.key === "Enter" && hits.length === 1) { event.preventDefault(); hits[0].click(); }
  });
  draw();
  box.replaceChildren(...all);
  search.focus();
}

// What matters of a step, with the rest folded; measuring is started, and `close` gets the id of the measurement, or of the profile that
// an equal one has made before.
function settings({ title, facts: about, sources, large }, close, back) {
  const wrong = html("p", { class: "wrong", role: "alert", hidden: true }), bar = progress("Starting");
  const number = (name, value, most) => html("input", { name, type: "number", min: 1, max: most, value, required: true });
  const source = html("select", { name: "of" }, ...sources.map(({ label }, index) => html("option", { value: index }, label)));
  const device = html("select", { name: "device" }, html("option", { value: "cpu" }, "this machine: measured, and can be run"));
  const submit = html("button", { class: "main" }, "Measure");
  const form = html("form", { id: "measure", class: "stack" },
    html("p", { class: "soft" }, about),
    sources.length > 1 ? field("What to measure", source) : null,
    html("div", { class: "row" },
      field("Length, tokens", number("seq", 256, 1 << 20), "the longest sample"),
      field("Batch", number("batch", 1, 1 << 16), "samples of a step"),
      field("LoRA rank", number("lora_rank", 8, 1 << 14), "size of the adapter"),
      field("For", device, "others are estimated"),
    ),
    html("details", { class: "more" }, html("summary", {}, "More options"), html("div", { class: "row" })),
    wrong, html("div", { class: "row last" }, submit, back ? button("Back", back) : null, bar),
  );
  bar.hidden = true;
  complete(form, "profile", ["path", "hub", "config", "header"]).catch(() => {});
  get("/v1/devices").then(({ devices }) => {
    device.append(...devices.filter((one) => !one.local).map((one) => html("option", { value: one.name }, `${one.label}: estimated`)));
    if (large) form.elements.device.selectedIndex = Math.min(1, device.options.length - 1);
    rename();
  }).catch(() => {});
  const rename = () => { submit.textContent = device.value === "cpu" ? "Measure" : "Estimate"; };
  device.addEventListener("change", rename);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    forget(form);
    wrong.hidden = true;
    submit.disabled = true;
    bar.hidden = false;
    try {
      const request = { ...(await asked(form, "profile")), ...sources[source.value || 0].request };
      if (request.device === "cpu") delete request.device;
      const job = await post("/v1/profiles", request);
      close(job.result?.profile ?? job.id);
    } catch (error) {
      if (!beside(form, error)) {
        wrong.textContent = error.message;
        wrong.hidden = false;
      }
    } finally {
      submit.disabled = false;
      bar.hidden = true;
    }
  });
  return [back ? html("h3", {}, String(title)) : null, form].filter(Boolean); // alone in its dialog, that has the title
}
