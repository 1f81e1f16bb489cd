// Two plans side by side: memory over the step on one scale, figures, what changes in all and tensor by tensor.

import { html, place, seconds, sharedAxis, timeline } from "./charts.js";
import { drawn } from "./plan.js";
import { mib, percent, table } from "./components.js";

const $ = (id) => document.getElementById(id);

const signed = (value, text) => (value === 0 ? "0" : `${value > 0 ? "+" : "−"}${text(Math.abs(value))}`);
const spent = (value) => (Math.abs(value) < 5e-7 ? "0" : signed(value, seconds));

export function showDifference(difference, views, names) {
  const [a, b] = difference.plans;
  const phase = (plan, name) => plan.train?.[name] ?? 0;
  const row = (label, get, text) => [label, text(get(a)), text(get(b)), signed(get(b) - get(a), text)];
  const rows = [
    row("budget, MiB", (plan) => plan.budget_bytes, mib),
    row("peak, MiB", (plan) => plan.peak_bytes, mib),
    row("step, s", (plan) => plan.step_seconds, seconds),
    row("gap", (plan) => plan.gap, (value) => percent(value, 2)),
    ...["recompute_seconds", "unpack_seconds", "stall_seconds"].map((name) => row(name.replace("_seconds", ", s"), (plan) => phase(plan, name), seconds)),
    ...["read_bytes", "write_bytes"].map((name) => row(`${name.replace("_bytes", "")}, MiB per step`, (plan) => phase(plan, name), mib)),
    ["status", a.status, b.status, ""],
  ];
  $("difference").hidden = false;
  names.forEach((name, i) => ($(["left-name", "right-name"][i]).textContent = name));
  const shown = views.map(drawn), axis = sharedAxis(shown);
  shown.forEach((one, i) => place($(["left-memory", "right-memory"][i]), (width) => timeline(one, { width, axis, height: 260, label: `Memory over one step of ${names[i]}; the figures below compare them` }).picture));
  $("figures").replaceChildren(table("Side by side", ["figure", ...names, "change"], rows));
  const step = (change) => `${change.before ?? "–"} → ${change.after ?? "–"}`;
  const totals = difference.groups.map((group) => [`${group.kind}: ${step(group)}`, String(group.tensors), mib(group.bytes), spent(group.compute_seconds), spent(group.transfer_seconds)]);
  $("totals").replaceChildren(totals.length ? table("What changes, and the seconds per step that it costs (+) or saves (−)", ["kind and decision", "tensors", "MiB", "cores, s", "channels, s"], totals) : html("p", {}, "Every tensor is treated the same."));
  $("changes").replaceChildren(table(difference.left_out ? `Largest first; ${difference.left_out} more are left out` : "Largest first", ["tensor", "layer", "MiB", "decision", "cores, s", "channels, s"], difference.changes.map((change) => [change.name, change.layer, mib(change.bytes, 3), step(change), spent(change.compute_seconds), spent(change.transfer_seconds)])));
}
