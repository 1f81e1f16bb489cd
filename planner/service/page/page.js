// The page: choose a profile, drag the budget along the curve, look at the plan, compare two, run one.

import { get, post, Refused, setToken, work } from "./api.js";
import { atLeast, curve, html, legend, MIB, mib, seconds, table } from "./charts.js";
import { showDifference, showPlan } from "./plan.js";
import { setUpRun } from "./run.js";

const $ = (id) => document.getElementById(id);
const POINTS = 7, TIME_LIMIT = 15;
let POLICIES = [];
const state = { profile: null, least: 0, most: 0, cells: [], chart: null, plan: null, asked: 0 };

function complain(error) {
  if (error instanceof Refused && error.status === 401) {
    $("token-form").hidden = false;
    $("token").focus();
    return;
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

const working = (text) => { $("working").textContent = text; };
const told = (what) => (progress) => {
  const parts = [progress.stage];
  if (progress.total) parts.push(`${progress.done} of ${progress.total}`);
  if (progress.incumbent) parts.push(`step ${seconds(progress.incumbent)} s`, `bound ${seconds(progress.bound)} s`, `gap ${(100 * progress.gap).toFixed(2)} %`);
  working(`${what}: ${parts.join(", ")}`);
};

// --- 1. the model -----------------------------------------------------------------------------------------------------

async function listProfiles(chosen) {
  const { profiles } = await get("/v1/profiles");
  const options = profiles.map((one) => html("option", { value: one.id }, `${one.name} · ${one.summary.batch} × ${one.summary.seq ?? "–"} · ${one.summary.device}`));
  $("profile").replaceChildren(html("option", { value: "" }, profiles.length ? "choose one" : "none yet"), ...options);
  if (chosen) { $("profile").value = chosen; await choose(chosen); }
}

async function choose(identity) {
  const mine = ++state.asked;
  Object.assign(state, { profile: identity, cells: [], chart: null, plan: null });
  for (const id of ["fit", "plan", "compare", "run", "difference"]) $(id).hidden = true;
  $("about").textContent = "";
  if (!identity) return;
  const { summary, name } = await get(`/v1/profiles/${identity}`);
  $("about").textContent = `${name}: ${summary.layers} layers of ${summary.programs} kinds; weights ${mib(summary.packed_bytes)} MiB packed, ${mib(summary.weight_bytes)} unpacked; trainables ${mib(summary.trainable_bytes)} MiB; ${summary.measured ? "measured" : "estimated"} on ${summary.device}`;
  POLICIES = summary.policies;
  $("policy").replaceChildren(...POLICIES.map((name) => html("option", {}, name)));
  $("fit").hidden = false;
  $("verdict").textContent = "";
  $("curve").replaceChildren(); $("curve-table").replaceChildren(); $("curve-legend").replaceChildren();
  $("slider").disabled = true;
  working("finding the smallest and the largest budget that make sense …");
  // One byte never fits: the answers say what would.
  const ask = (policy) => work("/v1/plans", { profile: identity, memory: 1, policy, time_limit: TIME_LIMIT }, told(`smallest budget, ${policy}`));
  const [least, most] = await Promise.all([ask("solver"), ask("keep-all")]);
  if (mine !== state.asked) return;
  state.least = least.result.summary.minimum_budget_bytes;
  state.most = Math.max(most.result.summary.minimum_budget_bytes, state.least + MIB);
  const span = state.most - state.least;
  const budgets = Array.from({ length: POINTS }, (_, i) => Math.round(state.least + (span * 1.02 * i) / (POINTS - 1)));
  const compare = (policies) => work("/v1/comparisons", { profile: identity, memory: budgets, policies, time_limit: TIME_LIMIT }, told("curve"));
  const rules = compare(POLICIES.slice(1));
  rules.catch(() => {}); // told below
  const done = await compare(POLICIES.slice(0, 1));
  if (mine !== state.asked) return;
  state.cells = done.result.cells;
  working("");
  const slider = $("slider");
  slider.min = Math.floor((state.least - span * 0.05) / 1024); slider.max = Math.ceil((state.most + span * 0.05) / 1024);
  slider.value = Math.ceil(budgets[Math.floor(POINTS / 2)] / 1024);
  slider.disabled = false;
  draw();
  await moved();
  const { result } = await rules;
  if (identity !== state.profile) return;
  state.cells = state.cells.concat(result.cells);
  draw();
}

// --- 2. will it fit ---------------------------------------------------------------------------------------------------

function draw() {
  const slots = POLICIES.map((name, slot) => ({ name, slot, points: points(name) })).filter((one) => one.points.length);
  state.chart = curve(slots, state.least);
  const { picture } = state.chart;
  const drag = (event) => {
    $("slider").value = Math.round(state.chart.budgetAt(event) / 1024);
    glide();
  };
  picture.addEventListener("pointerdown", (event) => { picture.setPointerCapture(event.pointerId); drag(event); });
  picture.addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });
  picture.addEventListener("pointerup", action(moved));
  $("curve").replaceChildren(picture);
  mark();
  $("curve-legend").replaceChildren(...legend(slots.map((one) => [one.name, `var(--policy-${one.slot})`])), html("li", {}, "dotted: no plan of this class is faster"));
  const budgets = [...new Set(state.cells.map((cell) => cell.budget_bytes))].sort((a, b) => a - b);
  const cell = (budget, policy) => {
    const found = state.cells.find((one) => one.budget_bytes === budget && one.policy === policy);
    if (!found) return "–";
    return found.summary.status === "infeasible" ? `needs ${atLeast(found.summary.minimum_budget_bytes)}` : seconds(found.summary.step_seconds);
  };
  $("curve-table").replaceChildren(table("Seconds per step; where a budget is too small, the smallest that is enough, in MiB", ["budget, MiB", ...POLICIES], budgets.map((budget) => [mib(budget), ...POLICIES.map((policy) => cell(budget, policy))])));
  const options = () => state.cells.filter((one) => one.summary.status !== "infeasible").map((one) => html("option", { value: one.plan }, `${one.policy} at ${mib(one.budget_bytes)} MiB`));
  const solved = points("solver");
  for (const [id, first] of [["left", solved[0]], ["right", solved.at(-1)]]) {
    const kept = $(id).value;
    $(id).replaceChildren(...options());
    $(id).value = state.cells.some((one) => one.plan === kept) ? kept : first?.plan ?? "";
  }
  $("compare").hidden = false;
}

const points = (policy) => state.cells.filter((one) => one.policy === policy && one.summary.status !== "infeasible").map((one) => ({ budget: one.budget_bytes, step: one.summary.step_seconds, bound: one.summary.bound_seconds, plan: one.plan })).sort((a, b) => a.budget - b.budget);
const chosenBudget = () => Number($("slider").value) * 1024;

// The budget on the curve, and the best plan computed already: one for less memory fits in more.
function mark() {
  const budget = chosenBudget(), policy = $("policy").value;
  $("budget").value = (budget / MIB).toFixed(1);
  $("slider").setAttribute("aria-valuetext", `${mib(budget)} MiB`);
  const best = points(policy).filter((point) => point.budget <= budget).at(-1);
  state.chart?.show(budget, best?.step);
  return best;
}

// While the budget moves.
function glide() {
  const budget = chosenBudget(), best = mark();
  $("verdict").className = `verdict ${best ? "fits" : "not"}`;
  $("verdict").textContent = best ? `Fits ${mib(budget)} MiB: at most ${seconds(best.step)} s per step` : `Does not fit ${mib(budget)} MiB`;
  return best;
}

// When it rests: show the nearest plan that fits, computed or not.
async function moved() {
  const best = glide();
  if (best) await show(best.plan);
  else await solve();
}

async function solve() {
  const budget = chosenBudget(), policy = $("policy").value, mine = ++state.asked;
  $("solve").disabled = true;
  try {
    working(`planning at ${mib(budget)} MiB …`);
    const done = await work("/v1/plans", { profile: state.profile, memory: budget, policy, time_limit: TIME_LIMIT }, told(`planning at ${mib(budget)} MiB`));
    if (mine !== state.asked) return;
    working("");
    const cell = { budget_bytes: budget, policy, plan: done.result.plan, summary: done.result.summary };
    state.cells = state.cells.filter((one) => one.budget_bytes !== budget || one.policy !== policy).concat(cell);
    if (cell.summary.status !== "infeasible") draw();
    mark();
    await show(cell.plan);
  } finally {
    $("solve").disabled = false;
  }
}

// --- 3. the plan ------------------------------------------------------------------------------------------------------

async function show(identity) {
  const mine = (state.plan = identity);
  const view = await get(`/v1/plans/${identity}/view`);
  if (state.plan !== mine) return;
  const { summary } = view;
  const fits = summary.status !== "infeasible";
  const proof = summary.policy === "solver" ? `, within ${(100 * summary.gap).toFixed(2)} % of the best plan of its class` : `, by the rule ${summary.policy}`;
  $("verdict").className = `verdict ${fits ? "fits" : "not"}`;
  $("verdict").textContent = fits
    ? `Fits ${mib(chosenBudget())} MiB: ${seconds(summary.step_seconds)} s per step${proof}; peak ${mib(summary.peak_bytes)} MiB`
    : `Does not fit ${mib(summary.budget_bytes)} MiB: the smallest budget that is enough is ${atLeast(summary.minimum_budget_bytes)} MiB`;
  showPlan(view);
  $("plan-title").textContent = fits ? `3. The plan: ${summary.policy} at ${mib(summary.budget_bytes)} MiB` : "3. Why nothing fits";
  $("run").hidden = !fits || !view.runnable;
  $("download").dataset.plan = identity;
}

// --- set up -----------------------------------------------------------------------------------------------------------

$("token-form").addEventListener("submit", action(async () => {
  setToken($("token").value);
  $("token-form").hidden = true;
  await listProfiles();
}));
$("profile").addEventListener("change", action(() => choose($("profile").value)));
$("upload").addEventListener("change", action(async () => {
  const [file] = $("upload").files;
  if (!file) return;
  const kept = await post("/v1/profiles/upload", await file.text());
  await listProfiles(kept.id);
}));
$("measure").addEventListener("submit", action(async (event) => {
  const form = new FormData(event.target);
  const request = { path: form.get("path") };
  for (const name of ["seq", "batch", "lora_rank"]) request[name] = Number(form.get(name));
  $("about").textContent = "measuring …";
  const done = await work("/v1/profiles", request, (progress) => { $("about").textContent = `measuring: ${progress.stage} ${progress.done} of ${progress.total}`; });
  await listProfiles(done.result.profile);
}));
$("slider").addEventListener("input", glide);
$("slider").addEventListener("change", action(moved));
$("policy").addEventListener("change", action(moved));
$("budget").addEventListener("change", action(async () => {
  const wanted = Math.ceil((Number($("budget").value) * MIB) / 1024), slider = $("slider");
  slider.min = Math.min(slider.min, wanted); slider.max = Math.max(slider.max, wanted);
  slider.value = wanted;
  await moved();
}));
$("solve").addEventListener("click", action(solve));
$("compare-form").addEventListener("submit", action(async () => {
  const [left, right] = ["left", "right"].map((id) => $(id));
  showDifference(await get(`/v1/plans/${left.value}/changes/${right.value}`), [left, right].map((one) => one.selectedOptions[0].text));
}));
$("download").addEventListener("click", action(async (event) => {
  const plan = await get(`/v1/plans/${event.target.dataset.plan}/file`);
  const link = html("a", { href: URL.createObjectURL(new Blob([JSON.stringify(plan)], { type: "application/json" })), download: "plan.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}));
$("download").setAttribute("href", "#plan");
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  $("theme").setAttribute("aria-pressed", String(!dark));
});
setUpRun(() => state.plan, complain);
action(() => listProfiles())();
