// What every place needs of the frame around it (`shell.js`, which opens places): addresses, and telling what went wrong.

import { Refused } from "./api.js";
import { html } from "./charts.js";
import { announce } from "./components.js";

export const TOKEN_WANTED = "tokenwanted"; // the event by which the frame asks for the token
const problem = () => document.getElementById("problem");

// The address of a place: `to("models", id, {budget})`.
export function to(name, id = "", query = {}) {
  const asked = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "")).toString();
  return `#/${[name, id].filter(Boolean).map(encodeURIComponent).join("/")}${asked ? `?${asked}` : ""}`;
}

export const go = (...where) => { location.hash = to(...where); };

export function complain(error) {
  if (error?.name === "AbortError") return;
  if (error instanceof Refused && error.status === 401) return void dispatchEvent(new Event(TOKEN_WANTED));
  problem().replaceChildren(error.message, html("button", { type: "button", class: "quiet close", "aria-label": "Close", click: () => { problem().hidden = true; } }, "×"));
  problem().hidden = false;
  announce(error.message);
}

// A handler that clears the last complaint and tells what goes wrong; `passing`: what the browser does with the event is left to it.
export const action = (run, { passing = false } = {}) => async (event) => {
  if (!passing) event?.preventDefault?.();
  problem().hidden = true;
  try { await run(event); } catch (error) { complain(error); }
};
