// One model: will it fit. A curve of seconds per step against the budget, the budget to drag along it, the verdict of that budget and
// of nothing else; where nothing fits, what would help. What is searched for goes on in the service when this place is left, and is
// found again: an equal request is the same job.

import { download, finish, get, patch, post, work } from "./api.js";
import { atLeast, curveLegend, html, kindColour, MIB, place as drawIn, places, seconds, size } from "./charts.js";
import { announce, bar, button, card, command, editable, field, heading, mib, note, percent, progress, scrolling, section, span, table, term } from "./components.js";
import { budgetCurve } from "./curve.js";
import { asked, beside, complete, forget } from "./forms.js";
import { deleted, estimated, measuredModel, measuring, nameOf, origin, shapeWords } from "./models.js";
import { fits, gapWords, inWords, meaningOfRule, nameOfRule, SOLVER } from "./rules.js";
import { action, complain, go, to } from "./addresses.js";
import { choose } from "./sources.js";

const LOOK = 1.5, ROUGH = 1.5, FINE = 15, LONG = 60; // seconds for a plan: to see where the curve lies, to sketch it, to draw it, to find a smaller one
const SAME = 1e-3; // of a step: two times this near are the same to who waits for them
const SKETCHED = 4, POINTS = 9; // budgets of the sketch and of the curve
const SLIDER_STEPS = 400, MOST = Number.MAX_SAFE_INTEGER, LEAST = 1024, SPREAD = 5; // budgets apart by more than this factor lie on a scale of ratios
const MORE = 50 * MIB;
const NOISE = 2 * MIB; // by which two measurements of one machine may differ in what a process holds

export async function show(place) {
  if (place.id.startsWith("job-")) await showMeasurement(place);
  else await explore(place);
}

// --- a measurement ----------------------------------------------------------------------------------------------------

async function showMeasurement({ root, id, query, signal, title }) {
  const job = await get(`/v1/jobs/${id}`), name = measuredModel(job);
  title(name);
  if (job.state === "succeeded") return location.replace(to("models", job.result.profile, query));
  const bar = measuring(job), cancel = button("Cancel", action(async () => { cancel.disabled = true; await post(`/v1/jobs/${id}/cancel`, {}); }), "quiet");
  const box = section(null, html("div", { class: "row" }, bar, cancel), html("p", { class: "soft" }, `${estimated(job) ? "Its step is traced, and how long its operators take is computed from the device's figures" : "Its operators are timed on the machine, one kind after the other"}; that takes from some seconds to some minutes, and goes on when this page is closed.`));
  const trying = query.tried ? html("p", { id: "trial" }, `Tried for ${mib(Number(query.budget))} MiB: ${query.tried}.`) : "";
  root.append(heading(name), trying, box);
  finish(job, bar.hear, signal).then(
    (done) => { if (!signal.aborted) location.replace(to("models", done.result.profile, query)); },
    (error) => {
      if (signal.aborted) return;
      const words = error.code === "cancelled" ? "This measurement was cancelled." : error.message;
      box.replaceChildren(html("p", { class: "not", role: "alert" }, words), html("div", { class: "row last" }, button("Try again", action(() => again(job.request, {}, query)), "main"), button("Choose another model", () => choose().catch(complain))));
    },
  );
}

// The model that was looked at last: what somebody comes from who wants to fine-tune.
const LATEST = "tightfit-model";
export const latestModel = () => sessionStorage.getItem(LATEST);

// Ask for a measurement by what an earlier one was asked for, with changes: the service names paths relative to its folders.
export async function again({ source, config, header, ...options }, changes = {}, query = {}) {
  const model = config ? { config } : header ? { header } : { path: source }, known = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== null));
  const job = await post("/v1/profiles", { ...known, ...model, ...changes });
  go("models", job.result?.profile ?? job.id, query);
}

// --- a profile --------------------------------------------------------------------------------------------------------

async function explore(place) {
  const { root, id, query, signal } = place;
  const [profile, { devices }] = await Promise.all([get(`/v1/profiles/${id}`), get("/v1/devices")]);
  const { summary } = profile, policies = [...summary.policies, ...(summary.approximate ?? [])];
  const measuredBy = summary.request ?? null;
  place.title(nameOf(profile));
  sessionStorage.setItem(LATEST, id);
  const { budget: budgetKept, policy: policyKept, tried, was, ...stepKept } = query; // `tried`: a change of another model's step, whose smallest budget `was` so large
  const state = { least: 0, proven: false, most: 0, budget: 0, policy: policies.includes(policyKept) ? policyKept : SOLVER, cells: [], chart: null, asked: 0, step: stepKept, drawn: new Set(summary.policies), ticked: new Set(), dragging: false, typing: false, chosen: false, ways: null, round: 0 };
  const old = (round) => signal.aborted || round !== state.round;

  // --- what is to be seen ---

  const verdict = html("p", { id: "verdict", class: "verdict", role: "status", "aria-live": "polite" }), trial = html("p", { id: "trial", role: "status" }), smallest = html("p", { id: "smallest", class: "soft" });
  const slider = html("input", { id: "slider", type: "range", min: 0, max: SLIDER_STEPS, step: 1, disabled: true }), input = html("input", { id: "budget", type: "text", inputmode: "decimal", autocomplete: "off", class: "figure" });
  const budgetField = field("MiB", input), refusal = html("span", { id: "no-budget", class: "wrong", role: "alert" }), beyond = html("small", { id: "beyond" });
  budgetField.append(refusal, beyond);
  const policy = html("select", { id: "policy" }, html("optgroup", { label: "Exact gradient" }, ...summary.policies.map((name) => html("option", { value: name }, nameOfRule(name)))), summary.approximate?.length ? html("optgroup", { label: "Another gradient" }, ...summary.approximate.map((name) => html("option", { value: name }, nameOfRule(name)))) : null);
  const solveButton = button("Plan at this budget", action(() => solve()), "main"), fitButton = fitThisMachine(), working = html("div", { id: "working" }), curving = html("div", { id: "curving" });
  const chart = html("div", { id: "curve", class: "chart-box", "aria-busy": "true" }), key = html("ul", { id: "curve-legend", class: "legend" }), numbersBox = html("div", { id: "curve-table" });
  const next = html("div", { id: "next" }), help = html("div", { id: "help" }), rules = html("div", { id: "rules" });
  const stepForm = html("form", { id: "step-form" }, html("details", { class: "more" }, html("summary", {}, "Optimizer, clipping, and how near to the best"), html("div", { class: "row" }, html("button", {}, "Plan so"))));
  solveButton.id = "solve";
  policy.value = state.policy;
  const named = editable(nameOf(profile), async (title) => { const shown = nameOf(Object.assign(profile, await patch(`/v1/profiles/${id}`, { title }))); place.title(shown); return shown; }, { action });
  root.append(
    heading(named, button("Download profile", action(() => download(`/v1/profiles/${id}/file`, "profile.json")), "quiet"), button("Delete", action(async () => { if (await deleted(profile)) go("models"); }), "danger")),
    html("p", { id: "about", class: "soft" }, about(profile)),
    summary.marks?.length ? caution() : "",
    note(profile.note, (text) => patch(`/v1/profiles/${id}`, { note: text }), action),
    section("Will it fit?", verdict, trial, smallest,
      html("div", { class: "row" }, html("div", { class: "grow" }, field("Memory of the whole run", slider)), budgetField, field("How", policy)),
      html("div", { class: "row" }, solveButton, fitButton),
      working, chart, key, curving,
      html("details", {}, html("summary", {}, "The curve in numbers, and plans to compare"), numbersBox),
      stepForm),
    next, help, rules,
  );

  // --- what is known of a budget ---

  const points = (name) => state.cells.filter((one) => one.policy === name && fits(one.summary)).map((one) => ({ budget: one.budget_bytes, step: one.summary.step_seconds, bound: one.summary.bound_seconds, peak: one.summary.peak_bytes, plan: one.plan, summary: one.summary })).sort((a, b) => a.budget - b.budget);
  const misfits = (name) => state.cells.filter((one) => one.policy === name && !fits(one.summary) && one.budget_bytes > 1).map((one) => ({ budget: one.budget_bytes, needs: one.summary.minimum_budget_bytes }));
  // The best plan that is made already for a budget: one for less memory fits in more. Of those about as fast as the fastest it is the one
  // for the largest budget.
  function bestFor(budget, made = () => true) {
    const fitting = points(state.policy).filter((point) => point.budget <= budget && made(point)), fastest = Math.min(...fitting.map((point) => point.step));
    return fitting.findLast((point) => point.step <= fastest * (1 + SAME)) ?? null;
  }

  // Points than which a smaller budget has none as fast.
  const undercut = (all) => all.filter((point, index) => all.slice(0, index).every((earlier) => earlier.step > point.step * (1 - 1e-9)));
  // The smallest budget that is enough for a policy's plans, as far as it is known.
  const needs = (name) => Math.min(...state.cells.filter((one) => one.policy === name && !fits(one.summary)).map((one) => one.summary.minimum_budget_bytes).filter(Boolean), ...points(name).map((one) => one.budget));
  const isAt = (cell, budget, name) => cell.budget_bytes === budget && cell.policy === name;

  // Keep plans in the table: of two for one budget the one that is stored, then the faster one, then the one that knows of a smaller budget.
  function keep(cells) {
    for (const cell of cells) {
      const at = state.cells.findIndex((one) => isAt(one, cell.budget_bytes, cell.policy)), known = state.cells[at];
      if (at < 0) state.cells.push(cell);
      else if (better(cell, known)) state.cells[at] = cell;
    }
    const found = needs(SOLVER);
    if (found < Infinity) {
      const firm = state.cells.filter((one) => one.policy === SOLVER && !fits(one.summary) && one.summary.ended_by !== "time limit" && one.summary.minimum_budget_bytes);
      state.proven = firm.some((one) => one.summary.minimum_budget_bytes <= found);
      if (state.most) state.least = Math.min(found, state.most);
    }
    if (!state.dragging && state.most) draw();
    judge();
  }

  // --- the curve ---

  const onRatios = () => state.most > SPREAD * state.least;
  const ends = () => { const margin = (state.most - state.least) * 0.05; return onRatios() ? [state.least / 1.06, state.most * 1.06] : [Math.max(LEAST, state.least - margin), state.most + margin]; };
  const budgetAt = (position) => { const [low, high] = ends(), share = position / SLIDER_STEPS; return onRatios() ? low * (high / low) ** share : low + (high - low) * share; };
  const positionOf = (budget) => { const [low, high] = ends(), share = onRatios() ? Math.log(budget / low) / Math.log(high / low) : (budget - low) / (high - low); return Math.round(SLIDER_STEPS * Math.min(1, Math.max(0, share))); };
  const inKib = (bytes) => Math.max(LEAST, Math.round(bytes / 1024) * 1024);

  function draw() {
    // What was planned far off the curve, perhaps by a slip of the keyboard, is in the table alone: it would squeeze the rest.
    const { least, most } = state, near = ({ budget }) => (onRatios() ? budget >= least / 1.5 && budget <= most * 1.5 : budget >= 2 * least - most && budget <= 2 * most - least);
    const series = policies.map((name, slot) => ({ name, label: nameOfRule(name), slot, points: (name === SOLVER ? undercut(points(name)) : points(name)).filter(near), misfits: misfits(name).filter(near) })).filter((one) => state.drawn.has(one.name) && one.points.length + one.misfits.length);
    drawIn(chart, (width) => {
      state.chart = budgetCurve(series, { least, most, known: needs(SOLVER) < Infinity, proven: state.proven, width });
      const { picture } = state.chart;
      const drag = (event) => { choosing(inKib(state.chart.budgetAt(event))); glide(); };
      picture.addEventListener("pointerdown", (event) => { picture.setPointerCapture(event.pointerId); state.dragging = true; drag(event); });
      picture.addEventListener("pointermove", (event) => { if (state.dragging) drag(event); });
      for (const end of ["pointerup", "pointercancel"]) picture.addEventListener(end, action(() => { state.dragging = false; draw(); return dragged(); }));
      mark();
      return picture;
    });
    key.replaceChildren(...curveLegend(series, chart));
    drawNumbers();
    drawRules();
  }

  function drawNumbers() {
    const shown = policies.filter((name) => state.cells.some((one) => one.policy === name));
    const budgets = [...new Set(state.cells.map((cell) => cell.budget_bytes))].filter((budget) => budget > 1).sort((a, b) => a - b);
    const cell = (budget, name) => {
      const planned = state.cells.find((one) => isAt(one, budget, name));
      if (!planned) return "–";
      const cut = name === SOLVER && planned.summary.ended_by === "time limit";
      if (!fits(planned.summary)) return `needs ${atLeast(planned.summary.minimum_budget_bytes)}${cut ? " or less" : ""}`;
      const text = `${seconds(planned.summary.step_seconds)}${cut ? " (time limit)" : ""}`;
      return planned.plan ? html("span", { class: "tickable" }, ticker(planned), html("a", { href: to("plans", planned.plan) }, text)) : text;
    };
    const compared = html("a", { class: "button", id: "compare", href: to("compare", "", { plans: [...state.ticked].join(",") }) }, `Compare ${state.ticked.size} plans`);
    compared.hidden = state.ticked.size < 2;
    renew(numbersBox,
      scrolling("Seconds per step by budget and policy", table("Seconds per step by the model, with a note where the time limit ended a search; where a budget is too small, the smallest that is enough, in MiB. Tick plans to compare them.", ["budget, MiB", ...shown.map(nameOfRule)], budgets.map((budget) => [mib(budget), ...shown.map((name) => cell(budget, name))]))),
      compared,
    );
  }

  function ticker({ plan, policy: name, budget_bytes: budget }) {
    const box = html("input", { type: "checkbox", "aria-label": `Compare ${nameOfRule(name)} at ${mib(budget)} MiB` });
    box.checked = state.ticked.has(plan);
    box.addEventListener("change", () => {
      state.ticked[box.checked ? "add" : "delete"](plan);
      const link = numbersBox.querySelector("#compare");
      link.hidden = state.ticked.size < 2;
      link.textContent = `Compare ${state.ticked.size} plans`;
      link.href = to("compare", "", { plans: [...state.ticked].join(",") });
    });
    return box;
  }

  function mark() {
    const { budget } = state;
    if (!budget) return;
    if (!state.typing) input.value = state.written = (budget / MIB).toFixed(places(budget / MIB)); // what somebody types is theirs until it is entered
    if (state.most) slider.value = positionOf(budget);
    slider.setAttribute("aria-valuetext", `${mib(budget)} MiB`);
    state.chart?.show(budget, bestFor(budget)?.step);
  }

  // What is known of the budget and the policy that are chosen, and of nothing else: said anew whenever they or it change.
  function judge() {
    const { budget, policy: name } = state, wanted = `${mib(budget)} MiB`, best = bestFor(budget);
    // The answer first, in a second and smaller sentence what it rests on.
    const say = (text, fits, more = "") => {
      verdict.className = `verdict ${fits === null ? "soft" : fits ? "fits" : "not"}`;
      if (verdict.textContent !== `${text}${more && ` ${more}`}`) verdict.replaceChildren(text, ...(more ? [" ", html("small", {}, more)] : []));
    };
    const own = devices.find((one) => one.local)?.memory_bytes;
    beyond.textContent = own && budget > own && !devices.some((one) => !one.local && one.name === summary.device) ? `More than the ${roomy(own)} that this machine has.` : "";
    drawSmallest();
    if (!budget) return say("", null);
    offerNext(best);
    const here = state.cells.find((one) => isAt(one, budget, name)), least = here?.summary.minimum_budget_bytes || needs(name), enough = needs(SOLVER);
    offerHelp(!best && enough < Infinity && budget < enough);
    if (best) {
      if (!best.plan) return say(`Yes, it fits ${wanted}: at most ${seconds(best.step)} s a step.`, true);
      const proof = best.summary.policy === SOLVER ? sentence(nearness(best.summary)) : `Planned by the rule “${nameOfRule(name)}”`;
      if (mib(best.budget) === mib(budget)) return say(`Yes, it fits ${wanted}: ${seconds(best.step)} s a step.`, true, `${proof}; peak ${mib(best.peak)} MiB.`);
      return say(`Yes, it fits ${wanted}: at most ${seconds(best.step)} s a step.`, true, here ? `That is the plan for ${mib(best.budget)} MiB; the search at this budget found none as fast.` : `That is as at ${mib(best.budget)} MiB; plan at this budget to see what the rest is good for.`);
    }
    if (!here && least === Infinity) return say(`${wanted}: nothing is known of it yet`, null);
    if (!here && budget >= least) return say(`Yes, it fits ${wanted}; how fast is not known yet.`, true);
    if (name === SOLVER) return say(`Does not fit ${wanted}: ${state.proven ? "the smallest budget that is enough is" : "the smallest budget found to be enough is"} ${atLeast(least)} MiB`, false);
    const others = budget >= enough ? `other plans fit from ${atLeast(enough)} MiB on` : enough < Infinity ? `nor does any other plan found: the smallest budget found to be enough is ${atLeast(enough)} MiB` : "whether another plan does is not known yet";
    say(`“${nameOfRule(name)}” does not fit ${wanted}, it needs ${atLeast(least)} MiB; ${others}`, false);
  }

  // What came of a change that was tried so that a budget suffices.
  function drawTrial() {
    if (!tried || !state.budget) return;
    const least = needs(SOLVER), before = Number(was), missing = least - state.budget, head = `Tried for ${mib(state.budget)} MiB: ${tried}.`;
    const text = least === Infinity ? `${head} What it needs is being found.` : `${head} The smallest budget ${before ? `was ${atLeast(before)} MiB and ` : ""}is ${atLeast(least)} MiB${state.proven ? "" : " as far as it is found"}: ${missing > 0 ? `${atLeast(missing)} MiB are missing` : "that is enough"}.`;
    if (trial.textContent !== text) trial.textContent = text;
  }

  function drawSmallest() {
    const least = needs(SOLVER);
    drawTrial();
    const shown = [least, state.proven, state.seeking].join(" ");
    if (smallest.dataset.shown === shown) return;
    smallest.dataset.shown = shown;
    if (least === Infinity) return smallest.replaceChildren();
    const words = state.proven ? term("proven", "The search for the smallest plan came to its end: it has shown that no plan of this kind needs less.") : term("the best found so far", "The search for the smallest plan was ended by its time limit. A longer one may find a smaller plan.");
    smallest.replaceChildren(html("span", {}, "The smallest budget is ", html("b", {}, `${atLeast(least)} MiB`), ", ", words, "."), state.proven ? "" : " ", state.proven || state.seeking ? "" : button("Search longer", action(() => seek(LONG)), "link"));
  }

  // A budget that a person chooses stays; one that the page opens with gives way to one that is planned.
  function choosing(budget) { Object.assign(state, { budget, chosen: true, typing: false }); }

  // While the budget moves, the verdict moves along.
  function glide() { mark(); judge(); }

  // When it rests: what is asked for another budget is no longer shown; where no plan is known that fits and a person `asks`, one is made.
  async function moved(asks = true) {
    state.asked++;
    working.replaceChildren();
    solveButton.disabled = false;
    remember();
    glide();
    const known = state.cells.some((one) => isAt(one, state.budget, state.policy)) || bestFor(state.budget, (point) => point.plan);
    if (asks && !known) await solve();
  }

  // What is dragged to asks for a plan where one may fit; passing over budgets that are too small does not.
  const dragged = () => moved(state.budget >= needs(state.policy));

  const remember = () => place.keep({ budget: state.budget || null, policy: state.policy === SOLVER ? null : state.policy, ...state.step });
  const request = (budget, name, limit) => ({ profile: id, memory: budget, policy: name, time_limit: limit, ...state.step });

  async function solve(budget = state.budget) {
    const { policy: name, round } = state, mine = ++state.asked, current = () => mine === state.asked && !old(round), bar = solving(`Planning at ${mib(budget)} MiB`, FINE);
    remember();
    solveButton.disabled = true;
    working.replaceChildren(bar);
    try {
      const done = await work("/v1/plans", request(budget, name, FINE), (figures) => { if (current()) bar.hear(figures); }, signal);
      if (old(round)) return;
      keep([{ budget_bytes: budget, policy: name, plan: done.result.plan, summary: done.result.summary }]);
    } finally {
      if (current()) {
        working.replaceChildren();
        solveButton.disabled = false;
      }
    }
  }

  // --- what to do next, what would help, what rules there are ---

  // What is to be doubted of the measurement, and a way to make it anew.
  function caution() {
    const marks = summary.marks.map((mark) => mark.replace(AGAIN, ""));
    return html("div", { id: "caution", class: "caution row" }, html("p", {}, `Caution: ${marks.join("; ")}.${measuredBy ? " Measure it once more when nothing else runs." : ""}`), measuredBy ? button("Measure anew", action(() => again(measuredBy, { force: true }, { budget: state.budget || null }))) : null);
  }

  function fitThisMachine() {
    // The times of another device say nothing of this machine.
    if (devices.some((one) => !one.local && one.name === summary.device)) return "";
    const own = devices.find((one) => one.local), spare = own?.spare_bytes;
    const made = button(spare ? `Fit this machine (${roomy(spare)} free)` : "Fit this machine", action(async () => {
      const { spare_bytes: now } = (await get("/v1/devices")).devices.find((one) => one.local);
      if (!now) throw new Error("Nothing can be spared on this machine now; end other programs, or name a budget.");
      choosing(inKib(now));
      announce(`budget ${mib(now)} MiB`);
      await moved();
    }));
    made.id = "fit-machine";
    made.disabled = !spare;
    if (own?.spare_why) made.title = own.spare_why;
    return made;
  }

  function offerNext(best) {
    if (!best?.plan) return next.replaceChildren();
    const more = bestFor(best.budget + MORE), shown = [best.plan, state.budget, more?.plan, state.cells.some((one) => isAt(one, best.budget + MORE, SOLVER))].join(" ");
    if (next.dataset.shown === shown && next.childElementCount) return;
    next.dataset.shown = shown;
    const { summary: figures } = best, { train } = figures, runs = profile.origin === "made" && summary.measured;
    const cards = [
      ["one step", `${seconds(best.step)} s`, figures.policy === SOLVER && figures.bound_seconds ? `by the model; at best ${seconds(figures.bound_seconds)} s` : "by the model, with a fixed rule"],
      ["peak", `${mib(best.peak)} MiB`, `of ${mib(best.budget)} MiB`],
      train ? ["computed again", percent(train.recompute_seconds / (best.step || 1)), `${seconds(train.recompute_seconds)} s of each step`] : null,
      train ? ["disk", `${mib(train.read_bytes + train.write_bytes)} MiB`, `each step; ${seconds(train.stall_seconds)} s waiting`] : null,
    ].filter(Boolean);
    const own = mib(best.budget) === mib(state.budget);
    renew(next, section(own ? "From here" : `From here: the plan for ${mib(best.budget)} MiB, which fits too`,
      html("dl", { class: "cards" }, ...cards.map(([name, value, more]) => card(name, value, more))),
      worth(best),
      html("div", { class: "row last" },
        runs ? html("a", { class: "button main", id: "start-run", href: to("runs", "", { plan: best.plan, new: 1 }) }, "Start fine-tuning") : null,
        html("a", { class: `button${runs ? "" : " main"}`, id: "open-plan", href: to("plans", best.plan) }, "Open the plan"),
        html("a", { class: "button", href: to("plans", "", { profile: id }) }, "All plans of this model"),
        runs ? null : html("span", { class: "soft" }, !summary.measured ? `Times are estimated for ${summary.device}; to fine-tune here, measure the model on this machine.` : "Only what was measured on this machine can be fine-tuned here."),
        runs ? null : button("Measure a model here", () => choose().catch(complain))),
      ...(!summary.measured && summary.lora ? [html("p", { class: "soft" }, `On ${summary.device} itself, with its weights in place of MODEL:`), command(`tightfit train MODEL ${shapeWords(summary)} --memory ${mib(best.budget).replaceAll(",", "")}MiB --data DATA -o OUT`, "Copy the command for that device")] : []),
    ));
  }

  // What 50 MiB more or less are worth at a budget: the difference that is proven of bounds, and of plans where both are made.
  function worth(best) {
    if (state.policy !== SOLVER || mib(best.budget) !== mib(state.budget)) return null;
    const box = html("p", { id: "worth", class: "soft" }), more = bestFor(best.budget + MORE);
    const share = (value) => percent(value / best.step);
    const parts = (best.summary.explanation?.neighbours ?? []).map(({ change_bytes: change, price_seconds: price, status }) => {
      const by = `${mib(Math.abs(change), 0)} MiB ${change > 0 ? "more" : "less"}`;
      if (status === "infeasible") return `${by}: nothing fits`;
      if (status === "unknown") return `${by}: no plan found`;
      if (price === null) return null;
      return Math.abs(price) < SAME * best.step ? `${by} change nothing that counts` : change > 0 ? `${by} save about ${seconds(-price)} s a step (${share(-price)})` : `${by} cost about ${seconds(price)} s a step (${share(price)})`;
    }).filter(Boolean);
    const planned = more && more.budget > best.budget && more.step < best.step ? ` Planned at ${mib(more.budget)} MiB: ${seconds(best.step - more.step)} s a step less (${share(best.step - more.step)}).` : "";
    box.append(parts.length ? `What memory is worth here: ${parts.join("; ")}.` : "What would a little more memory be worth?", planned, " ");
    if (!state.cells.some((one) => isAt(one, best.budget + MORE, SOLVER))) box.append(button("Plan 50 MiB more", action(() => solve(best.budget + MORE)), "link"));
    return box;
  }

  function offerHelp(wanted) {
    const ways = state.ways;
    if (!wanted || !ways) return help.replaceChildren();
    const shown = [state.budget, needs(SOLVER)].join(" ");
    if (help.dataset.shown === shown && help.childElementCount) return;
    help.dataset.shown = shown;
    const missing = needs(SOLVER) - state.budget, words = { tile: "a part of the tokens at a time", batch: "a smaller batch", seq: "shorter samples", lora_rank: "a smaller adapter", base: "frozen weights in fewer bits" };
    const remedies = ways.remedies.map((remedy) => reaching(remedy, missing)), most = mostFreed(remedies);
    const row = (remedy) => {
      const can = remedy.field && measuredBy, start = action(() => again(measuredBy, { [remedy.field]: remedy.value }, { budget: state.budget, tried: remedy.change, was: needs(SOLVER) }));
      return html("li", { class: "row" }, can ? button(`Try ${remedy.change}`, start) : html("b", {}, remedy.change), html("span", { class: "soft" }, `${words[remedy.field] ?? "a change"}, frees up to ${size(remedy.saves_bytes)}${remedy.saves_bytes < missing && remedy.most > remedy.saves_bytes ? `, and never more than ${size(remedy.most)}` : ""}`), html("span", { class: `pill ${remedy.saves_bytes >= missing + NOISE ? "good" : ""}` }, remedy.saves_bytes >= missing + NOISE ? "may be enough" : remedy.saves_bytes >= missing ? "is hardly enough alone" : "not enough alone"));
    };
    renew(help, section("Why not, and what would help",
      html("p", {}, `${size(missing)} are missing. This is what fills the memory of the smallest plan found:`),
      filling(ways.peak),
      html("p", { class: "soft" }, `The smallest plan is fullest at ${inWords(ways.peak.text)}.`),
      most < missing ? html("p", { id: "never", class: "caution" }, `${remedies.length ? `What can be changed of the step frees about ${size(most)} of this at most, however small it gets: that cannot suffice.` : "Nothing is known that would make this step smaller."} It takes more memory, or a smaller model.`) : null,
      html("p", { class: "soft" }, `${!remedies.length || (measuredBy && !remedies.some((one) => one.field)) ? "" : measuredBy ? "Each button measures the changed step, which takes a while, and then comes back to this budget." : "What was uploaded cannot be changed here: measure the model on this machine to try these."}`),
      html("ul", { class: "bare" }, ...remedies.map(row)),
      html("div", { class: "row last" }, useSmallest(), measuredBy ? null : button("Measure it here", () => choose().catch(complain))),
    ));
  }

  function useSmallest() {
    const least = needs(SOLVER), made = button(`Use ${atLeast(least)} MiB instead`, action(() => { choosing(Math.max(LEAST, Math.ceil(least / 1024) * 1024)); return moved(); }), "main");
    made.id = "use-smallest";
    return made;
  }

  function drawRules() {
    const row = (name) => {
      const fast = points(name).reduce((best, point) => (best && best.step <= point.step ? best : point), null), least = needs(name), box = html("input", { type: "checkbox", "aria-label": `Draw ${nameOfRule(name)}` });
      box.checked = state.drawn.has(name);
      box.addEventListener("change", () => { state.drawn[box.checked ? "add" : "delete"](name); draw(); });
      const firm = misfits(name).length || name === "keep-all", enough = least === Infinity ? "" : firm ? `needs ${atLeast(least)} MiB` : `needs at most ${atLeast(least)} MiB${state.finding ? " so far" : ""}`, pace = fast ? `${seconds(fast.step)} s a step` : "";
      return html("tr", {}, html("th", { scope: "row" }, html("span", { class: "tickable" }, box, html("b", {}, nameOfRule(name)))), html("td", { class: "wide" }, meaningOfRule(name)), html("td", {}, [enough, pace].filter(Boolean).join(", ") || "not planned yet"));
    };
    const folded = rules.querySelector("details")?.open ?? true;
    const body = html("tbody", {}, ...policies.filter((name) => name !== SOLVER).map(row));
    if (!body.childElementCount) return;
    renew(rules, section("Fixed rules, to compare with", html("details", folded ? { open: true } : {}, html("summary", {}, "What each does, and what it needs"), scrolling("Fixed rules", html("table", { class: "listing rules" }, html("thead", {}, html("tr", {}, ...["Rule", "What it does", "Here"].map((text) => html("th", { scope: "col" }, text)))), body)))));
  }

  // --- finding the curve ---

  // What is searched for, one stage after the other; each stage's answers are drawn as they come.
  async function find() {
    const round = ++state.round, { items: plans } = await get(`/v1/plans?${new URLSearchParams({ profile: id, limit: 1000 })}`);
    if (old(round)) return;
    const stored = plans.filter((plan) => matches(plan.summary)), questions = stored.filter(({ summary }) => summary.budget_bytes === 1);
    keep(stored.filter(({ summary }) => summary.budget_bytes > 1).map((plan) => ({ budget_bytes: plan.summary.budget_bytes, policy: plan.summary.policy, plan: plan.id, summary: plan.summary })));
    for (const question of questions) learn(question.summary);
    // What was found earlier, by this page or by somebody else, is drawn at once and not searched for again, and the budget of the
    // address stands beside it from the beginning.
    const kept = Number(budgetKept);
    if (!state.budget && kept >= LEAST && kept <= MOST) choosing(Math.round(kept));
    const known = (name) => needs(name) < Infinity;
    if (points(SOLVER).length > 1 && known("keep-all")) reach();
    mark();
    judge();
    const compare = async (budgets, names, limit, what) => {
      const bar = progress(what);
      curving.append(bar);
      try {
        const job = await post("/v1/comparisons", { profile: id, memory: budgets, policies: names, time_limit: limit, ...state.step });
        const done = await finish(job, (figures) => {
          if (old(round)) return;
          if (figures.done !== undefined) bar.update({ done: figures.done, total: budgets.length * names.length, stage: "" });
          if (figures.cell) keep([{ ...figures.cell, summary: figures.cell }]);
        }, signal);
        if (!old(round)) keep(done.result.cells);
      } finally {
        bar.remove();
      }
    };
    // One byte never fits: the answers say what would.
    if (!known(SOLVER) || !known("keep-all")) await compare([1], [SOLVER, "keep-all"], LOOK, "Looking for the smallest and the largest budget that make sense");
    if (old(round)) return;
    reach();
    const { least, most } = state, names = summary.policies.slice(1), drawn = () => points(SOLVER).filter(({ budget }) => budget <= 1.05 * most).length;
    const sketch = spread(least, most, SKETCHED);
    await Promise.all([
      drawn() < SKETCHED ? compare(sketch, [SOLVER], ROUGH, "A first sketch of the curve") : null,
      names.some((name) => !points(name).length) ? compare(sketch, names, FINE, "Fixed rules") : null,
    ]);
    if (old(round)) return;
    chart.removeAttribute("aria-busy");
    // A plan's answer says what would help, which a comparison's does not.
    if (!state.ways) await seek(LOOK);
    if (old(round)) return;
    if (drawn() < POINTS - 1) await compare(spread(least, most, POINTS), [SOLVER], FINE, "Refining the curve");
    if (old(round)) return;
    openOnPlan();
    if (state.budget >= needs(SOLVER) && !bestFor(state.budget, (point) => point.plan) && !state.cells.some((one) => isAt(one, state.budget, state.policy))) await solve();
  }

  // What the answer to a budget of one byte, which never fits, says of the smallest. The search for it goes on after its first answer, and
  // may find that a smaller one is enough.
  function learn(answer) {
    const { policy: name, minimum_budget_bytes: first, explanation } = answer, shortfall = explanation?.shortfall;
    if (name === SOLVER && shortfall && !(state.ways?.minimum_budget_bytes < shortfall.minimum_budget_bytes)) state.ways = shortfall;
    keep([{ budget_bytes: 1, policy: name, plan: null, summary: { ...answer, minimum_budget_bytes: Math.min(first, shortfall?.minimum_budget_bytes ?? first) } }]);
  }

  // The ends of the curve, as far as they are known, and a budget between them where none is chosen.
  function reach() {
    state.least = Math.max(1, needs(SOLVER));
    state.most = Math.max(needs("keep-all"), state.least + Math.min(MIB, state.least));
    if (!state.budget) state.budget = spread(state.least, state.most, POINTS)[Math.floor(POINTS / 2)];
    slider.disabled = false;
    openOnPlan();
    keep([]);
  }

  // Where nobody has chosen a budget, the nearest that is planned is shown, so that the verdict says what is known.
  function openOnPlan() {
    const near = state.chosen || state.typing ? null : undercut(points(state.policy)).filter(({ plan }) => plan).reduce((best, point) => (best && Math.abs(best.budget - state.budget) <= Math.abs(point.budget - state.budget) ? best : point), null);
    if (near) state.budget = near.budget;
    remember();
    mark();
    judge();
  }

  // So many budgets from the smallest to the largest, as they are shown: in tenths of a MiB, unless the whole curve lies within one.
  function spread(least, most, count) {
    const wide = most - least, whole = (bytes) => Math.ceil(wide > MIB ? (Math.ceil((10 * bytes) / MIB) * MIB) / 10 : bytes);
    const budgets = Array.from({ length: count }, (_, i) => whole(most > SPREAD * least ? least * ((most * 1.01) / least) ** (i / (count - 1)) : least + (wide * 1.02 * i) / (count - 1)));
    return [...new Set(budgets)];
  }

  // Search for the smallest budget for longer.
  async function seek(limit) {
    const { round } = state, bar = solving("Looking for a smaller budget", 2 * limit);
    state.seeking = true;
    curving.append(bar);
    drawSmallest();
    try {
      const { result } = await work("/v1/plans", request(1, SOLVER, limit), bar.hear, signal);
      if (!old(round)) learn(result.summary);
    } finally {
      state.seeking = false;
      bar.remove();
      if (!old(round)) drawSmallest();
    }
  }

  // Whether a stored plan is one of what is asked of the step now, on the profile's device.
  const matches = ({ optimizer, max_grad_norm: norm, elsewhere = null }) => optimizer === (state.step.optimizer ?? optimizer_of(summary)) && String(norm ?? "") === String(state.step.max_grad_norm ?? "") && (elsewhere ?? summary.device) === summary.device;

  // Begin anew: another optimizer or clipping makes other plans.
  async function restart() {
    Object.assign(state, { cells: [], chart: null, ways: null, proven: false, most: 0, asked: state.asked + 1 });
    chart.replaceChildren();
    chart.setAttribute("aria-busy", "true");
    for (const box of [key, numbersBox, next, help, rules, curving, working]) box.replaceChildren();
    await run();
  }

  async function run() {
    const round = state.round + 1;
    state.finding = true;
    try {
      await find();
    } finally {
      if (!old(round)) {
        state.finding = false;
        if (state.most) drawRules();
        curving.replaceChildren();
        chart.removeAttribute("aria-busy");
      }
    }
  }

  // --- set up ---

  slider.addEventListener("input", () => { choosing(inKib(budgetAt(Number(slider.value)))); glide(); });
  let byPointer = false; // whether the slider is being dragged
  slider.addEventListener("pointerdown", () => { byPointer = true; });
  slider.addEventListener("change", action(() => { const pointed = byPointer; byPointer = false; return pointed ? dragged() : moved(false); }));
  slider.addEventListener("keydown", action((event) => (event.key === "Enter" ? moved() : null), { passing: true }));
  policy.addEventListener("change", action(() => { state.policy = policy.value; state.drawn.add(state.policy); if (state.most) draw(); return moved(); }));
  const refuse = (text) => {
    refusal.textContent = text;
    input[text ? "setAttribute" : "removeAttribute"]("aria-invalid", "true");
    if (text) input.setAttribute("aria-errormessage", refusal.id);
  };
  const entered = async (asks) => {
    if (input.value === state.written) { refuse(""); return asks ? moved() : null; } // rounded, as the page has written it
    const bytes = budgetOf(input.value), refused = bytes === null ? `Write a budget in MiB, such as 300${input.value.trim() ? `: “${input.value.trim()}” is none` : ""}.` : bytes > MOST ? `That is more than any machine has; write at most ${mib(MOST, 0)} MiB.` : "";
    state.typing = false;
    refuse(refused);
    if (refused) return mark();
    const next = Math.max(LEAST, Math.ceil(bytes / 1024) * 1024);
    choosing(next);
    await moved(asks);
  };
  input.addEventListener("keydown", action((event) => (event.key === "Enter" ? entered(true) : null), { passing: true }));
  input.addEventListener("change", action(() => entered(false)));
  input.addEventListener("input", () => { state.typing = true; refuse(""); });
  input.addEventListener("blur", () => { state.typing = false; mark(); });
  stepForm.addEventListener("submit", action(async () => {
    forget(stepForm);
    const before = state.step;
    state.step = await asked(stepForm, "step");
    place.keep(Object.fromEntries(Object.keys(before).map((name) => [name, null])));
    remember();
    try {
      await restart();
    } catch (error) {
      if (!beside(stepForm, error)) throw error;
    }
  }));
  await complete(stepForm, "step", ["time_limit"]);
  for (const [name, value] of Object.entries(stepKept)) if (stepForm.elements[name]) stepForm.elements[name].value = value;
  state.step = await asked(stepForm, "step");
  // The place is there; what is searched for comes as it is found.
  run().catch((error) => { if (!signal.aborted) complain(error); });
}

// Show something else in a box, and leave the keyboard where it was.
function renew(box, ...children) {
  const nameIn = (one) => one.getAttribute("aria-label") ?? one.textContent, at = document.activeElement, name = box.contains(at) ? nameIn(at) : null;
  box.replaceChildren(...children);
  if (name !== null) [...box.querySelectorAll("a, button, input, summary, [tabindex]")].find((one) => nameIn(one) === name)?.focus({ preventScroll: true });
}

// A remedy as far as it has to go. The service tells of half as much; what frees enough may be less than that. `most`: what it could
// free in the end.
export function reaching(remedy, missing) {
  const { change, field, value, saves_bytes: saved } = remedy, now = Number(/instead of (\d+)/.exec(change)?.[1]);
  if (typeof value !== "number" || !(now > value) || field === "tile") return { ...remedy, most: saved };
  const most = (saved * now) / (now - value), small = Math.floor(now * (1 - (missing + NOISE) / most)), enough = field === "seq" && small > 8 ? small - (small % 8) : small;
  if (saved >= missing + NOISE || enough < 1) return { ...remedy, most };
  return { ...remedy, most, value: enough, change: change.replace(/\d+/, enough), saves_bytes: Math.floor((most * (now - enough)) / now) };
}

// What all remedies could free together: fewer tokens at a time, a smaller batch and shorter samples free the same bytes.
const BY_TOKENS = ["tile", "batch", "seq"];
const mostFreed = (remedies) => Math.max(0, ...remedies.filter(({ field }) => BY_TOKENS.includes(field)).map(({ most }) => most)) + remedies.filter(({ field }) => !BY_TOKENS.includes(field)).reduce((sum, { most }) => sum + most, 0);

// What fills the memory at the peak of a plan, the largest first; what counts for little is told together.
const HELD = { packed: "frozen weights, as stored", weight: "frozen weights, unpacked", trainable: "what is trained", optimizer: "the optimizer's state", gradient: "gradients", activation: "activations", batch: "samples", constant: "constants" };
const LITTLE = 0.005;
function filling(peak) {
  const held = Object.entries(peak.by_kind), between = peak.tensor_bytes - held.reduce((sum, [, bytes]) => sum + bytes, 0);
  const all = [["floor", "the process before it trains", peak.floor_bytes + peak.start_bytes], ...held.map(([kind, bytes]) => [kind, HELD[kind] ?? kind, bytes]), ["fragmentation", "gaps between tensors", between], ["workspace", "scratch of what runs then", peak.workspace_bytes], ["other", "the plan itself", peak.schedule_bytes]];
  const counts = ([, , bytes]) => bytes >= LITTLE * peak.bytes, parts = all.filter(counts).sort((a, b) => b[2] - a[2]), rest = peak.bytes - parts.reduce((sum, [, , bytes]) => sum + bytes, 0);
  const rows = [...parts, ...(rest > 0 ? [["other", "the rest", rest]] : [])].map(([kind, words, bytes]) => [words, mib(bytes), bar(bytes / peak.bytes, kindColour(kind))]);
  return scrolling("What fills the smallest plan", table("The smallest plan at its fullest", ["", "MiB", ""], [...rows, ["together", mib(peak.bytes), ""]]));
}

const AGAIN = /[;,]? profile again once they are idle/; // what the command line says where the page has a button

// What somebody has typed as a budget, in bytes: a comma stands for a decimal point, or parts thousands where three digits follow each;
// null for what is none.
export function budgetOf(text) {
  const plain = text.trim().replace(/\s*MiB$/i, ""), parted = /^\d{1,3}(,\d{3})+(\.\d+)?$/.test(plain);
  const value = plain === "" ? NaN : Number(parted ? plain.replaceAll(",", "") : plain.replace(",", "."));
  return value > 0 ? value * MIB : null;
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1);

// Large amounts as people say them.
const roomy = (bytes) => (bytes >= 4096 * MIB ? `${(bytes / (1024 * MIB)).toFixed(1)} GiB` : size(bytes));

const optimizer_of = ({ optimizer }) => optimizer ?? "adamw";

function better(cell, known) {
  const unfit = (one) => !fits(one.summary);
  if (unfit(cell) !== unfit(known)) return unfit(known);
  if (unfit(cell)) return cell.summary.minimum_budget_bytes <= known.summary.minimum_budget_bytes;
  const same = Math.abs(cell.summary.step_seconds - known.summary.step_seconds) <= 1e-9 * known.summary.step_seconds;
  if (!same) return cell.summary.step_seconds < known.summary.step_seconds;
  return Boolean(cell.plan) && (!known.plan || Boolean(cell.summary.explanation) || cell.summary.bound_seconds > known.summary.bound_seconds);
}

// What is proven of a solver's plan, and what ended its search.
const ENDS = { gap: ", as near as was asked for", stalled: ", where the search gained no more", "time limit": ", where the time limit ended the search", interrupt: ", where the search was interrupted" };
function nearness({ status, gap, ended_by: end }) {
  if (status === "optimal") return "proven the best of all plans it can choose from";
  return `within ${gapWords(gap)} of the best plan it can choose from${ENDS[end] ?? ""}`;
}

const PRICED = ["columns", "pricing"]; // stages of a search that estimate a step

// A bar for a search that is given `limit` seconds: it moves with them, and says how good the best plan is.
export function solving(what, limit) {
  const bar = progress(what), began = Date.now();
  let fastest = Infinity; // of what was carried out; what the search still prices may turn out slower
  const tell = ({ stage, incumbent, bound } = {}) => {
    if (incumbent && !PRICED.includes(stage)) fastest = Math.min(fastest, incumbent);
    const passed = Math.min(limit, (Date.now() - began) / 1000);
    const found = fastest < Infinity ? `${seconds(fastest)} s a step so far` : incumbent ? `about ${seconds(incumbent)} s a step in sight` : "";
    bar.update({ stage: found && bound ? `${found}, none is faster than ${seconds(Math.min(bound, fastest))} s` : found });
    bar.querySelector("progress").value = passed / limit;
    bar.querySelector("span").append(`; ends within ${span(limit - passed + 1)}`);
  };
  bar.hear = tell;
  tell();
  return bar;
}

function about(profile) {
  // A label says already what the step is; a name that a person gave does not.
  const { summary } = profile, named = Boolean(profile.title), parts = [
    named && summary.seq ? `${summary.batch} × ${summary.seq} tokens a step${summary.accumulate > 1 ? `, ${summary.accumulate} steps make an update` : ""}` : null,
    named && summary.lora ? `LoRA rank ${summary.lora.rank}` : null,
    summary.weight_bytes || summary.seq ? `${summary.layers} layers of ${summary.programs} kinds` : "a graph of operators",
    summary.weight_bytes ? `weights ${mib(summary.packed_bytes)} MiB packed, ${mib(summary.weight_bytes)} unpacked` : null,
    summary.trainable_bytes ? `trained ${mib(summary.trainable_bytes)} MiB` : null,
    `${origin(profile)}, times of ${summary.device}`,
  ];
  return `${profile.title ? `${profile.name}: ` : ""}${parts.filter(Boolean).join("; ")}.`;
}
