// What a run came to, beside what was predicted, and its loss and memory over the steps: on the page while it goes on, in a report of its own
// once it is done.

import { MIB, seconds } from "./charts.js";
import { mib, percent, table } from "./components.js";
import { showLines, smoothed } from "./lines.js";

// The loss of one or several runs over each other, [name, {steps, evaluations}] each: as it is (faint) and smoothed, and on held-out data
// where it was evaluated. `parts`: of `chartBox`; `state` outlasts drawing anew.
export function showLoss(parts, runs, state = {}) {
  showLines(parts, runs.flatMap(([name, run], slot) => lossOf(name, slot, run)), { label: "Loss by step", yLabel: "loss", state });
}

function lossOf(name, slot, { steps, evaluations = [] }) {
  const raw = steps.map((one) => [one.step, one.loss]), held = evaluations.map((one) => [one.step, one.eval_loss]);
  return [{ name: `${name} as it is`, slot, points: raw, faint: true }, { name: `${name}, smoothed`, slot, points: smoothed(raw) }, ...(held.length ? [{ name: `${name}, held out`, slot: slot + 4, points: held, marks: true }] : [])];
}

// The memory of a run by step, under its cap in bytes.
export function showMemory(parts, steps, cap, state = {}) {
  const of = (name) => steps.map((one) => [one.step, one[name] / MIB]);
  showLines(parts, [{ name: "peak so far", slot: 2, points: of("peak_bytes") }, { name: "held now", slot: 0, points: of("resident_bytes") }], { label: "Memory by step, under the cap", yLabel: "MiB", zero: true, cap: cap === null ? null : { value: cap / MIB, text: `${mib(cap)} MiB` }, tell: (value) => `${value.toFixed(1)} MiB`, state });
}

// The figures of a report.
export function reportTable(report) {
  const { peak_bytes: peak, step_seconds: step } = report;
  return table(`The cap was enforced by ${report.enforced_by === "cgroup" ? "the kernel" : "the process's own meter"}`, ["figure", "predicted", "measured"], [
    ["peak of its processes, MiB", mib(peak.predicted), mib(peak.measured)],
    ...Object.entries(report.processes ?? {}).map(([name, one]) => [`– ${name}, MiB`, mib(one.predicted), mib(one.measured)]),
    [`step, s, by the ${step.predicted_by}`, seconds(step.predicted), seconds(step.measured)],
    ...(report.contention ? [[`step, s, in the ${report.contention.steps} steps during which other programs used cores`, "–", seconds(report.contention.step_seconds)]] : []),
    ...(report.tokens ? [[`tokens/s (rows ${percent(report.tokens.padding_share, 0)} padding)`, "–", Math.round(report.tokens.per_second).toLocaleString("en")]] : []),
    ...Object.entries(report.evaluation ?? {}).map(([when, one]) => [`held-out loss ${when}${one.accuracy == null ? "" : ", accuracy"}`, "–", `${one.loss.toFixed(4)}${one.accuracy == null ? "" : `, ${one.accuracy.toFixed(3)}`}`]),
  ]);
}

