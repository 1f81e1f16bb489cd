// The words of plans, explained where they first stand in a text.

import { term } from "./components.js";

const MEANINGS = {
  "activations": "What a layer computes on the way forward and needs once more on the way back, to find out how to change the weights.",
  "frozen weights": "The numbers of the model itself. Fine-tuning leaves them as they are and trains a small adapter beside them.",
  "optimizer's states": "Running means that the optimizer keeps of every trained number, to choose the size of its changes.",
  "packed": "In the form in which the file has it, a few bits for each number. Unpacked it takes several times the memory.",
  "unpacked": "As plain numbers that the arithmetic reads, which take several times the memory of the stored form.",
  "computed again": "Given up to save memory, and computed a second time when it is needed: the same numbers, bit for bit.",
  "backward": "The second half of a training step: from the last layer to the first, it finds out how each trained number is to change.",
  "workspace": "Memory that an operator needs while it runs, beside what it reads and writes. Room for the largest one is kept all through the step.",
  "empty, kept for reuse": "Memory that held something earlier in the step. The process keeps it, and what is made next goes there.",
  "trainables": "The numbers that are trained: those of the adapter.",
  "fixed rule": "A way to decide that looks at no figures, such as keeping everything. It is planned at once and is rarely the fastest that fits.",
  "proven": "The planner has a bound: it shows that no plan of the same kind can be faster than that.",
  "schedule": "The order in which a step computes, moves and gives up tensors.",
  "fullest": "The moment with most bytes in use: it decides which budget is enough.",
};

// `text` as nodes, in which words that have a meaning are explained; `told` keeps those that were.
export function explained(text, told = new Set()) {
  const words = Object.keys(MEANINGS).filter((word) => !told.has(word)).sort((a, b) => b.length - a.length);
  const nodes = [];
  let rest = text;
  while (rest) {
    const found = words.filter((word) => !told.has(word)).map((word) => [place(rest, word), word]).filter(([at]) => at >= 0).sort((a, b) => a[0] - b[0] || b[1].length - a[1].length)[0];
    if (!found) { nodes.push(rest); break; }
    const [at, word] = found;
    told.add(word);
    nodes.push(rest.slice(0, at), term(rest.slice(at, at + word.length), MEANINGS[word]));
    rest = rest.slice(at + word.length);
  }
  return nodes;
}

// Where a word stands by itself in a text.
const place = (text, word) => text.search(new RegExp(`(?<![\\w-])${word}(?![\\w-])`));
