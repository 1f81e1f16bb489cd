// All plans: found by name, sorted by their figures, compared, deleted.

import { get, pageOf, remove } from "./api.js";
import { html, seconds, size } from "./charts.js";
import { button, confirmed, empty, heading, list, when } from "./components.js";
import { nameOf as nameOfModel } from "./models.js";
import { fits as hasSchedule, gapWords, misfit, nameOfPlan as nameOf, nameOfRule, SOLVER, unusual } from "./rules.js";
import { action, go, to } from "./addresses.js";

const AT_ONCE = 50;

// Of which model a plan is, and how its step differs from the usual one: two plans may have the same name.
function particulars(plan, models) {
  const model = models.get(plan.profile);
  return [...(model ? [nameOfModel(model)] : []), ...unusual(plan, model)].join("; ");
}

export async function show({ root, query, keep, signal }) {
  const { items: profiles } = await get("/v1/profiles?limit=1000"), models = new Map(profiles.map((one) => [one.id, one]));
  if (signal.aborted) return;
  const all = html("input", { type: "checkbox" });
  all.checked = Boolean(query.all);
  const fits = (plan) => hasSchedule(plan.summary), figure = (plan, name) => (fits(plan) ? plan.summary[name] : null);
  const plans = list({
    name: "plans",
    action,
    columns: [
      { title: "Plan", value: nameOf, cell: (plan) => html("span", {}, html("a", { href: to("plans", plan.id) }, nameOf(plan)), html("small", { class: "noted" }, particulars(plan, models)), plan.note ? html("small", { class: "noted" }, plan.note) : null) },
      { title: "Planned by", value: (plan) => plan.summary.policy, cell: (plan) => (plan.summary.policy === SOLVER ? "search" : html("span", {}, "rule “", nameOfRule(plan.summary.policy), "”")) },
      { title: "Budget", value: (plan) => plan.summary.budget_bytes, cell: (plan) => size(plan.summary.budget_bytes) },
      { title: "Seconds per step", value: (plan) => figure(plan, "expected_seconds"), cell: (plan) => (fits(plan) ? seconds(plan.summary.expected_seconds) : html("span", { class: "pill bad" }, misfit(plan.summary))) },
      { title: "Peak", value: (plan) => figure(plan, "peak_bytes"), cell: (plan) => (fits(plan) ? size(plan.summary.peak_bytes) : "–") },
      { title: "At most slower than the best", value: (plan) => figure(plan, "gap"), cell: (plan) => (fits(plan) ? gapWords(plan.summary.gap) : "–") },
      { title: "Made", value: (plan) => -plan.created, cell: (plan) => when(plan.created) },
    ],
    load: (after, search) => pageOf("plans", { limit: AT_ONCE, search, after, profile: query.profile, asked: all.checked ? null : true }),
    none: () => empty(all.checked ? "No plan yet. A plan is made of a model and a budget." : "No plan here that somebody asked for. A plan is made of a model and a budget.", all.checked ? "" : button("Show those made for curves", () => { all.checked = true; switched(); }), button("Choose a model", () => go("models"), "main")),
    actions: (chosen) => [
      chosen.length > 1 ? button(`Compare ${chosen.length}`, () => go("compare", "", { plans: chosen.map((plan) => plan.id).join(",") }), "main") : html("span", { class: "soft" }, "choose another to compare"),
      button("Delete", action(async () => {
        if (!(await confirmed(`Delete ${chosen.length === 1 ? `the plan “${nameOf(chosen[0])}”` : `these ${chosen.length} plans`}?`, "Delete"))) return;
        for (const plan of chosen) await remove(`/v1/plans/${plan.id}`);
        await plans.reload();
      }), "danger"),
    ],
  });
  const switched = () => { keep({ all: all.checked ? 1 : null }); plans.reload(); };
  all.addEventListener("change", switched);
  const of = query.profile ? models.get(query.profile) : null;
  root.append(
    heading(of ? `Plans of ${nameOfModel(of)}` : "Plans", query.profile ? html("a", { class: "button", href: to("plans") }, "Plans of all models") : ""),
    html("p", { class: "soft" }, "Each says what happens to every tensor in one training step, so that it fits a budget. Tick some to compare them."),
    html("label", { class: "tick" }, all, "Also those that were made for a curve or a search for the smallest budget"), plans,
  );
  await plans.reload();
}
