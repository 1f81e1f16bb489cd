// The service, as the page calls it: JSON in and out, jobs followed by their events, the token where one is asked for.

export class Refused extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code;
  }
}

const TRIES = 60; // of a stream that breaks, a second apart: a service that is started again takes its jobs up
const KEY = "tightfit-token";
let token = sessionStorage.getItem(KEY);

export function setToken(value) {
  token = value;
  sessionStorage.setItem(KEY, value);
}

async function send(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (token) headers.Authorization = `Bearer ${token}`;
  const answer = await fetch(path, { ...options, headers });
  if (!answer.ok) {
    let error = { code: "internal", message: `the service answered ${answer.status}` };
    try { error = (await answer.json()).error; } catch { /* no JSON: the status says it */ }
    throw new Refused(answer.status, error);
  }
  return answer;
}

export const get = async (path) => (await send(path)).json();
export const blob = async (path) => (await send(path)).blob();

export async function post(path, body, headers = {}) {
  const content = typeof body === "string" ? body : JSON.stringify(body);
  return (await send(path, { method: "POST", body: content, headers: { "Content-Type": "application/json", ...headers } })).json();
}

// Follow a job to its end. EventSource cannot send a token, so the stream is read by hand; one that breaks is taken up again.
export async function finish(job, progress = () => {}) {
  for (let tries = 0; ["queued", "running"].includes(job.state) && tries < TRIES; tries++) {
    try {
      const answer = await send(`/v1/jobs/${job.id}/events`);
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        const parts = (text + value).split("\n\n");
        text = parts.pop();
        for (const part of parts) {
          const [, name, data] = part.match(/^event: (\w+)\ndata: (.*)$/s) || [];
          if (name === "job") job = JSON.parse(data);
          if (name === "progress") progress(JSON.parse(data), job);
        }
      }
    } catch (error) {
      if (error instanceof Refused) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
  if (job.state === "succeeded") return job;
  throw new Refused(0, job.error || { code: job.state, message: `the job was ${job.state}` });
}

export const work = async (path, body, progress) => finish(await post(path, body), progress);
