// What was said: samples of one prompt across policies, votes with what they were on, and where a reply comes from.

import { Trouble, ask, read } from "/web/operator_api.js";
import { byId, make } from "/web/element.js";
import { at, show, table } from "/web/operator_parts.js";

let samples = [];
let loaded = [];   // policies that can be asked now

function fillSelect(select, values, label) {
  const before = select.value;
  show(select, values.map(label), () => values.map((value, i) => make("option", { value: i }, label(value))));
  if (before && before < values.length) select.value = before;
}

function replyCard(policy, content) {
  return make("article", { class: "card" }, make("h3", { class: "name" }, policy), make("p", { class: "said" }, content));
}

function showSample() {
  const chosen = samples[Number(byId("prompt").value)] ?? samples[0];
  show(byId("samples"), chosen ?? null, () =>
    chosen ? chosen.replies.map(({ policy, content }) => replyCard(policy, content))
      : [make("p", { class: "quiet" }, "No cycle has answered the guard set yet.")]);
}

export function showSamples(found) {
  samples = found;
  byId("prompt").closest("label").hidden = !samples.length;
  fillSelect(byId("prompt"), samples, (sample) => sample.prompt);
  showSample();
}

export function offerPolicies(policies) { loaded = policies; }

// Each answers by itself; one that fails says so in its own place.
async function askAll(text) {
  const cards = loaded.map((policy) => replyCard(policy, "..."));
  byId("answers").replaceChildren(...(cards.length ? cards : [make("p", { class: "trouble" }, "No engine answers now.")]));
  await Promise.all(loaded.map(async (policy, i) => {
    const said = cards[i].querySelector(".said");
    try {
      said.textContent = await ask(policy, text);
    } catch (error) {
      said.classList.add("trouble");
      said.textContent = error instanceof Trouble ? error.message : "It could not be asked.";
    }
  }));
}

const CHOSE = { first: "the first", second: "the second", tie: "both alike", neither: "neither" };

export function showVotes(votes) {
  show(byId("said"), votes, () => {
    if (!votes.length) return [make("p", { class: "quiet" }, "No votes yet.")];
    return votes.map((vote) => make("article", { class: "card vote" },
      make("p", { class: "quiet" }, at(vote.created_at), ` chose ${CHOSE[vote.choice]}`, vote.tags.length ? `, tags: ${vote.tags.join(", ")}` : ""),
      make("p", { class: "said asked" }, vote.prompt),
      make("div", { class: "pair" }, ...vote.replies.map(({ policy, content }, i) => {
        const liked = vote.choice === ["first", "second"][i];
        return make("div", { class: liked ? "liked" : "" },
          make("p", { class: "quiet" }, policy ?? "imported", liked ? " (chosen)" : ""),
          make("p", { class: "said" }, content));
      })),
      vote.comment === null ? null : make("blockquote", { class: "said" }, vote.comment)));
  });
}

async function trace(id) {
  const place = byId("traced");
  try {
    if (id.startsWith("cmp-")) place.replaceChildren(...votesOnwards(await read(`comparisons/${encodeURIComponent(id)}/lineage`)));
    else place.replaceChildren(repliesBack(await read(`replies/${encodeURIComponent(id)}/lineage`)));
  } catch (error) {
    place.replaceChildren(make("p", { class: "trouble" }, error instanceof Trouble ? error.message : "It could not be traced."));
  }
}

function repliesBack({ policies }) {
  if (!policies.length) return make("p", {}, "It was imported: it is of no policy of this service.");
  const rows = policies.map((one) =>
    [one.name, one.cycle_id === null ? "" : String(one.cycle_id), String(one.num_feedback), one.snapshot_sha256?.slice(0, 12) ?? "", one.state, at(one.created_at)]);
  return table("From the reply back to the base", ["policy", "cycle", "votes and other feedback", "snapshot", "state", "made"], rows);
}

function votesOnwards({ feedback }) {
  if (!feedback.length) return [make("p", {}, "Nobody has voted on it.")];
  return feedback.map((one) => {
    if (!one.policies.length) return make("p", {}, `No policy has learnt from ${one.kind} ${one.id} yet.`);
    const rows = one.policies.map((learner) => [learner.name, learner.directly ? "itself" : "by its parents"]);
    return table(`Policies that learnt from ${one.kind} ${one.id}`, ["policy", "how"], rows);
  });
}

export function prepareTalk(readVotes) {
  byId("prompt").addEventListener("change", showSample);
  byId("commented").addEventListener("change", readVotes);
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    askAll(byId("ask-text").value);
  });
  byId("trace").addEventListener("submit", (event) => {
    event.preventDefault();
    trace(byId("trace-id").value.trim());
  });
}
