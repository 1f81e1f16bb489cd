// Fleets: steps of several devices that were planned, and the way to plan another.

import { pageOf, patch, remove } from "./api.js";
import { html, seconds } from "./charts.js";
import { button, confirmed, empty, heading, list, when } from "./components.js";
import { action, go, to } from "./shell.js";

const PAGE = 50;

export const nameOf = (fleet) => fleet.title ?? fleet.label ?? `${fleet.summary.model} on ${membersOf(fleet).join(", ")}`;
const membersOf = ({ summary }) => summary.members.map((member) => member.name);

// How many times shorter a step is than on the fastest device alone; null where none can do it alone.
export function speedup({ baselines = [], makespan_seconds: together }) {
  const alone = baselines.find((one) => one.name === "fastest alone")?.makespan_seconds;
  return alone ? { alone, times: alone / together } : null;
}

export async function show({ root }) {
  const add = () => button("Plan a fleet", () => go("fleets", "new"), "main");
  const fleets = list({
    name: "fleets", action,
    columns: [
      { title: "Fleet", value: nameOf, cell: (fleet) => html("a", { href: to("fleets", fleet.id) }, nameOf(fleet)) },
      { title: "Devices", value: (fleet) => membersOf(fleet).length, cell: (fleet) => String(membersOf(fleet).length) },
      { title: "One step", value: (fleet) => fleet.summary.makespan_seconds, cell: (fleet) => `${seconds(fleet.summary.makespan_seconds)} s` },
      { title: "Compared with one device", value: (fleet) => speedup(fleet.summary)?.times ?? null, cell: (fleet) => (speedup(fleet.summary) ? `${speedup(fleet.summary).times.toFixed(2)} × as fast` : "none fits alone") },
      { title: "Note", cell: (fleet) => fleet.note ?? "", wide: true, least: true },
      { title: "Made", value: (fleet) => fleet.created, cell: (fleet) => when(fleet.created) },
    ],
    load: (after, search) => pageOf("fleets", { limit: PAGE, after, search }),
    actions: (chosen) => [button("Delete", action(async () => {
      if (!(await confirmed(`Delete ${chosen.length === 1 ? nameOf(chosen[0]) : `${chosen.length} fleets`}?`, "Delete"))) return;
      for (const fleet of chosen) await remove(`/v1/fleets/${fleet.id}`);
      await fleets.reload();
    }), "danger")],
    none: () => empty("No fleet is planned yet. Several devices can share each training step: every one within its own memory.", add()),
  });
  root.append(heading("Fleets", add()), fleets);
  await fleets.reload();
}

export const rename = (fleet, fields) => patch(`/v1/fleets/${fleet.id}`, fields);
