// The service, as the page calls it: JSON in and out, jobs followed by their events, the token where one is asked for.

// A message without the command line's way of naming options: “max grad norm”, not --max-grad-norm.
export const plainly = (text) => text.replace(/(^|[^\w-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)/g, (_, before, name) => `${before}“${name.replaceAll("-", " ")}”`);

export class Refused extends Error {
  constructor(status, error) {
    super(plainly(error.message));
    this.status = status;
    this.code = error.code;
    this.fields = error.fields ?? [];
  }
}

const SILENCE = 60000, AGAIN = 1000; // ms: a service that is started again takes its jobs up
const GONE = [0, 502, 503, 504]; // no answer, or a proxy's in its stead
const KEY = "tightfit-token";
let token = sessionStorage.getItem(KEY);

export const hasToken = () => token !== null;

export function setToken(value) {
  token = value;
  sessionStorage.setItem(KEY, value);
}

async function send(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (token) headers.Authorization = `Bearer ${token}`;
  const answer = await fetch(path, { ...options, headers }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, { code: "gone", message: "the service does not answer; ask again once tightfit serve runs" });
  });
  if (!answer.ok) {
    let error = { code: "internal", message: `the service answered ${answer.status}` };
    try { error = (await answer.json()).error; } catch { /* no JSON: the status says it */ }
    throw new Refused(answer.status, error);
  }
  return answer;
}

export const get = async (path) => (await send(path)).json();

// Let the browser save what is at `path` under a name: by itself, however large it is, but where a token has to be sent.
export async function download(path, name) {
  const link = document.createElement("a");
  if (!token) await send(path, { method: "HEAD" }); // what is refused is told here, not saved as a file
  link.href = token ? URL.createObjectURL(await (await send(path)).blob()) : path;
  link.download = name;
  link.click();
  if (token) setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// A page of what the service keeps at `/v1/PATH`: {items, next}; what is empty in `query` is not asked for.
export async function pageOf(path, query) {
  const asked = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return get(`/v1/${path}?${new URLSearchParams(asked)}`);
}

// Whether a job has not ended, and those that have not: `query` narrows them.
const OPEN = ["running", "queued"];
export const isOpen = (job) => OPEN.includes(job.state);
export async function openJobs(query = {}) {
  const pages = await Promise.all(OPEN.map((state) => pageOf("jobs", { ...query, state, limit: 100 })));
  return pages.flatMap(({ items }) => items);
}

export async function post(path, body, headers = {}) {
  const content = typeof body === "string" ? body : JSON.stringify(body);
  return (await send(path, { method: "POST", body: content, headers: { "Content-Type": "application/json", ...headers } })).json();
}

// Send a file as it is; the service keeps it under its name.
export const upload = async (path, file) => (await send(path, { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } })).json();

export const patch = async (path, body) => (await send(path, { method: "PATCH", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } })).json();
export const remove = (path) => send(path, { method: "DELETE" });

// What happened, of a server-sent event: its `event`, `data` and `id`.
const eventOf = (text) => Object.fromEntries(text.split("\n").map((line) => line.split(/: (.*)/s, 2)).filter(([name]) => name));

// How far a job is, as its latest progress says, or in a word.
export const standing = (job) => (job.state === "running" && job.progress ? job.progress : { stage: job.state === "queued" ? "waits for its turn" : "" });

// Follow a job to its end. EventSource cannot send a token, so the stream is read by hand; one that breaks is taken up again after the
// last event that came. Where `signal` is aborted, following ends, the job does not.
export async function finish(job, progress = () => {}, signal = undefined) {
  const open = () => isOpen(job);
  let last = null;
  for (let heard = Date.now(); open() && Date.now() - heard < SILENCE; ) {
    try {
      const answer = await send(`/v1/jobs/${job.id}/events`, { signal, headers: last === null ? {} : { "Last-Event-ID": last } });
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        heard = Date.now();
        const parts = (text + value).split("\n\n");
        text = parts.pop();
        for (const { event, data, id } of parts.map(eventOf)) {
          if (id !== undefined) last = id;
          if (event === "job") job = JSON.parse(data);
          if (event === "job" || event === "progress") progress(event === "job" ? standing(job) : JSON.parse(data), job);
        }
      }
    } catch (error) {
      if (signal?.aborted || (error instanceof Refused && !GONE.includes(error.status))) throw error;
    }
    if (!open()) break;
    progress({ stage: "the service does not answer, asked again until it does" }, job);
    await new Promise((resolve) => setTimeout(resolve, AGAIN));
  }
  if (job.state === "succeeded") return job;
  const gone = { code: "gone", message: "the service has not answered for a minute; what was asked goes on once it is started again" };
  throw new Refused(0, job.error || (open() ? gone : { code: job.state, message: `the job was ${job.state}` }));
}

export const work = async (path, body, progress, signal) => finish(await post(path, body), progress, signal);
