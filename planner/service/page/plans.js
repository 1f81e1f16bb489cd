// (to be written)
import { empty, heading } from "./components.js";
export async function show({ root }) { root.append(heading("plans"), empty("not yet")); }
