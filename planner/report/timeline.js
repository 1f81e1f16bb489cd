// The timeline to move in: one training step of a plan, instruction by instruction. Memory by kind is stacked above, under the cap; below
// lie lanes for the layers, the cores and the channels, so that what overlaps is seen. It is drawn on a canvas, since a step may have tens
// of thousands of instructions; its text is in the elements around it.
//
// `stepOf(columns)` unfolds what the service or a page has of a plan (step_columns.py), `showStep(box, step, options)` shows it.

import { duration, html, inUnit, kindColour, legend, round, seconds, size, svg, ticks, unitOf } from "./charts.js";
import { button, numbers, scrolling, table } from "./components.js";

const LEFT = 62, RIGHT = 14, TOP = 24, AXIS = 36, TRACK = 12, GAP = 6;
const LANES = { layers: 20, compute: 24, read: 14, write: 14 };
const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
const MOMENTS = 40; // rows of the table
const LISTED = 30; // tensors listed before one asks for more
const STRETCHES = 60; // stays in memory that are drawn of one tensor
const ZOOM = 1.6; // by a button or a key
const FADED = 0.35; // the part of a pixel that is at work shows at least so much
const PEN = { forward: "forward", inference: "forward", backward: "backward", again: "again", unpack: "unpack", update: "update", wait: "wait", read: "read", write: "write" };
const MOVES = ["read", "fetch", "spill", "free"]; // what takes the cores no time worth a colour

// --- the step ---------------------------------------------------------------------------------------------------------

const added = (changes) => { let sum = 0; return changes.map((change) => (sum += change)); };

// Columns unfolded: seconds of every instruction, bytes of each kind while it runs, stays of tensors in memory, transfers, stretches of
// layers. Where a graph gives no seconds, an instruction takes one.
export function stepOf(columns) {
  const { instructions, tensors, kinds, whats, tick } = columns, count = instructions.what.length;
  const timed = columns.seconds > 0, begin = new Float64Array(count), end = new Float64Array(count);
  for (let i = 0, now = 0; i < count; i++) {
    begin[i] = timed ? (now += instructions.wait[i]) * tick : i;
    end[i] = timed ? (now += instructions.work[i]) * tick : i + 1;
  }
  const whole = timed ? Math.max(columns.seconds, end[count - 1] ?? 0) : count;
  const kindAt = Object.fromEntries(kinds.map((kind, k) => [kind.name, k])), what = instructions.what.map((w) => whats[w].name);
  const levels = kinds.map(() => new Float64Array(count)), total = new Float64Array(count), used = new Float64Array(count);
  const held = new Float64Array(kinds.length), stays = tensors.name.map(() => []);
  const came = { at: added(columns.came.instruction), tensor: columns.came.tensor }, went = { at: added(columns.went.instruction), tensor: columns.went.tensor };
  const touched = added(instructions.touched), free = kindAt.fragmentation;
  let c = 0, w = 0;
  for (let i = -1; i < count; i++) {
    // Of what comes and goes in one instruction, a gradient that is handed on goes before it comes.
    for (; w < went.at.length && went.at[w] === i; w++) { held[tensors.kind[went.tensor[w]]] -= tensors.bytes[went.tensor[w]]; stays[went.tensor[w]].at(-1)[1] = i; }
    for (; c < came.at.length && came.at[c] === i; c++) { held[tensors.kind[came.tensor[c]]] += tensors.bytes[came.tensor[c]]; stays[came.tensor[c]].push([i, count]); }
    if (i < 0) continue;
    let live = 0;
    for (let k = 0; k < kinds.length; k++) { levels[k][i] = held[k]; live += held[k]; }
    if (kindAt.floor !== undefined) levels[kindAt.floor][i] = columns.floor;
    if (kindAt.constant !== undefined) levels[kindAt.constant][i] += columns.fixed;
    levels[kindAt.workspace][i] += instructions.workspace[i];
    used[i] = live + columns.fixed + instructions.workspace[i] + columns.floor;
    const gap = free === undefined ? 0 : Math.max(0, touched[i] - live);
    if (gap) levels[free][i] = gap;
    total[i] = used[i] + gap;
  }
  const shown = kinds.map((kind, k) => k).filter((k) => levels[k].some((bytes) => bytes > 0));
  const moved = columns.transfers, movedAt = added(moved.instruction), movedFrom = added(moved.begin);
  const transfers = movedAt.map((instruction, i) => ({ instruction, begin: timed ? movedFrom[i] * tick : instruction, end: timed ? (movedFrom[i] + moved.length[i]) * tick : instruction + 1, out: moved.out[i] === 1 }));
  const decided = new Map(columns.decided.tensor.map((tensor, i) => [tensor, i]));
  const step = { columns, count, timed, begin, end, whole, what, kinds, levels, shown, total, used, stays, transfers, decided };
  step.segments = segmentsOf(step);
  step.fullest = used.reduce((best, bytes, i) => (bytes > used[best] ? i : best), 0);
  return step;
}

// The step of a page that has its columns within itself, packed.
export async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

// Stretches of the step in which the cores are at one layer, forward or backward.
function segmentsOf({ columns, count, what, begin, end }) {
  const segments = [];
  let last = null;
  for (let i = 0; i < count; i++) {
    if (columns.instructions.operator[i] < 0) continue;
    const layer = columns.instructions.of[i], forward = what[i] === "forward" || what[i] === "inference";
    if (!last || last.layer !== layer || last.forward !== forward) segments.push((last = { layer, forward, first: i, last: i, begin: begin[i], end: end[i] }));
    Object.assign(last, { last: i, end: end[i] });
  }
  return segments;
}

// What an instruction does, in words.
export function textOf({ columns, what }, i) {
  const { of, operator } = columns.instructions, { label } = columns.whats[columns.instructions.what[i]];
  if (operator[i] < 0) return `${label} ${columns.tensors.name[of[i]]}`;
  return columns.graph ? `${columns.operators[operator[i]]} (${label})` : `${columns.layers[of[i]]}: ${columns.operators[operator[i]]} (${label})`;
}

// The axes that several timelines share: the longest step; bytes up to the fullest moment, or to a cap that is not so far above that it
// would flatten the picture, from zero or, where Python and PyTorch alone would fill half of it, from just inside them.
export function sharedAxis(steps) {
  const unit = unitOf(Math.max(...steps.map(most)));
  const tops = steps.map((step) => { const top = most(step), cap = step.columns.budget; return 1.06 * Math.max(top, cap <= 1.7 * top ? cap : 0); });
  const high = Math.max(...tops) / unit.size, floor = Math.min(...steps.map((step) => step.columns.floor)) / unit.size;
  const low = floor < 0.4 * high ? 0 : Math.max(0, Math.floor((floor - 0.12 * (high - floor)) / 10) * 10);
  return { unit, high, low, whole: Math.max(...steps.map((step) => step.whole)) };
}
const most = ({ total }) => total.reduce((high, bytes) => Math.max(high, bytes), 0);

// --- why a tensor is as it is -----------------------------------------------------------------------------------------

const DONE = { kept: "kept in memory", recomputed: "made again", offloaded: "moved out and back", streamed: "read at each use", packed: "in memory, packed", unpacked: "in memory, unpacked" };
const took = (value) => (value > 0 ? duration(value) : "no time");

// Why a tensor is as it is: what it costs per step, and what the other ways would.
export function whyOf({ columns, decided, kinds }, tensor) {
  const kind = kinds[columns.tensors.kind[tensor]].name, bytes = size(columns.tensors.bytes[tensor]), at = decided.get(tensor);
  const { decisions, ...figures } = columns.decided, decision = at === undefined || figures.decision[at] < 0 ? null : decisions[figures.decision[at]];
  if (decision === null) return { decision, text: FIXED[kind] ?? "it lies in memory from what makes it to its last use; there was nothing to choose" };
  const figure = Object.fromEntries(Object.entries(figures).map(([name, column]) => [name, column[at]]));
  const make = figure.make === null ? null : `making it again would take ${took(figure.make)} of the cores`, move = figure.move === null ? null : `moving it to ${columns.elsewhere} and back ${took(figure.move)} of the channel`;
  const others = [make, move].filter(Boolean).join(", ") || "there is no other way: it comes from random numbers, or nothing can make it again";
  const channel = took(figure.read + figure.write), read = `reading it once ${took(figure.move ?? 0)} of the channel, unpacking it ${took(figure.make ?? 0)} of the cores`;
  const texts = {
    kept: `stays in memory from what makes it to its last use: ${others}`,
    recomputed: `is given up and made again when it is needed: ${took(figure.recompute)} of the cores per step instead of ${bytes} until then${figure.move === null ? "" : `; ${move}`}`,
    offloaded: `is moved to ${columns.elsewhere} and back: ${channel} of the channel per step instead of ${bytes} meanwhile${make ? `; ${make}` : ""}`,
    streamed: `is read from ${columns.elsewhere} for each use and given up after it: ${took(figure.read)} of the channel and ${took(figure.unpack)} of the cores per step instead of a place in memory all the time`,
    packed: `stays in memory in its stored form and is unpacked for each use: ${took(figure.unpack)} of the cores per step; unpacked it would take ${bytes} all the time`,
    unpacked: `stays in memory as operators read it, ${bytes} all the time: for each use ${read}`,
  };
  return { decision, text: texts[decision] ?? decision };
}
const FIXED = {
  constant: "is needed all the time, and small",
  batch: "holds the samples of the step",
  trainable: "is trained: it stays in memory",
  packed: "is the stored form of a weight, from its reading to its unpacking",
  gradient: "a gradient lies in memory from the first operator that adds to it to its last use",
};

// --- the picture ------------------------------------------------------------------------------------------------------

const drawnAnew = new Set(); // timelines that are drawn again when colours change
const recolour = () => { for (const one of drawnAnew) if (one.frame.isConnected) one.recolour(); else drawnAnew.delete(one); };
addEventListener("themechange", recolour);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);

// Show several steps on one scale, which move together: [{box, step, name}].
export function showSteps(shown, height = 150) {
  const steps = shown.map(({ step }) => step), axis = sharedAxis(steps), linked = [];
  shown.forEach(({ box, step, name }, i) => linked.push(showStep(box, step, { name, axis, height, linked, told: i ? [] : steps })));
  return linked;
}

// Show a step in a box. `name`: of the plan, for those who do not see it; `axis`: one of `sharedAxis`; `height`: of the memory; `linked`: steps
// that move along; `told`: the steps whose colours are told above it, where the buttons are; none, and there are neither. Returns what moves it.
export function showStep(box, step, { name, axis = sharedAxis([step]), height = 250, linked = [], told: toldOf = [step] } = {}) {
  const { columns, count, begin, end, kinds, levels, shown, total, used, transfers, segments } = step;
  const canvas = html("canvas"), over = html("canvas", { class: "over" });
  const frame = html("div", { class: "step-frame", tabindex: 0, role: "application", "aria-roledescription": "timeline", "aria-label": `One step of ${name}: memory above, layers, cores and channels below. Arrow keys move from instruction to instruction, plus and minus zoom, Home and End go to the ends, Enter tells what lies there; the table below has the numbers.` }, canvas, over);
  const reading = html("p", { class: "reading" }), voice = html("p", { class: "unseen", role: "status", "aria-live": "polite" }), told = html("div", { class: "step-detail", "aria-live": "polite" });
  const ground = html("canvas"), brush = ground.getContext("2d"), pen = canvas.getContext("2d"), mark = over.getContext("2d");
  const tops = {};
  let foot = TOP + height + 8;
  for (const [lane, tall] of Object.entries(LANES)) { tops[lane] = foot; foot += tall + GAP; }
  const bottom = foot, tall = foot + AXIS + TRACK;
  let width = 0, ratio = 1, colours = {}, from = 0, until = axis.whole, at = step.fullest, pointed = false, waiting = 0, image = null;
  const least = axis.whole / Math.max(20, 4 * count);

  const x = (moment) => LEFT + ((moment - from) / (until - from)) * (width - LEFT - RIGHT);
  const moment = (place) => from + ((place - LEFT) / (width - LEFT - RIGHT)) * (until - from);
  const y = (bytes) => TOP + height - ((bytes / axis.unit.size - axis.low) / (axis.high - axis.low)) * height;

  // Memory of an instruction holds until the next one is taken up.
  const holds = (i) => (i ? begin[i] : 0), leaves = (i) => (i + 1 < count ? begin[i + 1] : step.whole);
  function instructionAt(when) {
    let low = 0, high = count - 1;
    while (low < high) { const middle = (low + high + 1) >> 1; if (holds(middle) <= when) low = middle; else high = middle - 1; }
    return low;
  }

  // --- drawing ---
  function recolour() {
    const style = getComputedStyle(frame), variable = (text) => style.getPropertyValue(text).trim();
    colours = { ink: variable("--ink"), soft: variable("--soft"), line: variable("--line"), panel: variable("--panel"), warn: variable("--warn"), sunk: variable("--sunk"), accent: variable("--accent"), on: variable("--on-accent") };
    colours.kinds = kinds.map(({ name: kind }) => pixelOf(variable(`--kind-${kind}`) || variable("--kind-other")));
    colours.pens = Object.fromEntries(Object.entries(PEN).map(([key, value]) => [key, variable(`--step-${value}`)]));
    colours.other = variable("--step-other");
    later();
  }

  function fit() {
    const wide = frame.clientWidth, dense = Math.min(3, devicePixelRatio || 1);
    if (!wide || (wide === width && dense === ratio)) return;
    [width, ratio] = [wide, dense];
    for (const one of [canvas, over]) { one.width = Math.round(width * ratio); one.height = Math.round(tall * ratio); one.style.height = `${tall}px`; }
    later();
  }

  function later() { if (!waiting) waiting = requestAnimationFrame(() => { waiting = 0; draw(); }); }

  function draw() {
    if (!width) return;
    if (devicePixelRatio !== ratio && devicePixelRatio <= 3) fit();
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, tall);
    pen.font = FONT;
    drawGrid();
    const first = instructionAt(from);
    drawMemory(first);
    drawLimits();
    drawLayers();
    drawCores(first);
    drawChannels();
    drawNames();
    drawCursor();
  }

  function drawGrid() {
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const tick of ticks(axis.low, axis.high)) {
      const place = Math.round(y(tick * axis.unit.size)) + 0.5;
      line(LEFT, place, width - RIGHT, place, colours.line);
      write(round(tick), LEFT - 8, place, colours.soft);
    }
    pen.textAlign = "left";
    write(axis.low ? `${axis.unit.name}, from ${round(axis.low)} up` : axis.unit.name, 2, 10, colours.soft);
    pen.textAlign = "center";
    for (const tick of ticks(from, until, Math.max(2, (width - LEFT) / 110))) {
      const place = x(tick);
      if (place < LEFT - 1 || place > width - RIGHT + 1) continue;
      line(Math.round(place) + 0.5, TOP + height, Math.round(place) + 0.5, bottom, colours.line);
      write(round(tick), Math.min(place, width - RIGHT - 12), bottom + 12, colours.soft);
    }
    write(step.timed ? "seconds into the step" : "instructions", (LEFT + width - RIGHT) / 2, bottom + 28, colours.soft);
    // Where in the whole step one is.
    const whole = width - LEFT - RIGHT, top = tall - 8;
    pen.fillStyle = colours.sunk;
    pen.fillRect(LEFT, top, whole, 5);
    pen.fillStyle = colours.soft;
    pen.fillRect(LEFT + (from / axis.whole) * whole, top, Math.max(6, ((until - from) / axis.whole) * whole), 5);
  }

  // Of each column of pixels the fullest instruction is drawn, so that no peak is lost.
  function drawMemory(first) {
    const dots = Math.round((width - LEFT - RIGHT) * ratio), scale = dots / (until - from), best = new Int32Array(dots).fill(-1);
    for (let i = first; i < count && holds(i) < until; i++) {
      const left = Math.max(0, Math.floor((holds(i) - from) * scale)), right = Math.min(dots, Math.max(left + 1, Math.floor((leaves(i) - from) * scale)));
      for (let dot = left; dot < right; dot++) if (best[dot] < 0 || used[i] > used[best[dot]]) best[dot] = i;
    }
    const runs = [];
    for (let dot = 0; dot < dots; dot++) {
      if (best[dot] < 0) continue;
      if (runs.length && runs.at(-1)[2] === best[dot] && runs.at(-1)[1] === dot) runs.at(-1)[1] = dot + 1;
      else runs.push([dot, dot + 1, best[dot]]);
    }
    // Pixels are set one by one: that takes as long for thirty thousand instructions as for thirty.
    const rows = Math.round(height * ratio), dense = rows / (axis.high - axis.low) / axis.unit.size, low = axis.low * axis.unit.size;
    if (ground.width !== dots || ground.height !== rows) {
      [ground.width, ground.height] = [dots, rows];
      image = pen.createImageData(dots, rows);
    }
    const pixels = new Uint32Array(image.data.buffer);
    pixels.fill(0);
    for (const [left, right, i] of runs) {
      let sum = 0, base = rows;
      for (const k of shown) {
        if (!levels[k][i]) continue;
        sum += levels[k][i];
        const top = Math.max(0, rows - Math.round(Math.max(0, sum - low) * dense)), colour = colours.kinds[k];
        for (let row = top; row < base; row++) for (let at = row * dots + left, stop = row * dots + right; at < stop; at++) pixels[at] = colour;
        base = Math.min(base, top);
      }
    }
    brush.putImageData(image, 0, 0);
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.drawImage(ground, Math.round(LEFT * ratio), Math.round(TOP * ratio));
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  }

  function drawLimits() {
    const cap = columns.budget;
    if (cap / axis.unit.size <= axis.high) {
      pen.setLineDash([7, 4]);
      line(LEFT, y(cap), width - RIGHT, y(cap), colours.warn, 1.6);
      pen.setLineDash([]);
      pen.textAlign = "left";
      pen.font = `600 ${FONT}`;
      write(`cap ${size(cap)}`, LEFT + 6, y(cap) - 9, colours.warn);
      pen.font = FONT;
    }
    const place = x((holds(step.fullest) + leaves(step.fullest)) / 2);
    if (place < LEFT || place > width - RIGHT) return;
    pen.beginPath();
    pen.arc(place, y(used[step.fullest]), 5, 0, 7);
    pen.fillStyle = colours.panel;
    pen.strokeStyle = colours.ink;
    pen.lineWidth = 2;
    pen.fill();
    pen.stroke();
  }

  // Bars of a lane; those narrower than a pixel are gathered, and the pixel is as dense as it is busy.
  function lane(name, each) {
    const top = tops[name], high = LANES[name], pixels = Math.ceil(width - LEFT - RIGHT), busy = new Map();
    each((start, stop, colour, label) => {
      const left = Math.max(LEFT, x(start)), right = Math.min(width - RIGHT, x(stop));
      if (right <= LEFT || left >= width - RIGHT || right <= left) return;
      if (right - left < 1) {
        const gathered = busy.get(colour) ?? busy.set(colour, new Float32Array(pixels + 1)).get(colour), pixel = Math.floor(left - LEFT), next = Math.min(right, LEFT + pixel + 1);
        gathered[pixel] += next - left;
        if (right > next) gathered[pixel + 1] += right - next;
        return;
      }
      pen.fillStyle = colour;
      pen.fillRect(left, top, right - left > 4 ? right - left - 1 : right - left, high);
      if (label && right - left > 34) {
        pen.textAlign = "left";
        write(shortened(label, right - left - 8), left + 4, top + high / 2 + 0.5, colours.on);
      }
    });
    for (const [colour, gathered] of busy) {
      pen.fillStyle = colour;
      for (let pixel = 0; pixel < pixels; pixel++) {
        if (!gathered[pixel]) continue;
        pen.globalAlpha = Math.min(1, FADED + (1 - FADED) * gathered[pixel]);
        pen.fillRect(LEFT + pixel, top, 1, high);
      }
      pen.globalAlpha = 1;
    }
  }

  function drawLayers() {
    lane("layers", (bar) => {
      for (let s = firstEnding(segments, from); s < segments.length && segments[s].begin < until; s++) {
        const { layer, forward, begin: start, end: stop } = segments[s];
        bar(start, stop, forward ? colours.pens.forward : colours.pens.backward, columns.graph ? (forward ? "forward" : "backward") : columns.layers[layer]);
      }
    });
  }

  function drawCores(first) {
    lane("compute", (bar) => {
      for (let i = first; i < count && begin[i] <= until; i++) {
        const before = i ? end[i - 1] : 0;
        if (begin[i] > before) bar(before, begin[i], colours.pens.wait, "waits");
        if (end[i] > begin[i]) bar(begin[i], end[i], colours.pens[step.what[i]] ?? colours.other, columns.instructions.operator[i] < 0 ? step.what[i] : columns.operators[columns.instructions.operator[i]]);
      }
      if (end[count - 1] < step.whole) bar(end[count - 1], step.whole, colours.pens.wait, "waits");
    });
  }

  function drawChannels() {
    for (const [name, out] of [["read", false], ["write", true]]) lane(name, (bar) => {
      for (let t = firstEnding(transfers, from); t < transfers.length && transfers[t].begin < until; t++) if (transfers[t].out === out) bar(transfers[t].begin, transfers[t].end, colours.pens[name], columns.tensors.name[columns.instructions.of[transfers[t].instruction]]);
    });
  }

  function drawNames() {
    pen.textAlign = "right";
    const names = { layers: columns.graph ? "phase" : "layer", compute: "compute", read: "read", write: "write" };
    for (const [name, top] of Object.entries(tops)) write(names[name], LEFT - 8, top + LANES[name] / 2 + 0.5, colours.soft);
  }

  function drawCursor() {
    mark.setTransform(ratio, 0, 0, ratio, 0, 0);
    mark.clearRect(0, 0, width, tall);
    if (!pointed && document.activeElement !== frame) return;
    const left = x(holds(at)), right = x(leaves(at)), place = Math.round((left + right) / 2) + 0.5;
    if (right < LEFT || left > width - RIGHT) return;
    if (right - left > 3) {
      mark.fillStyle = colours.ink;
      mark.globalAlpha = 0.08;
      mark.fillRect(Math.max(LEFT, left), TOP, Math.min(width - RIGHT, right) - Math.max(LEFT, left), bottom - TOP);
      mark.globalAlpha = 1;
    }
    mark.strokeStyle = colours.ink;
    mark.lineWidth = 1;
    mark.beginPath();
    mark.moveTo(Math.min(width - RIGHT, Math.max(LEFT, place)), TOP - 4);
    mark.lineTo(Math.min(width - RIGHT, Math.max(LEFT, place)), bottom);
    mark.stroke();
  }

  function line(x1, y1, x2, y2, colour, wide = 1) {
    pen.strokeStyle = colour;
    pen.lineWidth = wide;
    pen.beginPath();
    pen.moveTo(x1, y1);
    pen.lineTo(x2, y2);
    pen.stroke();
  }
  function write(text, left, top, colour) {
    pen.fillStyle = colour;
    pen.fillText(text, left, top);
  }
  const shortened = (text, room) => { const letters = Math.floor(room / 6.6); return text.length <= letters ? text : letters < 4 ? "" : `…${text.slice(1 - letters)}`; };

  // --- moving ---
  function look(start, stop, alone = false) {
    if (!alone) for (const other of linked) if (other.frame !== frame) other.look(start, stop, true);
    const span = Math.min(axis.whole, Math.max(least, stop - start));
    from = Math.min(Math.max(0, start), axis.whole - span);
    until = from + span;
    later();
  }
  const zoom = (factor, around = (holds(at) + leaves(at)) / 2) => {
    const fixed = around < from || around > until ? (from + until) / 2 : around;
    look(fixed - (fixed - from) / factor, fixed + (until - fixed) / factor);
  };
  function go(index, say = true) {
    at = Math.max(0, Math.min(count - 1, index));
    const middle = (holds(at) + leaves(at)) / 2;
    if (say && (middle < from || middle > until)) look(middle - (until - from) / 2, middle + (until - from) / 2);
    reading.textContent = sentence(at);
    if (say) voice.textContent = reading.textContent;
    drawCursor();
  }
  function sentence(i) {
    const parts = shown.map((k) => [kinds[k].label, levels[k][i]]).filter(([, bytes]) => bytes >= Math.min(0.05 * axis.unit.size, total[i] / 1000));
    return `${step.timed ? `${duration(begin[i])}, ` : ""}instruction ${i + 1} of ${count}: ${textOf(step, i)}. ${size(total[i], axis.unit)} = ${parts.map(([kind, bytes]) => `${kind} ${inUnit(bytes, axis.unit)}`).join(" + ")}${i === step.fullest ? room : ""}`;
  }
  // What the plan's peak has beyond its fullest instruction.
  const { peak } = step.columns, beyond = peak.bytes - total[step.fullest], room = peak.bytes > peak.start && beyond >= 0.05 * axis.unit.size ? `; with ${size(beyond, axis.unit)} more, kept for the step's largest workspace, the peak is ${size(peak.bytes, axis.unit)}` : "";
  const KEYS = {
    ArrowRight: () => go(at + 1), ArrowLeft: () => go(at - 1), PageDown: () => go(jump(1)), PageUp: () => go(jump(-1)), Home: () => go(0), End: () => go(count - 1),
    "+": () => zoom(ZOOM), "=": () => zoom(ZOOM), "-": () => zoom(1 / ZOOM), 0: () => look(0, axis.whole), Enter: () => tell({ instruction: at }),
  };
  // The first instruction of the layer after, or before, the one at the cursor.
  function jump(way) {
    const here = segments.findLastIndex((segment) => segment.first <= at);
    return segments[Math.max(0, Math.min(segments.length - 1, here + way))]?.first ?? at;
  }
  frame.addEventListener("keydown", (event) => {
    if (event.altKey || event.metaKey || event.ctrlKey || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  frame.addEventListener("focus", () => go(at));
  frame.addEventListener("blur", drawCursor);
  frame.addEventListener("wheel", (event) => {
    const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : event.shiftKey ? event.deltaY : 0;
    if (!event.ctrlKey && !sideways) return;
    event.preventDefault();
    if (event.ctrlKey) return zoom(Math.exp(-event.deltaY / 180), moment(placeOf(event)));
    const shift = (sideways / (width - LEFT - RIGHT)) * (until - from);
    look(from + shift, until + shift);
  }, { passive: false });

  // One finger or the mouse drags, two fingers pinch; what has not moved is a click.
  const placeOf = (event) => event.clientX - frame.getBoundingClientRect().left;
  const fingers = new Map();
  let dragged = false;
  frame.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, placeOf(event));
    dragged = false;
  });
  frame.addEventListener("pointermove", (event) => {
    const place = placeOf(event);
    if (!fingers.has(event.pointerId)) { pointed = true; return go(instructionAt(moment(place)), false); }
    const before = [...fingers.values()].map(moment), old = fingers.get(event.pointerId);
    if (!dragged && fingers.size === 1 && Math.abs(place - old) < 4) return;
    if (!dragged) frame.setPointerCapture(event.pointerId);
    dragged = true;
    frame.classList.add("dragged");
    fingers.set(event.pointerId, place);
    const now = [...fingers.values()];
    if (now.length === 1) { const shift = before[0] - moment(now[0]); return look(from + shift, until + shift); }
    // What lay under both fingers stays under them.
    const rate = (before[1] - before[0]) / (now[1] - now[0] || 1);
    if (rate > 0) look(before[0] - (now[0] - LEFT) * rate, before[0] - (now[0] - LEFT) * rate + (width - LEFT - RIGHT) * rate);
  });
  for (const name of ["pointerup", "pointercancel"]) frame.addEventListener(name, (event) => {
    const clicked = name === "pointerup" && fingers.size === 1 && !dragged;
    fingers.delete(event.pointerId);
    frame.classList.remove("dragged");
    if (clicked) pick(event);
  });
  frame.addEventListener("pointerleave", () => { pointed = false; drawCursor(); });

  function pick(event) {
    const { left, top } = frame.getBoundingClientRect(), place = event.clientX - left, high = event.clientY - top, when = moment(place);
    if (place < LEFT || when > step.whole) return;
    go(instructionAt(when), false);
    const hit = Object.entries(tops).find(([name, start]) => high >= start && high < start + LANES[name] + GAP)?.[0];
    if (hit === "layers") {
      const segment = segments.find((one) => one.begin <= when && when <= one.end);
      if (segment) return tell(columns.graph ? { instruction: at } : { layer: segment.layer });
    }
    if (hit === "read" || hit === "write") {
      const near = transfers.filter((one) => one.out === (hit === "write")).sort((a, b) => distance(a, when) - distance(b, when))[0];
      if (near) return tell({ instruction: near.instruction });
    }
    if (!hit && high < TOP + height) {
      let sum = 0;
      for (const k of shown) if (y((sum += levels[k][at])) <= high) return tell({ instruction: at, kind: k });
    }
    tell({ instruction: at });
  }
  const distance = ({ begin: start, end: stop }, when) => (when < start ? start - when : when > stop ? when - stop : 0);

  // --- what is clicked ---
  function tell(chosen) {
    const { tensors } = columns, resident = (tensor) => step.stays[tensor].some(([since, to]) => since <= chosen.instruction && chosen.instruction <= to);
    const all = tensors.name.map((_, tensor) => tensor), largest = (list) => list.sort((a, b) => tensors.bytes[b] - tensors.bytes[a] || a - b);
    if (chosen.layer !== undefined) {
      const of = largest(all.filter((tensor) => tensors.layer[tensor] === chosen.layer && step.stays[tensor].length));
      return say(`Layer ${columns.layers[chosen.layer]}`, summed(of), of);
    }
    const when = `${step.timed ? `${duration(begin[chosen.instruction])} into the step, ` : ""}instruction ${chosen.instruction + 1}: ${textOf(step, chosen.instruction)}`;
    if (chosen.kind !== undefined) {
      const { name: kind, label } = kinds[chosen.kind], of = largest(all.filter((tensor) => tensors.kind[tensor] === chosen.kind && resident(tensor)));
      return say(`${label[0].toUpperCase()}${label.slice(1)}, ${size(levels[chosen.kind][chosen.instruction])}`, `${when}. ${OTHERWISE[kind] ?? summed(of)}`, of);
    }
    const touched = largest(all.filter((tensor) => step.stays[tensor].some(([since, to]) => since === chosen.instruction || to === chosen.instruction))), others = largest(all.filter((tensor) => !touched.includes(tensor) && resident(tensor)));
    return say(`Instruction ${chosen.instruction + 1}`, `${when}. ${size(total[chosen.instruction])} in memory. What it makes or gives up comes first, then what lies in memory beside it.`, [...touched, ...others]);
  }
  function summed(list) {
    const sums = new Map();
    for (const tensor of list) {
      const { decision } = whyOf(step, tensor);
      if (decision) sums.set(decision, (sums.get(decision) ?? 0) + columns.tensors.bytes[tensor]);
    }
    return [...sums].map(([decision, bytes]) => `${size(bytes)} ${DONE[decision] ?? decision}`).join(", ");
  }
  function say(title, text, list, limit = LISTED) {
    const rows = list.slice(0, limit).map((tensor) => {
      const { decision, text: why } = whyOf(step, tensor);
      return html("tr", {}, html("th", { scope: "row" }, columns.tensors.name[tensor]), html("td", {}, size(columns.tensors.bytes[tensor])), html("td", {}, stretches(tensor)), html("td", { class: "wide" }, decision ? html("span", { class: "pill" }, DONE[decision] ?? decision) : null, " ", why));
    });
    const more = list.length > limit ? button(`Show more of ${list.length}`, () => say(title, text, list, limit * 4), "quiet") : null;
    const close = button("×", () => { told.replaceChildren(); frame.focus(); }, "quiet close");
    close.setAttribute("aria-label", "Close");
    told.replaceChildren(
      html("div", { class: "heading" }, html("h3", {}, title), close), html("p", { class: "soft" }, text),
      ...(rows.length ? [scrolling(title, html("table", { class: "tensors many" }, html("thead", {}, html("tr", {}, ...["tensor", "size", "in memory", "why"].map((head) => html("th", { scope: "col" }, head)))), html("tbody", {}, ...rows)))] : []), ...(more ? [more] : []),
    );
  }
  // When over the step a tensor lies in memory.
  function stretches(tensor) {
    const all = step.stays[tensor], share = (bits) => bits / step.whole, spans = all.map(([since, to]) => [since < 0 ? 0 : begin[since], to >= count ? step.whole : end[to]]);
    const together = spans.reduce((sum, [since, to]) => sum + to - since, 0);
    const text = `${(100 * share(together)).toFixed(0)} % of the step${all.length > 1 ? `, ${all.length} times` : ""}`;
    const picture = svg("svg", { class: "stay", viewBox: "0 0 100 8", width: 100, height: 8, "aria-hidden": "true", preserveAspectRatio: "none" }, svg("rect", { width: 100, height: 8, fill: "var(--sunk)" }), ...spans.slice(0, STRETCHES).map(([since, to]) => svg("rect", { x: 100 * share(since), width: Math.max(0.6, 100 * share(to - since)), height: 8, fill: kindColour(kinds[columns.tensors.kind[tensor]].name) })));
    return html("span", { class: "stay-text" }, picture, ` ${text}`);
  }

  // --- around it ---
  const keys = [["memory", unique(toldOf.flatMap((one) => one.shown.map((k) => [one.kinds[k].label, kindColour(one.kinds[k].name)])))], ["below", unique(toldOf.flatMap(pensOf))]].map(([of, entries]) => html("ul", { class: "legend", "aria-label": of }, html("li", { class: "soft" }, of), ...legend(entries)));
  const controls = html("div", { class: "row step-bar" },
    named("−", "Zoom out", () => zoom(1 / ZOOM, (from + until) / 2)), named("+", "Zoom in", () => zoom(ZOOM)), named("◂", "Move back", () => shift(-0.5)), named("▸", "Move on", () => shift(0.5)),
    button("Whole step", () => look(0, axis.whole)), button("Fullest moment", () => { const span = Math.max(least * 40, step.whole / 60), middle = holds(step.fullest); look(middle - span / 2, middle + span / 2); pointed = true; go(step.fullest); tell({ instruction: step.fullest }); }),
    html("small", {}, "Drag to move; Ctrl and the wheel, or two fingers, zoom; click to see what lies there and why."));
  const shift = (share) => look(from + share * (until - from), until + share * (until - from));
  function named(sign, text, press) {
    const made = button(sign, press);
    made.setAttribute("aria-label", text);
    made.title = text;
    return made;
  }
  box.replaceChildren(...(toldOf.length ? [controls, ...keys] : []), frame, reading, voice, told, numbers(`Numbers of ${name}`, moments(step, axis.unit)));
  reading.textContent = sentence(at);
  new ResizeObserver(fit).observe(frame);
  const shownStep = { frame, step, look, go, tell, recolour };
  for (const one of drawnAnew) if (!one.frame.isConnected) drawnAnew.delete(one); // those of places that were left
  drawnAnew.add(shownStep);
  recolour();
  fit();
  return shownStep;
}

// A colour as a pixel of a picture.
function pixelOf(colour) {
  const pen = html("canvas", { width: 1, height: 1 }).getContext("2d");
  pen.fillStyle = colour;
  pen.fillRect(0, 0, 1, 1);
  return new Uint32Array(pen.getImageData(0, 0, 1, 1).data.buffer)[0];
}

const OTHERWISE = {
  floor: "What the process holds before any tensor: Python, PyTorch and the plan's own instructions.",
  workspace: "What the operator needs while it runs, beside its inputs and outputs.",
  fragmentation: "Bytes that were in use before and hold nothing now; the process keeps them for what comes.",
};

// The first of `list`, ordered by time, that ends after a moment.
function firstEnding(list, when) {
  let low = 0, high = list.length;
  while (low < high) { const middle = (low + high) >> 1; if (list[middle].end > when) high = middle; else low = middle + 1; }
  return low;
}

const unique = (entries) => [...new Map(entries)];

// The colours of what the cores and channels do in this step, with their names.
function pensOf({ columns, what, transfers }) {
  const done = new Set(what.filter((name) => !MOVES.includes(name))), entries = columns.whats.filter(({ name }) => done.has(name)).map(({ name, label }) => [label, PEN[name] ? `var(--step-${PEN[name]})` : "var(--step-other)"]);
  if (columns.instructions.wait.some((ticks) => ticks > 0)) entries.push(["cores wait", "var(--step-wait)"]);
  if (transfers.some((one) => !one.out)) entries.push([`read from ${columns.elsewhere}`, "var(--step-read)"]);
  if (transfers.some((one) => one.out)) entries.push([`written to ${columns.elsewhere}`, "var(--step-write)"]);
  return entries;
}

// About forty moments of the step, and the fullest: of each stretch its fullest instruction.
function moments(step, unit) {
  const { count, shown, kinds, levels, total, used, whole, begin } = step, best = new Array(MOMENTS).fill(-1);
  for (let i = 0; i < count; i++) {
    const slot = Math.min(MOMENTS - 1, Math.floor((begin[i] / whole) * MOMENTS));
    if (best[slot] < 0 || used[i] > used[best[slot]]) best[slot] = i;
  }
  const rows = best.filter((i) => i >= 0).map((i) => [`${step.timed ? seconds(begin[i]) : i + 1}${i === step.fullest ? " (fullest)" : ""}`, textOf(step, i), ...shown.map((k) => inUnit(levels[k][i], unit)), inUnit(total[i], unit)]);
  return table(`${unit.name} by kind, at the fullest instruction of each stretch`, [step.timed ? "at, s" : "instruction", "what runs", ...shown.map((k) => kinds[k].label), "together"], rows);
}
