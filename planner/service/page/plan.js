// One plan on the page: figures, sentences, memory over the step, the peak, layers, channels.

import { atLeast, html, inUnit, kindColour, legend, place, seconds, showTimeline, size, unitOf } from "./charts.js";
import { DECISIONS, didColour, layerGraph } from "./layers.js";
import { bar, mib, percent, table } from "./components.js";

const $ = (id) => document.getElementById(id);
const ROWS = 40; // of the timeline's table

// What a timeline is drawn of.
export const drawn = ({ timeline, peak, summary }) => ({ series: timeline, peak, cap: summary.budget_bytes });

export function showPlan(view) {
  $("plan").hidden = false;
  $("cards").replaceChildren(...cards(view).map(([name, value, more]) => html("div", { class: "card" }, html("dt", {}, name), html("dd", {}, html("b", {}, value), html("span", {}, more)))));
  $("sentences").replaceChildren(...view.sentences.map((text) => html("li", {}, text)));
  const feasible = Boolean(view.timeline);
  $("feasible").hidden = !feasible;
  if (!feasible) return;
  showTimeline({ box: $("timeline"), key: $("timeline-legend"), reading: $("reading") }, drawn(view), `${view.summary.policy} at ${size(view.summary.budget_bytes)}`);
  $("timeline-table").replaceChildren(moments(view.timeline));
  showPeak(view.peak);
  showLayers(view);
  $("channels-table").replaceChildren(
    table("Share of the step at work; bytes per step", ["channel", "", "share", "seconds", "MiB"], view.channels.map((row, index) => [row.name, bar(row.share, `var(--policy-${index})`), percent(row.share), seconds(row.seconds), row.bytes ? mib(row.bytes) : "–"])),
  );
}

function cards({ summary, timeline }) {
  if (!timeline) {
    const least = summary.minimum_budget_bytes;
    return [
      ["asked for", `${mib(summary.budget_bytes)} MiB`, "for the whole process"],
      [summary.policy === "solver" ? "smallest that fits" : `smallest for ${summary.policy}`, least ? `${atLeast(least)} MiB` : "unknown", least ? `${atLeast(least - summary.budget_bytes)} MiB more` : ""],
    ];
  }
  const { train } = summary;
  return [
    ["one step", `${seconds(summary.step_seconds)} s`, summary.policy === "solver" ? `proven: at best ${seconds(summary.bound_seconds)} s` : `by the rule ${summary.policy}`],
    ["peak", `${mib(summary.peak_bytes)} MiB`, `of ${mib(summary.budget_bytes)} MiB`],
    ["made again", `${seconds(train.recompute_seconds)} s`, `${percent(train.recompute_seconds / (summary.step_seconds || 1))} of the step`],
    ["disk", `${mib(train.read_bytes + train.write_bytes)} MiB`, `read and written per step; ${seconds(train.stall_seconds)} s waiting`],
  ];
}

// A row for every slice would be long: about forty, and the peak's.
function moments({ ends, kinds, sizes, total, peak }) {
  const unit = unitOf(Math.max(...total)), every = Math.max(1, Math.ceil(ends.length / ROWS));
  const rows = ends.map((_, i) => i).filter((i) => i % every === 0 || i === peak);
  const row = (i) => [`${seconds(ends[i])}${i === peak ? " (fullest)" : ""}`, ...[...sizes, total].map((bytes) => inUnit(bytes[i], unit))];
  return table(`${unit.name} by kind`, ["until, s", ...kinds.map((kind) => kind.label), "together"], rows.map(row));
}

function showPeak(peak) {
  const rows = peak.parts.filter((part) => part.bytes >= Math.min(52429, peak.bytes / 1000)).map((part, index) => [part.label, bar(part.bytes / peak.bytes, kindColour(part.name)), mib(part.bytes), percent(part.bytes / peak.bytes, 0)]);
  rows.push(["together", "", mib(peak.bytes), ""]);
  $("peak").replaceChildren(table(`The fullest moment of training is instruction ${peak.instruction}, ${peak.text}`, ["what", "", "MiB", "share"], rows));
  $("largest").replaceChildren(table("Largest tensors there", ["tensor", "MiB"], peak.tensors.map(([name, size]) => [name, mib(size, 2)])));
}

function showLayers(view) {
  place($("layers"), (width) => layerGraph(view.layers, view.edges, width));
  const used = new Set(view.layers.flatMap((layer) => Object.values(layer.decisions).flatMap(Object.keys)));
  $("layers-legend").replaceChildren(...legend([...DECISIONS.filter((name) => used.has(name)), ...[...used].filter((name) => !DECISIONS.includes(name))].map((name) => [name, didColour(name)])));
  const bytesOf = (decided) => Object.entries(decided || {}).filter(([, size]) => size).map(([name, size]) => `${name} ${mib(size)}`).join(", ") || "–";
  $("layers-table").replaceChildren(
    table("MiB by decision", ["layer", "forward, s", "backward, s", "activations", "weights", "optimizer states"], view.layers.map((layer) => [layer.name, seconds(layer.forward_seconds), seconds(layer.backward_seconds), bytesOf(layer.decisions.activations), bytesOf(layer.decisions.weights), bytesOf(layer.decisions.states)])),
  );
}
