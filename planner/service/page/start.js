// The first ten seconds: an example that is planned already, three doors, and what was done last.

import { get } from "./api.js";
import { html, seconds, size } from "./charts.js";
import { heading, mib, section, when } from "./components.js";
import { nameOf as nameOfModel } from "./models.js";
import { fits, misfit, nameOfPlan } from "./rules.js";
import { nameOf as nameOfRun, stateOf } from "./runs.js";
import { choose, dropZone } from "./sources.js";
import { complain, go, to } from "./addresses.js";
import { showStep, stepOf } from "./timeline.js";

const LATEST = 6, AGAIN = 2000; // ms between two looks for the example's plans

export async function show({ root, signal }) {
  const [{ items: profiles }, { items: plans }, { items: runs }] = await Promise.all([get("/v1/profiles?limit=50"), get(`/v1/plans?limit=${LATEST}&asked=true`), get(`/v1/runs?limit=${LATEST}`)]);
  if (signal.aborted) return;
  const example = profiles.find((one) => one.origin === "example");
  root.append(...[
    heading("Train in the memory you have"),
    html("p", { class: "soft" }, "Will this model train in this memory, how fast, and what changes with a little more? tightfit measures a model, plans every byte of a training step, and runs it inside a hard limit."),
    html("div", { class: "doors" },
      section("Drop a file", html("p", { class: "soft" }, "A model (GGUF, safetensors, config.json), a profile, a plan or a graph. Of a model only the header is read here in the browser; its weights are never uploaded."), dropZone((identity) => go("models", identity), complain)),
      section("Pick a model", html("p", { class: "soft" }, "From what lies on the service's machine, or a published shape to estimate."), html("div", { class: "row last" }, html("button", { type: "button", class: "main", click: () => choose().catch(complain) }, "Choose a model"))),
      example ? section("See an example", html("p", { class: "soft" }, `${example.title ?? example.name}, planned already: drag the budget and see what the plan does.`), html("div", { class: "row last" }, html("button", { type: "button", click: () => go("models", example.id) }, "Open the example"))) : null,
    ),
    latest("Fine-tuned last", runs, (run) => [html("a", { href: to("runs", run.id) }, nameOfRun(run)), stateOf(run), when(run.created)]),
    latest("Models", profiles.slice(0, LATEST), (one) => [html("a", { href: to("models", one.id) }, nameOfModel(one)), html("span", { class: "soft" }, one.summary.device ?? ""), when(one.created)]),
    latest("Planned last", plans, (plan) => [html("a", { href: to("plans", plan.id) }, nameOfPlan(plan)), html("span", { class: "soft" }, fits(plan.summary) ? `${seconds(plan.summary.expected_seconds)} s, ${mib(plan.summary.budget_bytes)} MiB` : misfit(plan.summary)), when(plan.created)]),
  ].filter(Boolean));
  if (example && !runs.length && profiles.length === 1) picture(root.querySelector(".doors"), example, signal).catch(complain);
}

// What tightfit is about, on a service that holds nothing yet: the example's step in the middle of its curve.
async function picture(doors, example, signal) {
  const planned = async () => (await get(`/v1/plans?profile=${example.id}&limit=50`)).items.filter((plan) => fits(plan.summary)).sort((a, b) => a.summary.budget_bytes - b.summary.budget_bytes);
  let fitting = await planned();
  while (!fitting.length && !signal.aborted) { // it is being planned: the service has just begun
    await new Promise((resolve) => setTimeout(resolve, AGAIN));
    fitting = await planned();
  }
  if (signal.aborted) return;
  const plan = fitting[Math.floor(fitting.length / 2)], columns = await get(`/v1/plans/${plan.id}/timeline`), name = `${columns.model} in ${size(columns.budget)}`;
  if (signal.aborted) return;
  const box = html("div", { class: "step" });
  doors.after(section(`One training step of ${name}`, html("p", { class: "soft" }, `${seconds(plan.summary.expected_seconds)} s, and never above the line. `, html("a", { href: to("plans", plan.id) }, "See why it is done so")), box));
  showStep(box, stepOf(columns), { name });
}

const latest = (title, items, row) => (items.length ? section(title, html("ul", { class: "bare" }, ...items.map((item) => html("li", { class: "row" }, ...row(item))))) : null);
