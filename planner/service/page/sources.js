// (to be written by the places helper) How a model comes in: dropped files, what lies under the roots, published shapes.
import { html } from "./charts.js";
export const dropZone = () => html("div", { class: "drop" }, "Drop a file here, or choose one");
export async function choose() {}
