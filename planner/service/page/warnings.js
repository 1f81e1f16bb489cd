// What should be said in words of a run under way: a loss that is no number, one that rises, held-out data that get worse.

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
