// The phases of a run, and how long it still takes to its end.

import { html } from "./charts.js";
import { leftOf } from "./components.js";

export const BEFORE = "evaluating before", TRAINING = "training", AFTER = "evaluating after";

// Where a run is: `phases` by name, and `at`, the number of the one that `stage` belongs to, -1 while it is prepared.
export function phasesOf(request, stage = "") {
  const phases = request.eval_data ? [BEFORE, TRAINING, AFTER] : [TRAINING];
  const now = stage === "evaluated" || stage.startsWith(`${AFTER} step`) ? TRAINING : stage;
  return { phases, at: phases.indexOf(now) };
}

// Seconds that a run still takes: {steps, evaluations} of them, each null where it is not known yet. `latest`: its latest progress;
// `step`: of the last one, 0 before the first; `total`: steps in all; `pace`: seconds of a step; `evaluation`: seconds of one, null where
// none has been made.
export function leftInRun(request, { latest, step, total, pace, evaluation }) {
  const { phases, at } = phasesOf(request, latest?.stage), now = phases[at], { clock, done, total: batches } = latest ?? {};
  const under = now !== TRAINING && clock ? leftOf(done, batches, { done: 1, at: clock.began }, clock.at) : null;
  if (at < 0) return { steps: null, evaluations: null };
  if (now === AFTER) return { steps: 0, evaluations: under };
  const each = now === BEFORE && under !== null ? (under * batches) / (batches - done) : evaluation;
  const every = Number(request.eval_every) || null, further = !request.eval_data ? 0 : every && total ? Math.ceil((total - step) / every) : 1;
  return { steps: total && pace ? (total - step) * pace : null, evaluations: !request.eval_data ? 0 : each === null ? null : (now === BEFORE ? under ?? each : 0) + further * each };
}

// The phases as a row, the present one marked.
export function phaseList({ phases, at }) {
  return phases.length < 2 ? null : html("ol", { class: "phases bare", "aria-label": "Phases of this run" }, ...phases.map((name, index) => html("li", { class: index < at ? "past" : null, "aria-current": index === at ? "step" : null }, name)));
}
