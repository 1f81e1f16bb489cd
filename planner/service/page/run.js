// Runs, live: loss and memory step by step against the cap, then the report. A reloaded page finds them again.

import { download, finish, get, post } from "./api.js";
import { amount, capLine, frame, html, MIB, path, place, seconds, svg } from "./charts.js";
import { asked, beside, forget } from "./forms.js";
import { mib, percent, table } from "./components.js";

const $ = (id) => document.getElementById(id);
const REDRAW = 250; // ms
const LISTED = 20;
let current = null, followed = 0;

// Show the form where the plan can be run, else why not.
export function offerRun(view) {
  const refused = view?.not_runnable;
  $("run-form").hidden = !view || Boolean(refused);
  $("run-refused").hidden = !refused;
  $("run-refused").textContent = refused ?? "";
  const steps = $("run-form").elements.steps, unit = view?.summary.accumulate ?? 1;
  steps.min = steps.step = unit;
  if (steps.value) steps.value = Math.ceil(steps.value / unit) * unit;
  $("run").hidden = (!view || view.summary.status === "infeasible") && $("runs").options.length < 2;
}

// `action` makes of a handler one that clears the last complaint and tells what goes wrong; beside the run it is told too.
export function setUpRun(plan, action) {
  const guarded = (run) => action(async (event) => {
    try {
      await run(event);
    } catch (error) {
      $("run-state").textContent = error.message;
      throw error;
    }
  });
  $("run-form").addEventListener("submit", guarded(async (event) => {
    const form = event.target, start = event.submitter;
    start.disabled = true;
    forget(form);
    try {
      const request = { plan: plan(), ...(await asked(form, "run")) };
      const job = await post("/v1/runs", request, { "Idempotency-Key": crypto.randomUUID?.() || String(Math.random()) });
      await listRuns(job.id);
      await follow(job);
    } catch (error) {
      if (!beside(form, error)) throw error;
    } finally {
      start.disabled = false;
    }
  }));
  $("runs").addEventListener("change", guarded(async () => {
    if ($("runs").value) await follow(await get(`/v1/jobs/${$("runs").value}`));
  }));
  $("cancel").addEventListener("click", guarded(async () => {
    $("cancel").disabled = true;
    $("run-state").textContent = "asked to save and end …";
    try {
      await post(`/v1/jobs/${current}/cancel`, "");
    } catch (error) { $("cancel").disabled = false; throw error; }
  }));
  $("resume").addEventListener("click", guarded(async () => {
    const mine = current;
    $("resume").hidden = true;
    const job = await post(`/v1/runs/${mine}/resume`, "").catch((error) => { $("resume").hidden = mine !== current; throw error; });
    await follow(job);
  }));
  $("adapter-button").addEventListener("click", guarded(() => download(`/v1/runs/${current}/adapter`, `adapter-${current}.tar`)));
}

export async function listRuns(chosen = "") {
  const { jobs } = await get(`/v1/jobs?kind=run&limit=${LISTED}`);
  const began = (job) => new Date(1000 * job.created).toLocaleString();
  $("runs").replaceChildren(html("option", { value: "" }, "choose one"), ...jobs.map((job) => html("option", { value: job.id }, `${began(job)} · ${length(job.request)} · ${job.state}`)));
  $("runs").value = chosen;
  $("runs-label").hidden = !jobs.length;
  if (jobs.length) $("run").hidden = false;
}

// What waits or trains can be cancelled; what ended before its last step goes on from its checkpoint.
function offerEnd(state) {
  $("cancel").hidden = !["queued", "running"].includes(state);
  $("cancel").disabled = false;
  $("resume").hidden = !["cancelled", "failed", "interrupted"].includes(state);
}

// Follow a run to its end, or until another one is shown.
async function follow(job) {
  const mine = ++followed, left = () => mine !== followed;
  current = job.id;
  try {
    await shown(job, left);
  } catch (error) {
    if (!left()) throw error;
  }
}

async function shown(job, left) {
  offerEnd(job.state);
  for (const id of ["live", "report", "adapter"]) $(id).hidden = true;
  $("run-state").textContent = job.state === "queued" ? "waiting for the device …" : job.state;
  const { budget_bytes: cap, places_per_step: places, steps: known } = await get(`/v1/runs/${job.id}/metrics`);
  const seen = new Map(known.map((step) => [step.step, step]));
  let drawn = 0;
  try {
    job = await finish(job, (latest) => {
      if (left()) return;
      if (latest.step === undefined) {
        $("run-state").textContent = `${latest.stage} …`;
        return;
      }
      seen.set(latest.step, latest);
      $("run-state").textContent = `${$("cancel").disabled ? "asked to save and end; " : ""}step ${latest.step}${job.request.steps ? ` of ${job.request.steps}` : latest.epoch === undefined ? "" : ` (epoch ${latest.epoch.toFixed(1)} of ${job.request.epochs})`}: loss ${latest.loss.toFixed(4)}, ${seconds(latest.seconds)} s${latest.tokens === undefined ? "" : `, ${rate(latest)} tokens/s without padding${padding(latest, places)}`}, peak of the training process ${mib(latest.peak_bytes)} of ${mib(cap)} MiB`;
      if (performance.now() - drawn > REDRAW) {
        drawn = performance.now();
        draw([...seen.values()], cap, places);
      }
    });
  } finally {
    const { steps: all, evaluations } = await get(`/v1/runs/${job.id}/metrics`);
    if (!left()) {
      if (all.length) draw(all, cap, places);
      $("evaluations").hidden = !evaluations?.length;
      $("evaluations").replaceChildren(...(evaluations?.length ? [evaluated(evaluations)] : []));
      offerEnd((await get(`/v1/jobs/${job.id}`)).state);
      await listRuns(job.id);
    }
  }
  const report = await get(`/v1/runs/${job.id}/report`);
  if (left()) return;
  const { peak_bytes: peak, step_seconds: step } = report;
  $("report").replaceChildren(table(`Predicted beside measured; the cap was enforced by ${report.enforced_by === "cgroup" ? "the kernel" : "the process's own meter"}`, ["figure", "predicted", "measured"], [
    ["peak of its processes, MiB", mib(peak.predicted), mib(peak.measured)],
    ...Object.entries(report.processes ?? {}).map(([name, one]) => [`– ${name}, MiB`, mib(one.predicted), mib(one.measured)]),
    ["step, s", seconds(step.predicted), seconds(step.measured)],
    ...(report.contention ? [[`step, s, in the ${report.contention.steps} steps during which other programs used cores`, "–", seconds(report.contention.step_seconds)]] : []),
    ...(report.tokens ? [[`tokens/s (rows ${percent(report.tokens.padding_share, 0)} padding)`, "–", Math.round(report.tokens.per_second).toLocaleString("en")]] : []),
    ...Object.entries(report.evaluation).map(([when, evaluation]) => [`held-out loss ${when}${evaluation.accuracy == null ? "" : ", accuracy"}`, "–", `${evaluation.loss.toFixed(4)}${evaluation.accuracy == null ? "" : `, ${evaluation.accuracy.toFixed(3)}`}`]),
  ]));
  for (const id of ["report", "adapter"]) $(id).hidden = false;
  $("run-state").textContent = `done: ${report.loss.length} steps, peak ${mib(peak.measured)} of ${mib(cap)} MiB`;
}

// How long a run is asked to be.
const length = ({ steps, epochs }) => steps ? `${steps} steps` : `${epochs} epochs`;

// Tokens per second of a step, padding left out.
const rate = (step) => Math.round(step.tokens / step.seconds).toLocaleString("en");

// The share of a step's rows that is padding, where it is known; where steps differ in length, each says how many places its rows have.
const shareOf = (step, places) => (step.tokens === undefined || !places ? null : percent(1 - step.tokens / (step.places ?? places), 0));
const padding = (step, places) => (shareOf(step, places) === null ? "" : ` (${shareOf(step, places)} of the rows)`);

const evaluated = (list) => table("Evaluations on the held-out data", ["step", "loss", "accuracy", ""], list.map((one) => [String(one.step), one.eval_loss.toFixed(4), one.eval_accuracy === undefined ? "–" : one.eval_accuracy.toFixed(3), one.best ? "the best so far" : ""]));

// One line over steps, with an optional cap.
function steps(label, points, { yLabel, width, cap = null, colour = "var(--policy-0)", zero = false }) {
  const values = points.map(([, value]) => value).concat(cap === null ? [] : [cap]);
  let low = zero ? 0 : Math.min(...values), high = Math.max(...values);
  const margin = (high - low) * 0.1 || Math.abs(high) * 0.05 || 1;
  low = zero ? 0 : low - margin; high += margin;
  const last = Math.max(2, points.length ? points[points.length - 1][0] : 2);
  const chart = frame(label, { x: [1, last], y: [low, high], xLabel: "step", yLabel, width, height: 260, whole: true });
  const { picture, x, y } = chart;
  if (points.length) picture.append(svg("path", { class: "line", style: `--c: ${colour}`, d: path(points, x, y) }));
  if (points.length === 1) picture.append(svg("circle", { class: "dot-mark", style: `--c: ${colour}`, cx: x(points[0][0]), cy: y(points[0][1]), r: 4 }));
  if (cap !== null) capLine(chart, cap, `${amount(cap)} MiB`);
  return picture;
}

function draw(list, cap, room) {
  const ordered = list.sort((a, b) => a.step - b.step);
  $("live").hidden = false;
  place($("loss"), (width) => steps("Loss by step; the table below has the numbers", ordered.map((s) => [s.step, s.loss]), { yLabel: "loss", width }));
  place($("memory"), (width) => steps("Peak memory by step, under the cap; the table below has the numbers", ordered.map((s) => [s.step, s.peak_bytes / MIB]), { yLabel: "MiB, peak so far", cap: cap / MIB, colour: "var(--policy-2)", zero: true, width }));
  $("steps-table").replaceChildren(table("Every step", ["step", "loss", "seconds", "tokens/s", "padding", "resident, MiB", "peak, MiB"], ordered.map((s) => [String(s.step), s.loss.toFixed(4), seconds(s.seconds), s.tokens === undefined ? "–" : rate(s), shareOf(s, room) ?? "–", mib(s.resident_bytes), mib(s.peak_bytes)])));
}
