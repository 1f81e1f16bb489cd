// The curve with the smallest budget that fits, and the chosen budget as a line to drag.

import { atLeast, BOTTOM, curve, LEFT, RIGHT, svg, TOP } from "./charts.js";

export function budgetCurve(series, { least, most, width }) {
  const chart = curve(series, { width, reach: [least, most] });
  const { picture, x, y, at, unit, height } = chart, foot = height - BOTTOM, edge = x(least / unit.size);
  picture.prepend(svg("rect", { class: "beyond", x: LEFT, width: Math.max(0, edge - LEFT), y: TOP, height: foot - TOP }));
  picture.append(svg("line", { class: "cap", x1: edge, x2: edge, y1: TOP, y2: foot }));
  picture.append(svg("text", { class: "cap-label", x: edge + 6, y: TOP + 10 }, `no plan found below ${atLeast(least, unit)} ${unit.name}`));
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
