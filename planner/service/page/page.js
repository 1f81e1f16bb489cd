// The page: choose a profile, drag the budget along the curve, look at the plan, compare two, run one; and look at fleets.

import { download, get, post, Refused, setToken, work } from "./api.js";
import { atLeast, curveLegend, html, MIB, place, places, seconds } from "./charts.js";
import { showDifference } from "./compare.js";
import { budgetCurve } from "./curve.js";
import { listDevices } from "./devices.js";
import { listFleets, setUpFleets } from "./fleet.js";
import { asked, beside, complete, forget } from "./forms.js";
import { showPlan } from "./plan.js";
import { listRuns, offerRun, setUpRun } from "./run.js";
import { mib, percent, table } from "./tables.js";

const $ = (id) => document.getElementById(id);
const POINTS = 7, TIME_LIMIT = 15, SLIDER_STEPS = 200, MOST = Number.MAX_SAFE_INTEGER;
let POLICIES = [];
const state = { profile: null, least: 0, most: 0, budget: 0, cells: [], chart: null, plan: null, chosen: 0, asked: 0, views: new Map(), dragging: false, step: {} };

function complain(error) {
  if (error instanceof Refused && error.status === 401) {
    $("token-form").hidden = false;
    $("token").focus();
    $("token").select();
    if (!$("token").value) return;
    error.message = "this token is not the service's; it is what TIGHTFIT_TOKEN held when the service was started";
  }
  $("problem").textContent = error.message;
  $("problem").hidden = false;
}

// Every action clears the last complaint; a newer action makes an older one's answer void.
function action(run) {
  return async (...args) => {
    args[0]?.preventDefault?.();
    $("problem").hidden = true;
    try { await run(...args); } catch (error) { complain(error); }
  };
}

const working = (text, where = "working") => {
  $(where).textContent = text;
  $(where).classList.toggle("busy", Boolean(text));
};
const reporter = (what, where) => (progress) => {
  const parts = [progress.stage];
  if (progress.total) parts.push(`${progress.done} of ${progress.total}`);
  if (progress.incumbent) parts.push(`step ${seconds(progress.incumbent)} s`, `bound ${seconds(progress.bound)} s`, `gap ${percent(progress.gap, 2)}`);
  working(`${what}: ${parts.join(", ")}`, where);
};

// --- 1. the model -----------------------------------------------------------------------------------------------------

async function listProfiles(chosen, kept) {
  const { profiles } = await get("/v1/profiles?limit=1000");
  const shape = ({ summary }) => (summary.seq ? ` · ${summary.batch} × ${summary.seq} tokens` : "");
  const came = ({ origin, created }) => `${origin === "made" ? "measured here" : "uploaded"} ${new Date(1000 * created).toLocaleString()}`;
  const options = profiles.map((one) => html("option", { value: one.id }, `${one.name}${shape(one)} · ${one.summary.device} · ${came(one)}`));
  $("profile").replaceChildren(html("option", { value: "" }, profiles.length ? "choose one" : "none yet"), ...options);
  if (chosen) { $("profile").value = chosen; await choose(chosen, kept); }
}

// The address says what is looked at, so that it can be loaded anew, kept and sent.
function remember() {
  const { profile, budget, step } = state;
  history.replaceState(null, "", profile ? `#${new URLSearchParams({ profile, budget, policy: $("policy").value, ...step })}` : "#");
}

// Measuring takes minutes, and others may be looked at meanwhile: it has a line of its own, which the latest one owns.
let measurements = 0;
async function measured(request) {
  const mine = ++measurements, say = (text) => { if (mine === measurements) working(text, "measuring"); };
  say("measuring …");
  try {
    return await work("/v1/profiles", request, ({ stage, done, total }) => say(`measuring: ${stage}${total ? ` ${done} of ${total}` : ""}`));
  } finally {
    say("");
  }
}

async function recall() {
  const { profile, ...kept } = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  await Promise.all([listRuns(), listFleets(), listDevices(), formed]);
  $("step-form").reset();
  for (const [name, value] of Object.entries(kept)) if ($("step-form").elements[name]) $("step-form").elements[name].value = value;
  state.step = await asked($("step-form"), "step");
  await listProfiles(profile, kept);
  if (!profile && state.profile) await choose("");
}

async function configOf(file) {
  if (!file?.size) throw new Error("choose a config.json first");
  try { return JSON.parse(await file.text()); } catch (error) { throw new Error(`${file.name} is no JSON (${error.message}); choose a model's config.json`); }
}

// Look at a profile that is made or uploaded, unless another was chosen since: `chosen` is what `state.chosen` was.
async function arrived(identity, chosen) {
  if (chosen === state.chosen) return listProfiles(identity);
  await listProfiles();
  $("profile").value = state.profile;
}

// `kept`: the budget and policy that the address names.
async function choose(identity, kept = {}) {
  const mine = ++state.chosen, old = () => mine !== state.chosen;
  state.asked++;
  Object.assign(state, { profile: identity, cells: [], chart: null, plan: null });
  for (const id of ["fit", "plan", "compare", "difference"]) $(id).hidden = true;
  offerRun(null);
  $("start").hidden = Boolean(identity);
  $("about").textContent = $("caution").textContent = "";
  working("");
  working("", "curving");
  $("curve").removeAttribute("aria-busy");
  if (!identity) return remember();
  try {
    await explore(identity, kept, old);
  } catch (error) {
    if (old()) return;
    $("profile").value = state.chart ? identity : ""; // what shows nothing can be chosen anew
    throw error;
  } finally {
    if (!old()) {
      working("", "curving");
      $("curve").removeAttribute("aria-busy");
      if (!state.chart) working("");
    }
  }
}

async function explore(identity, kept, old) {
  const { summary, name } = await get(`/v1/profiles/${identity}`);
  if (old()) return;
  $("about").textContent = `${name}: ${summary.layers} layers of ${summary.programs} kinds; weights ${mib(summary.packed_bytes)} MiB packed, ${mib(summary.weight_bytes)} unpacked; trainables ${mib(summary.trainable_bytes)} MiB${summary.accumulate > 1 ? `; ${summary.accumulate} steps make an update` : ""}; times ${summary.measured ? "measured" : "estimated"} on ${summary.device}`;
  $("caution").textContent = summary.marks?.length ? `Caution: ${summary.marks.join("; ")}` : "";
  POLICIES = summary.policies;
  $("policy").replaceChildren(...POLICIES.map((policy) => html("option", {}, policy)));
  if (POLICIES.includes(kept.policy)) $("policy").value = kept.policy;
  $("fit").hidden = false;
  $("verdict").textContent = "";
  for (const id of ["curve-table", "curve-legend"]) $(id).replaceChildren();
  $("slider").disabled = $("solve").disabled = true;
  for (const id of ["left", "right"]) delete $(id).dataset.chosen;
  $("curve").setAttribute("aria-busy", "true");
  working("finding the smallest and the largest budget that make sense …");
  // One byte never fits: the answers say what would.
  const ask = (policy) => work("/v1/plans", { profile: identity, memory: 1, policy, time_limit: TIME_LIMIT, ...state.step }, (progress) => { if (!old()) reporter(`smallest budget, ${policy}`)(progress); });
  const [least, most] = await Promise.all([ask("solver"), ask("keep-all")]);
  if (old()) return;
  state.least = Math.max(1, least.result.summary.minimum_budget_bytes);
  state.most = Math.max(most.result.summary.minimum_budget_bytes, state.least + Math.min(MIB, state.least));
  const span = state.most - state.least;
  // Budgets as they are shown, in tenths of a MiB, unless the whole curve lies within one.
  const whole = (bytes) => Math.ceil(span > MIB ? (Math.ceil((10 * bytes) / MIB) * MIB) / 10 : bytes);
  const budgets = Array.from({ length: POINTS }, (_, i) => whole(state.least + (span * 1.02 * i) / (POINTS - 1)));
  const asked = Number(kept.budget);
  state.budget = asked >= 1024 && asked <= MOST ? Math.round(asked) : budgets[Math.floor(POINTS / 2)];
  setSlider(state.least - span * 0.05, state.most + span * 0.05);
  remember();
  $("slider").disabled = false;
  draw();
  // The curve fills while the plan in its middle is looked at already.
  const compare = async (policies, what) => {
    const live = (progress) => {
      if (old()) return;
      reporter(what, "curving")(progress);
      if (progress.cell) keep([{ ...progress.cell, summary: progress.cell }]);
    };
    const done = await work("/v1/comparisons", { profile: identity, memory: budgets, policies, time_limit: TIME_LIMIT, ...state.step }, live);
    if (!old()) keep(done.result.cells);
  };
  const first = solve();
  const rest = compare(POLICIES.slice(1), "the curve of fixed rules").then(() => compare(POLICIES.slice(0, 1), "the curve"));
  // It goes on where the first plan fails, and says so until it ends.
  await Promise.all([first, rest.finally(() => { if (!old()) working("", "curving"); })]);
  if (old()) return;
  glide();
  const best = bestFor(state.budget, (point) => point.plan)?.plan ?? state.plan;
  if (best) await show(best);
}

// --- 2. will it fit ---------------------------------------------------------------------------------------------------

// Keep plans in the table; a cell that progress announced gives way to the stored plan.
function keep(cells) {
  for (const cell of cells) {
    const at = state.cells.findIndex((one) => one.budget_bytes === cell.budget_bytes && one.policy === cell.policy);
    if (at < 0) state.cells.push(cell);
    else if (cell.plan) state.cells[at] = cell;
  }
  if (!state.dragging) draw();
  judge();
}

// The range is that of the profile: a budget beyond it, typed or in the address, stands at the slider's end.
function setSlider(low, high) {
  const slider = $("slider"), step = Math.max(1, Math.round((high - low) / 1024 / SLIDER_STEPS));
  slider.min = Math.max(1, Math.floor(low / 1024 / step)) * step;
  slider.max = Math.ceil(high / 1024 / step) * step;
  slider.step = step;
}

function draw() {
  // What was planned far off the curve, perhaps by a slip of the keyboard, is in the table alone: it would squeeze the rest.
  const { least, most } = state, near = ({ budget }) => budget >= 2 * least - most && budget <= 2 * most - least;
  const series = POLICIES.map((name, slot) => ({ name, slot, points: points(name).filter(near), misfits: misfits(name).filter(near) })).filter((one) => one.points.length + one.misfits.length);
  place($("curve"), (width) => {
    state.chart = budgetCurve(series, { least, most, width });
    const { picture } = state.chart;
    const drag = (event) => {
      state.budget = Math.max(1024, Math.round(state.chart.budgetAt(event) / 1024) * 1024);
      glide();
    };
    picture.addEventListener("pointerdown", (event) => { picture.setPointerCapture(event.pointerId); state.dragging = true; drag(event); });
    picture.addEventListener("pointermove", (event) => { if (state.dragging) drag(event); });
    for (const end of ["pointerup", "pointercancel"]) picture.addEventListener(end, action(() => { state.dragging = false; draw(); return moved(); }));
    mark();
    return picture;
  });
  $("curve-legend").replaceChildren(...curveLegend(series));
  const budgets = [...new Set(state.cells.map((cell) => cell.budget_bytes))].sort((a, b) => a - b);
  const cell = (budget, policy) => {
    const planned = state.cells.find((one) => one.budget_bytes === budget && one.policy === policy);
    if (!planned) return "–";
    const cut = policy === "solver" && planned.summary.ended_by === "time limit";
    if (planned.summary.status === "infeasible") return `needs ${atLeast(planned.summary.minimum_budget_bytes)}${cut ? " or less" : ""}`;
    return `${seconds(planned.summary.step_seconds)}${cut ? " (time limit)" : ""}`;
  };
  $("curve-table").replaceChildren(table("Seconds per step, with a note where the time limit ended a search; where a budget is too small, the smallest that is enough, in MiB", ["budget, MiB", ...POLICIES], budgets.map((budget) => [mib(budget), ...POLICIES.map((policy) => cell(budget, policy))])));
  const plans = state.cells.filter((one) => one.plan && one.summary.status !== "infeasible").sort((a, b) => POLICIES.indexOf(a.policy) - POLICIES.indexOf(b.policy) || a.budget_bytes - b.budget_bytes);
  const solved = points("solver").filter((point) => point.plan);
  for (const [id, first] of [["left", solved[0]], ["right", solved.at(-1)]]) {
    const kept = $(id).dataset.chosen;
    $(id).replaceChildren(...plans.map((one) => html("option", { value: one.plan }, `${one.policy} at ${mib(one.budget_bytes)} MiB`)));
    $(id).value = plans.some((one) => one.plan === kept) ? kept : first?.plan ?? "";
  }
  $("compare").hidden = plans.length < 2;
}

const points = (policy) => state.cells.filter((one) => one.policy === policy && one.summary.status !== "infeasible").map((one) => ({ budget: one.budget_bytes, step: one.summary.step_seconds, bound: one.summary.bound_seconds, peak: one.summary.peak_bytes, plan: one.plan, summary: one.summary })).sort((a, b) => a.budget - b.budget);
const misfits = (policy) => state.cells.filter((one) => one.policy === policy && one.summary.status === "infeasible").map((one) => ({ budget: one.budget_bytes, needs: one.summary.minimum_budget_bytes }));

// The best plan made already: one for less memory fits in more.
const bestFor = (budget, made = () => true) => points($("policy").value).filter((point) => point.budget <= budget && made(point)).at(-1);

// What is proven of a solver's plan, and what ended its search.
const ENDS = { gap: ", as near as was asked for", stalled: ", where the search gained no more", "time limit": ", where the time limit ended the search", interrupt: ", where the search was interrupted" };
function nearness({ status, gap, ended_by: end }) {
  if (status === "optimal") return "proven optimal among plans of its class";
  return `within ${percent(Math.ceil(1e4 * gap - 1e-6) / 1e4, 2)} of the best plan of its class${ENDS[end] ?? ""}`;
}

function mark() {
  const { budget } = state;
  $("budget").value = (budget / MIB).toFixed(places(budget / MIB));
  $("slider").value = Math.round(budget / 1024);
  $("slider").setAttribute("aria-valuetext", `${mib(budget)} MiB`);
  state.chart?.show(budget, bestFor(budget)?.step);
}

// The smallest budget that is enough for a policy's plans, as far as it is known.
function needs(policy) {
  const known = misfits(policy).map((one) => one.needs).filter(Boolean);
  return Math.min(...known, policy === "solver" ? state.least : Infinity, ...points(policy).map((one) => one.budget));
}

// What is known of the budget and the policy that are chosen, and of nothing else: said anew whenever they or it change.
function judge() {
  const { budget } = state, policy = $("policy").value, asked = `${mib(budget)} MiB`, best = bestFor(budget);
  const say = (text, fits) => {
    $("verdict").className = `verdict ${fits ? "fits" : "not"}`;
    $("verdict").textContent = text;
  };
  if (best) {
    const { summary } = best;
    if (!best.plan) return say(`Fits ${asked}: at most ${seconds(best.step)} s per step`, true);
    const proof = summary.policy === "solver" ? `, ${nearness(summary)}` : `, by the rule ${summary.policy}`;
    if (best.budget === budget) return say(`Fits ${asked}: ${seconds(summary.step_seconds)} s per step${proof}; peak ${mib(summary.peak_bytes)} MiB`, true);
    return say(`Fits ${asked}: at most ${seconds(summary.step_seconds)} s per step, as at ${mib(best.budget)} MiB; plan at this budget to see what the rest is good for`, true);
  }
  const here = state.cells.find((one) => one.budget_bytes === budget && one.policy === policy);
  const least = here?.summary.minimum_budget_bytes || needs(policy), enough = needs("solver");
  if (!here && (budget >= least || least === Infinity)) return say(`${asked}: no plan made yet`, false);
  if (policy === "solver") return say(`Does not fit ${asked}: the smallest budget found to be enough is ${atLeast(least)} MiB`, false);
  const others = budget >= enough ? `plans of the solver fit from ${atLeast(enough)} MiB on` : `nor does any other plan found: the smallest budget found to be enough is ${atLeast(enough)} MiB`;
  say(`The rule ${policy} does not fit ${asked}, it needs ${atLeast(least)} MiB; ${others}`, false);
}

// While the budget moves, the plan moves along.
function glide() {
  const best = bestFor(state.budget);
  mark();
  judge();
  if (best?.plan && best.plan !== state.plan) show(best.plan).catch(complain);
}

// When it rests: show the nearest plan that fits, made or not.
async function moved() {
  state.asked++; // what was asked for another budget is no longer shown
  working("");
  $("solve").disabled = false;
  remember();
  glide();
  const best = bestFor(state.budget, (point) => point.plan);
  if (best) await show(best.plan);
  else await solve();
}

async function solve() {
  const { budget, chosen } = state, policy = $("policy").value, mine = ++state.asked, current = () => mine === state.asked;
  const what = `planning at ${mib(budget)} MiB`, report = reporter(what);
  remember();
  $("solve").disabled = true;
  working(`${what} …`);
  try {
    const request = { profile: state.profile, memory: budget, policy, time_limit: TIME_LIMIT, ...state.step };
    const done = await work("/v1/plans", request, (progress) => { if (current()) report(progress); });
    if (chosen !== state.chosen) return;
    keep([{ budget_bytes: budget, policy, plan: done.result.plan, summary: done.result.summary }]);
    if (current()) await show(done.result.plan);
  } finally {
    if (current()) {
      working("");
      $("solve").disabled = false;
    }
  }
}

// --- 3. the plan ------------------------------------------------------------------------------------------------------

function viewOf(identity) {
  if (!state.views.has(identity)) {
    const asked = get(`/v1/plans/${identity}/view`);
    asked.catch(() => state.views.delete(identity));
    state.views.set(identity, asked);
  }
  return state.views.get(identity);
}

async function show(identity) {
  state.plan = identity;
  const view = await viewOf(identity);
  if (state.plan !== identity) return;
  const { summary } = view, at = `${mib(summary.budget_bytes)} MiB`;
  const none = summary.policy === "solver" ? "3. Why nothing fits" : `3. Why the rule ${summary.policy} does not fit ${at}`;
  showPlan(view);
  $("plan-title").textContent = summary.status === "infeasible" ? none : `3. The plan: ${summary.policy} at ${at}`;
  offerRun(view);
}

// --- set up -----------------------------------------------------------------------------------------------------------

$("token-form").addEventListener("submit", action(async () => {
  setToken($("token").value);
  $("token-form").hidden = true;
  await recall();
}));
$("profile").addEventListener("change", action(() => choose($("profile").value)));
$("upload").addEventListener("change", action(async () => {
  const [file] = $("upload").files;
  if (!file) return;
  const { chosen } = state, kept = await post("/v1/profiles/upload", await file.text());
  await arrived(kept.id, chosen);
}));
$("source").addEventListener("change", () => {
  for (const name of ["path", "config"]) $(`${name}-label`).hidden = $("source").value !== name;
});
$("measure").addEventListener("submit", action(async (event) => {
  const form = event.target, { source, config } = form.elements, { path, ...request } = await asked(form, "profile");
  if (source.value === "path") request.path = path ?? "";
  else request.config = await configOf(config.files[0]);
  forget(form);
  try {
    const { chosen } = state, done = await measured(request);
    await arrived(done.result.profile, chosen);
  } catch (error) {
    if (!beside(form, error)) throw error;
  }
}));
// Another optimizer or clipping makes other plans: the curve is drawn anew.
$("step-form").addEventListener("submit", action(async (event) => {
  const form = event.target, { profile, budget } = state;
  forget(form);
  state.step = await asked(form, "step");
  try {
    await choose(profile, { budget, policy: $("policy").value });
  } catch (error) {
    if (!beside(form, error)) throw error;
  }
}));
$("slider").addEventListener("input", () => { state.budget = Number($("slider").value) * 1024; glide(); });
$("slider").addEventListener("change", action(moved));
$("policy").addEventListener("change", action(moved));
$("budget").addEventListener("change", action(async () => {
  const { value } = $("budget"), bytes = Number(value) * MIB;
  if (!(bytes > 0 && bytes <= MOST)) {
    mark();
    throw new Error(`${value || "nothing"} is no budget; write MiB above 0, at most ${mib(MOST, 0)}`);
  }
  state.budget = Math.max(1024, Math.ceil(bytes / 1024) * 1024);
  await moved();
}));
$("solve").addEventListener("click", action(solve));
$("compare-form").addEventListener("submit", action(async () => {
  const chosen = ["left", "right"].map((id) => $(id));
  const [left, right] = chosen.map((one) => one.value);
  const [changes, ...views] = await Promise.all([get(`/v1/plans/${left}/changes/${right}`), viewOf(left), viewOf(right)]);
  showDifference(changes, views, chosen.map((one) => one.selectedOptions[0].text));
}));
for (const id of ["left", "right"]) $(id).addEventListener("change", () => { $(id).dataset.chosen = $(id).value; });
$("download").addEventListener("click", action(() => download(`/v1/plans/${state.plan}/file`, "plan.json")));

const root = document.documentElement, darker = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : darker.matches);
const nameTheme = () => { $("theme").textContent = dark() ? "Light" : "Dark"; };
root.dataset.theme = localStorage.getItem("tightfit-theme") ?? "";
if (!root.dataset.theme) delete root.dataset.theme;
darker.addEventListener("change", nameTheme);
$("theme").addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  localStorage.setItem("tightfit-theme", root.dataset.theme);
  nameTheme();
});
nameTheme();
const formed = Promise.all([complete($("measure"), "profile", ["hub"]), complete($("step-form"), "step", ["time_limit"]), complete($("run-form"), "run", ["plan"])]);
formed.catch(complain);
setUpRun(() => state.plan, action);
setUpFleets(action);
addEventListener("hashchange", action(recall));
action(recall)();
