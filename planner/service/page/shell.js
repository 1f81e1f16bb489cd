// The frame of the page: the places and their addresses, what is under way, the token, light and dark, and what went wrong.
//
// A place is a module that exports `show(place)`. It fills `place.root` and resolves once something is to be seen; what it has started
// ends when `place.signal` is aborted, as another place is opened then. `place.id` and `place.query` come from the address,
// `#/models/ID?budget=…`; `place.keep({budget})` changes the query without leaving the place, so that reloading finds it again.

import { showActivity, watchActivity } from "./activity.js";
import { action, complain, TOKEN_WANTED, to } from "./addresses.js";
import { get, hasToken, Refused, setToken } from "./api.js";
import { html } from "./charts.js";
import { empty, heading, loading } from "./components.js";

const PLACES = [
  { name: "", label: "Start", load: () => import("./start.js") },
  { name: "models", label: "Models", load: (id) => (id ? import("./model.js") : import("./models.js")) },
  { name: "plans", label: "Plans", load: (id) => (id ? import("./plan.js") : import("./plans.js")) },
  { name: "compare", label: "Compare", load: () => import("./compare.js") },
  { name: "runs", label: "Runs", load: (id) => (id ? import("./run.js") : import("./runs.js")) },
];

// What a place's second part may be; one that cannot be is said so without asking the service.
const IDS = { models: /^([0-9a-f]{64}|job-[0-9a-f]{16})$/, plans: /^[0-9a-f]{64}$/, runs: /^job-[0-9a-f]{16}$/ };
const ONE = { models: "model", plans: "plan", runs: "run", compare: "plan or run" };

const $ = (id) => document.getElementById(id);
let left = new AbortController();

// --- addresses --------------------------------------------------------------------------------------------------------

function here() {
  const [path, asked = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [name = "", id = ""] = path.split("/").map(decodeURIComponent);
  return { name, id, query: Object.fromEntries(new URLSearchParams(asked)) };
}

async function open() {
  const { name, id, query } = here();
  const place = PLACES.find((one) => one.name === name) ?? { ...PLACES[0], name: null, label: "Nothing here" };
  left.abort();
  left = new AbortController();
  const { signal } = left, root = html("div", { class: "place", id: "place" });
  $("problem").hidden = true;
  for (const box of document.querySelectorAll("dialog[open]")) box.close();
  $("place").replaceWith(root);
  root.append(loading());
  for (const link of $("places").querySelectorAll("a")) {
    if (link.dataset.place === place.name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${place.label} – tightfit`;
  scrollTo(0, 0);
  if (place.name === null || (id && !IDS[name]?.test(id))) return nowhere(root, place);
  try {
    const { show } = await place.load(id);
    if (!signal.aborted) await show({ root, id, query, signal, keep: (more) => { if (!signal.aborted) keep(place.name, id, query, more); }, title: (text) => { if (!signal.aborted) document.title = `${text} – tightfit`; } });
  } catch (error) {
    if (signal.aborted) return;
    if (error instanceof Refused && error.status === 404 && !root.querySelector("h1")) nowhere(root, place);
    else complain(error);
  } finally {
    root.querySelector(":scope > .loading")?.remove();
  }
}

// What is shown at an address where nothing is, with ways back.
function nowhere(root, { name, label }) {
  const links = [name ? html("a", { class: "button main", href: to(name) }, label) : null, html("a", { class: `button${name ? "" : " main"}`, href: to("") }, "Start")].filter(Boolean);
  root.replaceChildren(heading(name ? `There is no such ${ONE[name] ?? "thing"}` : "There is nothing at this address"), empty(name ? "It may have been deleted, or the address is mistyped." : "The address may be mistyped.", ...links));
}

function keep(name, id, query, more) {
  Object.assign(query, more);
  history.replaceState(null, "", to(name, id, query));
}

// --- the token --------------------------------------------------------------------------------------------------------

// Ask for the token, once however many requests were refused for want of one.
function askForToken() {
  const wrong = hasToken();
  if ($("token-form") && !wrong) return;
  const input = html("input", { type: "password", autocomplete: "off", required: true, id: "token" });
  const form = html("form", { class: "panel narrow", id: "token-form", submit: action(async () => {
    setToken(input.value);
    await get("/v1/devices");
    await open();
    watchActivity($("activity"), complain);
  }) },
  html("h1", {}, "This service asks for a token"),
  html("p", { class: "soft" }, wrong ? "This token is not the service's; it is what TIGHTFIT_TOKEN held when the service was started." : "It is what TIGHTFIT_TOKEN held when the service was started."),
  html("label", {}, "Token", input), html("button", { class: "main" }, "Use it"));
  $("place").replaceChildren(form);
  input.focus();
}

// --- set up -----------------------------------------------------------------------------------------------------------

$("places").append(...PLACES.map(({ name, label }) => html("a", { href: to(name), "data-place": name }, label)));

const root = document.documentElement, darker = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : darker.matches);
const nameTheme = () => { $("theme").textContent = dark() ? "Light" : "Dark"; };
if (localStorage.getItem("tightfit-theme")) root.dataset.theme = localStorage.getItem("tightfit-theme");
darker.addEventListener("change", nameTheme);
$("theme").addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  localStorage.setItem("tightfit-theme", root.dataset.theme);
  nameTheme();
  dispatchEvent(new Event("themechange")); // pictures on a canvas are drawn anew
});
nameTheme();
$("activity").addEventListener("click", action(() => showActivity()));
watchActivity($("activity"), complain);
// A file that is dropped beside what takes one is not opened in the page's stead, but told where it belongs.
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  if (event.defaultPrevented || !event.dataTransfer?.files.length) return;
  event.preventDefault();
  complain(new Error(`Nothing here takes ${event.dataTransfer.files[0].name}: models, plans and profiles are dropped on “Models”, data where a fine-tuning is prepared.`));
});
addEventListener(TOKEN_WANTED, askForToken);
addEventListener("hashchange", open);
open();
