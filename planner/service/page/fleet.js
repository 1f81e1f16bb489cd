// Fleets: one training step of several devices, as `tightfit fleet plan --server` or POST /v1/fleets has planned it.

import { download, get } from "./api.js";
import { html, seconds, showLanes } from "./charts.js";
import { table } from "./components.js";

const $ = (id) => document.getElementById(id);
const LISTED = 100;
let chosen = 0;

const sheet = ({ caption, headings, rows }) => table(caption, headings, rows);

// `action` makes of a handler one that clears the last complaint and tells what goes wrong.
export function setUpFleets(action) {
  $("fleets").addEventListener("change", action(() => show($("fleets").value, action)));
}

export async function listFleets() {
  const { fleets } = await get(`/v1/fleets?limit=${LISTED}`);
  const label = ({ created, summary }) => `${new Date(1000 * created).toLocaleString()} · ${summary.model} · ${summary.micro_batches} micro-batches in ${seconds(summary.makespan_seconds)} s`;
  const { value } = $("fleets");
  $("fleets").replaceChildren(html("option", { value: "" }, "choose one"), ...fleets.map((one) => html("option", { value: one.id }, label(one))));
  $("fleets").value = fleets.some((one) => one.id === value) ? value : "";
  $("fleet").hidden = !fleets.length;
}

async function show(identity, action) {
  const mine = ++chosen;
  $("fleet-shown").hidden = true;
  if (!identity) return;
  const view = await get(`/v1/fleets/${identity}/view`);
  if (mine !== chosen) return;
  $("fleet-shown").hidden = false;
  $("fleet-sentences").replaceChildren(...view.sentences.map((text) => html("li", {}, text)));
  showLanes({ boxes: [$("lanes"), $("exchange")], key: $("lanes-legend"), reading: $("lanes-reading") }, view.lanes, view.title);
  $("lanes-table").replaceChildren(sheet(view.activity));
  $("chain").replaceChildren(sheet(view.chain));
  $("prices").hidden = !view.prices;
  $("prices").replaceChildren(...(view.prices ? [sheet(view.prices)] : []));
  const files = [["fleet.json", `/v1/fleets/${identity}/file`], ...Object.entries(view.plans).map(([name, plan]) => [name, `/v1/plans/${plan}/file`])];
  $("fleet-files").replaceChildren(...files.map(([name, path]) => {
    const button = html("button", { type: "button" }, `Download ${name}`);
    button.addEventListener("click", action(() => download(path, name)));
    return button;
  }));
}
