// Charts as SVG elements, and the tables that say the same. Sizes in MiB, times in seconds; colours are the style sheet's.

const NS = "http://www.w3.org/2000/svg";
export const MIB = 1048576;
const W = 760, LEFT = 58, RIGHT = 20, TOP = 24, BOTTOM = 44;

export const mib = (bytes, digits = 1) => (bytes / MIB).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
// Rounded up, so that a smallest budget can be typed back as it is printed.
export const atLeast = (bytes) => (Math.ceil((bytes / MIB) * 10) / 10).toLocaleString("en", { minimumFractionDigits: 1 });
export const seconds = (value) => value.toLocaleString("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 4 });

export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export function html(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export function ticks(low, high, wanted = 6) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(span / wanted));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= span / wanted);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

const scale = (low, high, start, end) => {
  const map = (value) => start + ((value - low) / (high - low || 1)) * (end - start);
  map.back = (place) => low + ((place - start) / (end - start)) * (high - low);
  return map;
};

const round = (value) => Number(value.toPrecision(6)).toLocaleString("en");

// A frame with axes. Returns the picture and its scales.
export function frame(label, { x: [x0, x1], y: [y0, y1], xLabel, yLabel, height = 320 }) {
  const x = scale(x0, x1, LEFT, W - RIGHT), y = scale(y0, y1, height - BOTTOM, TOP);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${height}`, role: "img", "aria-label": label });
  for (const tick of ticks(y0, y1)) {
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(tick), y2: y(tick) }));
    picture.append(svg("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, round(tick)));
  }
  for (const tick of ticks(x0, x1)) picture.append(svg("text", { x: x(tick), y: height - BOTTOM + 18, "text-anchor": "middle" }, round(tick)));
  picture.append(svg("text", { x: LEFT - 8, y: TOP - 9 }, yLabel));
  picture.append(svg("text", { x: (LEFT + W - RIGHT) / 2, y: height - 6, "text-anchor": "middle" }, xLabel));
  return { picture, x, y, height };
}

export const path = (points, x, y) => points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");

// Seconds per step against the budget: `series` is [{name, slot, points: [{budget, step, bound, plan}]}].
export function curve(series, least) {
  const all = series.flatMap((one) => one.points);
  const low = Math.min(least, ...all.map((p) => p.budget)) / MIB, high = Math.max(...all.map((p) => p.budget), least) / MIB;
  const margin = (high - low) * 0.06 || high * 0.1;
  const made = frame("Seconds per step against the memory budget; the table below has the numbers", {
    x: [Math.max(0, low - margin), high + margin], y: [0, Math.max(...all.map((p) => p.step)) * 1.15], xLabel: "budget of the whole process, MiB", yLabel: "seconds per step",
  });
  const { picture, x, y, height } = made;
  const solved = series.find((one) => one.name === "solver");
  if (solved) picture.append(svg("path", { class: "bound", d: path(solved.points.map((p) => [p.budget / MIB, p.bound]), x, y) }));
  for (const one of series) {
    const group = svg("g", { style: `--c: var(--policy-${one.slot})` });
    group.append(svg("path", { class: "line", d: path(one.points.map((p) => [p.budget / MIB, p.step]), x, y) }));
    for (const p of one.points) {
      group.append(svg("circle", { class: "dot-mark", cx: x(p.budget / MIB), cy: y(p.step), r: 4.5 }, svg("title", {}, `${one.name} at ${mib(p.budget)} MiB: ${seconds(p.step)} s`)));
    }
    picture.append(group);
  }
  picture.append(svg("line", { class: "cap", x1: x(least / MIB), x2: x(least / MIB), y1: TOP, y2: height - BOTTOM }));
  picture.append(svg("text", { class: "cap-label", x: x(least / MIB) + 5, y: height - BOTTOM - 6 }, "nothing fits left of here"));
  const here = svg("g", { visibility: "hidden" }, svg("line", { class: "here", y1: TOP, y2: height - BOTTOM }), svg("circle", { class: "here-dot", r: 7 }));
  picture.append(here);
  picture.classList.add("draggable");
  made.show = (budget, step) => {
    const [line, dot] = here.children;
    const place = Math.min(W - RIGHT, Math.max(LEFT, x(budget / MIB)));
    line.setAttribute("x1", place); line.setAttribute("x2", place);
    dot.setAttribute("cx", place); dot.setAttribute("cy", step ? y(step) : height - BOTTOM);
    here.setAttribute("visibility", "visible");
  };
  made.budgetAt = (event) => {
    const box = picture.getBoundingClientRect();
    return x.back(((event.clientX - box.left) / box.width) * W) * MIB;
  };
  return made;
}

// One line over steps, with an optional cap.
export function steps(label, points, { yLabel, cap = null, colour = "var(--policy-0)", zero = false }) {
  const values = points.map(([, value]) => value).concat(cap === null ? [] : [cap]);
  let low = zero ? 0 : Math.min(...values), high = Math.max(...values);
  const margin = (high - low) * 0.1 || Math.abs(high) * 0.05 || 1;
  low = zero ? 0 : low - margin; high += margin;
  const last = Math.max(2, points.length ? points[points.length - 1][0] : 2);
  const { picture, x, y } = frame(label, { x: [1, last], y: [low, high], xLabel: "step", yLabel, height: 260 });
  if (points.length) picture.append(svg("path", { class: "line", style: `--c: ${colour}`, d: path(points, x, y) }));
  if (points.length === 1) picture.append(svg("circle", { class: "dot-mark", style: `--c: ${colour}`, cx: x(points[0][0]), cy: y(points[0][1]), r: 4 }));
  if (cap !== null) {
    picture.append(svg("line", { class: "cap", x1: LEFT, x2: W - RIGHT, y1: y(cap), y2: y(cap) }));
    picture.append(svg("text", { class: "cap-label", x: LEFT + 6, y: y(cap) - 6 }, `cap ${cap.toFixed(1)} MiB`));
  }
  return picture;
}

// Horizontal bars of shares of the step.
export function bars(rows) {
  const height = 34 * rows.length + 8, most = Math.max(1, ...rows.map((row) => row.share));
  const picture = svg("svg", { viewBox: `0 0 ${W} ${height}`, role: "img", "aria-label": "How busy each channel is, as a share of the step; the table has the numbers" });
  rows.forEach((row, index) => {
    const top = 34 * index + 6;
    picture.append(svg("text", { x: 0, y: top + 16 }, row.name));
    picture.append(svg("rect", { x: 110, y: top, width: 520, height: 22, fill: "var(--line)", rx: 3 }));
    picture.append(svg("rect", { x: 110, y: top, width: (520 * row.share) / most, height: 22, fill: `var(--policy-${index % 6})`, rx: 3 }));
    picture.append(svg("text", { x: 640, y: top + 16 }, `${(100 * row.share).toFixed(1)} %`));
  });
  return picture;
}

export const DECISIONS = ["kept", "recomputed", "offloaded", "streamed", "packed", "unpacked"];
const GROUPS = ["activations", "weights", "states"];
export const didColour = (decision) => (DECISIONS.includes(decision) ? `var(--did-${decision})` : "var(--did-other)");

// Layers as boxes in a row; each box is cut by decision, activations above weights above optimizer states; arcs are what flows.
export function layerGraph(layers, edges) {
  const shown = layers.slice(0, 400);
  const each = Math.max(16, Math.min(90, (W - 20) / Math.max(1, shown.length)));
  const width = Math.max(W, each * shown.length + 20), box = 132, height = box + 96;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, role: "img", "aria-label": "Layers coloured by decision; the table below has the numbers" });
  const place = new Map(shown.map((layer, index) => [layer.name, 10 + each * index]));
  for (const edge of edges) {
    const a = place.get(edge.from), b = place.get(edge.to);
    if (a === undefined || b === undefined) continue;
    const from = a + each / 2, to = b + each / 2, rise = Math.min(54, 14 + Math.abs(to - from) / 6);
    picture.append(svg("path", { class: "flow", d: `M${from} 56C${from} ${56 - rise} ${to} ${56 - rise} ${to} 56` }, svg("title", {}, `${edge.from} → ${edge.to}: ${mib(edge.bytes)} MiB`)));
  }
  shown.forEach((layer) => {
    const left = place.get(layer.name), group = svg("g");
    const told = [layer.name];
    GROUPS.forEach((name, row) => {
      const decided = Object.entries(layer.decisions[name] || {}).filter(([, size]) => size > 0);
      const total = decided.reduce((sum, [, size]) => sum + size, 0);
      const tall = [64, 44, 24][row], top = 58 + [0, 64, 108][row];
      group.append(svg("rect", { x: left, y: top, width: each - 2, height: tall - 1, fill: "var(--line)" }));
      let at = top;
      for (const [decision, size] of decided.sort((a, b) => b[1] - a[1])) {
        const part = (tall - 1) * (size / total);
        group.append(svg("rect", { x: left, y: at, width: each - 2, height: part, fill: didColour(decision) }));
        at += part;
        told.push(`${name} ${decision} ${mib(size)} MiB`);
      }
    });
    group.prepend(svg("title", {}, told.join("\n")));
    picture.append(group);
    if (each >= 44) picture.append(svg("text", { x: left + each / 2, y: height - 10, "text-anchor": "middle" }, layer.name.split(".").slice(-2).join(".").slice(0, Math.floor(each / 7))));
  });
  return picture;
}

export function table(caption, headings, rows) {
  const head = html("tr", {}, ...headings.map((text) => html("th", { scope: "col" }, text)));
  const body = rows.map(([first, ...rest]) => html("tr", {}, html("th", { scope: "row" }, first), ...rest.map((text) => html("td", {}, text))));
  return html("table", {}, html("caption", {}, caption), html("thead", {}, head), html("tbody", {}, ...body));
}

export const legend = (entries) => entries.map(([label, colour]) => html("li", {}, html("span", { class: "dot", style: `--c: ${colour}` }), label));
