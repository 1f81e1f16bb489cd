// What is under way, from wherever it was started: a button that says how much, and a dialog with each and a way to end it.

import { openJobs, post } from "./api.js";
import { html } from "./charts.js";
import { button, dialog, empty, progress, when } from "./components.js";
import { ruleInWords } from "./rules.js";

const EVERY = 3000; // ms between two looks
const WORDS = { profile: "Measuring", bundle: "Making a bundle", plan: "Planning", "answer-plan": "Planning answers", comparison: "Planning a curve", run: "Fine-tuning", preview: "Reading data", answer: "Answering", merge: "Merging" };
const PLACE = { run: "runs", profile: "models" }; // of a job that has a page of its own
let timer = 0, changed = () => {};

const nameOf = (job) => {
  const { request: { policy, memory } } = job, plain = job.title ?? ruleInWords(job.label ?? WORDS[job.kind] ?? job.kind, policy);
  return [memory].flat().every((bytes) => bytes === 1) ? `${plain}, the smallest budget` : plain;
};

// Keep the button's text true, while the page is looked at.
export function watchActivity(shown, complain) {
  clearTimeout(timer);
  const look = async () => {
    if (!document.hidden) {
      try {
        const jobs = await openJobs();
        shown.textContent = jobs.length ? `${jobs.length} under way` : "Nothing under way";
        shown.classList.toggle("busy", jobs.length > 0);
        changed(jobs);
      } catch (error) {
        if (error.status === 401) return complain(error);
        shown.textContent = "The service does not answer";
        shown.classList.remove("busy");
      }
    }
    timer = setTimeout(look, EVERY);
  };
  look();
}

export async function showActivity() {
  const box = html("div", { class: "activity" }), ended = new Set();
  const row = (job) => {
    const { stage = job.state === "queued" ? "waits for its turn" : "", done, total, step } = job.progress ?? {};
    const bar = progress(WORDS[job.kind] ?? job.kind);
    bar.update({ stage: step === undefined ? stage : `step ${step}`, done: step ?? done, total: step === undefined ? total : job.request.steps });
    const end = button("Cancel", async () => { ended.add(job.id); end.disabled = true; await post(`/v1/jobs/${job.id}/cancel`, "").catch(() => {}); }, "quiet");
    end.disabled = ended.has(job.id);
    const name = PLACE[job.kind] ? html("a", { href: `#/${PLACE[job.kind]}/${job.id}` }, nameOf(job)) : nameOf(job);
    return html("li", {}, html("div", { class: "heading" }, html("strong", {}, name), html("span", { class: "soft" }, when(job.created))), html("div", { class: "row" }, bar, end));
  };
  const draw = (jobs) => box.replaceChildren(jobs.length ? html("ul", { class: "bare" }, ...jobs.map(row)) : empty("Nothing is under way."));
  draw(await openJobs());
  changed = draw;
  await dialog("Under way", () => box);
  changed = () => {};
}
