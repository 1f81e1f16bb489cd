// Runs: all that were started, each named by its model, data and budget; one is started from here, several are compared.

import { get, isOpen, pageOf, post, remove } from "./api.js";
import { html, seconds } from "./charts.js";
import { button, confirmed, empty, heading, list, mib, when } from "./components.js";
import { action, go, to } from "./addresses.js";

const PAGE = 50;
export const STATES = { queued: "waits", running: "under way", succeeded: "done", failed: "failed", cancelled: "cancelled", interrupted: "interrupted" };

export const nameOf = (job) => job.title ?? job.label ?? job.id;
export const stateOf = (job) => html("span", { class: `pill ${{ succeeded: "good", failed: "bad", interrupted: "bad" }[job.state] ?? ""}` }, STATES[job.state]);

// A run's figures, the same wherever they stand: loss of its last step, number of that step, losses on held-out data, peak of all its
// processes; null where it is not known. `job.last` is the last step of one that ended early (`withLast`).
export const lossOf = (job) => job.result?.report?.loss?.at(-1) ?? job.progress?.loss ?? job.last?.loss ?? null;
export const stepsOf = (job) => job.result?.report?.steps ?? job.progress?.step ?? job.last?.step ?? null;
export const heldOutOf = (job) => job.result?.report?.evaluation ?? {};
export const peakOf = (job) => job.result?.report?.peak_bytes?.measured ?? null;
const paceOf = (job) => job.result?.report?.step_seconds?.measured ?? null;

// What ended early has no report: its last step tells how far it came.
async function withLast(job) {
  return isOpen(job) || job.result ? job : { ...job, last: (await get(`/v1/runs/${job.id}/metrics`)).steps.at(-1) };
}

export async function show({ root, id, query, signal, keep, title }) {
  if (query.new) return (await import("./new_run.js")).show({ root, id, query, signal, keep, title });
  const add = () => button("Fine-tune a model", () => go("runs", "", { new: 1 }), "main");
  const runs = list({
    name: "runs", action,
    columns: [
      { title: "Run", value: nameOf, cell: (job) => html("a", { href: to("runs", job.id) }, nameOf(job)) },
      { title: "State", value: (job) => job.state, cell: stateOf },
      { title: "Steps", value: stepsOf, cell: (job) => String(stepsOf(job) ?? "–") },
      { title: "Loss", value: lossOf, cell: (job) => lossOf(job)?.toFixed(4) ?? "–" },
      { title: "Held-out loss", value: (job) => heldOutOf(job).after?.loss ?? null, cell: (job) => heldOutOf(job).after?.loss.toFixed(4) ?? "–" },
      { title: "Peak, MiB", value: peakOf, cell: (job) => (peakOf(job) === null ? "–" : mib(peakOf(job))) },
      { title: "One step, s", value: paceOf, cell: (job) => (paceOf(job) === null ? "–" : seconds(paceOf(job))) },
      { title: "Note", cell: (job) => job.note ?? "", wide: true },
      { title: "Started", value: (job) => job.created, cell: (job) => when(job.created) },
    ],
    load: async (after, search) => {
      const { items, next } = await pageOf("runs", { limit: PAGE, after, search });
      return { items: await Promise.all(items.map(withLast)), next };
    },
    actions: (chosen) => [
      chosen.length > 1 ? button("Compare", () => go("compare", "", { runs: chosen.map((job) => job.id).join(",") })) : null,
      chosen.some(isOpen) ? button("Cancel", action(async () => { for (const { id } of chosen.filter(isOpen)) await post(`/v1/jobs/${id}/cancel`, "").catch((error) => { if (error.status !== 409) throw error; }); /* 409: it has ended meanwhile */ await runs.reload(); })) : null,
      chosen.every(isOpen) ? null : button("Delete", action(async () => {
        const ended = chosen.filter((job) => !isOpen(job));
        if (!(await confirmed(`Delete ${ended.length === 1 ? nameOf(ended[0]) : `${ended.length} runs`}, with adapters and checkpoints?`, "Delete"))) return;
        for (const job of ended) await remove(`/v1/jobs/${job.id}`);
        await runs.reload();
      }), "danger"),
    ].filter(Boolean),
    none: () => empty("Nothing was fine-tuned yet.", add()),
  });
  root.append(heading("Runs", add()), runs);
  await runs.reload();
}
