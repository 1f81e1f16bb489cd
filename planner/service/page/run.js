// A run, live: loss and memory step by step against the cap, then the report.

import { blob, finish, get, post } from "./api.js";
import { html, MIB, mib, seconds, steps, table } from "./charts.js";

const $ = (id) => document.getElementById(id);
const REDRAW = 250; // ms
let current = null;

export function setUpRun(plan, complain) {
  $("run-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const form = new FormData(event.target);
    const start = event.submitter;
    start.disabled = true;
    try {
      await follow(await post("/v1/runs", { plan: plan(), data: form.get("data"), steps: Number(form.get("steps")) }, { "Idempotency-Key": crypto.randomUUID?.() || String(Math.random()) }));
    } catch (error) {
      complain(error);
      $("run-state").textContent = error.message;
    } finally {
      start.disabled = false;
      $("cancel").disabled = true;
    }
  });
  $("cancel").addEventListener("click", async () => {
    $("cancel").disabled = true;
    $("run-state").textContent = "asked to save and end …";
    try { await post(`/v1/jobs/${current}/cancel`, ""); } catch (error) { complain(error); }
  });
  $("adapter-button").addEventListener("click", async () => {
    try {
      const link = html("a", { href: URL.createObjectURL(await blob(`/v1/runs/${current}/adapter`)), download: `adapter-${current}.tar` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    } catch (error) { complain(error); }
  });
}

async function follow(job) {
  current = job.id;
  $("cancel").disabled = false;
  for (const id of ["live", "report", "adapter"]) $(id).hidden = true;
  $("run-state").textContent = "waiting for the device …";
  const { budget_bytes: cap, steps: known } = await get(`/v1/runs/${job.id}/metrics`);
  const seen = new Map(known.map((step) => [step.step, step]));
  let drawn = 0;
  try {
    job = await finish(job, (told) => {
      if (told.step === undefined) {
        $("run-state").textContent = `${told.stage} …`;
        return;
      }
      seen.set(told.step, told);
      $("run-state").textContent = `step ${told.step} of ${job.request.steps}: loss ${told.loss.toFixed(4)}, ${seconds(told.seconds)} s, peak ${mib(told.peak_bytes)} of ${mib(cap)} MiB`;
      if (performance.now() - drawn > REDRAW) {
        drawn = performance.now();
        draw([...seen.values()], cap);
      }
    });
  } finally {
    const all = (await get(`/v1/runs/${job.id}/metrics`)).steps;
    if (all.length) draw(all, cap);
  }
  const report = await get(`/v1/runs/${job.id}/report`);
  const { peak_bytes: peak, step_seconds: step } = report;
  $("report").replaceChildren(table(`Predicted beside measured; the cap was enforced by ${report.enforced_by === "cgroup" ? "the kernel" : "the process's own meter"}`, ["figure", "predicted", "measured"], [
    ["peak of the process, MiB", mib(peak.predicted), mib(peak.measured)],
    ["step, s", seconds(step.predicted), seconds(step.measured)],
  ]));
  for (const id of ["report", "adapter"]) $(id).hidden = false;
  $("run-state").textContent = `done: ${report.loss.length} steps, peak ${mib(peak.measured)} of ${mib(cap)} MiB`;
}

function draw(list, cap) {
  const ordered = list.sort((a, b) => a.step - b.step);
  $("live").hidden = false;
  $("loss").replaceChildren(steps("Loss by step; the table below has the numbers", ordered.map((s) => [s.step, s.loss]), { yLabel: "loss" }));
  $("memory").replaceChildren(steps("Peak memory by step, under the cap; the table below has the numbers", ordered.map((s) => [s.step, s.peak_bytes / MIB]), { yLabel: "MiB, peak so far", cap: cap / MIB, colour: "var(--policy-2)", zero: true }));
  $("steps-table").replaceChildren(table("Every step", ["step", "loss", "seconds", "resident, MiB", "peak, MiB"], ordered.map((s) => [String(s.step), s.loss.toFixed(4), seconds(s.seconds), mib(s.resident_bytes), mib(s.peak_bytes)])));
}
