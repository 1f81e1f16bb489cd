// Devices elsewhere that have asked for plans: what they are, what was planned for them, and how it went there.

import { get } from "./api.js";
import { html, seconds } from "./charts.js";
import { mib, table } from "./components.js";

const $ = (id) => document.getElementById(id);
const HEADINGS = ["Device", "Memory, MiB", "Budget, MiB", "Planned", "Step, s", "Held, MiB", "Asked last"];
const NONE = "–";

export async function listDevices() {
  const { devices } = await get("/v1/remote-devices");
  $("devices").hidden = !devices.length;
  $("devices-table").replaceChildren(table("The latest first; in brackets what was predicted", HEADINGS, devices.map(row)));
}

function row({ device, planned, report, seen }) {
  const cores = `${device.cores} ${device.cores === 1 ? "core" : "cores"}`;
  return [
    lines([device.name, html("span", { class: "soft" }, `${device.processor}, ${cores}`)]),
    mib(device.memory_bytes),
    told(device.budget_bytes, mib),
    planned ? linked(planned) : NONE,
    report ? beside(report.measured_step_seconds, report.predicted_step_seconds, seconds) : NONE,
    report?.phases.length ? lines(report.phases.map((one) => `${one.phase}: ${beside(one.held_bytes, one.predicted_bytes, mib)}`)) : NONE,
    new Date(1000 * seen).toLocaleString(undefined, { dateStyle: "short", timeStyle: "short" }),
  ];
}

const lines = (texts) => html("div", {}, ...texts.map((text) => html("div", {}, text)));
const told = (value, say) => (value === null ? NONE : say(value));
const beside = (measured, predicted, say) => `${told(measured, say)} (${told(predicted, say)})`;

// The address of the page that shows a plan.
function linked({ profile, memory, policy, state, model, status, step_seconds: step, peak_bytes: peak }) {
  const name = model ?? "a model", fits = `${name}: ${told(step, seconds)} s, ${told(peak, mib)} MiB`;
  const result = status === "infeasible" ? `${name}: nothing fits ${mib(memory)} MiB` : fits;
  return html("a", { href: `#${new URLSearchParams({ profile, budget: memory, policy })}` }, state === "succeeded" ? result : state);
}
