// What plans are made by, in words: the solver and fixed rules.

import { size } from "./charts.js";
import { percent } from "./components.js";

export const SOLVER = "solver";
const RULES = {
  [SOLVER]: ["Best plan found", "Decides of every tensor of every layer whether it is kept, computed again, or moved to disk, and proves how near to the best that is."],
  "keep-all": ["Keep everything", "Plain training: all that the backward pass reads stays in memory, weights unpacked. The fastest, and the largest."],
  "checkpoint-layers": ["Redo each layer", "Keeps the input of each layer alone; the layer's forward pass runs again in its backward pass."],
  "checkpoint-sqrt": ["Redo runs of layers", "Keeps every √n-th layer's input alone; the layers between go forward again (Chen et al. 2016)."],
  mebp: ["Stream the weights", "Redoes each layer, and reads and unpacks every weight just before its use (MeBP, Song and Tang 2025)."],
  mesp: ["Stream each use", "As the one before, but a weight is unpacked at each single use (MeSP, arXiv 2602.13069)."],
  mezo: ["No backward pass", "Two forward passes and a random direction (MeZO, Malladi et al. 2023). The gradient is an estimate: steps learn less, so their seconds do not compare."],
  lcsb: ["A fourth of the layers", "The backward pass goes through a fourth of the layers in turn (LCSB, arXiv 2602.13073). The gradient is partial: steps learn less, so their seconds do not compare."],
  mobillm: ["A server trains", "This device goes forward alone; a side network on a server learns (MobiLLM, arXiv 2502.20421). No adapter comes of it."],
};

export const nameOfRule = (policy) => RULES[policy]?.[0] ?? policy;

// What a plan is called.
export function nameOfPlan({ title, label, summary: { policy, budget_bytes: budget } }) {
  return title ?? ruleInWords(label ?? `${policy} in ${size(budget)}`, policy);
}

// The service's label of something that was planned by a rule, with the rule's name on the page in place of the command line's.
export function ruleInWords(label, policy) {
  const end = `, ${policy}`;
  return label.endsWith(end) ? `${label.slice(0, -end.length)}, ${nameOfRule(policy)}` : label;
}

// By how much a plan may be slower than the best, rounded up: what is said is proven.
export const gapWords = (gap) => percent(Math.ceil(1e4 * gap - 1e-6) / 1e4, 2);
export const meaningOfRule = (policy) => RULES[policy]?.[1] ?? "";

// How a plan's step differs from the usual one of its model: two plans may have the same name.
export function unusual({ summary: { optimizer, max_grad_norm: norm, policy } }, model, { rule = false } = {}) {
  const usual = model?.summary.optimizer ?? "adamw";
  return [rule && policy !== SOLVER ? nameOfRule(policy) : null, optimizer && optimizer !== usual ? optimizer : null, norm ? `gradients clipped at ${norm}` : null].filter(Boolean);
}

// Operators by their own names, without what they come from: "head: head chunk (forward)".
export const inWords = (text) => text.replace(/\b(?:tightfit|aten)\.(\w+)(?:\.\w+)?/g, (_, name) => name.replaceAll("_", " "));

// Whether a plan has a schedule; and, where it has none, in a word whether that is proven.
export const fits = ({ status }) => status === "optimal" || status === "feasible";
export const misfit = ({ status }) => (status === "infeasible" ? "does not fit" : "none found");
