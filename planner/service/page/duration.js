// How long a run takes, as planned: its steps, and the evaluations before, between and after them.

import { seconds } from "./charts.js";
import { span } from "./components.js";

const AS_LONG = 1; // times the seconds of the steps, from which evaluations are warned of

// `summary`: of the plan; `learn`, `held`: what previews say of the data, null where they are not known or there are none; `every`: the
// interval between evaluations as it is asked for, a number of steps or such as “0.5 epochs”. Gives {steps, training, evaluations,
// evaluating, whole}, times in seconds, `steps` null where they follow from data that are not known.
export function durationOf(summary, { learn, held, steps = null, epochs = null, every = null }) {
  const unit = summary.accumulate ?? 1;
  const asked = steps ?? (learn?.epoch_steps && epochs ? Math.max(1, Math.ceil(Number((epochs * learn.epoch_steps).toFixed(6)) / unit)) * unit : null);
  const batches = held?.evaluation_batches ?? 0, one = batches * (summary.evaluate?.seconds ?? 0);
  const inEpochs = /^([\d.]+) ?epochs?$/.exec(String(every ?? "").trim()), between = inEpochs ? Math.max(1, Math.round(Number(inEpochs[1]) * (learn?.epoch_steps ?? 1))) : Number(every) || null;
  const evaluations = !batches ? 0 : 1 + (between && asked ? Math.ceil(asked / between) : 1);
  return { steps: asked, training: asked === null ? null : asked * summary.expected_seconds, evaluations, evaluating: evaluations * one, whole: (learn?.whole ?? true) && (held?.whole ?? true) };
}

// The same in a sentence.
export function durationWords({ steps, training, evaluations, evaluating, whole }) {
  if (steps === null) return "";
  const least = whole ? "" : "at least ", when = evaluations > 2 ? `${evaluations} evaluations` : "evaluation before and after";
  return `Takes ${least}about ${span(training + evaluating)}: ${steps.toLocaleString("en")} ${steps === 1 ? "step" : "steps"} of ${seconds(training / steps)} s, ${span(training)} in all${evaluations ? `; ${when}, ${span(evaluating)}` : ""}.`;
}

// What is to be warned of: an evaluation that takes longer than what it judges.
export const outweighs = ({ training, evaluating }) => training !== null && evaluating > AS_LONG * training;
