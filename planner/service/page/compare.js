// Several plans side by side, or several runs: what differs first, then their steps or losses, then what becomes of each tensor.

import { get, pageOf } from "./api.js";
import { html, seconds, size } from "./charts.js";
import { button, dialog, empty, field, heading, list, scrolling, section, table, when } from "./components.js";
import { chartBox } from "./lines.js";
import { fits, gapWords, misfit, nameOfPlan as nameOf, nameOfRule, SOLVER } from "./rules.js";
import { showLoss } from "./run_report.js";
import { nameOf as runName, STATES } from "./runs.js";
import { action, to } from "./addresses.js";
import { letter, sideBySide } from "./side_by_side.js";
import { showSteps, stepOf } from "./timeline.js";

const AT_ONCE = 50;

export async function show(place) {
  const { root, query, signal } = place, runs = listed(query.runs), plans = listed(query.plans);
  if (runs.length) return compareRuns(root, runs, signal);
  if (plans.length) return comparePlans(place, plans);
  root.append(heading("Compare"), empty("Nothing is chosen yet: tick several in the list of plans, or of runs.", html("a", { href: to("plans") }, "Plans"), html("a", { href: to("runs") }, "Runs")));
}

const listed = (text) => [...new Set((text ?? "").split(",").filter(Boolean))];

// --- plans ------------------------------------------------------------------------------------------------------------

async function comparePlans({ root, query, signal, keep, title }, ids) {
  const shown = await Promise.all(ids.map(async (id) => { const [plan, view] = await Promise.all([get(`/v1/plans/${id}`), get(`/v1/plans/${id}/view`)]); return { id, plan, view }; }));
  if (signal.aborted) return;
  title(`${shown.length} plans`);
  const names = called(shown.map(({ plan }) => nameOf(plan))), again = async (next) => { query.plans = next.join(","); keep({ plans: query.plans }); root.replaceChildren(); await comparePlans({ root, query, signal, keep, title }, next); };
  const links = shown.map(({ id }, i) => html("a", { href: to("plans", id) }, names[i]));
  root.append(
    heading("Plans side by side", button("Add a plan", action(async () => { const chosen = await choosePlan(ids, shown[0].plan.profile); if (chosen) await again([...ids, chosen]); }))),
    html("ul", { class: "row bare chosen" }, ...shown.map(({ id }, i) => html("li", { class: "pill" }, html("b", {}, letter(i)), " ", links[i].cloneNode(true), " ", dropping(names[i], () => again(ids.filter((one) => one !== id)), ids.length > 1)))),
    shown.length < 2 ? empty("Add another plan to compare this one with.") : section("What differs", sideBySide("Figures of each plan; the best is marked", links, figuresOf(shown))),
  );
  const fitting = shown.filter(({ view }) => view.fits);
  if (fitting.length) await steps(root, fitting, (one) => `${letter(shown.indexOf(one))}: ${names[shown.indexOf(one)]}`, signal);
  if (fitting.length > 1 && !signal.aborted) tensors(root, fitting, (one) => `${letter(shown.indexOf(one))}: ${names[shown.indexOf(one)]}`);
}

function dropping(name, drop, allowed) {
  const made = button("×", action(drop), "quiet close");
  made.setAttribute("aria-label", `Leave out ${name}`);
  made.hidden = !allowed;
  return made;
}

// Names that are told apart: equal ones are numbered.
function called(names) {
  return names.map((name, i) => (names.filter((other) => other === name).length > 1 ? `${name} (${names.slice(0, i + 1).filter((other) => other === name).length})` : name));
}

function figuresOf(shown) {
  const of = (get) => shown.map(({ view }) => get(view)), summary = (get) => of((view) => get(view.summary)), train = (name) => of(({ summary: one }) => one.train?.[name] ?? null);
  const fits = (get) => of((view) => (view.fits ? get(view.summary) : null)), time = (value) => `${seconds(value)} s`;
  const decided = (group, decision) => of((view) => (view.fits ? view.layers.reduce((sum, layer) => sum + (layer.decisions[group]?.[decision] ?? 0), 0) : null));
  return [
    { label: "model", values: of((view) => view.model) },
    { label: "what is trained", values: of((view) => view.about) },
    { label: "fits", values: of((view) => (view.fits ? "yes" : "no")) },
    { label: "planned by", values: summary((one) => (one.policy === SOLVER ? "search" : `rule “${nameOfRule(one.policy)}”`)) },
    { label: "budget", values: summary((one) => one.budget_bytes), text: size },
    { label: "smallest budget that is enough", values: of((view) => (view.fits ? null : view.summary.minimum_budget_bytes)), text: size },
    { label: "one step, by the model", values: fits((one) => one.step_seconds), text: time, better: -1 },
    { label: "peak memory", values: fits((one) => one.peak_bytes), text: size, better: -1 },
    { label: "at most slower than the best of its kind", values: fits((one) => one.gap), text: gapWords },
    { label: "computed again, per step", values: train("recompute_seconds"), text: time, better: -1 },
    { label: "unpacking weights, per step", values: train("unpack_seconds"), text: time, better: -1 },
    { label: "cores wait, per step", values: train("stall_seconds"), text: time, better: -1 },
    { label: "read, per step", values: train("read_bytes"), text: size, better: -1 },
    { label: "written, per step", values: train("write_bytes"), text: size, better: -1 },
    { label: "activations kept", values: decided("activations", "kept"), text: size },
    { label: "activations computed again", values: decided("activations", "recomputed"), text: size },
    { label: "activations moved out and back", values: decided("activations", "offloaded"), text: size },
    { label: "weights in memory unpacked", values: decided("weights", "unpacked"), text: size },
    { label: "weights in memory packed", values: decided("weights", "packed"), text: size },
    { label: "weights read for each use", values: decided("weights", "streamed"), text: size },
    { label: "optimizer's states moved out", values: decided("states", "offloaded"), text: size },
    { label: "instructions", values: of(({ summary: one }) => one.train?.instructions ?? null) },
  ];
}

// All steps on one scale, one below the other.
async function steps(root, fitting, name, signal) {
  const boxes = fitting.map((one) => html("div", { class: "step" }, html("h3", {}, name(one)), html("div", {}, html("p", { class: "soft busy" }, "loading the step …"))));
  root.append(section("One step of each, on one scale", ...boxes));
  const loaded = [];
  for (const { id } of fitting) loaded.push(stepOf(await get(`/v1/plans/${id}/timeline`)));
  if (signal.aborted) return;
  showSteps(loaded.map((step, i) => ({ box: boxes[i].lastChild, step, name: name(fitting[i]) })));
}

// What becomes of each tensor in one of them and in another.
function tensors(root, fitting, name) {
  const box = html("div"), choice = (chosen) => { const made = html("select", { class: "wide" }, ...fitting.map((one) => html("option", { value: one.id }, name(one)))); made.value = chosen.id; return made; };
  const first = choice(fitting[0]), second = choice(fitting[1]);
  const load = action(async () => {
    const difference = await get(`/v1/plans/${first.value}/changes/${second.value}`), fate = (decision) => decision ?? "not there", change = (one) => (one.before === one.after ? fate(one.before) : `${fate(one.before)} → ${fate(one.after)}`);
    const cost = (value) => (Math.abs(value) < 5e-7 ? "0" : `${value > 0 ? "+" : "−"}${seconds(Math.abs(value))}`);
    const sums = difference.groups.map((group) => [`${group.kind}: ${change(group)}`, String(group.tensors), size(group.bytes), cost(group.compute_seconds), cost(group.transfer_seconds)]);
    const rows = difference.changes.map((one) => [one.name, one.layer, size(one.bytes), change(one), cost(one.compute_seconds), cost(one.transfer_seconds)]);
    box.replaceChildren(...(sums.length ? [
      scrolling("Changes by sort", table("By sort of change; seconds per step that it costs (+) or saves (−)", ["change", "tensors", "size", "cores, s", "channels, s"], sums)),
      html("details", {}, html("summary", {}, "Tensor by tensor"), scrolling("Changes tensor by tensor", table(difference.left_out ? `Largest first; ${difference.left_out} more are left out` : "Largest first", ["tensor", "layer", "size", "change", "cores, s", "channels, s"], rows))),
    ] : [html("p", {}, "Both treat every tensor the same.")]));
  });
  for (const one of [first, second]) one.addEventListener("change", load);
  root.append(section("What becomes of the tensors", html("div", { class: "beside" }, field("from", first), field("to", second)), box));
  load();
}

// One more plan, of the same model first.
const choosePlan = (ids, profile) => dialog("Add a plan", (close) => {
  const plans = list({
    name: "plans", action,
    columns: [
      { title: "Plan", value: nameOf, cell: (plan) => { const made = button(nameOf(plan), () => close(plan.id), "link"); made.disabled = ids.includes(plan.id); return made; } },
      { title: "Seconds per step", value: (plan) => plan.summary.expected_seconds, cell: (plan) => (fits(plan.summary) ? seconds(plan.summary.expected_seconds) : misfit(plan.summary)) },
      { title: "Made", value: (plan) => -plan.created, cell: (plan) => when(plan.created) },
    ],
    load: async (after, search) => {
      const { items, next } = await pageOf("plans", { limit: AT_ONCE, after, search });
      return { items: items.sort((a, b) => (b.profile === profile) - (a.profile === profile)), next };
    },
    none: () => empty("There is no other plan."),
  });
  plans.reload();
  return plans;
});

// --- runs -------------------------------------------------------------------------------------------------------------

async function compareRuns(root, ids, signal) {
  const runs = await Promise.all(ids.map(async (id) => { const [job, metrics] = await Promise.all([get(`/v1/jobs/${id}`), get(`/v1/runs/${id}/metrics`)]); return { id, job, metrics, report: job.result?.report ?? null }; }));
  if (signal.aborted) return;
  const names = called(runs.map(({ job }) => runName(job))), loss = chartBox("Loss"), links = runs.map(({ id }, i) => html("a", { href: to("runs", id) }, names[i]));
  const of = (get) => runs.map(({ job, metrics, report }) => get(job, metrics, report) ?? null), time = (value) => `${seconds(value)} s`, four = (value) => value.toFixed(4);
  const asked = [...new Set(runs.flatMap(({ job }) => Object.keys(job.request)))].filter((name) => !["plan", "data", "eval_data"].includes(name) && of((job) => job.request[name]).every((value) => value === null || typeof value !== "object"));
  root.append(
    heading("Runs side by side"),
    section("What differs", sideBySide("Figures of each run; the best is marked", links, [
      { label: "state", values: of((job) => STATES[job.state]) },
      { label: "steps taken", values: of((job, metrics) => metrics.steps.at(-1)?.step) },
      { label: "loss of the last step", values: of((job, metrics) => metrics.steps.at(-1)?.loss), text: four, better: -1 },
      { label: "held-out loss before", values: of((job, metrics, report) => report?.evaluation?.before?.loss), text: four },
      { label: "held-out loss after", values: of((job, metrics, report) => report?.evaluation?.after?.loss), text: four, better: -1 },
      { label: "budget", values: of((job, metrics) => metrics.budget_bytes), text: size },
      { label: "peak, measured", values: of((job, metrics, report) => report?.peak_bytes?.measured ?? metrics.steps.at(-1)?.peak_bytes), text: size, better: -1 },
      { label: "peak, predicted", values: of((job, metrics, report) => report?.peak_bytes?.predicted), text: size },
      { label: "one step, measured", values: of((job, metrics, report) => report?.step_seconds?.measured), text: time, better: -1 },
      { label: "one step, predicted", values: of((job, metrics, report) => report?.step_seconds?.predicted), text: time },
      { label: "tokens a second", values: of((job, metrics, report) => report?.tokens?.per_second), text: (value) => Math.round(value).toLocaleString("en"), better: 1 },
      { label: "data", values: of((job) => job.request.data) },
      { label: "held-out data", values: of((job) => job.request.eval_data) },
      ...asked.map((name) => ({ label: name === "steps" ? "steps asked for" : name.replaceAll("_", " "), values: of((job) => job.request[name]) })),
    ])),
    html("ul", { class: "row bare chosen" }, ...links.map((link, i) => html("li", { class: "pill" }, html("b", {}, letter(i)), " ", link.cloneNode(true)))),
    section("Loss", loss.whole),
  );
  showLoss(loss, runs.map(({ metrics }, i) => [`${letter(i)}: ${names[i]}`, metrics]));
}
