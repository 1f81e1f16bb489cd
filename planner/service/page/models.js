// The models: what was measured, uploaded or estimated, what is being measured, and a way in for another.

import { finish, get, openJobs, pageOf, post, remove } from "./api.js";
import { html, size } from "./charts.js";
import { button, confirmed, empty, heading, list, mib, progress, section, when } from "./components.js";
import { action, complain, go, to } from "./addresses.js";
import { choose, dropZone } from "./sources.js";

const PAGE = 50, LATELY = 86400; // items fetched at once; seconds for which a measurement that failed is told of
export const nameOf = (profile) => profile.title ?? profile.label ?? profile.name;

// Where the times of a profile come from.
export const origin = ({ origin: came, summary }) => (came === "example" ? "example" : summary.measured ? (came === "made" ? "measured here" : "measured elsewhere") : "estimated");

// What a step takes at once.
export const stepOf = ({ summary: { batch, seq, accumulate } }) => `${seq ? `${batch} × ${seq} tokens` : batch > 1 ? `${batch} samples` : "one sample"}${accumulate > 1 ? `, ${accumulate} steps an update` : ""}`;

// The same as options of a command.
export const shapeWords = ({ seq, batch, accumulate, lora }) => [batch ? `--batch ${batch}` : null, seq ? `--seq ${seq}` : null, lora ? `--lora-rank ${lora.rank}` : null, accumulate > 1 ? `--accumulate ${accumulate}` : null].filter(Boolean).join(" ");

const COLUMNS = [
  { title: "Model", cell: (one) => html("div", {}, html("a", { href: to("models", one.id) }, nameOf(one)), one.note ? html("div", { class: "soft" }, one.note) : null), value: nameOf },
  { title: "One step", cell: stepOf, value: ({ summary }) => (summary.seq ?? 0) * (summary.batch ?? 1) },
  { title: "Weights, MiB", cell: ({ summary }) => (summary.weight_bytes ? mib(summary.packed_bytes || summary.weight_bytes) : "–"), value: ({ summary }) => summary.packed_bytes || summary.weight_bytes },
  { title: "Device", cell: (one) => html("div", {}, one.summary.device, html("div", { class: "soft" }, origin(one))), value: ({ summary }) => summary.device, wide: true },
  { title: "Since", cell: (one) => when(one.created), value: (one) => one.created },
];

export async function show({ root, signal }) {
  const models = list({
    name: "models", columns: COLUMNS, action,
    load: (after, search) => pageOf("profiles", { limit: PAGE, after, search }),
    actions: (chosen) => [button(chosen.length > 1 ? `Delete ${chosen.length}` : "Delete", action(async () => {
      for (const one of chosen) if (!(await deleted(one))) break;
      await models.reload();
    }), "danger")],
    none: () => empty("No model is here yet. Drop a file above, or choose one.", button("Choose a model", () => choose().catch(complain), "main")),
  });
  const under = html("div"), failed = html("div");
  root.append(
    heading("Models", button("Choose a model", () => choose().catch(complain), "main")),
    dropZone((identity) => go("models", identity), complain), under, failed, models,
  );
  await Promise.all([models.reload(), measurements(under, signal, models.reload), failures(failed)]);
}

// Delete a profile, and where plans are made of it, after asking, these too. Returns whether the person went on.
export async function deleted(profile) {
  if (!(await confirmed(`Delete ${nameOf(profile)}?`, "Delete"))) return false;
  try {
    await remove(`/v1/profiles/${profile.id}`);
  } catch (error) {
    const plans = error.status === 409 && /^(a plan|\d+ plans) of /.exec(error.message)?.[1];
    if (!plans) throw error;
    if (!(await confirmed(`${plans === "a plan" ? "A plan is" : `${plans} are`} made of ${nameOf(profile)}. Delete it with all its plans?`, "Delete all of it"))) return false;
    await remove(`/v1/profiles/${profile.id}?with_plans=true`);
  }
  return true;
}

// What a measurement is of, before there is a profile.
export function measuredModel({ label, title, request: { source, config, seq, batch } }) {
  const name = title ?? (source ? source.split("/").at(-1) : null) ?? config?._name_or_path ?? config?.model_type ?? label ?? "a model";
  return `${name}${seq || batch ? `, ${batch ?? 1} × ${seq ?? 256} tokens` : ""}`;
}

const STAGES = { pack: "packing its weights", export: "tracing a step", programs: "reading the step", compare: "checking the gradients", measure: "measuring operators", estimate: "estimating operators" };

export const estimated = ({ request }) => Boolean(request.device) && request.device !== "cpu";

// A bar that follows a measurement.
export function measuring(job) {
  const bar = progress(estimated(job) ? "Estimating" : "Measuring");
  // Nothing is counted before the model is read. Of packing bytes are counted, which people read in larger units.
  bar.hear = ({ stage, done, total }, { state } = job) => {
    const words = STAGES[stage] ?? (state === "queued" ? "waits until the machine is free" : "reading the model");
    bar.update({ stage: stage === "pack" && total ? `${words}, ${size(done)} of ${size(total)}` : words, done, total, counted: stage !== "pack" });
  };
  bar.hear(job.progress ?? {});
  return bar;
}

async function measurements(box, signal, reload) {
  const rows = (await openJobs({ kind: "profile" })).map((job, index) => {
    const bar = measuring(job), row = html("li", {}, html("div", { class: "heading" }, html("a", { href: to("models", job.id) }, measuredModel(job)), when(job.created)), html("div", { class: "row" }, bar, button("Cancel", action(() => post(`/v1/jobs/${job.id}/cancel`, {})), "quiet")));
    // One runs at a time, and a browser has few connections: the first two are followed.
    if (index < 2) finish(job, bar.hear, signal).catch(() => {}).then(() => { if (!signal.aborted) { row.remove(); reload(); } });
    return row;
  });
  if (rows.length) box.replaceChildren(section("Being measured", html("ul", { class: "bare" }, ...rows)));
}

async function failures(box) {
  const { items: jobs } = await get("/v1/jobs?kind=profile&state=failed&limit=5");
  const late = jobs.filter((job) => Date.now() / 1000 - (job.finished ?? job.created) < LATELY);
  if (late.length) box.replaceChildren(html("details", {}, html("summary", {}, late.length > 1 ? `${late.length} measurements failed lately` : "A measurement failed lately"), html("ul", { class: "bare" }, ...late.map((job) => html("li", {}, html("a", { href: to("models", job.id) }, measuredModel(job)), `: ${job.error?.message ?? "no reason was given"} `, when(job.finished ?? job.created))))));
}

