// The way to the service: who the user is, streamed answers, votes. Knows nothing of the page.

export class Trouble extends Error {
  constructor(message, code) { super(message); this.code = code; }
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

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The service cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new Trouble(body.error?.message ?? `The service answered ${response.status}.`, body.error?.code);
}

function json(method, body, signal) {
  return { method, body: JSON.stringify(body), signal, headers: { "content-type": "application/json" } };
}

// Yields OpenAI's chunks as they come. Throws Trouble for an error, and where the stream ends too early.
export async function* chat(messages, comparison, signal) {
  const body = { model: "ratchet", messages, comparison, stream: true, user: userName() };
  const response = await send("/v1/chat/completions", json("POST", body, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Trouble("The answer broke off. Try again.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Trouble(chunk.error.message, chunk.error.code);
      yield chunk;
    }
  }
}

export async function vote(comparisonId, choice) {
  const path = `/v1/comparisons/${encodeURIComponent(comparisonId)}/vote`;
  return (await send(path, json("PUT", { choice, user: userName() }))).json();
}

export async function status() {
  return (await send("/v1/status", {})).json();
}
