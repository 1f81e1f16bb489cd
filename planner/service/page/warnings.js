// What should be said in words of a run under way: a loss that is no number, one that rises, held-out data that get worse.

import { seconds } from "./charts.js";

const SLOWER = 1.3, FEWEST = 3, LATELY = 5; // times the planned seconds from which a step counts as slow; steps that have to be slow, and those that are looked at
const LATEST = 20; // steps whose mean is looked at
const WORSE = 0.01; // share above the best from which on a loss counts as risen

export function warnings(steps, evaluations = []) {
  const said = [], lost = steps.find((one) => !Number.isFinite(one.loss));
  if (lost) said.push(`The loss is no number since step ${lost.step}: nothing is learnt any more. Cancel the run and start with a smaller learning rate, or cut large gradients (“Max grad norm” on the model's page).`);
  const losses = steps.map((one) => one.loss).filter(Number.isFinite);
  if (!lost && losses.length >= 4 * LATEST) {
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
    const first = mean(losses.slice(0, LATEST)), now = mean(losses.slice(-LATEST));
    if (now > first * 1.1) said.push(`The loss has risen from ${first.toFixed(3)} to ${now.toFixed(3)}: the learning rate may be too large.`);
  }
  const held = evaluations.filter((one) => Number.isFinite(one.eval_loss));
  if (held.length >= 3) {
    const best = held.reduce((a, b) => (b.eval_loss < a.eval_loss ? b : a)), later = held.filter((one) => one.step > best.step);
    if (later.length >= 2 && later.slice(-2).every((one) => one.eval_loss > best.eval_loss * (1 + WORSE))) said.push(`The held-out loss rises since step ${best.step} (${best.eval_loss.toFixed(4)} there, ${later.at(-1).eval_loss.toFixed(4)} now): the model begins to learn its data by heart. The adapter of that step would be the better one.`);
  }
  return said;
}

// That steps take longer than planned, in words; null where they do not. `planned`: seconds of a step;
// `others`: cores that other programs use, as far as the run has said so.
export function slower(steps, planned, others = 0) {
  const recent = steps.slice(1).slice(-LATELY); // the first builds kernels
  const took = recent.reduce((sum, one) => sum + one.seconds, 0) / recent.length;
  if (recent.length < FEWEST || !planned || took < SLOWER * planned) return null;
  const why = others ? `other programs use ${others.toFixed(1)} of the cores` : "look whether other programs use the cores";
  return `Planned ${seconds(planned)} s a step, takes ${seconds(took)} s: ${why}. The results stay the same.`;
}
