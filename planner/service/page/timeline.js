// Memory over one training step, stacked by kind under the cap, with the instruction that sets the peak.

import { amount, capLine, frame, html, legend, LEFT, MIB, place, RIGHT, seconds, svg, table, BOTTOM, TOP } from "./charts.js";

const colour = (kind) => `var(--kind-${kind.name}, var(--kind-other))`;
const ROWS = 40; // of the table

// What Python and PyTorch take alone may fill half of the picture: then the axis starts just inside.
function lowest({ kinds, mib }, high) {
  const floor = kinds[0]?.name === "floor" ? Math.min(...mib[0]) : 0;
  return floor < 0.4 * high ? 0 : Math.max(0, Math.floor((floor - 0.12 * (high - floor)) / 10) * 10);
}

const highest = ({ total }, cap) => {
  const most = Math.max(...total);
  return Math.max(most, cap <= 1.7 * most ? cap : 0) * 1.1;
};

// The axis that several plans share.
export function sharedAxis(shown) {
  const high = Math.max(...shown.map(({ series, cap }) => highest(series, cap)));
  return { low: Math.min(...shown.map(({ series }) => lowest(series, high))), high };
}

export function picture(series, { cap, peak, width, axis = sharedAxis([{ series, cap }]), height = 360, label }) {
  const { low, high } = axis;
  const made = frame(label, {
    x: [0, series.seconds], y: [low, high], xLabel: "seconds into the step", yLabel: low ? `MiB, from ${low} up` : "MiB", width, height, role: "group",
  });
  const { picture: drawn, x, y } = made;
  drawn.setAttribute("tabindex", "0");
  let base = series.total.map(() => low), sum = series.total.map(() => 0);
  series.kinds.forEach((kind, k) => {
    sum = sum.map((value, i) => value + series.mib[k][i]);
    const top = sum.map((value) => Math.max(low, value));
    const edge = (i, value, first) => `${first ? "M" : "L"}${x(series.starts[i]).toFixed(1)} ${y(value).toFixed(1)}H${x(series.ends[i]).toFixed(1)}`;
    const up = top.map((value, i) => edge(i, value, i === 0)).join("");
    const down = base.map((value, i) => `L${x(series.ends[i]).toFixed(1)} ${y(value).toFixed(1)}H${x(series.starts[i]).toFixed(1)}`).reverse().join("");
    drawn.append(svg("path", { d: `${up}${down}Z`, fill: colour(kind), "data-kind": kind.name }));
    base = top;
  });
  if (cap <= high) capLine(made, cap);
  const i = series.peak, middle = x((series.starts[i] + series.ends[i]) / 2);
  const waste = series.kinds.findIndex((kind) => kind.name === "fragmentation");
  const used = series.total[i] - (waste < 0 ? 0 : series.mib[waste][i]);
  const late = middle > width * 0.55;
  drawn.append(svg("circle", { class: "peak", cx: middle, cy: y(used), r: 5 }, svg("title", {}, peak.text)));
  const text = width < 520 ? `instruction ${peak.instruction}` : `instruction ${peak.instruction}: ${peak.text}`.slice(0, Math.floor(width / 12));
  drawn.append(svg("text", { class: "peak-label", x: middle + (late ? -10 : 10), y: y(used) + 17, "text-anchor": late ? "end" : "start" }, text));
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: height - BOTTOM, visibility: "hidden" });
  drawn.append(cursor);
  made.show = (index) => {
    const at = x((series.starts[index] + series.ends[index]) / 2);
    cursor.setAttribute("x1", at); cursor.setAttribute("x2", at); cursor.setAttribute("visibility", "visible");
  };
  made.indexAt = (event) => {
    const box = drawn.getBoundingClientRect(), where = ((event.clientX - box.left) / box.width) * width;
    const moment = ((where - LEFT) / (width - RIGHT - LEFT)) * series.seconds;
    const index = series.ends.findIndex((end) => moment < end);
    return index < 0 ? series.ends.length - 1 : index;
  };
  return made;
}

// The picture with a cursor that pointer and arrow keys move, what it reads, its legend and its table.
export function showTimeline(view, { box, reading, key, numbers }) {
  const { timeline: series, peak, summary } = view, cap = summary.budget_bytes / MIB;
  let at = series.peak, made = null;
  const show = (index) => {
    at = Math.max(0, Math.min(series.ends.length - 1, index));
    made.show(at);
    const parts = series.kinds.map((kind, k) => [kind.label, series.mib[k][at]]).filter(([, value]) => value >= Math.min(0.05, series.total[at] / 1000));
    reading.textContent = `${seconds(series.ends[at])} s: ${amount(series.total[at])} MiB = ${parts.map(([kind, value]) => `${kind} ${amount(value)}`).join(" + ")}`;
  };
  place(box, (width) => {
    made = picture(series, { cap, peak, width, label: `Memory over one step of ${summary.policy} at ${amount(cap)} MiB; arrow keys move along the step, the table below has the numbers` });
    const chart = made.picture;
    chart.addEventListener("pointermove", (event) => show(made.indexAt(event)));
    chart.addEventListener("focus", () => show(at));
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, PageUp: 20, PageDown: -20 }[event.key];
      if (step) show(at + step);
      else if (event.key === "Home") show(0);
      else if (event.key === "End") show(series.ends.length - 1);
      else return;
      event.preventDefault();
    });
    return chart;
  });
  reading.textContent = "Point at the chart, or focus it and use the arrow keys.";
  key.replaceChildren(...legend(series.kinds.map((kind) => [kind.label, colour(kind)])));
  // A row for every slice would be long: about forty, and the peak's.
  const every = Math.max(1, Math.ceil(series.ends.length / ROWS));
  const rows = series.ends.map((_, i) => i).filter((i) => i % every === 0 || i === series.peak);
  numbers.replaceChildren(
    table("MiB by kind", ["until, s", ...series.kinds.map((kind) => kind.label), "together"], rows.map((i) => [`${seconds(series.ends[i])}${i === series.peak ? " (fullest)" : ""}`, ...series.mib.map((kind) => amount(kind[i])), amount(series.total[i])])),
  );
}

// Two plans beside each other, on one scale.
export function showBeside(views, boxes, names) {
  const shown = views.map((view) => ({ series: view.timeline, cap: view.summary.budget_bytes / MIB }));
  const axis = sharedAxis(shown);
  views.forEach((view, i) => {
    place(boxes[i], (width) => {
      const { picture: drawn } = picture(view.timeline, { cap: shown[i].cap, peak: view.peak, width, axis, height: 260, label: `Memory over one step of ${names[i]}; the figures below compare them` });
      drawn.removeAttribute("tabindex");
      drawn.setAttribute("role", "img");
      return html("div", {}, drawn);
    });
  });
}
