// A fleet made from devices that are known: which model, which devices with how much memory and what link; then planned. What is
// filled in is kept until it is planned, also over reloading.

import { get, Refused, work } from "./api.js";
import { html, MIB } from "./charts.js";
import { button, empty, field, heading, progress, section } from "./components.js";
import { asked, complete } from "./forms.js";
import { nameOf } from "./models.js";
import { action, complain, go, to } from "./shell.js";

const DRAFT = "tightfit-fleet";
const LINKS = { "1Gbit/s": "wired, 1 Gbit/s", "100Mbit/s": "wired, 100 Mbit/s", "50Mbit/s": "Wi-Fi, 50 Mbit/s", "20Mbit/s": "slow Wi-Fi, 20 Mbit/s" };
const OTHER = "other";
const SHARE = 4; // of a device's memory a run gets at first, a quarter
const MOST = 32; // devices of a fleet

export async function show({ root, query, signal, title }) {
  title("Plan a fleet");
  const [{ profiles }, { devices }, { devices: remote }, like] = await Promise.all([get("/v1/profiles?limit=200"), get("/v1/devices"), get("/v1/remote-devices"), query.like ? draftOf(query.like) : null]);
  if (signal.aborted) return;
  const models = profiles.filter((one) => one.summary.layers > 1);
  if (!models.length) return void root.append(heading("Plan a fleet"), empty("A fleet needs a model first: measure one, or open the example.", html("a", { href: to("models") }, "Models")));
  const draft = like ?? JSON.parse(sessionStorage.getItem(DRAFT) ?? "null") ?? { profile: query.profile ?? models[0].id, micro_batches: 8, members: [] };
  if (!models.some((one) => one.id === draft.profile)) draft.profile = models[0].id;
  const known = [...devices.map((one) => ({ ...one, key: one.local ? "own" : one.name })), ...remote.filter(({ planned }) => planned).map(({ id, device, planned }) => ({ key: id, name: device.name, label: `${device.name} (${device.processor}), which trains with this service`, memory_bytes: device.memory_bytes, budget_bytes: device.budget_bytes, profile: planned.profile }))];
  const model = html("select", {}, ...models.map((one) => html("option", { value: one.id, selected: one.id === draft.profile }, nameOf(one))));
  const batches = html("input", { type: "number", min: 1, name: "micro_batches", value: draft.micro_batches, required: true });
  const members = html("div", { class: "doors", id: "members" }), say = html("div", { role: "status" }), start = html("button", { class: "main" }, "Plan this fleet");
  const keep = () => sessionStorage.setItem(DRAFT, JSON.stringify(draft));

  const add = (key) => {
    const device = known.find((one) => one.key === key), name = freeName(device.key === "own" ? "this-machine" : device.name);
    draft.members.push({ name, device: key, memory: Math.round((device.budget_bytes ?? device.memory_bytes / SHARE) / MIB), link: "100Mbit/s" });
    draw();
  };
  const freeName = (wanted) => {
    const plain = wanted.replace(/[^A-Za-z0-9_.-]/g, "-").replace(/^[^A-Za-z0-9]+/, "") || "device", taken = draft.members.map((one) => one.name);
    let name = plain.slice(0, 60);
    for (let number = 2; taken.includes(name); number++) name = `${plain.slice(0, 56)}-${number}`;
    return name;
  };
  const choice = html("select", { "aria-label": "Device to add" }, ...known.map((one) => html("option", { value: one.key }, one.key === "own" ? "this machine, as measured" : one.label)));
  const draw = () => {
    keep();
    members.replaceChildren(...draft.members.map(card));
    adding.disabled = draft.members.length >= MOST;
    start.disabled = !draft.members.length;
  };
  const bound = (member, name, control) => { control.addEventListener("input", () => { member[name] = control.type === "number" ? Number(control.value) : control.value.trim(); keep(); }); return control; };
  const card = (member, index) => {
    const device = known.find((one) => one.key === member.device);
    const rate = bound(member, "link", html("select", {}, ...Object.entries({ ...LINKS, [OTHER]: "another rate" }).map(([value, text]) => html("option", { value, selected: value === member.link }, text))));
    const other = bound(member, "rate", html("input", { value: member.rate ?? "", placeholder: "10Mbit/s" })), more = field("Rate", other, "Both ways, such as 10Mbit/s or 2MB/s.");
    const showRate = () => { more.hidden = rate.value !== OTHER; };
    rate.addEventListener("change", showRate);
    showRate();
    const box = section(null,
      html("div", { class: "heading" }, html("h2", {}, member.device === "own" ? "This machine" : device?.label ?? member.device), button("Remove", () => { draft.members.splice(index, 1); draw(); }, "quiet")),
      field("Name", bound(member, "name", html("input", { value: member.name, required: true, pattern: "[A-Za-z0-9][A-Za-z0-9_.\\-]{0,63}", title: "letters, digits, dots, dashes and underscores" }))),
      field("Memory for training, MiB", bound(member, "memory", html("input", { type: "number", min: 1, step: "any", value: member.memory, required: true })), device ? `It has ${Math.round(device.memory_bytes / MIB).toLocaleString("en")} MiB.` : null),
      field("Link", rate), more);
    box.dataset.member = index;
    return box;
  };
  const adding = button("Add", () => add(choice.value));
  const form = html("form", { id: "fleet-form", submit: action(async () => {
    for (const wrong of form.querySelectorAll(".wrong")) wrong.remove();
    draft.profile = model.value;
    draft.micro_batches = Number(batches.value);
    keep();
    const bar = progress("Planning");
    start.disabled = true;
    say.replaceChildren(bar);
    try {
      const job = await work("/v1/fleets", { ...(await asked(form, "fleet")), micro_batches: draft.micro_batches, members: draft.members.map((member) => requested(member, draft, known)) }, (latest) => bar.update(latest), signal);
      if (signal.aborted) return;
      sessionStorage.removeItem(DRAFT);
      go("fleets", job.result.fleet);
    } catch (error) {
      if (!signal.aborted && !beside(error, members)) throw error;
    } finally {
      start.disabled = false;
      say.replaceChildren();
    }
  }) },
  section(null, html("div", { class: "row" }, field("Model", model), field("Micro-batches of a step", batches, "All devices together; each is one pass of the model's batch."))),
  section("Devices", html("p", { class: "soft" }, "Devices other than this machine are estimated from what is known of them; of one that trains with this service, its own measurement counts."), members, html("div", { class: "row last" }, choice, adding)),
  html("details", { class: "more panel" }, html("summary", {}, "More options"), html("div", { class: "row" })),
  html("div", { class: "row last" }, start), say);
  root.append(heading("Plan a fleet"), html("p", { class: "soft" }, "Several devices share each training step. The planner finds who computes how much, each within its own memory, so that the step is as short as it can be."), form);
  model.addEventListener("change", () => { draft.profile = model.value; keep(); });
  batches.addEventListener("input", () => { draft.micro_batches = Number(batches.value); keep(); });
  if (!draft.members.length) add("own");
  draw();
  complete(form, "fleet", ["members"]).catch(complain);
}

// A member as the service is asked for it. A device that has asked is planned with what it has measured itself.
function requested({ name, device, memory, link, rate }, draft, known) {
  const measured = known.find((one) => one.key === device)?.profile;
  return { name, profile: measured ?? draft.profile, device: measured ? "own" : device, memory: Math.round(memory * MIB), link: link === OTHER ? rate ?? "" : link };
}

// What was planned already, as a draft.
async function draftOf(identity) {
  const { summary } = await get(`/v1/fleets/${identity}`), { jobs } = await get("/v1/jobs?kind=fleet&limit=1000");
  const request = jobs.find((job) => job.result?.fleet === identity)?.request;
  if (!request) throw new Refused(404, { code: "not_found", message: `how ${summary.model} was asked for is no longer kept; fill it in anew` });
  const same = (member) => Object.keys(LINKS).find((rate) => member.up === member.down && bytes(rate) === member.up);
  return { profile: request.members[0].profile, micro_batches: request.micro_batches, members: request.members.map((member) => ({ name: member.name, device: member.device ?? "own", memory: member.memory / MIB, link: same(member) ?? OTHER, rate: same(member) ? undefined : `${Math.min(member.up, member.down)}B/s` })) };
}
const bytes = (rate) => (Number.parseFloat(rate) * (rate.includes("Gbit") ? 1e9 : 1e6)) / 8;

// Tell what is wrong beside the device that it is said of.
function beside(error, members) {
  const found = (error.fields ?? []).map(({ field: name, message }) => [members.querySelector(`[data-member="${name.match(/^body\.members\.(\d+)/)?.[1]}"]`), message]).filter(([box]) => box);
  for (const [box, message] of found) box.append(html("p", { class: "wrong", role: "alert" }, message));
  return found.length > 0;
}
