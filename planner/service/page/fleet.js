// One fleet: how its devices share a step, who does what when, what each needs, and what more memory or a faster link is worth.

import { download, get, remove } from "./api.js";
import { html, seconds, showLanes } from "./charts.js";
import { button, card, command, confirmed, editable, heading, note, numbers, scrolling, section, table, term } from "./components.js";
import { nameOf, rename, speedup } from "./fleets.js";
import { shapeWords } from "./models.js";
import { action, go, to } from "./shell.js";

const FIRST = 5; // sentences that stand above, the others are folded
const sheet = ({ caption, headings, rows }) => table(caption, headings, rows);

export async function show({ root, id, signal, title }) {
  const [fleet, view] = await Promise.all([get(`/v1/fleets/${id}`), get(`/v1/fleets/${id}/view`)]);
  const planned = Object.values(view.plans)[0], { profile } = planned ? await get(`/v1/plans/${planned}`).catch(() => ({})) : {};
  const model = profile ? await get(`/v1/profiles/${profile}`).catch(() => null) : null;
  if (signal.aborted) return;
  title(nameOf(fleet));
  const lanes = html("div", { class: "chart-box", id: "lanes" }), exchange = html("div", { class: "chart-box", id: "exchange" }), key = html("ul", { class: "legend" }), reading = html("p", { class: "reading", "aria-live": "polite" });
  const guessed = fleet.summary.members.filter((member) => member.plan_fingerprint && !member.measured).map((member) => member.name);
  const files = [["fleet.json", `/v1/fleets/${id}/file`], ...Object.entries(view.plans).map(([name, plan]) => [name, `/v1/plans/${plan}/file`])];
  root.append(
    heading(
      editable(nameOf(fleet), async (name) => { const shown = nameOf(Object.assign(fleet, await rename(fleet, { title: name }))); title(shown); return shown; }, { action }),
      button("Plan another like it", () => go("fleets", "new", { like: id })),
      button("Delete", action(async () => {
        if (!(await confirmed(`Delete ${nameOf(fleet)}?`, "Delete"))) return;
        await remove(`/v1/fleets/${id}`);
        go("fleets");
      }), "danger"),
    ),
    note(fleet.note, (text) => rename(fleet, { note: text }), action),
    section(null, cards(fleet.summary), html("ul", { class: "plain", id: "sentences" }, ...view.sentences.slice(0, FIRST).map((text) => html("li", {}, text))), view.sentences.length > FIRST ? html("details", {}, html("summary", {}, "More about this fleet"), html("ul", { class: "plain" }, ...view.sentences.slice(FIRST).map((text) => html("li", {}, text)))) : null),
    section("Who does what when", lanes, html("div", {}, html("h3", {}, "The exchange, enlarged"), exchange), key, reading, numbers("What each device and each link does", sheet(view.activity))),
    section("The devices", scrolling("The members of the chain", sheet(view.chain)), html("p", { class: "row" }, "Each device's plan: ", ...Object.entries(view.plans).map(([name, plan]) => html("a", { href: to("plans", plan) }, name.replace(/\.plan\.json$/, ""))))),
    section(guessed.length ? "Once it is measured" : "To run it", ...(guessed.length ? toMeasure(guessed, model) : toRun(fleet.summary, view)), html("p", { class: "row last", id: "files" }, ...files.map(([name, path]) => button(`Download ${name}`, action(() => download(path, name)))))),
  );
  showLanes({ boxes: [lanes, exchange], key, reading }, view.lanes, view.title);
}

// What is done on which device, command by command.
function toRun({ micro_batches: batches, members }, { commands, meets_at: meets }) {
  const alone = `tightfit fleet run plan --data DATA --steps ${batches} -o OUT`;
  if (!meets) return [html("p", {}, `${members.find((one) => one.plan_fingerprint)?.name} does all of it: put the files below into a folder plan on it, and start there`), command(alone, "Copy the command")];
  return [
    html("ol", { class: "steps" },
      html("li", {}, "Put the files below into a folder plan. Make the key by which the devices know each other, in that folder:", command("(umask 077; openssl rand -hex 32 > plan/fleet.key)", "Copy the command that makes the key")),
      html("li", {}, "Copy the folder and the same data to each device. To try it here first, all of them on one machine:", command(alone, "Copy the command that tries it here")),
      html("li", {}, `Start each device. HOST is an address of ${meets} that the others reach; steps are a multiple of ${batches}:`, ...Object.entries(commands).map(([name, text]) => html("div", {}, html("strong", {}, name), command(text, `Copy the command for ${name}`))))),
  ];
}

// How devices whose times are estimated are measured.
function toMeasure(guessed, model) {
  return [
    html("p", { class: "soft" }, `How long ${guessed.join(" and ")} ${guessed.length === 1 ? "takes" : "take"} is estimated. Measure the model on each, with the folder of its weights in place of MODEL, drop the file on “Models” and plan this fleet again with it; until then these files are for reading.`),
    ...guessed.map((name) => html("div", {}, html("strong", {}, name), command(`tightfit profile MODEL ${shapeWords(model?.summary ?? {})} -o ${name}.json`.replace("  ", " "), `Copy the command for ${name}`))),
  ];
}

function cards(summary) {
  const gain = speedup(summary);
  const shown = [
    ["one step", `${seconds(summary.makespan_seconds)} s`, `${summary.micro_batches} micro-batches`],
    ["compared with one device", gain ? `${gain.times.toFixed(2)} × as fast` : "–", gain ? `the fastest alone takes ${seconds(gain.alone)} s` : "none can do the step alone"],
    ["devices that compute", String(summary.members.filter((member) => member.plan_fingerprint).length), `of ${summary.members.length}`],
    ["results", summary.bit_identical ? "the same bits" : "differ by rounding", summary.bit_identical ? "as on one device" : "from those of one device"],
  ];
  return html("dl", { class: "cards" }, ...shown.map(([name, value, more]) => card(name === "one step" ? term(name, "From the moment all devices begin until each has the updated weights.") : name, value, more)));
}
