// OpenAI's client for Node, unmodified, as `test_node.py` tells it: one call a line, an event a line (see peer.py).

import { createInterface } from "node:readline";

import OpenAI from "openai";

const report = (event) => process.stdout.write(JSON.stringify(event) + "\n");
const asked = ({ text, ...fields }) => ({
  model: "ratchet",
  messages: [{ role: "user", content: text }],
  ...fields,
});

const calls = {
  create: (client, fields) => client.chat.completions.create(asked(fields)),

  async stream(client, { close_after, ...fields }) {
    const chunks = [];
    const stream = await client.chat.completions.create({
      ...asked(fields),
      stream: true,
      stream_options: { include_usage: true },
    });
    for await (const chunk of stream) {
      chunks.push(chunk);
      report({ piece: chunk.choices[0]?.delta.content ?? "" });
      if (chunks.length === close_after) break; // which closes the connection
    }
    return chunks;
  },

  async helper(client, fields) {
    const runner = client.chat.completions.stream(asked(fields));
    runner.on("content", (piece) => report({ piece }));
    return runner.finalChatCompletion();
  },

  async abort(client, fields) {
    const controller = new AbortController();
    const answer = client.chat.completions.create(asked(fields), { signal: controller.signal });
    setTimeout(() => controller.abort(), fields.after_milliseconds);
    return answer;
  },

  models: async (client) => (await client.models.list()).data,

  model: (client, { model }) => client.models.retrieve(model),

  async headers(client, fields) {
    const { data, response, request_id } = await client.chat.completions.create(asked(fields)).withResponse();
    return { headers: Object.fromEntries(response.headers), request_id, model: data.model };
  },

  vote: (client, { comparison, ...body }) => client.put(`/comparisons/${comparison}/vote`, { body }),
};

const described = (error) => ({
  classes: lineage(error).map((kind) => kind.name),
  status: error.status ?? null,
  code: error.code ?? null,
  message: error.message,
});

function lineage(error) {
  const kinds = [];
  for (let it = Object.getPrototypeOf(error); it !== null; it = Object.getPrototypeOf(it)) kinds.push(it.constructor);
  return kinds;
}

for await (const line of createInterface({ input: process.stdin })) {
  const { call, base_url: baseURL, api_key: apiKey = "none", timeout = 60_000, ...fields } = JSON.parse(line);
  const client = new OpenAI({ baseURL, apiKey, timeout, maxRetries: 0 });
  try {
    report({ done: await calls[call](client, fields) });
  } catch (error) {
    report({ error: described(error) });
  }
}
