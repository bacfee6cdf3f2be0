// The way to the service: who the user is, calls, streamed answers. Knows nothing of the pages.

import { keyHeaders, readKey } from "/web/key.js";

const BREATH_MS = 50;   // a stream that never pauses would leave the page no moment for a click

// What went wrong, in words for people.
export class Trouble extends Error {
  constructor(message, { code, status, key } = {}) {
    super(message);
    this.code = code;
    this.status = status;
    this.key = key;   // that was sent
  }

  // Whether another key would help.
  get needsKey() { return this.status === 401 || this.code?.startsWith("needs_") === true && this.status === 403; }

  // Whether it is of a key that another has taken the place of since.
  get isOfOldKey() { return this.needsKey && this.key !== readKey(); }
}

export function messageOf(error) {
  if (error instanceof Trouble) return error.message;
  console.error(error);
  return "Something went wrong on this page. Load it again.";
}

// A random name, kept in this browser: a vote counts only from whom the comparison was shown to.
export function userName() {
  let name = localStorage.getItem("ratchet-user");
  if (!name) {
    const bytes = crypto.getRandomValues(new Uint8Array(12));
    name = "web-" + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
    localStorage.setItem("ratchet-user", name);
  }
  return name;
}

async function send(method, path, { body, query, signal, user = true } = {}) {
  const inBody = method === "POST" || method === "PUT";
  const search = new URLSearchParams(user && !inBody ? { ...query, user: userName() } : query).toString();
  const key = readKey(), headers = { ...keyHeaders() };
  if (inBody) headers["content-type"] = "application/json";
  const content = inBody ? JSON.stringify(user ? { ...body, user: userName() } : body) : undefined;
  let response;
  try {
    response = await fetch(search ? `${path}?${search}` : path, { method, headers, body: content, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The service cannot be reached. Is it still running?", { code: "unreachable" });
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  const seconds = response.headers.get("retry-after");
  const message = answer.error?.message ?? `The service answered ${response.status}.`;
  throw new Trouble(seconds ? `${message} (In about ${seconds} s.)` : message, {
    code: answer.error?.code,
    status: response.status,
    key,
  });
}

// call("PUT", "/v1/comparisons/cmp-1/vote", { body: { choice } }): the answer, or null where there is none.
export async function call(method, path, options) {
  const response = await send(method, path, options);
  return response.status === 204 ? null : response.json();
}

export const segment = encodeURIComponent;

// Yields OpenAI's chunks as they come; first an empty one, as soon as the answer is on its way, which says whether it is a comparison.
// Throws Trouble for an error, and where the stream ends too early.
export async function* chat(request, signal) {
  const response = await send("POST", "/v1/chat/completions", { body: { ...request, stream: true }, signal });
  const id = response.headers.get("x-ratchet-comparison");
  yield { comparison: id ? { id } : undefined, choices: [] };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", rested = performance.now();
  for (;;) {
    if (performance.now() - rested > BREATH_MS) {
      await new Promise((resolve) => setTimeout(resolve));
      rested = performance.now();
    }
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Trouble("The connection was lost before the answer ended.", { code: "unreachable" });
    });
    if (done) throw new Trouble("The answer broke off before its end.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Trouble(chunk.error.message, { code: chunk.error.code });
      yield chunk;
    }
  }
}
