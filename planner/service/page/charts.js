// Charts as SVG elements, and the tables that say the same. Sizes in MiB, times in seconds; colours are the style sheet's.
// Every chart is drawn at the width of its box, so that its text has one size on a phone as on a desk.

const NS = "http://www.w3.org/2000/svg";
export const MIB = 1048576;
export const LEFT = 58, RIGHT = 20, TOP = 26, BOTTOM = 44;

// Decimals of a figure in MiB: one, but below one MiB as many as show three digits, since graphs may be small.
export const places = (value, digits = 1) => (value && Math.abs(value) < 1 ? 2 - Math.floor(Math.log10(Math.abs(value))) : digits);
const fixed = (value, decimals) => value.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
export const amount = (value, digits) => fixed(value, places(value, digits));
export const mib = (bytes, digits) => amount(bytes / MIB, digits);
// Rounded up, so that a smallest budget can be typed back as it is printed.
export const atLeast = (bytes) => {
  const decimals = places(bytes / MIB);
  return fixed(Math.ceil((bytes / MIB) * 10 ** decimals) / 10 ** decimals, decimals);
};
export const seconds = (value) => value.toLocaleString("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 4 });
export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

function element(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
export const svg = (name, attributes = {}, ...children) => element(document.createElementNS(NS, name), attributes, children);
export const html = (name, attributes = {}, ...children) => element(document.createElement(name), attributes, children);

// --- boxes ------------------------------------------------------------------------------------------------------------

const makers = new WeakMap(), widths = new WeakMap();
const watch = new ResizeObserver((entries) => {
  for (const { target } of entries) if (target.clientWidth && target.clientWidth !== widths.get(target)) fill(target);
});

function fill(box) {
  widths.set(box, box.clientWidth);
  box.replaceChildren(makers.get(box)(Math.max(280, box.clientWidth || 760)));
}

// Draw `make(width)` into a box, now and whenever its width changes.
export function place(box, make) {
  makers.set(box, make);
  fill(box);
  watch.observe(box);
}

// --- axes -------------------------------------------------------------------------------------------------------------

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

const round = (value) => value.toLocaleString("en", { maximumSignificantDigits: 6 });

// A frame with axes. Returns the picture and its scales.
export function frame(label, { x: [x0, x1], y: [y0, y1], xLabel, yLabel, width, height = 320, role = "img", whole = false }) {
  const x = scale(x0, x1, LEFT, width - RIGHT), y = scale(y0, y1, height - BOTTOM, TOP);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role, "aria-label": label });
  for (const tick of ticks(y0, y1)) {
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }));
    picture.append(svg("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, round(tick)));
  }
  for (const tick of ticks(x0, x1, width / 110).filter((tick) => !whole || Number.isInteger(tick))) picture.append(svg("text", { x: x(tick), y: height - BOTTOM + 18, "text-anchor": "middle" }, round(tick)));
  picture.append(svg("text", { x: 0, y: TOP - 12 }, yLabel));
  picture.append(svg("text", { x: (LEFT + width - RIGHT) / 2, y: height - 6, "text-anchor": "middle" }, xLabel));
  return { picture, x, y, width, height };
}

export const path = (points, x, y) => points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");

export function capLine({ picture, y, width }, cap) {
  picture.append(svg("line", { class: "cap", x1: LEFT, x2: width - RIGHT, y1: y(cap), y2: y(cap) }));
  picture.append(svg("text", { class: "cap-label", x: LEFT + 6, y: y(cap) - 6 }, `cap ${amount(cap)} MiB`));
}

// --- charts -----------------------------------------------------------------------------------------------------------

// Seconds per step against the budget: `series` is [{name, slot, points: [{budget, step, bound}]}].
export function curve(series, least, most, width) {
  const all = series.flatMap((one) => one.points);
  const low = Math.min(least, ...all.map((p) => p.budget)) / MIB, high = Math.max(most, ...all.map((p) => p.budget)) / MIB;
  const margin = (high - low) * 0.06 || high * 0.1;
  const made = frame("Seconds per step against the memory budget; the table below has the numbers", {
    x: [Math.max(0, low - margin), high + margin], y: [0, Math.max(...all.map((p) => p.step), 1e-6) * 1.15], xLabel: "budget of the whole process, MiB", yLabel: "seconds per step", width,
  });
  const { picture, x, y, height } = made;
  const edge = x(least / MIB);
  picture.append(svg("rect", { class: "beyond", x: LEFT, width: Math.max(0, edge - LEFT), y: TOP, height: height - BOTTOM - TOP }));
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
  picture.append(svg("line", { class: "cap", x1: edge, x2: edge, y1: TOP, y2: height - BOTTOM }));
  picture.append(svg("text", { class: "cap-label", x: edge + 6, y: height - BOTTOM - 8 }, `nothing fits below ${atLeast(least)} MiB`));
  const here = svg("g", { visibility: "hidden" }, svg("line", { class: "here", y1: TOP, y2: height - BOTTOM }), svg("circle", { class: "here-dot", r: 7 }));
  picture.append(here);
  picture.classList.add("draggable");
  made.show = (budget, step) => {
    const [line, dot] = here.children;
    const place = Math.min(width - RIGHT, Math.max(LEFT, x(budget / MIB)));
    line.setAttribute("x1", place); line.setAttribute("x2", place);
    dot.setAttribute("cx", place); dot.setAttribute("cy", step ? y(step) : height - BOTTOM);
    here.setAttribute("visibility", "visible");
  };
  made.budgetAt = (event) => {
    const box = picture.getBoundingClientRect();
    return x.back(((event.clientX - box.left) / box.width) * width) * MIB;
  };
  return made;
}

// One line over steps, with an optional cap.
export function steps(label, points, { yLabel, width, cap = null, colour = "var(--policy-0)", zero = false }) {
  const values = points.map(([, value]) => value).concat(cap === null ? [] : [cap]);
  let low = zero ? 0 : Math.min(...values), high = Math.max(...values);
  const margin = (high - low) * 0.1 || Math.abs(high) * 0.05 || 1;
  low = zero ? 0 : low - margin; high += margin;
  const last = Math.max(2, points.length ? points[points.length - 1][0] : 2);
  const made = frame(label, { x: [1, last], y: [low, high], xLabel: "step", yLabel, width, height: 260, whole: true });
  const { picture, x, y } = made;
  if (points.length) picture.append(svg("path", { class: "line", style: `--c: ${colour}`, d: path(points, x, y) }));
  if (points.length === 1) picture.append(svg("circle", { class: "dot-mark", style: `--c: ${colour}`, cx: x(points[0][0]), cy: y(points[0][1]), r: 4 }));
  if (cap !== null) capLine(made, cap);
  return picture;
}

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
    const left = at.get(layer.name), group = svg("g"), told = [layer.name];
    GROUPS.forEach((name, row) => {
      const decided = Object.entries(layer.decisions[name] || {}).filter(([, size]) => size > 0);
      const total = decided.reduce((sum, [, size]) => sum + size, 0);
      group.append(svg("rect", { x: left, y: tops[row], width: each - 2, height: tall[row] - 1, fill: "var(--line)" }));
      let top = tops[row];
      for (const [decision, size] of decided.sort((a, b) => b[1] - a[1])) {
        const part = (tall[row] - 1) * (size / total);
        group.append(svg("rect", { x: left, y: top, width: each - 2, height: part, fill: didColour(decision) }));
        top += part;
        told.push(`${name} ${decision} ${mib(size)} MiB`);
      }
    });
    group.prepend(svg("title", {}, told.join("\n")));
    picture.append(group);
    const short = each >= 44 ? layer.name.split(".").slice(-2).join(".").slice(0, Math.floor(each / 7)) : String(index + 1);
    if (index % each_label === 0) picture.append(svg("text", { x: left + each / 2, y: height - 14, "text-anchor": "middle" }, short));
  });
  return picture;
}

// --- tables -----------------------------------------------------------------------------------------------------------

export function table(caption, headings, rows) {
  const head = html("tr", {}, ...headings.map((text) => (text ? html("th", { scope: "col" }, text) : html("td"))));
  const body = rows.map(([first, ...rest]) => html("tr", {}, html("th", { scope: "row" }, first), ...rest.map((text) => html("td", {}, text))));
  return html("table", {}, html("caption", {}, caption), html("thead", {}, head), html("tbody", {}, ...body));
}

// A cell's share as a bar beside its number.
export const bar = (share, colour) => html("span", { class: "bar", "aria-hidden": "true" }, html("span", { style: `width: ${Math.min(100, 100 * share)}%; background: ${colour}` }));

export const legend = (entries) => entries.map(([label, colour]) => html("li", {}, html("span", { class: "dot", style: `--c: ${colour}` }), label));
