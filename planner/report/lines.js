// Lines over the steps of training runs: loss, memory under its cap; ten thousand steps and several runs over each other.

import { capLine, cursor, follow, frame, HOW, html, legend, path, place, policyColour, svg } from "./charts.js";

const STEADY = 0.9; // what a smoothed value keeps of the one before
const EDGE = 0.08; // of the values' range that is left free above and below

// A moving mean that forgets, without its pull towards the zero that it begins with: [[x, y]] → [[x, y]].
export function smoothed(points, steady = STEADY) {
  let sum = 0, weight = 0;
  return points.map(([x, y]) => {
    if (Number.isFinite(y)) {
      sum = steady * sum + (1 - steady) * y;
      weight = steady * weight + (1 - steady);
    }
    return [x, weight ? sum / weight : y];
  });
}

// At most four points for each of `columns` equal parts of the x axis, the first, lowest, highest and last of it: drawn, they look
// like all of them.
export function thinned(points, columns) {
  if (points.length <= 4 * columns) return points;
  const [first] = points[0], width = (points.at(-1)[0] - first) / columns || 1, kept = [];
  for (let i = 0, column = 0; i < points.length; column++) {
    const begin = i;
    let low = i, high = i;
    for (; i < points.length && (points[i][0] - first < (column + 1) * width || column === columns - 1); i++) {
      if (points[i][1] < points[low][1]) low = i;
      if (points[i][1] > points[high][1]) high = i;
    }
    if (i > begin) kept.push(...[...new Set([begin, low, high, i - 1])].sort((a, b) => a - b).map((index) => points[index]));
  }
  return kept;
}

// `series`: [{name, slot, points: [[x, y]], faint, marks}]: a faint one lies behind the others and is not told of, `marks` are points
// without a line. Options: `cap` (a value and what it says), `zero` (the axis begins there), `from` and `to` of the x axis.
export function lineChart(series, { width, height = 260, label, xLabel = "step", yLabel, cap = null, zero = false, from = null, to = null }) {
  const xs = series.flatMap(({ points }) => (points.length ? [points[0][0], points.at(-1)[0]] : []));
  const left = from ?? Math.min(...xs, 1), right = to ?? Math.max(...xs, left + 1);
  const within = series.map((one) => ({ ...one, points: one.points.filter(([x, y]) => x >= left && x <= right && Number.isFinite(y)) }));
  let low = zero ? 0 : Infinity, high = cap ? cap.value : -Infinity;
  for (const { points } of within) for (const [, y] of points) { if (y < low) low = y; if (y > high) high = y; }
  if (!(low <= high)) [low, high] = [0, 1];
  const edge = (high - low) * EDGE || Math.abs(high) * 0.05 || 1;
  const chart = frame(label, { x: [left, right], y: [zero ? 0 : low - edge, high + edge], xLabel, yLabel, width, height, whole: true });
  const { picture, x, y } = chart;
  for (const one of [...within].sort((a, b) => Boolean(b.faint) - Boolean(a.faint))) {
    const group = svg("g", { class: one.faint ? "faint" : null, "data-series": one.name, style: `--c: ${policyColour(one.slot)}` });
    if (!one.marks && one.points.length > 1) group.append(svg("path", { class: "line", d: path(thinned(one.points, Math.round(width)), x, y) }));
    if (one.marks || one.points.length === 1) for (const [px, py] of one.points) group.append(svg("circle", { class: "dot-mark", cx: x(px), cy: y(py), r: 4 }));
    picture.append(group);
  }
  if (cap) capLine(chart, cap.value, cap.text);
  return { ...chart, within };
}

// A line chart with its legend and a cursor that pointer and arrow keys move; `reading` tells the values there by `tell(value)`. Dragging
// across it enlarges what lies between, a double click or Escape shows all again; `state` = {from, to, at} outlasts drawing anew.
export function showLines({ box, key, reading }, series, { label, tell = (y) => y.toFixed(4), state = {}, ...options }) {
  const named = series.filter((one) => !one.faint);
  const draw = () => place(box, (width) => {
    const chart = lineChart(series, { ...options, label: `${label}; arrow keys move along, the table has the numbers`, width, from: state.from, to: state.to });
    const { picture, x, at, height } = chart;
    const steps = [...new Set(chart.within.flatMap(({ points, faint }) => (faint ? [] : points.map(([step]) => step))))].sort((a, b) => a - b);
    const last = Math.max(0, steps.length - 1);
    const find = (moment) => {
      let low = 0, high = last;
      while (low < high) { const middle = (low + high) >> 1; if (steps[middle] < moment) low = middle + 1; else high = middle; }
      return low && moment - steps[low - 1] < steps[low] - moment ? low - 1 : low;
    };
    const read = (index) => {
      const step = steps[index], parts = named.map(({ name, points }) => [name, points[before(points, step)]]).filter(([, point]) => point);
      reading.textContent = step === undefined ? "" : `${options.xLabel ?? "step"} ${step}: ${parts.map(([name, [, y]]) => `${name} ${tell(y)}`).join("; ")}`;
    };
    const line = cursor(picture, (index) => x(steps[index] ?? 0), height);
    follow({ picture, at, ...line }, { last, state: (state.at === undefined ? Object.assign(state, { at: last }) : state), find, read });
    enlarging(picture, at, x, height, (from, to) => { Object.assign(state, { from, to, at: 0 }); draw(); });
    return picture;
  });
  draw();
  if (!reading.textContent) reading.textContent = `${HOW} Drag across it to enlarge a part; Escape shows all.`;
  key.replaceChildren(...legend(named.map((one) => [one.name, policyColour(one.slot)])));
}

// The last point at or before a step: by halving, as steps are in order.
function before(points, step) {
  let low = 0, high = points.length - 1;
  while (low < high) { const middle = (low + high + 1) >> 1; if (points[middle][0] <= step) low = middle; else high = middle - 1; }
  return low;
}

function enlarging(picture, at, x, height, choose) {
  const band = svg("rect", { class: "band", y: 0, height, visibility: "hidden" });
  let begun = null;
  picture.append(band);
  picture.addEventListener("pointerdown", (event) => { begun = at(event); picture.setPointerCapture(event.pointerId); });
  picture.addEventListener("pointermove", (event) => {
    if (begun === null) return;
    const [a, b] = [begun, at(event)].sort((one, other) => one - other);
    band.setAttribute("x", x(a));
    band.setAttribute("width", Math.max(0, x(b) - x(a)));
    band.setAttribute("visibility", "visible");
  });
  picture.addEventListener("pointerup", (event) => {
    const [a, b] = [begun, at(event)].sort((one, other) => one - other);
    begun = null;
    band.setAttribute("visibility", "hidden");
    if (x(b) - x(a) > 8) choose(a, b);
  });
  picture.addEventListener("dblclick", () => choose(null, null));
  picture.addEventListener("keydown", (event) => { if (event.key === "Escape") choose(null, null); });
}

// The boxes of a chart that `showLines` fills, under its name.
export function chartBox(name) {
  const box = html("div", { class: "chart-box" }), key = html("ul", { class: "legend" }), reading = html("p", { class: "reading", "aria-live": "polite" });
  return { box, key, reading, whole: html("figure", { "data-chart": name }, html("figcaption", {}, name), box, key, reading) };
}
