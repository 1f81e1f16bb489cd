// A new run: a plan, data, how long, and a look at the data before it starts.

import { get, post } from "./api.js";
import { html, seconds } from "./charts.js";
import { button, empty, field, heading, section } from "./components.js";
import { dataChooser, likely, preview, RANDOM } from "./data.js";
import { asked, beside, complete, forget } from "./forms.js";
import { nameOfPlan, SOLVER } from "./rules.js";
import { action, complain, go, to } from "./shell.js";

const EPOCHS = 1;

export async function show({ root, query, signal, keep, title }) {
  title("Fine-tune");
  const [{ plans }, { profiles }] = await Promise.all([get("/v1/plans?limit=500"), get("/v1/profiles?limit=500")]);
  if (signal.aborted) return;
  const made = new Map(profiles.filter((one) => one.origin === "made").map((one) => [one.id, one]));
  const usable = plans.filter((plan) => made.has(plan.profile) && plan.summary.status !== "infeasible" && plan.summary.policy === SOLVER && !plan.summary.of_a_fleet && !plan.summary.elsewhere);
  if (!usable.some((plan) => plan.id === query.plan) && query.plan) usable.unshift(await get(`/v1/plans/${query.plan}`));
  if (!usable.length) {
    return void root.append(heading("Fine-tune a model"), empty("First measure a model that lies on the service's machine, and plan it for the memory that you have.", html("a", { href: to("models") }, "Models")));
  }
  const named = (plan) => `${nameOfPlan(plan)}, ${seconds(plan.summary.step_seconds)} s a step`;
  const plan = html("select", { name: "plan", change: () => { keep({ plan: plan.value }); look(); } }, ...usable.map((one) => html("option", { value: one.id, selected: one.id === query.plan }, named(one))));
  const seen = section("The data, as they are read", html("p", { class: "soft" }, "Choose data to look at them."));
  const look = action(async () => {
    const value = data.value, mine = ++looks;
    unusable = "";
    keep({ plan: plan.value, data: value });
    if (!value || value === RANDOM) return void seen.lastChild.replaceWith(html("p", { class: "soft" }, value ? "Random tokens teach nothing; they try the plan." : "Choose data to look at them."));
    const box = html("div", {});
    seen.lastChild.replaceWith(box);
    try {
      const usable = await preview(box, { plan: plan.value, data: value, ...(await looked(form)) }, signal);
      if (mine === looks) unusable = usable === 0 ? "None of these samples can be used, for the reasons below: choose other data, or say under “More options” what their columns are called." : "";
    } catch (error) {
      if (mine !== looks) return;
      unusable = error.message;
      box.replaceChildren(html("p", { class: "wrong", role: "alert" }, error.message));
    }
  });
  const data = dataChooser({ name: "Data to learn from", value: query.data ?? "", random: true, changed: (_, byPerson) => {
    if (byPerson && guessed) held.set("");
    look();
  } });
  const held = dataChooser({ name: "Held-out data", none: "None", optional: true, changed: (_, byPerson) => { guessed = !byPerson; } });
  let guessed = false, unusable = "", looks = 0; // whether the held-out data are the page's own guess; why the data cannot be learnt from; how often they were looked at
  const start = html("button", { class: "main" }, "Start fine-tuning"), say = html("p", { class: "wrong", role: "alert" });
  const form = html("form", { id: "run-form", submit: action(async () => {
    say.textContent = "";
    if (unusable) { say.textContent = unusable; return; }
    if (!data.value) { say.textContent = "Choose data first."; data.focus(); return; }
    start.disabled = true;
    forget(form);
    try {
      const { plan: _, data: __, eval_data: ___, ...fields } = await asked(form, "run");
      if (fields.steps === undefined && fields.epochs === undefined) fields.epochs = EPOCHS;
      const request = { plan: plan.value, data: data.value, ...(held.value && { eval_data: held.value }), ...fields };
      const job = await post("/v1/runs", request, { "Idempotency-Key": crypto.randomUUID?.() || String(Math.random()) });
      go("runs", job.id);
    } catch (error) {
      if (!beside(form, error)) { say.textContent = error.message; if (error.status === 401) throw error; }
    } finally {
      start.disabled = false;
    }
  }) },
  section(null,
    html("div", { class: "beside" },
      html("div", {}, field("Plan", plan, "Made on a model's page: which memory it gets, and how fast a step is."), field("Data to learn from", data, "Lines with a prompt and an answer, conversations, pairs of answers, or plain text."), field("Held-out data", held, "Never learnt from: tells whether the model gets better at what it has not seen.")),
      html("div", {}, html("div", { class: "row" }, field("Passes over the data", html("input", { name: "epochs", type: "number", min: 0, step: "any", placeholder: EPOCHS })), field("or steps", html("input", { name: "steps", type: "number", min: 1, placeholder: "all" }))), field("Learning rate", html("input", { name: "lr", type: "number", min: 0, step: "any", value: 0.0002 })))),
    html("details", { class: "more" }, html("summary", {}, "More options"), html("div", { class: "row options" })),
    html("div", { class: "row last" }, start, button("Cancel", () => history.back(), "quiet")), say),
  );
  root.append(heading("Fine-tune a model"), form, seen);
  complete(form, "run", ["plan", "data", "eval_data"]).catch(complain);
  if (data.value) return void look();
  const { train, held: apart } = await likely();
  if (signal.aborted || data.value || !train) return;
  data.set(train.value, train.name);
  if (apart) held.set(apart.value, apart.name);
}

// Of a run's options those that change how data are read.
async function looked(form) {
  const { truncate, packing, columns } = await asked(form, "run");
  return Object.fromEntries(Object.entries({ truncate, packing, columns }).filter(([, value]) => value !== undefined && value !== null));
}
