// The labelers' page: a prompt from the queue or one's own, its answers ranked, corrected, or written. READ FIRST of its files.

import { call, messageOf, segment } from "/web/api.js";
import { demonstrationForm } from "/web/demonstration.js";
import { announce, byId, keepTyped, make } from "/web/element.js";
import { KeyForm } from "/web/key.js";
import { Queue } from "/web/queue.js";
import { Ranking } from "/web/ranking.js";

const NOT_VOTABLE = {
  replies_alike: "The answers all say the same, so there is nothing to rank. Correct one, or write a better one.",
  comparison_cut_off: "One of the answers was cut off, so they cannot be ranked.",
  comparison_failed: "One of the answers failed, so they cannot be ranked.",
};
const prompt = byId("prompt"), save = byId("save"), sample = byId("sample");
const keep = keepTyped(prompt, "ratchet-label-prompt");
const ranking = new Ranking(byId("ranking"), { correct, save: () => saveRanking() });
const queue = new Queue({ pick, failed });
const keyForm = new KeyForm(byId("key-form"), () => queue.load());

let picked = null;       // what of the queue is worked on
let comparison = null;   // the id of the one that is ranked

// The turns before the prompt come from the queue, and belong to its last message alone.
function messages() {
  const before = picked && picked.messages.at(-1).content === prompt.value ? picked.messages.slice(0, -1) : [];
  return [...before, { role: "user", content: prompt.value }];
}

function pick(item) {
  picked = item;
  prompt.value = item.messages.at(-1).content;
  keep();
  const before = item.messages.slice(0, -1);
  byId("before").hidden = !before.length;
  byId("before").replaceChildren(...before.map(({ role, content }) => make("li", { dir: "auto" }, `${role}: ${content}`)));
  clear();
  sample.focus();
}

function clear() {
  comparison = null;
  byId("to-rank").hidden = true;
  byId("to-write").hidden = true;
  byId("trouble").textContent = "";
}

async function getAnswers() {
  clear();
  sample.disabled = true;
  sample.textContent = "Getting answers";
  try {
    const body = { messages: messages(), count: Number(byId("count").value) };
    const made = await call("POST", "/v1/comparisons", { body });
    comparison = made.id;
    showOutcome(made.votable ? "" : NOT_VOTABLE[made.why_not], made.votable);
    byId("to-rank").hidden = false;
    await ranking.show(made.replies);
    announce(`${made.replies.length} answers have come, to be ranked.`);
  } catch (error) {
    failed(error);
  } finally {
    sample.disabled = false;
    sample.textContent = "Get answers";
  }
}

function showOutcome(text, canSave, canUndo = false) {
  byId("outcome").textContent = text;
  byId("rank-save").hidden = !canSave;
  byId("undo").hidden = !canUndo;
}

const rankingPath = () => `/v1/comparisons/${segment(comparison)}/ranking`;

async function saveRanking() {
  if (!comparison || byId("rank-save").hidden) return;
  save.disabled = true;
  byId("trouble").textContent = "";
  try {
    const comment = byId("why").value.trim();
    const body = { ranks: ranking.ranks, ...(comment && { comment }) };
    const { policies } = await call("PUT", rankingPath(), { body });
    const said = `Saved. All are answers of ${[...new Set(policies)].join(", ")}.`;
    const hadFocus = byId("rank-save").contains(document.activeElement);
    showOutcome(said, false, true);
    if (hadFocus) byId("undo").focus();
    announce(said);
    byId("why").value = "";
    queue.tick(picked);
  } catch (error) {
    failed(error);
  } finally {
    save.disabled = false;
  }
}

async function undoRanking() {
  try {
    await call("DELETE", rankingPath());
    showOutcome("Undone.", true);
    save.focus();
    announce("Undone.");
  } catch (error) {
    failed(error);
  }
}

function correct(reply, item) {
  item.querySelector(".demonstration")?.remove();
  const form = demonstrationForm({
    label: "Correct this answer",
    what: { corrects: reply.reply_id },
    text: reply.content,
    failed,
    done: (kept) => {
      if (kept) queue.tick(picked);
      item.focus();
    },
  });
  item.append(form);
  form.querySelector("textarea").focus();
}

function write() {
  if (!byId("prompt-form").reportValidity()) return;
  const section = byId("to-write");
  const form = demonstrationForm({
    label: "Your answer",
    what: { messages: messages() },
    failed,
    done: (kept) => {
      if (kept) queue.tick(picked);
      else section.hidden = true;
      byId("write").focus();
    },
  });
  section.replaceChildren(section.firstElementChild, form);
  section.hidden = false;
  form.querySelector("textarea").focus();
}

function failed(error) {
  if (error.needsKey) {
    keyForm.show(error.message);
    announce(error.message);
  } else {
    byId("trouble").textContent = messageOf(error);
  }
}

byId("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  getAnswers();
});
byId("write").addEventListener("click", write);
save.addEventListener("click", saveRanking);
byId("undo").addEventListener("click", undoRanking);
queue.load();
