// The layer graph: what becomes of every layer's bytes.

import { svg } from "./charts.js";
import { mib } from "./components.js";

export const DECISIONS = ["kept", "recomputed", "offloaded", "streamed", "packed", "unpacked"];
const GROUPS = ["activations", "weights", "states"];
export const didColour = (decision) => (DECISIONS.includes(decision) ? `var(--did-${decision})` : "var(--did-other)");

// Layers as boxes in a row; each box is cut by decision, activations above weights above optimizer states; arcs are what flows.
export function layerGraph(layers, edges, room) {
  const SIDE = 74, shown = layers.slice(0, 400);
  const each = Math.max(16, Math.min(240, (room - SIDE - 8) / Math.max(1, shown.length)));
  const width = Math.max(room, each * shown.length + SIDE + 8), height = 228;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "Layers coloured by decision; the table below has the numbers" });
  const at = new Map(shown.map((layer, index) => [layer.name, SIDE + each * index]));
  for (const edge of edges) {
    const a = at.get(edge.source), b = at.get(edge.target);
    if (a === undefined || b === undefined) continue;
    const from = a + each / 2, to = b + each / 2, rise = Math.min(54, 14 + Math.abs(to - from) / 6);
    picture.append(svg("path", { class: "flow", d: `M${from} 56C${from} ${56 - rise} ${to} ${56 - rise} ${to} 56` }, svg("title", {}, `${edge.source} → ${edge.target}: ${mib(edge.bytes)} MiB`)));
  }
  const tall = [64, 44, 24], tops = [58, 122, 166];
  GROUPS.forEach((name, row) => picture.append(svg("text", { x: 0, y: tops[row] + tall[row] / 2 + 4 }, name)));
  const each_label = Math.max(1, Math.ceil(46 / each));
  shown.forEach((layer, index) => {
    const left = at.get(layer.name), group = svg("g"), lines = [layer.name];
    GROUPS.forEach((name, row) => {
      const decided = Object.entries(layer.decisions[name] || {}).filter(([, size]) => size > 0);
      const total = decided.reduce((sum, [, size]) => sum + size, 0);
      group.append(svg("rect", { x: left, y: tops[row], width: each - 2, height: tall[row] - 1, fill: "var(--line)" }));
      let top = tops[row];
      for (const [decision, size] of decided.sort((a, b) => b[1] - a[1])) {
        const part = (tall[row] - 1) * (size / total);
        group.append(svg("rect", { x: left, y: top, width: each - 2, height: part, fill: didColour(decision) }));
        top += part;
        lines.push(`${name} ${decision} ${mib(size)} MiB`);
      }
    });
    group.prepend(svg("title", {}, lines.join("\n")));
    picture.append(group);
    const short = each >= 44 ? layer.name.split(".").slice(-2).join(".").slice(0, Math.floor(each / 7)) : String(index + 1);
    if (index % each_label === 0) picture.append(svg("text", { x: left + each / 2, y: height - 14, "text-anchor": "middle" }, short));
  });
  return picture;
}
