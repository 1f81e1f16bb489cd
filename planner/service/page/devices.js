// Devices: this machine, and those elsewhere that have asked for plans: what they are, what was planned for them, how it went there.

import { get } from "./api.js";
import { html, seconds } from "./charts.js";
import { bar, empty, heading, mib, scrolling, section, table, when } from "./components.js";
import { to } from "./shell.js";

const NONE = "–";

export async function show({ root, signal }) {
  const [{ devices }, { devices: asking }] = await Promise.all([get("/v1/devices"), get("/v1/remote-devices")]);
  if (signal.aborted) return;
  const own = devices.find((one) => one.local), sheets = devices.filter((one) => !one.local);
  root.append(
    heading("Devices"),
    section("This machine", html("p", {}, `${own.threads} ${own.threads === 1 ? "core" : "cores"}, ${mib(own.memory_bytes, 0)} MiB of memory. `, own.running ? html("span", {}, "Busy: ", html("a", { href: to("runs", own.running) }, "what runs"), own.waiting ? `, and ${own.waiting} more wait.` : ".") : "Measurements and runs begin at once.")),
    section("Devices that train with this service", asking.length ? html("div", { class: "doors", id: "asking" }, ...asking.map(card)) : empty("None yet. A device that is told this service's address when it trains gets its plan from here, and is listed with how it went.")),
    section("Devices that can be planned for", html("p", { class: "soft" }, "From their data sheets; times are estimated."), scrolling("Devices with a data sheet", table("", ["device", "kind", "memory, MiB"], sheets.map((one) => [one.label, one.kind === "cuda" ? "graphics card" : "processor", mib(one.memory_bytes, 0)])))),
  );
}

// A device as a card: its budget within its memory, what was planned, and what it has sent back.
function card({ device, planned, report, seen }) {
  const cores = `${device.cores} ${device.cores === 1 ? "core" : "cores"}`;
  return html("article", { class: "panel" },
    html("div", { class: "heading" }, html("h3", {}, device.name), html("span", { class: "soft" }, "last heard of ", when(seen))),
    html("p", { class: "soft" }, `${device.processor}, ${cores}, ${mib(device.memory_bytes, 0)} MiB`),
    device.budget_bytes === null ? null : html("p", {}, bar(device.budget_bytes / (device.memory_bytes || 1), "var(--accent)"), ` a budget of ${mib(device.budget_bytes)} MiB`),
    html("p", {}, planned ? linked(planned) : "No plan asked for yet."),
    report ? scrolling(`How it went on ${device.name}`, table("How it went", ["", "predicted", "measured"], [
      ["one step, s", told(report.predicted_step_seconds, seconds), told(report.measured_step_seconds, seconds)],
      ...report.phases.map((one) => [`${one.phase}, MiB`, told(one.predicted_bytes, mib), told(one.held_bytes, mib)]),
    ])) : html("p", { class: "soft" }, "It has not told how a run went."));
}

const told = (value, say) => (value === null || value === undefined ? NONE : say(value));

// What was planned for a device, as a link to it.
function linked({ profile, memory, policy, state, plan, model, status, step_seconds: step, peak_bytes: peak }) {
  const name = model ?? "a model", fits = `${name}: ${told(step, seconds)} s a step, peak ${told(peak, mib)} MiB`;
  const text = state !== "succeeded" ? `${name}: planning is ${state}` : status === "infeasible" ? `${name}: nothing fits ${mib(memory)} MiB` : fits;
  return html("a", { href: plan && status !== "infeasible" ? to("plans", plan) : to("models", profile, { budget: memory, policy }) }, text);
}
