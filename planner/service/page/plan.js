// One plan: what it does in plain words, its figures, its step to move in, what fills the memory, its layers and channels.

import { download, get, patch, remove } from "./api.js";
import { atLeast, html, kindColour, seconds, size } from "./charts.js";
import { bar, button, card, confirmed, editable, heading, mib, note, numbers, percent, scrolling, section, table, when } from "./components.js";
import { explained } from "./glossary.js";
import { inWords, nameOfPlan as nameOf, nameOfRule, SOLVER } from "./rules.js";
import { action, go, to } from "./addresses.js";
import { showStep, stepOf } from "./timeline.js";

const ROWS = 60; // of a table of layers, before one asks for more
const MOST_LAYERS = 400; // more are the operators of a graph

export async function show({ root, id, signal, title }) {
  const [plan, view] = await Promise.all([get(`/v1/plans/${id}`), get(`/v1/plans/${id}/view`)]);
  if (signal.aborted) return;
  const { summary } = view, feasible = view.fits, given = plan.label ?? `${view.model} in ${mib(summary.budget_bytes)} MiB`;
  const save = (fields) => patch(`/v1/plans/${id}`, fields);
  title(nameOf(plan));
  root.append(
    heading(editable(nameOf(plan), async (text) => { const kept = await save({ title: text }), shown = kept.title ?? given; Object.assign(plan, { title: kept.title }); title(shown); return shown; }, { label: "name of the plan", action }), ...actions(plan, view)),
    html("p", { class: "soft" }, plan.profile ? html("a", { href: to("models", plan.profile, { budget: summary.budget_bytes, policy: summary.policy }) }, view.model) : view.model, `, ${view.about}; planned `, when(plan.created)),
    note(plan.note, (text) => save({ note: text }), action),
    section(feasible ? "What this plan does" : "Why it does not fit", html("ul", { class: "plain-words" }, ...words(view.gist)), html("dl", { class: "cards" }, ...cards(view))),
  );
  if (feasible) {
    const box = html("div", { class: "step" }, html("p", { class: "soft busy" }, "loading the step …"));
    root.append(
      section("One step", box),
      html("div", { class: "beside" }, peak(view.peak), channels(view)),
      layers(view),
    );
    get(`/v1/plans/${id}/timeline`).then((columns) => { if (!signal.aborted) showStep(box, stepOf(columns), { name: nameOf(plan) }); }).catch((error) => box.replaceChildren(html("p", {}, error.message)));
  }
  if (view.details.length) root.append(html("details", {}, html("summary", {}, "With more figures"), html("ul", { class: "plain" }, ...view.details.map((text) => html("li", {}, text)))));
}

function words(sentences) {
  const told = new Set();
  return sentences.map((text) => html("li", {}, ...explained(text, told)));
}

function actions(plan, view) {
  const { summary } = view;
  return [
    view.fits && !view.not_runnable ? button("Fine-tune with it", () => go("runs", "", { new: 1, plan: plan.id }), "main") : null,
    view.fits && view.not_runnable ? html("span", { class: "pill", title: view.not_runnable }, "cannot run on this machine") : null,
    view.fits ? null : button("Choose another budget", () => go("models", plan.profile, { budget: summary.minimum_budget_bytes }), "main"),
    button("Compare", () => go("compare", "", { plans: plan.id })),
    button("Download", action(() => download(`/v1/plans/${plan.id}/file`, "plan.json"))),
    button("Delete", action(async () => {
      if (!(await confirmed(`Delete the plan “${nameOf(plan)}”?`, "Delete"))) return;
      await remove(`/v1/plans/${plan.id}`);
      go("plans");
    }), "danger"),
  ].filter(Boolean);
}

function cards({ summary, fits }) {
  if (!fits) {
    const least = summary.minimum_budget_bytes;
    return [
      ["asked for", `${mib(summary.budget_bytes)} MiB`, "for everything"],
      [summary.deterministic === false ? "smallest found so far" : "smallest that is enough", least ? `${atLeast(least)} MiB` : "unknown", least ? `${atLeast(least - summary.budget_bytes)} MiB more` : ""],
    ].map((one) => card(...one));
  }
  const { train } = summary, share = (value) => percent(value / (summary.step_seconds || 1));
  return [
    ["one step", `${seconds(summary.expected_seconds)} s`, `${whence(summary)}; ${summary.policy === SOLVER ? `at best ${seconds(summary.bound_seconds)} s` : `by the rule “${nameOfRule(summary.policy)}”`}`],
    ["peak memory", size(summary.peak_bytes), `of ${size(summary.budget_bytes)}`],
    ["computed again", `${seconds(train.recompute_seconds)} s`, `${share(train.recompute_seconds)} of the step`],
    ["read and written", size(train.read_bytes + train.write_bytes), `per step; ${seconds(train.stall_seconds)} s of waiting`],
  ].map((one) => card(...one));
}

// Where the seconds that a step is expected to take come from.
function whence({ expected_from: from, busy_machine: busy, step_seconds: model }) {
  const beside = busy ? " beside other programs" : "";
  return from === "rehearsal" ? `as rehearsed${beside}, ${seconds(model)} s by the model` : `by the model${busy ? `, measured${beside}` : ""}`;
}

function peak({ parts, bytes, instruction, text, tensors }) {
  const rows = parts.filter((part) => part.bytes >= Math.min(52429, bytes / 1000)).map((part) => [html("span", {}, ...explained(part.label)), bar(part.bytes / bytes, kindColour(part.name)), size(part.bytes), percent(part.bytes / bytes, 0)]);
  rows.push(["together", "", size(bytes), ""]);
  return section("What fills the memory",
    scrolling("At the fullest moment", table(`At the fullest moment, instruction ${instruction + 1}: ${inWords(text)}`, ["what", "", "size", "share"], rows)),
    html("details", {}, html("summary", {}, "Largest tensors there"), scrolling("Largest tensors", table("Largest tensors at the fullest moment", ["tensor", "size"], tensors.map(([name, most]) => [name, size(most)])))));
}

const CHANNELS = { compute: "cores compute", read: "read", write: "write", waiting: "cores wait" };

const channels = (view) => section("Who is busy",
  scrolling("Who is busy", table("Share of the step; they work beside each other", ["", "", "share", "seconds", "moved"], view.channels.map((row) => [CHANNELS[row.name] ?? row.name, bar(row.share, `var(--step-${{ compute: "forward", waiting: "wait" }[row.name] ?? row.name})`), percent(row.share), seconds(row.seconds), row.bytes ? size(row.bytes) : "–"]))));

function layers(view) {
  const together = (decisions) => Object.entries(decisions || {}).filter(([, bytes]) => bytes).map(([name, bytes]) => `${name} ${size(bytes)}`).join(", ") || "–";
  const row = (layer) => [layer.name, seconds(layer.forward_seconds), seconds(layer.backward_seconds), together(layer.decisions.activations), together(layer.decisions.weights), together(layer.decisions.states)];
  const box = html("div"), what = view.layers.length > MOST_LAYERS ? "operators" : "layers";
  const list = (limit) => {
    const more = view.layers.length > limit ? button(`Show more of ${view.layers.length}`, () => list(limit * 4), "quiet") : null;
    box.replaceChildren(...[table("What becomes of each", ["layer", "forward, s", "backward, s", "activations", "weights", "optimizer's states"], view.layers.slice(0, limit).map(row)), more].filter(Boolean));
  };
  list(ROWS);
  return section(`The ${what}`, numbers("In the order of the forward, in numbers", box));
}
