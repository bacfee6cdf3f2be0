// The way to the operator's calls. Knows nothing of the page.

import { keyHeaders } from "/web/key.js";

export class Trouble extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;   // 0 where the service was not reached
    this.code = code;
  }
  get needsKey() { return this.status === 401 || (this.status === 403 && this.code === "needs_operator"); }
}

async function call(path, options = {}) {
  const headers = { ...keyHeaders(), ...options.headers };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch {
    throw new Trouble("The service cannot be reached.", 0);
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body !== null) return body;
  const error = body?.error;
  throw new Trouble(error?.message ?? `The service answered ${response.status}.`, response.status, error?.code);
}

export const read = (path) => call(`/operator/${path}`);

export const send = (path, body) =>
  call(`/operator/${path}`, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "content-type": "application/json" },
  });

// One policy's answer to one prompt; it is not compared, and nobody votes on it.
export async function ask(policy, text) {
  const body = { model: policy, messages: [{ role: "user", content: text }], user: "operator-page" };
  const answer = await call("/v1/chat/completions", {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "content-type": "application/json" },
  });
  return answer.choices[0].message.content;
}
