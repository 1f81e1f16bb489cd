// The curve with the smallest budget that fits, and the chosen budget as a line to drag.

import { atLeast, curve, LEFT, RIGHT, svg, TOP } from "./charts.js";

// `least`, `most`: the budgets that the picture reaches, the smaller one that of the smallest plan, `proven` or the best so far;
// none (null) where nothing is known yet.
export function budgetCurve(series, { least, most, known, proven, width }) {
  const chart = curve(series, { width, reach: [least, most] }), { picture, x, y, at, unit, foot } = chart;
  if (known) {
    const edge = x(least / unit.size), text = `${proven ? "nothing fits" : "no plan found"} below ${atLeast(least, unit)} ${unit.name}`;
    picture.prepend(svg("rect", { class: "beyond", x: LEFT, width: Math.max(0, edge - LEFT), y: TOP, height: foot - TOP }));
    picture.append(svg("line", { class: "cap", x1: edge, x2: edge, y1: TOP, y2: foot }));
    picture.append(svg("text", { class: "cap-label", x: edge + 6, y: TOP + 10 }, text));
  }
  const line = svg("line", { class: "here", y1: TOP, y2: foot }), dot = svg("circle", { class: "here-dot", r: 7 });
  const here = svg("g", { visibility: "hidden" }, line, dot);
  picture.append(here);
  picture.classList.add("draggable");
  const show = (budget, step) => {
    const place = Math.min(width - RIGHT, Math.max(LEFT, x(budget / unit.size)));
    line.setAttribute("x1", place); line.setAttribute("x2", place);
    dot.setAttribute("cx", place); dot.setAttribute("cy", step ? y(step) : foot);
    here.setAttribute("visibility", "visible");
  };
  return { picture, show, budgetAt: (event) => at(event) * unit.size };
}
