// A new run: a plan, data, how long, and a look at the data before it starts.

import { get, post } from "./api.js";
import { html, seconds } from "./charts.js";
import { button, empty, field, heading, mib, section } from "./components.js";
import { counted, dataChooser, likely, preview, RANDOM, shorterLengths } from "./data.js";
import { durationOf, durationWords, outweighs } from "./duration.js";
import { asked, beside, complete, forget } from "./forms.js";
import { again, latestModel } from "./model.js";
import { nameOf as nameOfModel, stepOf } from "./models.js";
import { fits, SOLVER, unusual } from "./rules.js";
import { action, complain, go, to } from "./addresses.js";

const EPOCHS = 1;
const PADDED = 0.3; // share of padding from which something is offered against it

export async function show({ root, query, signal, keep, title }) {
  title("Fine-tune");
  const [{ items: asked_for }, { items: profiles }] = await Promise.all([get("/v1/plans?limit=500&asked=true"), get("/v1/profiles?limit=500")]);
  if (signal.aborted) return;
  const models = new Map(profiles.map((one) => [one.id, one]));
  const runs = (plan) => models.get(plan.profile)?.origin === "made" && fits(plan.summary) && plan.summary.policy === SOLVER && !plan.summary.elsewhere;
  let usable = asked_for.filter(runs);
  if (!usable.length) usable = (await get("/v1/plans?limit=500")).items.filter(runs); // nobody has asked for one: those of curves
  const wanted = usable.find((plan) => plan.id === query.plan) ?? (query.plan ? await get(`/v1/plans/${query.plan}`) : null);
  if (signal.aborted) return;
  if (wanted && !usable.includes(wanted)) usable.unshift(wanted);
  if (!usable.length) {
    return void root.append(heading("Fine-tune a model"), empty("First measure a model that lies on the service's machine, and plan it for the memory that you have.", html("a", { href: to("models") }, "Models")));
  }
  const first = wanted ?? usable.find((plan) => plan.profile === (query.profile ?? latestModel())) ?? usable[0]; // the latest comes first
  const choice = html("select", { name: "plan", change: () => { keep({ plan: choice.value }); describe(); look(); lookHeld(); } }, ...grouped(usable, first, models));
  choice.value = first.id;
  const chosen = () => usable.find((plan) => plan.id === choice.value), model = () => models.get(chosen().profile);
  const planField = field("Plan", choice, " "), describe = () => { planField.querySelector("small").textContent = model() ? `Of ${named(model())}.` : "Made on a model's page."; };
  describe();
  const seen = section("The data, as they are read", html("p", { class: "soft" }, "Choose data to look at them."));
  const known = { learn: null, held: null }; // what previews say of the data
  const look = action(async () => {
    const value = data.value, mine = ++looks;
    unusable = "";
    known.learn = null;
    keep({ plan: choice.value, data: value });
    tell();
    if (!value || value === RANDOM) return void seen.lastChild.replaceWith(html("p", { class: "soft" }, value ? "Random tokens teach nothing; they try the plan." : "Choose data to look at them."));
    const box = html("div", {});
    seen.lastChild.replaceWith(box);
    try {
      const found = await preview(box, { profile: chosen().profile, data: value, ...(await looked(form)) }, signal, offers);
      if (mine !== looks || !found) return;
      known.learn = found;
      unusable = found.samples.length === 0 ? "None of these samples can be used, for the reasons below: choose other data, or say under “More options” what their columns are called." : "";
      tell();
    } catch (error) {
      if (mine !== looks) return;
      unusable = error.message;
      box.replaceChildren(html("p", { class: "wrong", role: "alert" }, error.message));
    }
  });
  // Held-out data are counted alone, so that it is known how long an evaluation takes.
  const lookHeld = async () => {
    const value = held.value, mine = ++heldLooks;
    known.held = null;
    tell();
    if (!value) return;
    const found = await counted({ profile: chosen().profile, data: value, ...(await looked(form)) }, signal).catch(() => null); // what is wrong with them is said when the run is asked for
    if (mine !== heldLooks || signal.aborted) return;
    known.held = found;
    tell();
  };
  const packing = () => form.elements.packing, pack = () => { packing().checked = true; look(); lookHeld(); };
  const canPack = () => Boolean(packing()) && !packing().checked && (known.learn ?? known.held)?.can_pack;
  // What can be done where most of the places are padding.
  const offers = (found) => {
    const profile = model(), request = profile?.summary.request;
    if (!(found.padding_share > PADDED)) return [];
    const at = ({ seq }) => button(`Measure at ${seq} tokens`, action(() => again(request, { seq }, { budget: chosen().summary.budget_bytes })));
    const lengths = request ? shorterLengths(found).filter(({ seq }) => seq < profile.summary.seq) : [];
    return [
      found.can_pack && packing() && !packing().checked ? button("Switch on packing", pack) : null,
      ...lengths.flatMap((length) => [at(length), html("span", { class: "soft" }, length.cuts ? `cuts ${length.cuts} of ${length.of} samples` : "holds all samples")]),
    ].filter(Boolean);
  };
  const takes = html("p", { id: "takes", role: "status" }), heavy = html("div", { id: "heavy", class: "caution" });
  const tell = () => {
    const value = (name) => { const text = form.elements[name]?.value.trim(); return text || null; };
    const steps = value("steps") && Number(value("steps")), epochs = steps ? null : Number(value("epochs") ?? EPOCHS), random = data.value === RANDOM;
    const time = durationOf(chosen().summary, { learn: random ? null : known.learn, held: known.held, steps, epochs, every: value("eval_every") });
    const counting = held.value && !known.held ? " How long evaluations take is being counted." : "";
    takes.textContent = data.value ? `${durationWords(time)}${durationWords(time) && counting}` : "";
    heavy.hidden = !outweighs(time);
    const fewer = time.evaluations > 2 ? button("Evaluate before and after alone", () => { form.elements.eval_every.value = ""; tell(); }) : null;
    heavy.replaceChildren(...(heavy.hidden ? [] : [html("p", {}, "Evaluating takes longer than the steps that it judges."), html("div", { class: "row" }, ...[fewer, canPack() ? button("Switch on packing", pack) : null, button("Leave held-out data out", () => held.set("", "", true))].filter(Boolean))]));
  };
  const data = dataChooser({ name: "Data to learn from", value: query.data ?? "", random: true, changed: (_, byPerson) => {
    if (byPerson && guessed) held.set("");
    look();
  } });
  const held = dataChooser({ name: "Held-out data", none: "None", optional: true, changed: (_, byPerson) => { guessed = !byPerson; lookHeld(); } });
  let guessed = false, unusable = "", looks = 0, heldLooks = 0; // whether the held-out data are the page's own guess; why the data cannot be learnt from; how often they were looked at
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
      const request = { plan: choice.value, data: data.value, ...(held.value && { eval_data: held.value }), ...fields };
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
      html("div", {}, planField, field("Data to learn from", data, "Lines with a prompt and an answer, conversations, pairs of answers, or plain text."), field("Held-out data", held, "Never learnt from: tells whether the model gets better at what it has not seen.")),
      html("div", {}, html("div", { class: "row" }, field("Passes over the data", html("input", { name: "epochs", type: "number", min: 0, step: "any", placeholder: EPOCHS })), field("or steps", html("input", { name: "steps", type: "number", min: 1, placeholder: "all" }))), field("Learning rate", html("input", { name: "lr", type: "number", min: 0, step: "any", value: 0.0002 })))),
    html("details", { class: "more" }, html("summary", {}, "More options"), html("div", { class: "row options" })),
    takes, heavy,
    html("div", { class: "row last" }, start, button("Cancel", () => history.back(), "quiet")), say),
  );
  form.addEventListener("input", tell);
  form.addEventListener("change", ({ target }) => { if (READING.includes(target.name)) { look(); lookHeld(); } });
  root.append(heading("Fine-tune a model"), form, seen);
  complete(form, "run", ["plan", "data", "eval_data"]).catch(complain);
  if (data.value) return void look();
  const { train, held: apart } = await likely();
  if (signal.aborted || data.value || !train) return;
  data.set(train.value, train.name);
  if (apart) held.set(apart.value, apart.name);
}

// What is measured of a model, in its own words and in those that a name given by a person leaves out.
function named(model) {
  const { summary } = model, own = model.title ? [summary.lora ? `LoRA rank ${summary.lora.rank}` : null, stepOf(model)].filter(Boolean) : [];
  return [nameOfModel(model), ...own].join(", ");
}

// The plans to choose from, by model and by budget, one of those that differ in nothing: the latest, or the `chosen` one.
function grouped(plans, chosen, models) {
  const kept = new Map(), key = (plan) => [plan.profile, mib(plan.summary.budget_bytes), plan.title, ...unusual(plan, models.get(plan.profile), { rule: true })].join("|");
  for (const plan of plans) if (!kept.has(key(plan)) || plan === chosen) kept.set(key(plan), plan);
  const groups = Map.groupBy ? Map.groupBy(kept.values(), (plan) => plan.profile) : [...kept.values()].reduce((all, plan) => all.set(plan.profile, [...(all.get(plan.profile) ?? []), plan]), new Map());
  const words = (plan) => [...(plan.title ? [plan.title] : []), `${mib(plan.summary.budget_bytes)} MiB`, `${seconds(plan.summary.expected_seconds)} s a step`, ...unusual(plan, models.get(plan.profile), { rule: true })].join(", ");
  return [...groups].map(([profile, own]) => html("optgroup", { label: models.has(profile) ? named(models.get(profile)) : "a model that is gone" }, ...own.sort((a, b) => a.summary.budget_bytes - b.summary.budget_bytes).map((plan) => html("option", { value: plan.id }, words(plan)))));
}

// Of a run's options those that change how data are read.
const READING = ["truncate", "packing", "columns"];
async function looked(form) {
  const fields = await asked(form, "run");
  return Object.fromEntries(READING.map((name) => [name, fields[name]]).filter(([, value]) => value !== undefined && value !== null));
}
