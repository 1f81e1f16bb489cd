// What the charts of all pages are made of, as SVG, and that of seconds per step against the budget.
// Each is drawn at the width of its box, so that its text has one size on a phone as on a desk; its colours are those of charts.css.
// Sizes are given in bytes and told in MiB, small ones in KiB or bytes.

const NS = "http://www.w3.org/2000/svg";
export const MIB = 1048576;
export const LEFT = 58, RIGHT = 20, TOP = 26, BOTTOM = 44;
const BYTES = { size: 1, name: "B", digits: 0 }, IN_KIB = { size: 1024, name: "KiB", digits: 1 }, IN_MIB = { size: MIB, name: "MiB", digits: 1 };
const POLICY_COLOURS = 9; // --policy-0 to --policy-8 in charts.css

// --- figures ----------------------------------------------------------------------------------------------------------

export function unitOf(bytes) {
  if (bytes < IN_KIB.size) return BYTES;
  return bytes < MIB ? IN_KIB : IN_MIB;
}

// Decimals of a figure: `digits`, but below one as many as show three digits.
export const places = (value, digits = 1) => (value && Math.abs(value) < 1 ? 2 - Math.floor(Math.log10(Math.abs(value))) : digits);
const fixed = (value, decimals) => value.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
export const amount = (value, digits) => fixed(value, places(value, digits));
export const inUnit = (bytes, unit) => amount(bytes / unit.size, unit.digits);
export const size = (bytes, unit = unitOf(bytes)) => `${inUnit(bytes, unit)} ${unit.name}`;
// Rounded up, so that a smallest budget can be typed back as it is printed.
export function atLeast(bytes, unit = IN_MIB) {
  const decimals = places(bytes / unit.size, unit.digits);
  return fixed(Math.ceil((bytes / unit.size) * 10 ** decimals) / 10 ** decimals, decimals);
}
export const seconds = (value) => value.toLocaleString("en", { minimumSignificantDigits: 3, maximumSignificantDigits: 4 });
export const duration = (value) => (value > 0 && value < 1e-3 ? `${seconds(1e6 * value)} µs` : `${seconds(value)} s`);

// --- elements ---------------------------------------------------------------------------------------------------------

// An attribute that is a function listens to the event of its name, one that is true has no value; what is null or false is left out.
function element(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}
export const svg = (name, attributes = {}, ...children) => element(document.createElementNS(NS, name), attributes, children);
export const html = (name, attributes = {}, ...children) => element(document.createElement(name), attributes, children);

export const legend = (entries) => entries.map(([label, colour]) => html("li", {}, html("span", { class: "dot", style: `--c: ${colour}` }), label));
export const kindColour = (name) => `var(--kind-${name}, var(--kind-other))`;
export const policyColour = (slot) => `var(--policy-${slot % POLICY_COLOURS})`;

const makers = new WeakMap(), widths = new WeakMap();
const watch = new ResizeObserver((entries) => entries.forEach(({ target }) => fill(target)));

function fill(box) {
  const width = box.clientWidth;
  if (!width || width === widths.get(box)) return; // one that is hidden is drawn once it is shown
  widths.set(box, width);
  box.replaceChildren(makers.get(box)(Math.max(280, width)));
}

// Draw `make(width)` into a box, now and whenever its width changes.
export function place(box, make) {
  makers.set(box, make);
  widths.delete(box);
  fill(box);
  watch.observe(box);
}

// --- axes -------------------------------------------------------------------------------------------------------------

export function ticks(low, high, wanted = 6) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(span / wanted));
  const step = [1, 2, 2.5, 5, 10, 20].map((m) => m * power).find((s) => s >= span / wanted);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

const scale = (low, high, start, end) => {
  const map = (value) => start + ((value - low) / (high - low || 1)) * (end - start);
  map.back = (place) => low + ((place - start) / (end - start)) * (high - low);
  return map;
};

export function round(value) {
  const kept = Number(value.toPrecision(6));
  return kept && Math.abs(kept) < 1e-4 ? kept.toExponential() : kept.toLocaleString("en", { maximumSignificantDigits: 6 });
}

// A scale whose equal steps are equal ratios.
const logarithmic = (low, high, start, end) => {
  const map = (value) => start + (Math.log(Math.max(value, low * 1e-3) / low) / Math.log(high / low)) * (end - start);
  map.back = (place) => low * (high / low) ** ((place - start) / (end - start));
  return map;
};

// Round figures for a logarithmic axis, as dense as there is room for.
function logarithmicTicks(low, high, wanted) {
  const all = (steps) => {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) found.push(...steps.map((step) => step * 10 ** power).filter((tick) => tick >= low && tick <= high));
    return found;
  };
  const choices = [[1, 1.5, 2, 3, 4, 5, 7], [1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]].map(all);
  return choices.find((found) => found.length <= wanted) ?? choices.at(-1);
}

// A frame with axes; `log`: the x axis has equal steps for equal ratios; `below`: room for marks under the axis.
// Returns the picture and its scales.
export function frame(label, { x: [x0, x1], y: [y0, y1], xLabel, yLabel, width, height = 320, whole = false, log = false, below = 0 }) {
  const x = (log ? logarithmic : scale)(x0, x1, LEFT, width - RIGHT), y = scale(y0, y1, height - BOTTOM - below, TOP);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const tick of ticks(y0, y1)) {
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }));
    picture.append(svg("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, round(tick)));
  }
  picture.append(svg("text", { x: 0, y: TOP - 12 }, yLabel), ...along([x0, x1], x, { label: xLabel, width, height, whole, log }));
  return { picture, x, y, at: pointed(picture, x, width), width, height, foot: height - BOTTOM - below };
}

// The x axis under a picture: ticks and what they count.
const along = ([low, high], x, { label, width, height, whole, log }) => [
  ...(log ? logarithmicTicks(low, high, width / 80) : ticks(low, high, width / 110)).filter((tick) => !whole || Number.isInteger(tick)).map((tick) => svg("text", { x: x(tick), y: height - BOTTOM + 18, "text-anchor": "middle" }, round(tick))),
  svg("text", { x: (LEFT + width - RIGHT) / 2, y: height - 6, "text-anchor": "middle" }, label),
];

// Where a pointer is, on the x axis.
const pointed = (picture, x, width) => (event) => {
  const box = picture.getBoundingClientRect();
  return x.back(((event.clientX - box.left) / box.width) * width);
};

export const path = (points, x, y) => points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");

export function capLine({ picture, y, width }, cap, text) {
  picture.append(svg("line", { class: "cap", x1: LEFT, x2: width - RIGHT, y1: y(cap), y2: y(cap) }));
  picture.append(svg("text", { class: "cap-label", x: LEFT + 6, y: y(cap) - 6 }, `cap ${text}`));
}

// --- seconds per step against the budget ------------------------------------------------------------------------------

const DECADES = 5; // budgets that are so many times as large as each other are drawn by their ratios
const ROW = 15; // height of a policy's row of crosses below the axis

// What is proven of a budget holds for all smaller ones.
function bounded(points) {
  let highest = 0;
  return points.toReversed().map((point) => { highest = Math.max(highest, point.bound); return { ...point, bound: highest }; }).reverse();
}

// `series`: [{name, label, slot, points: [{budget, step, bound, peak}], misfits: [{budget, needs}]}], a line for each policy and the
// solver's bound; below the axis a row for each policy that does not fit somewhere, with a cross at each such budget. The x axis
// reaches the budgets of `reach` as well. The y axis begins just below what is drawn: its label says so.
export function curve(series, { width, reach = [] }) {
  const budgets = [...reach, ...series.flatMap((one) => [...one.points, ...one.misfits].map((p) => p.budget))];
  const unit = unitOf(Math.max(...budgets)), low = Math.min(...budgets) / unit.size, high = Math.max(...budgets) / unit.size;
  const log = high > DECADES * low, margin = (high - low) * 0.06 || high * 0.1;
  const bound = bounded(series.find((one) => one.name === "solver")?.points ?? []), crossed = series.filter((one) => one.misfits.length);
  const times = [...series.flatMap((one) => one.points.map((p) => p.step)), ...bound.map((p) => p.bound).filter((time) => time > 0)];
  const fastest = times.length ? Math.min(...times) : 0, slowest = times.length ? Math.max(...times) : 1;
  // A rule far slower than all that the search found would squeeze the trade that is looked at: it stands at the upper edge.
  const searched = series.find((one) => one.name === "solver")?.points.map((p) => p.step) ?? [], slowestFound = Math.max(...searched);
  const top = searched.length > 1 ? Math.min(slowest, slowestFound + Math.max(0.4 * (slowestFound - fastest), 0.01 * slowestFound)) : slowest;
  const room = Math.max((top - fastest) * 0.1, top * 0.01), base = Math.max(0, fastest - room), below = crossed.length ? crossed.length * ROW + 6 : 0;
  const made = frame("Seconds per step against the memory budget; the table has the numbers", {
    x: log ? [low / 1.08, high * 1.08] : [Math.max(0, low - margin), high + margin], y: [base, top + room], log, below, height: 320 + below,
    xLabel: `budget, ${unit.name}${log ? ", equal steps are equal ratios" : ""}`, yLabel: base ? `seconds per step, from ${round(Number(base.toPrecision(3)))} up` : "seconds per step", width,
  });
  const { picture, x, y, foot } = made;
  const along = (points, value) => path(points.map((p) => [p.budget / unit.size, Math.min(value(p), top + room)]), x, y);
  picture.append(svg("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: foot, y2: foot }));
  if (below) picture.append(svg("text", { x: LEFT - 8, y: foot + 14, "text-anchor": "end", class: "misfit-name" }, width < 520 ? "no fit" : "no fit ×"));
  if (bound.length > 1) picture.append(svg("path", { class: "bound", d: along(bound, (p) => p.bound) }));
  for (const { name, label = name, slot, points, misfits } of series) {
    const group = svg("g", { style: `--c: ${policyColour(slot)}`, "data-policy": name });
    if (points.length > 1) group.append(svg("path", { class: points.every((p) => p.step > top) ? "line off" : "line", d: along(points, (p) => p.step) }));
    for (const p of points) {
      const text = `${label} at ${size(p.budget)}: ${duration(p.step)} per step, peak ${size(p.peak)}`;
      group.append(svg("circle", { class: p.step > top ? "dot-mark off" : "dot-mark", cx: x(p.budget / unit.size), cy: y(Math.min(p.step, top + room)), r: 4.5 }, svg("title", {}, text)));
    }
    const row = foot + 10 + ROW * crossed.findIndex((one) => one.name === name), enough = Math.min(...misfits.map((p) => p.needs ?? Infinity));
    // A policy's row ends where its plans begin to fit.
    if (misfits.length && enough < Infinity) group.append(svg("path", { class: "unfit", d: `M${LEFT} ${row}H${Math.max(LEFT, Math.min(width - RIGHT, x(enough / unit.size))).toFixed(1)}m0 -4v8` }));
    for (const { budget, needs } of misfits) {
      const text = needs ? `needs ${atLeast(needs, unitOf(needs))} ${unitOf(needs).name}` : "does not fit";
      group.append(svg("path", { class: "misfit", d: `M${x(budget / unit.size) - 4} ${row - 4}l8 8m0 -8l-8 8` }, svg("title", {}, `${label} at ${size(budget)}: ${text}`)));
    }
    picture.append(group);
  }
  return { ...made, y: (value) => y(Math.min(value, top + room)), unit, log };
}

// `box`: where the curve is drawn, whose marks are told of.
export function curveLegend(series, box = null) {
  const marks = [];
  if (series.some((one) => one.name === "solver" && one.points.length > 1)) marks.push(html("li", {}, html("span", { class: "dash" }), "proven bound: no plan that can be chosen is faster"));
  if (series.some((one) => one.misfits.length)) marks.push(html("li", {}, "× does not fit; the line beside it ends where it would"));
  if (box?.querySelector(".dot-mark.off")) marks.push(html("li", {}, html("span", { class: "ring" }), "slower than this picture reaches: its seconds are in the table"));
  return [...legend(series.map((one) => [one.label ?? one.name, policyColour(one.slot)])), ...marks];
}

// --- a cursor ---------------------------------------------------------------------------------------------------------

// A line across a picture that stands at one of its moments, `place` tells where.
export function cursor(picture, place, height) {
  const line = svg("line", { class: "cursor", y1: TOP, y2: height - BOTTOM, visibility: "hidden" });
  picture.append(line);
  const show = (i) => {
    for (const end of ["x1", "x2"]) line.setAttribute(end, place(i));
    line.setAttribute("visibility", "visible");
  };
  return { show, hide: () => line.setAttribute("visibility", "hidden") };
}

// Pointer and arrow keys move the cursor of a chart over its moments, 0 to `last`; `find` the one at a place of the x axis, `read`
// tells of it. Where the cursor stands outlasts a chart that is drawn anew: `state`.
export function follow({ picture, at, show, hide }, { last, state, find, read }) {
  const go = (index) => {
    state.at = Math.max(0, Math.min(last, index));
    show(state.at);
    read(state.at);
  };
  picture.setAttribute("role", "group");
  picture.setAttribute("tabindex", "0");
  picture.addEventListener("pointermove", (event) => go(find(at(event))));
  picture.addEventListener("pointerleave", () => { if (document.activeElement !== picture) hide(); });
  picture.addEventListener("focus", () => go(state.at));
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, PageUp: 20, PageDown: -20 }[event.key];
    if (step) go(state.at + step);
    else if (event.key === "Home") go(0);
    else if (event.key === "End") go(last);
    else return;
    event.preventDefault();
  });
  return picture;
}
export const HOW = "Point at the chart, or focus it and use the arrow keys.";
