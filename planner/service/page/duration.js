// How long a run takes, as planned: its steps, and the evaluations before, between and after them.

import { seconds } from "./charts.js";
import { span } from "./components.js";

const AS_LONG = 1; // times the seconds of the steps, from which evaluations are warned of

// The mean seconds of a batch by the lengths that the batches of some data have, [[length, how many]]; all those of a plan's full length
// where nothing is known of the data. `figure` names the seconds of a shorter step, `whole` are those of the full one.
function each(lengths, shorter, figure, whole) {
  const of = (length) => shorter.find((one) => one.seq === length)?.[figure] || whole, batches = lengths.reduce((sum, [, count]) => sum + count, 0);
  return batches ? lengths.reduce((sum, [length, count]) => sum + count * of(length), 0) / batches : whole;
}

// `summary`: of the plan; `learn`, `held`: what previews say of the data, null where they are not known or there are none; `every`: the
// interval between evaluations as it is asked for, a number of steps or such as “0.5 epochs”. Gives {steps, training, evaluations,
// evaluating, whole}, times in seconds, `steps` null where they follow from data that are not known.
export function durationOf(summary, { learn, held, steps = null, epochs = null, every = null }) {
  const shorter = summary.shorter ?? [], unit = summary.accumulate ?? 1;
  const asked = steps ?? (learn?.epoch_steps && epochs ? Math.max(1, Math.ceil(Number((epochs * learn.epoch_steps).toFixed(6)) / unit)) * unit : null);
  const batches = held ? held.evaluations.reduce((sum, [, count]) => sum + count, 0) : 0;
  const one = batches * each(held?.evaluations ?? [], shorter, "evaluation_seconds", summary.evaluate?.seconds ?? 0);
  const inEpochs = /^([\d.]+) ?epochs?$/.exec(String(every ?? "").trim()), between = inEpochs ? Math.max(1, Math.round(Number(inEpochs[1]) * (learn?.epoch_steps ?? 1))) : Number(every) || null;
  const evaluations = !batches ? 0 : 1 + (between && asked ? Math.ceil(asked / between) : 1);
  return { steps: asked, training: asked === null ? null : asked * each(learn?.steps ?? [], shorter, "step_seconds", summary.step_seconds), evaluations, evaluating: evaluations * one, whole: (learn?.whole ?? true) && (held?.whole ?? true) };
}

// The same in a sentence.
export function durationWords({ steps, training, evaluations, evaluating, whole }) {
  if (steps === null) return "";
  const least = whole ? "" : "at least ", when = evaluations > 2 ? `${evaluations} evaluations` : "evaluation before and after";
  return `Takes ${least}about ${span(training + evaluating)}: ${steps.toLocaleString("en")} ${steps === 1 ? "step" : "steps"} of ${seconds(training / steps)} s, ${span(training)} in all${evaluations ? `; ${when}, ${span(evaluating)}` : ""}.`;
}

// What is to be warned of: an evaluation that takes longer than what it judges.
export const outweighs = ({ training, evaluating }) => training !== null && evaluating > AS_LONG * training;
