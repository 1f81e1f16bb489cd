// The layers in a row: what becomes of every layer's bytes.

import { size, svg } from "./charts.js";

const DECISIONS = ["kept", "recomputed", "offloaded", "streamed", "packed", "unpacked"];
const GROUPS = ["activations", "weights", "states"];
export const LAYERS_DRAWN = 400; // of more, neighbours share a box
export const didColour = (decision) => (DECISIONS.includes(decision) ? `var(--did-${decision})` : "var(--did-other)");

// The decisions that some layers have.
export function used(layers) {
  const made = new Set(layers.flatMap((layer) => Object.values(layer.decisions).flatMap(Object.keys)));
  return [...DECISIONS.filter((name) => made.has(name)), ...[...made].filter((name) => !DECISIONS.includes(name))];
}

// At most `LAYERS_DRAWN` boxes, each of one layer or of neighbours together, and the box of each layer.
function boxed(layers) {
  const each = Math.ceil(layers.length / LAYERS_DRAWN), boxes = [], boxOf = new Map();
  layers.forEach((layer, index) => {
    const box = (boxes[Math.floor(index / each)] ??= { first: layer.name, last: layer.name, number: index + 1, decisions: Object.fromEntries(GROUPS.map((name) => [name, {}])) });
    box.last = layer.name;
    boxOf.set(layer.name, box);
    for (const name of GROUPS) for (const [decision, bytes] of Object.entries(layer.decisions[name] || {})) box.decisions[name][decision] = (box.decisions[name][decision] ?? 0) + bytes;
  });
  return { boxes, boxOf };
}

// Each box is cut by decision, activations above weights above optimizer's states; arcs are what flows between layers.
export function layerGraph(layers, edges, room) {
  const SIDE = 74, { boxes, boxOf } = boxed(layers);
  const each = Math.max(boxes.length < layers.length ? 2 : 16, Math.min(240, (room - SIDE - 8) / Math.max(1, boxes.length)));
  const width = Math.max(room, each * boxes.length + SIDE + 8), groups = GROUPS.filter((name) => boxes.some((box) => Object.keys(box.decisions[name]).length));
  const TALL = { activations: 64, weights: 44, states: 24 }, tops = {};
  let height = 58;
  for (const name of groups) { tops[name] = height; height += TALL[name]; }
  height += 36;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "Layers coloured by what becomes of their bytes; the table below has the numbers" });
  const at = new Map(boxes.map((box, index) => [box, SIDE + each * index])), gap = each > 4 ? 2 : 0;
  for (const edge of boxes.length < layers.length ? [] : edges) {
    const a = at.get(boxOf.get(edge.source)), b = at.get(boxOf.get(edge.target));
    if (a === undefined || b === undefined || a === b) continue;
    const from = a + each / 2, to = b + each / 2, rise = Math.min(54, 14 + Math.abs(to - from) / 6);
    picture.append(svg("path", { class: "flow", d: `M${from} 56C${from} ${56 - rise} ${to} ${56 - rise} ${to} 56` }, svg("title", {}, `${edge.source} → ${edge.target}: ${size(edge.bytes)}`)));
  }
  for (const name of groups) picture.append(svg("text", { x: 0, y: tops[name] + TALL[name] / 2 + 4 }, name));
  // Names are written whole, and fewer of them where there is no room for all; where not even that is possible, numbers.
  const words = (box) => box.first.split(".").slice(-2).join("."), named = each >= 44, longest = named ? 7 * Math.max(...boxes.map((box) => words(box).length)) + 8 : 46;
  const every = Math.max(1, Math.ceil(longest / each));
  boxes.forEach((box, index) => {
    const left = at.get(box), group = svg("g"), lines = [box.first === box.last ? box.first : `${box.first} to ${box.last}`];
    for (const name of groups) {
      const decided = Object.entries(box.decisions[name]).filter(([, bytes]) => bytes > 0), total = decided.reduce((sum, [, bytes]) => sum + bytes, 0);
      group.append(svg("rect", { x: left, y: tops[name], width: each - gap, height: TALL[name] - 1, fill: "var(--sunk)" }));
      let top = tops[name];
      for (const [decision, bytes] of decided.sort((a, b) => b[1] - a[1])) {
        const part = (TALL[name] - 1) * (bytes / total);
        group.append(svg("rect", { x: left, y: top, width: each - gap, height: part, fill: didColour(decision) }));
        top += part;
        lines.push(`${name} ${decision} ${size(bytes)}`);
      }
    }
    group.prepend(svg("title", {}, lines.join("\n")));
    picture.append(group);
    const short = named ? words(box) : String(box.number);
    if (index % every === 0) picture.append(svg("text", { x: left + each / 2, y: height - 14, "text-anchor": "middle" }, short));
  });
  return picture;
}
