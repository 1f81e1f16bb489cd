// One run, live: its phases from the first second, loss and memory step by step, what to be warned of, then what it left: the
// adapter, the report, and the model to be asked before and after.

import { download, finish, get, isOpen, patch, plainly, post, remove, standing } from "./api.js";
import { html, seconds } from "./charts.js";
import { button, card, confirmed, editable, field, heading, mib, note, numbers, percent, progress, scrolling, section, span, table, term } from "./components.js";
import { counted, dataName, RANDOM } from "./data.js";
import { chartBox, smoothed } from "./lines.js";
import { leftInRun, phaseList, phasesOf } from "./phases.js";
import { reportTable, showLoss, showMemory } from "./run_report.js";
import { heldOutOf, lossOf, nameOf, peakOf, stateOf } from "./runs.js";
import { action, go, to } from "./addresses.js";
import { slower, warnings } from "./warnings.js";

const REDRAW = 250; // ms between two drawings of a run under way
const ROWS = 200; // of the table of steps, evenly spread
const OTHERS = 30; // runs that can be laid over this one

export async function show({ root, id, query, signal, keep, title }) {
  let job = await get(`/v1/jobs/${id}`);
  const [metrics, uploads, plan] = await Promise.all([get(`/v1/runs/${id}/metrics`), get("/v1/uploads").catch(() => ({ items: [] })), get(`/v1/plans/${job.request.plan}`).catch(() => null)]);
  if (signal.aborted) return;
  title(nameOf(job));
  const run = { id, cap: metrics.budget_bytes, places: metrics.places_per_step, steps: new Map(metrics.steps.map((one) => [one.step, one])), evaluations: metrics.evaluations, planned: plan?.summary.expected_seconds ?? null, latest: job.progress };
  const state = html("span", {}), bar = progress("This run"), phases = html("div", {}), told = html("ul", { class: "warnings bare" }), cards = html("dl", { class: "cards" });
  const cancel = button("Cancel", action(async () => { cancel.disabled = true; bar.update({ stage: "asked to save and end" }); try { await post(`/v1/jobs/${id}/cancel`, ""); } catch (error) { cancel.disabled = false; throw error; } }));
  const resume = button("Go on with it", action(async () => { resume.hidden = true; try { job = await post(`/v1/runs/${id}/resume`, ""); } catch (error) { resume.hidden = false; throw error; } follow().catch(failed); }), "main");
  const erase = button("Delete", action(async () => {
    if (!(await confirmed(`Delete ${nameOf(job)}, with its adapter and checkpoints?`, "Delete"))) return;
    await remove(`/v1/jobs/${id}`);
    go("runs");
  }), "danger");
  const loss = chartBox("Loss"), memory = chartBox("Memory of the process that trains"), steps = numbers("Steps", html("div", {})), left = html("div", {}), other = html("div", { class: "row" });
  const views = { loss: {}, memory: {}, with: new Map() };
  const charts = section(null, html("div", { class: "beside" }, loss.whole, memory.whole), other, steps);
  root.append(
    heading(editable(nameOf(job), async (name) => { const shown = nameOf(Object.assign(job, { title: (await patch(`/v1/jobs/${id}`, { title: name })).title })); title(shown); return shown; }, { action }), cancel, resume, erase),
    html("p", { class: "soft" }, ...about(job, plan, uploads.items)),
    note(job.note, (text) => patch(`/v1/jobs/${id}`, { note: text }), action),
    section(null, html("div", { class: "row", id: "run-state" }, state, bar, phases), cards, told), charts, left,
  );
  const offer = () => {
    state.replaceChildren(stateOf(job));
    cancel.hidden = !isOpen(job);
    cancel.disabled = false;
    resume.hidden = !["cancelled", "failed", "interrupted"].includes(job.state) || !run.steps.size;
    erase.hidden = isOpen(job);
  };
  const draw = () => {
    const ordered = [...run.steps.values()].sort((a, b) => a.step - b.step);
    charts.hidden = !ordered.length;
    cards.replaceChildren(...figures(run, job, ordered));
    const said = [...warnings(ordered, run.evaluations), isOpen(job) ? slower(ordered, run.planned, run.latest?.clock?.others_cores) : null];
    told.replaceChildren(...said.filter(Boolean).map((text) => html("li", { class: "not" }, text)));
    phases.replaceChildren(...[isOpen(job) ? phaseList(phasesOf(job.request, run.latest?.stage)) : null].filter(Boolean));
    if (!ordered.length) return;
    showLoss(loss, [["this run", { steps: ordered, evaluations: run.evaluations }], ...views.with], views.loss);
    showMemory(memory, ordered, run.cap, views.memory);
    steps.lastChild.replaceChildren(stepTable(ordered, run.places));
  };
  offerOthers(other, id, query, keep, views, draw);
  draw();
  offer();

  async function follow() {
    const live = isOpen(job);
    offer();
    left.replaceChildren();
    bar.hidden = false;
    let drawn = 0;
    const hear = (latest, now) => {
      if (now?.state && now.state !== job.state) { job = now; offer(); }
      const phase = phasesOf(job.request, latest.stage).at !== phasesOf(job.request, run.latest?.stage).at, { clock, stage, ...figures } = latest;
      run.latest = latest;
      if (latest.eval_loss !== undefined) run.evaluations = [...run.evaluations.filter((one) => one.step !== latest.step), figures];
      else if (latest.step !== undefined) run.steps.set(latest.step, figures);
      const total = job.request.steps ?? (run.expected = expected(latest, job) ?? run.expected);
      bar.update(latest.loss === undefined ? latest : { stage: "training", done: latest.step, total, left: false });
      if (!phase && performance.now() - drawn < REDRAW) return;
      drawn = performance.now();
      draw();
    };
    if (live) hear(standing(job));
    try {
      job = await finish(job, hear, signal);
    } catch (error) {
      if (signal.aborted) return;
      job = await get(`/v1/jobs/${id}`);
      if (isOpen(job)) throw error;
    }
    if (signal.aborted) return;
    if (live) {
      const all = await get(`/v1/runs/${id}/metrics`);
      run.steps = new Map(all.steps.map((one) => [one.step, one]));
      run.evaluations = all.evaluations;
      draw();
    }
    offer();
    bar.hidden = true;
    await ended(left, job, run, signal);
  }
  const failed = (error) => { if (!signal.aborted) left.replaceChildren(section(null, html("p", { class: "wrong", role: "alert" }, error.message))); };
  follow().catch(failed);
}

// What is trained on what, with links to both.
function about(job, plan, uploads) {
  const { request } = job, long = request.steps ? `${request.steps} steps` : `${request.epochs} ${request.epochs === 1 ? "pass" : "passes"} over the data`;
  return [`${dataName(request.data, uploads)}, ${long}, learning rate ${request.lr}`, ...(plan ? [", by ", html("a", { href: to("plans", plan.id) }, `the plan for ${mib(plan.summary.budget_bytes)} MiB`), " of ", html("a", { href: to("models", plan.profile) }, "its model")] : [])];
}

// How many steps a run by epochs has, as far as its steps tell.
const expected = ({ step, epoch }, job) => (epoch ? Math.round((step / epoch) * job.request.epochs) : null);

function figures(run, job, ordered) {
  const { before, after } = heldOutOf(job), last = ordered.at(-1), recent = ordered.slice(-20), total = job.request.steps ?? run.expected;
  const mean = (name) => recent.reduce((sum, one) => sum + (one[name] ?? 0), 0) / recent.length, pace = recent.length ? mean("seconds") : run.planned;
  const evaluation = run.latest?.clock?.evaluation_seconds ?? run.evaluations.at(-1)?.eval_seconds ?? null;
  const left = isOpen(job) ? leftCard(leftInRun(job.request, { latest: run.latest, step: last?.step ?? 0, total, pace, evaluation })) : null;
  if (!last) return [left].filter(Boolean);
  const places = recent.length * (run.places ?? 0), tokens = recent.reduce((sum, one) => sum + (one.tokens ?? 0), 0), peak = peakOf(job);
  return [
    before && after ? card("held-out loss", `${before.loss.toFixed(4)} → ${after.loss.toFixed(4)}`, "before → after") : null,
    before?.accuracy != null && after?.accuracy != null ? card("held-out accuracy", `${percent(before.accuracy)} → ${percent(after.accuracy)}`, "before → after") : null,
    card("loss", (lossOf(job) ?? last.loss).toFixed(4), `of step ${last.step}${total ? ` of ${total}` : ""}; smoothed ${smoothed(ordered.map((one) => [one.step, one.loss])).at(-1)[1].toFixed(4)}`),
    last.tokens === undefined ? card("one step", `${seconds(pace)} s`, "mean of the latest") : card(term("tokens a second", "Tokens of your data, padding left out: what counts for how long the training takes."), Math.round(tokens / recent.length / pace).toLocaleString("en"), `${seconds(pace)} s a step${places ? `, ${percent(Math.max(0, 1 - tokens / places), 0)} padding` : ""}`),
    left ?? card("took", span(job.finished - job.started), "from start to end"),
    peak === null
      ? card(term("memory", "Of the process that trains; the one beside it, which watches and reports, takes some 16 MiB more. The report has both."), `${mib(last.resident_bytes)} MiB`, `peak ${mib(last.peak_bytes)}${run.cap === null ? "" : ` of ${mib(run.cap)}`} MiB`)
      : card(term("peak memory", "Of all processes of the run together. The chart has the process that trains alone."), `${mib(peak)} MiB`, run.cap === null ? "" : `of ${mib(run.cap)} MiB`),
  ].filter(Boolean);
}

// Time to the end of the run, as far as its parts are known.
function leftCard({ steps, evaluations }) {
  if (steps === null && !evaluations) return card("time left", "–", "not known yet");
  const parts = [steps ? `${span(steps)} of steps` : null, evaluations ? `${span(evaluations)} of evaluating` : null, steps === null ? "and the steps" : null, evaluations === null ? "and an evaluation" : null].filter(Boolean);
  return card("time left", span((steps ?? 0) + (evaluations ?? 0)), parts.join(", ") || "to the end of the run");
}

function stepTable(ordered, places) {
  const every = Math.ceil(ordered.length / ROWS), rows = ordered.filter((_, index) => index % every === 0 || index === ordered.length - 1);
  const share = (one) => (one.tokens === undefined || !places ? "–" : percent(1 - one.tokens / places, 0));
  const body = table(every > 1 ? `Every ${every}th step` : "Every step", ["step", "loss", "seconds", "tokens/s", "padding", "held, MiB", "peak, MiB"], rows.map((one) => [String(one.step), one.loss.toFixed(4), seconds(one.seconds), one.tokens === undefined ? "–" : Math.round(one.tokens / one.seconds).toLocaleString("en"), share(one), mib(one.resident_bytes), mib(one.peak_bytes)]));
  return html("div", {}, body, button("All steps as CSV", () => saveCsv(ordered), "quiet"));
}

function saveCsv(ordered) {
  const names = [...new Set(ordered.flatMap(Object.keys))];
  const text = [names.join(","), ...ordered.map((one) => names.map((name) => one[name] ?? "").join(","))].join("\n");
  const link = html("a", { download: "steps.csv", href: URL.createObjectURL(new Blob([text], { type: "text/csv" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// Other runs whose loss is laid over this one's; which ones stands in the address.
async function offerOthers(box, id, query, keep, views, draw) {
  const { items: jobs } = await get(`/v1/runs?limit=${OTHERS}`), others = jobs.filter((job) => job.id !== id);
  if (!others.length) return;
  const chosen = new Set((query.with ?? "").split(",").filter((one) => others.some((job) => job.id === one)));
  const lay = async () => {
    views.with.clear();
    for (const one of chosen) views.with.set(nameOf(others.find((job) => job.id === one)), await get(`/v1/runs/${one}/metrics`));
    draw();
  };
  const tick = (job) => {
    const input = html("input", { type: "checkbox", change: action(async () => { chosen[input.checked ? "add" : "delete"](job.id); keep({ with: [...chosen].join(",") }); await lay(); }) });
    input.checked = chosen.has(job.id);
    return html("label", { class: "tick" }, input, nameOf(job));
  };
  box.append(html("details", { open: chosen.size > 0 }, html("summary", {}, "Lay other runs over this one"), html("div", { class: "ticks" }, ...others.map(tick), html("a", { href: to("compare", "", { runs: [id, ...chosen].join(",") }) }, "compare them in figures"))));
  if (chosen.size) await lay();
}

// What a run that has ended leaves.
async function ended(box, job, run, signal) {
  if (job.state !== "succeeded") return void box.replaceChildren(section(null, html("p", { class: "wrong", role: "alert" }, job.error ? plainly(job.error.message) : `The run was ${job.state}.`), run.steps.size ? html("p", { class: "soft" }, "Its checkpoints are kept: it can go on from the last.") : html("p", { class: "soft" }, "It had not begun to learn. Start it anew once that is mended.")));
  const report = await get(`/v1/runs/${run.id}/report`);
  if (signal.aborted) return;
  box.replaceChildren(
    section("What it left", html("div", { class: "row", id: "files" },
      button("Download the adapter", action(() => download(`/v1/runs/${run.id}/adapter`, `adapter-${run.id}.tar`)), "main"),
      merging(run.id), button("Download the report", action(() => download(`/v1/runs/${run.id}/report`, "report.json")))),
    html("p", { class: "soft" }, "The adapter loads with PEFT; the merged model stands alone.")),
    section("Try it", ...asking(job, run.id, signal)),
    section("Predicted beside measured", scrolling("Predicted beside measured", reportTable(report))),
  );
}

function merging(id) {
  const box = html("span", {}), start = button("Download the merged model", action(async () => {
    const bar = progress("Merging");
    box.replaceChildren(bar);
    try {
      const job = await finish(await post("/v1/merges", { run: id }), (latest) => bar.update(latest));
      await download(`/v1/runs/${id}/merged`, `merged-${id}.${job.result.merged.format === "gguf" ? "gguf" : "tar"}`);
    } finally {
      box.replaceChildren(start);
    }
  }));
  box.append(start);
  return box;
}

// A prompt from the data that the model has learnt from, or was judged by: another one each time.
function sampled(job, prompt, signal) {
  const data = [job.request.eval_data, job.request.data].find((one) => one && one !== RANDOM);
  if (!data) return "";
  let prompts = null, next = 0;
  const made = button("Take one from the data", action(async () => {
    made.disabled = true;
    try {
      const { columns, truncate } = job.request, { profile } = await get(`/v1/plans/${job.request.plan}`);
      prompts ??= (await counted({ profile, data, ...(columns && { columns }), ...(truncate && { truncate }) }, signal)).samples.map(({ pieces }) => pieces[0]).filter((piece) => piece && !piece.trained && piece.text.trim()).map((piece) => piece.text);
      if (!prompts.length) throw new Error("These data have no prompts: all of their text is learnt.");
      prompt.value = prompts[next++ % prompts.length];
      prompt.focus();
    } finally {
      made.disabled = false;
    }
  }), "quiet");
  return made;
}

// The model asked with the adapter and without it, side by side.
function asking(job, id, signal) {
  const prompt = html("textarea", { rows: 3, class: "wide", name: "prompt" }), most = html("input", { type: "number", min: 1, max: 1024, value: 64 });
  const manner = html("select", {}, html("option", { value: "" }, "as it is"), html("option", { value: "chat" }, "as a conversation"));
  const answers = html("ol", { class: "bare chat", "aria-live": "polite" }), ask = html("button", { class: "main" }, "Ask");
  const form = html("form", { id: "ask", submit: action(async () => {
    const text = prompt.value;
    if (!text.trim()) return prompt.focus();
    ask.disabled = true;
    const before = html("p", {}, html("span", { class: "soft busy" }, "waits …")), after = html("p", {}, html("span", { class: "soft busy" }, "waits …"));
    answers.prepend(html("li", {}, html("p", { class: "question" }, text), html("div", { class: "beside" }, html("div", {}, html("h3", {}, "Before"), before), html("div", {}, html("h3", {}, "After"), after))));
    try {
      const { profile } = await get(`/v1/plans/${job.request.plan}`);
      for (const [shown, adapted] of [[after, id], [before, null]]) {
        const asked = await post("/v1/answers", { profile, run: adapted, prompt: text, max_tokens: Number(most.value), template: Boolean(manner.value) });
        try {
          const done = await finish(asked, (latest) => { if (latest.text !== undefined) shown.textContent = latest.text; else if (latest.stage) shown.replaceChildren(html("span", { class: "soft busy" }, latest.stage)); }, signal);
          shown.textContent = done.result.text || "The model ended at once, without a word.";
        } catch (error) {
          shown.replaceChildren(html("span", { class: "wrong" }, error.message));
        }
      }
      prompt.value = "";
    } finally {
      ask.disabled = false;
    }
  }) }, field("Your text", prompt, "As your data have their prompts. Both answers are the likeliest words, not drawn by chance."), html("div", { class: "row last ask" }, field("Sent", manner), field("At most, tokens", most), ask, sampled(job, prompt, signal)));
  return [form, answers];
}
