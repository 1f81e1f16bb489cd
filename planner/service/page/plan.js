// One plan on the page: sentences, memory over the step, the peak, layers, channels.

import { bars, DECISIONS, didColour, html, layerGraph, legend, MIB, mib, seconds, table } from "./charts.js";

const $ = (id) => document.getElementById(id);

export function showPlan(view) {
  $("plan").hidden = false;
  $("sentences").replaceChildren(...view.sentences.map((text) => html("li", {}, text)));
  const feasible = Boolean(view.timeline);
  $("feasible").hidden = !feasible;
  if (!feasible) return;
  showTimeline(view.timeline);
  showPeak(view.peak);
  showLayers(view);
  $("channels").replaceChildren(bars(view.channels));
  $("channels-table").replaceChildren(
    table("Share of the step", ["what", "seconds", "share", "MiB"], view.channels.map((row) => [row.name, seconds(row.seconds), `${(100 * row.share).toFixed(1)} %`, row.bytes ? mib(row.bytes) : "–"])),
  );
}

function showTimeline({ svg, series, kinds }) {
  $("timeline").innerHTML = svg; // the service's own drawing, escaped there
  $("timeline-legend").replaceChildren(...legend(kinds.map((kind) => [kind.label, `var(--kind-${kind.name}, var(--kind-other))`])));
  const chart = $("timeline").querySelector("svg"), cursor = chart.querySelector(".cursor");
  let at = series.peak;
  const show = (index) => {
    at = Math.max(0, Math.min(series.ends.length - 1, index));
    const middle = (series.starts[at] + series.ends[at]) / 2;
    const x = series.left + ((series.right - series.left) * middle) / series.seconds;
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.setAttribute("visibility", "visible");
    const parts = series.kinds.map((kind, k) => [kind, series.mib[k][at]]).filter(([, value]) => value >= 0.05);
    $("reading").textContent = `${seconds(series.ends[at])} s: ${series.total[at].toFixed(1)} MiB = ${parts.map(([kind, value]) => `${kind} ${value.toFixed(1)}`).join(" + ")}`;
  };
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const moment = ((((event.clientX - box.left) / box.width) * series.width - series.left) / (series.right - series.left)) * series.seconds;
    const index = series.ends.findIndex((end) => moment < end);
    show(index < 0 ? series.ends.length - 1 : index);
  });
  chart.addEventListener("focus", () => show(at));
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, PageUp: 20, PageDown: -20 }[event.key];
    if (step) show(at + step);
    else if (event.key === "Home") show(0);
    else if (event.key === "End") show(series.ends.length - 1);
    else return;
    event.preventDefault();
  });
  // A row for every slice would be long: about forty, and the peak's.
  const every = Math.max(1, Math.ceil(series.ends.length / 40));
  const rows = series.ends.map((_, i) => i).filter((i) => i % every === 0 || i === series.peak);
  $("timeline-table").replaceChildren(
    table("MiB by kind", ["until, s", ...series.kinds, "together"], rows.map((i) => [`${seconds(series.ends[i])}${i === series.peak ? " (fullest)" : ""}`, ...series.mib.map((kind) => kind[i].toFixed(1)), series.total[i].toFixed(1)])),
  );
}

function showPeak(peak) {
  const rows = peak.parts.map((part) => [part.label, mib(part.bytes), `${((100 * part.bytes) / peak.bytes).toFixed(0)} %`]);
  rows.push(["together", mib(peak.bytes), ""]);
  $("peak").replaceChildren(
    table(`The peak is instruction ${peak.instruction}: ${peak.text}`, ["what", "MiB", "share"], rows),
    table("Largest tensors there", ["tensor", "MiB"], peak.tensors.map(([name, size]) => [name, mib(size, 2)])),
  );
}

function showLayers(view) {
  $("layers").replaceChildren(layerGraph(view.layers, view.edges));
  const used = new Set(view.layers.flatMap((layer) => Object.values(layer.decisions).flatMap(Object.keys)));
  $("layers-legend").replaceChildren(...legend([...DECISIONS.filter((name) => used.has(name)), ...[...used].filter((name) => !DECISIONS.includes(name))].map((name) => [name, didColour(name)])));
  const told = (decided) => Object.entries(decided || {}).filter(([, size]) => size).map(([name, size]) => `${name} ${mib(size)}`).join(", ") || "–";
  $("layers-table").replaceChildren(
    table("MiB by decision", ["layer", "forward, s", "backward, s", "activations", "weights", "optimizer states"], view.layers.map((layer) => [layer.name, seconds(layer.forward_seconds), seconds(layer.backward_seconds), told(layer.decisions.activations), told(layer.decisions.weights), told(layer.decisions.states)])),
  );
}

export function showDifference(told, names) {
  const [a, b] = told.plans;
  const phase = (plan, name) => (plan.train ? seconds(plan.train[name]) : "–");
  const rows = [
    ["status", a.status, b.status],
    ["budget, MiB", mib(a.budget_bytes), mib(b.budget_bytes)],
    ["peak, MiB", mib(a.peak_bytes), mib(b.peak_bytes)],
    ["step, s", seconds(a.step_seconds), seconds(b.step_seconds)],
    ["gap", `${(100 * a.gap).toFixed(2)} %`, `${(100 * b.gap).toFixed(2)} %`],
    ...["recompute_seconds", "unpack_seconds", "stall_seconds"].map((name) => [name.replace("_seconds", ", s"), phase(a, name), phase(b, name)]),
    ...["read_bytes", "write_bytes"].map((name) => [`${name.replace("_bytes", "")}, MiB per step`, ...[a, b].map((plan) => (plan.train ? mib(plan.train[name]) : "–"))]),
  ];
  $("figures").replaceChildren(table("Side by side", ["figure", ...names], rows));
  const step = (row) => `${row.before ?? "–"} → ${row.after ?? "–"}`;
  const spent = (value) => (Math.abs(value) < 5e-7 ? "0" : `${value > 0 ? "+" : "−"}${seconds(Math.abs(value))}`);
  const totals = told.groups.map((row) => [`${row.kind}: ${step(row)}`, String(row.tensors), mib(row.bytes), spent(row.compute_seconds), spent(row.transfer_seconds)]);
  $("totals").replaceChildren(totals.length ? table("What changes, and the seconds per step that it costs (+) or saves (−)", ["kind and decision", "tensors", "MiB", "cores, s", "channels, s"], totals) : html("p", {}, "Every tensor is treated the same."));
  $("changes").replaceChildren(table(told.left_out ? `Largest first; ${told.left_out} more are left out` : "Largest first", ["tensor", "layer", "MiB", "decision", "cores, s", "channels, s"], told.changes.map((row) => [row.name, row.layer, (row.bytes / MIB).toFixed(3), step(row), spent(row.compute_seconds), spent(row.transfer_seconds)])));
  $("difference").hidden = false;
}
