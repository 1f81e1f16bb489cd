// Runs: all that were started, each named by its model, data and budget; one is started from here, several are compared.

import { isOpen, pageOf, post, remove } from "./api.js";
import { html, seconds } from "./charts.js";
import { button, confirmed, empty, heading, list, mib, when } from "./components.js";
import { action, go, to } from "./shell.js";

const PAGE = 50;
const STATES = { queued: "waits", running: "under way", succeeded: "done", failed: "failed", cancelled: "cancelled", interrupted: "interrupted" };

export const nameOf = (job) => job.title ?? job.label ?? job.id;
export const stateOf = (job) => html("span", { class: `pill ${{ succeeded: "good", failed: "bad", interrupted: "bad" }[job.state] ?? ""}` }, STATES[job.state]);
const lastLoss = (job) => job.result?.report?.loss?.at(-1) ?? job.progress?.loss ?? null;
const heldOut = (job) => job.result?.report?.evaluation?.after?.loss ?? null;

export async function show({ root, id, query, signal, keep, title }) {
  if (query.new) return (await import("./new_run.js")).show({ root, id, query, signal, keep, title });
  const add = () => button("Fine-tune a model", () => go("runs", "", { new: 1 }), "main");
  const runs = list({
    name: "runs", action,
    columns: [
      { title: "Run", value: nameOf, cell: (job) => html("a", { href: to("runs", job.id) }, nameOf(job)) },
      { title: "State", value: (job) => job.state, cell: stateOf },
      { title: "Steps", value: (job) => job.result?.report?.steps ?? job.progress?.step ?? 0, cell: (job) => String(job.result?.report?.steps ?? job.progress?.step ?? "–") },
      { title: "Loss", value: lastLoss, cell: (job) => lastLoss(job)?.toFixed(4) ?? "–" },
      { title: "Held-out loss", value: heldOut, cell: (job) => heldOut(job)?.toFixed(4) ?? "–" },
      { title: "Peak, MiB", value: (job) => job.result?.report?.peak_bytes?.measured ?? null, cell: (job) => (job.result?.report?.peak_bytes ? mib(job.result.report.peak_bytes.measured) : "–") },
      { title: "One step, s", value: (job) => job.result?.report?.step_seconds?.measured ?? null, cell: (job) => (job.result?.report?.step_seconds ? seconds(job.result.report.step_seconds.measured) : "–") },
      { title: "Note", cell: (job) => job.note ?? "", wide: true },
      { title: "Started", value: (job) => job.created, cell: (job) => when(job.created) },
    ],
    load: (after, search) => pageOf("jobs", { kind: "run", limit: PAGE, after, search }),
    actions: (chosen) => [
      chosen.length > 1 ? button("Compare", () => go("compare", "", { runs: chosen.map((job) => job.id).join(",") })) : null,
      chosen.some(isOpen) ? button("Cancel", action(async () => { await post("/v1/jobs/cancel", { jobs: chosen.filter(isOpen).map((job) => job.id) }); await runs.reload(); })) : null,
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
