// The chat page: one conversation, its answers as they come, and the votes on them. READ FIRST of the page's files.
// What people or models write is shown as text, or as HTML that the service has made safe (prose.js); never else.

import { call, chat, messageOf } from "/web/api.js";
import { Composer } from "/web/composer.js";
import { ConversationList, beginConversation, readConversation } from "/web/conversations.js";
import { announce, byId } from "/web/element.js";
import { KeyForm, forgetKey, readKey } from "/web/key.js";
import { Pace } from "/web/pace.js";
import { Turn } from "/web/turn.js";
import { Voting } from "/web/voting.js";

const STATUS_MS = 10_000, AGAIN_MS = 400, NEAR_END = 80;
const NOT_VOTABLE = {
  replies_alike: "The two answers say the same, so there is nothing to choose.",
  comparison_cut_off: "One of the answers was cut off, so they cannot be compared.",
  comparison_failed: "One of the answers failed, so they cannot be compared.",
};

const talk = byId("talk"), trouble = byId("trouble");
const composer = new Composer({ send: (content) => ask(content), stop: () => running?.abort() });
const voting = new Voting({
  turns: () => turns,
  isRunning: () => running !== null,
  failed,
  changed: () => {
    toEnd();
    showStatus();
  },
});
const list = new ConversationList({ open, deleted: (id) => { if (id === conversation) open(null); }, failed });
const keyForm = new KeyForm(byId("key-form"), () => start());
const actions = {
  edit: (turn, text) => ask(text, turns.indexOf(turn)),
  retry: (turn) => ask(turn.message, turns.indexOf(turn)),
  undo: (turn) => voting.undo(turn),
  reopen: (turn) => voting.reopen(turn),
  explain: (turn, comment) => voting.explain(turn, comment),
};

let conversation = null;   // its id, once there is one
let turns = [];
let running = null;        // AbortController of the answer that is coming
let atEnd = true;          // whether the newest text is in view: then it stays so

// ---- asking

// Says something, as turn number `from`: what stood there and after it is replaced. True where it was taken.
function ask(content, from = turns.length) {
  if (running) return false;
  run(content, from);
  return true;
}

async function run(content, from) {
  voting.passOver();
  trouble.textContent = "";
  byId("hint").hidden = true;
  const view = turns;
  const replaced = turns.splice(from);
  for (const turn of replaced) turn.element.hidden = true;
  const turn = new Turn(content, actions);
  turns.push(turn);
  byId("turns").append(turn.element);
  atEnd = true;
  toEnd();
  setRunning(new AbortController());
  try {
    await answer(turn, running.signal);
    for (const old of replaced) old.element.remove();
  } catch (error) {
    if (view === turns) await broke(turn, replaced, error);
  } finally {
    if (view === turns) setRunning(null);
  }
  toEnd();
  showStatus();
  if (turns.length === 1) list.load();
}

// Throws Trouble, and AbortError where it was stopped.
async function answer(turn, signal) {
  if (!conversation) {
    conversation = await beginConversation();
    list.mark(conversation);
  }
  let pace = null, comparison = null;
  try {
    for await (const chunk of chunksOf(turn, signal)) {
      comparison = chunk.comparison ?? comparison;   // the last one says whether the replies are worth a vote
      pace ??= begin(turn, comparison, signal);
      for (const choice of chunk.choices) {
        if (choice.reply_id) turn.replies[choice.index].id = choice.reply_id;
        pace.add(choice.index, choice.delta.content ?? "");
        if (choice.finish_reason) pace.end(choice.index);
      }
    }
  } catch (error) {
    pace?.stop();
    throw error;
  }
  await pace.whole;
  if (signal.aborted) throw new DOMException("stopped", "AbortError");
  await turn.finish();
  settle(turn, comparison);
}

function begin(turn, comparison, signal) {
  turn.open(comparison ? 2 : 1);
  turn.comparison = comparison?.id ?? null;
  if (comparison) voting.bar.begin(turn);
  const pace = new Pace(turn.replies.length, (texts) => {
    turn.grow(texts);
    toEnd();
  });
  signal.addEventListener("abort", () => pace.stop());
  return pace;
}

async function* chunksOf(turn, signal) {
  const before = turns.slice(0, turns.indexOf(turn)).findLast((earlier) => earlier.replyId);
  const request = {
    model: "ratchet",
    conversation,
    follows: before?.replyId ?? "",
    comparison: composer.comparison,
    messages: [{ role: "user", content: turn.message }],
  };
  try {
    yield* chat(request, signal);
  } catch (error) {
    // A reply that was stopped a moment ago may not be stored yet.
    if (error.code !== "reply_not_found" || !before?.stopped) throw error;
    await new Promise((resolve) => { setTimeout(resolve, AGAIN_MS); });
    yield* chat(request, signal);
  }
}

// Both answers have ended, or the only one.
function settle(turn, comparison) {
  if (!turn.isPair) {
    announce(`Answer: ${turn.replies[0].text}`);
    return;
  }
  const [first, second] = turn.replies.map((reply) => reply.text);
  const votable = comparison.votable;
  const end = votable ? "Choose by the keys 1, 2, equals for a tie, 0 for neither, S to skip." : NOT_VOTABLE[comparison.why_not];
  announce(`First answer: ${first} Second answer: ${second} ${end ?? ""}`);
  if (votable) {
    voting.bar.ready(turn);
  } else {
    voting.bar.end();
    turn.showUnvoted(end ?? "There is no vote on these.", false);
  }
}

// The answer was stopped, or broke off. What there is of it stays; where there is nothing, all is as before.
async function broke(turn, replaced, error) {
  const stopped = error.name === "AbortError";
  voting.drop(turn);
  if (!turn.replies.some((reply) => reply.text)) {
    turns.splice(turns.indexOf(turn), 1, ...replaced);
    turn.element.remove();
    for (const old of replaced) old.element.hidden = false;
    if (!replaced.length) composer.giveBack(turn.message);
    if (!stopped) failed(error);
    byId("hint").hidden = turns.length > 0;
    return;
  }
  for (const old of replaced) old.element.remove();
  await turn.finish();
  turn.stopped = stopped;
  const why = stopped ? "Stopped." : `${messageOf(error)} What came of the answer is not gone on with.`;
  turn.failed = !stopped;
  if (turn.isPair) turn.showUnvoted(why, false);
  else turn.say(why);
  announce(why);
  if (error.needsKey) failed(error);
}

// ---- showing

async function open(id) {
  running?.abort();
  setRunning(null);
  voting.bar.end();
  trouble.textContent = "";
  const view = turns = [];
  conversation = id;
  list.mark(id);
  byId("turns").replaceChildren();
  byId("hint").hidden = id !== null;
  if (!id) return;
  try {
    const detail = await readConversation(id);
    if (view !== turns) return;   // another one was opened meanwhile
    await Promise.all(detail.turns.filter((turn) => turn.current).map(show));
    const last = turns.at(-1);
    if (view === turns && last?.votable && !last.choice) voting.bar.ready(last);
  } catch (error) {
    if (view !== turns) return;
    if (error.status === 404) open(null);
    failed(error);
  }
  atEnd = true;
  toEnd();
}

// A turn as it is stored.
async function show({ message, comparison_id: comparison, choice, replies }) {
  const turn = new Turn(message, actions);
  turns.push(turn);
  byId("turns").append(turn.element);
  turn.comparison = comparison;
  turn.votable = replies.length === 2 && replies.every((reply) => reply.finish_reason === "stop");
  turn.open(replies.length);
  replies.forEach((reply, i) => Object.assign(turn.replies[i], { id: reply.id, text: reply.content }));
  await turn.finish();
  if (choice) turn.showVote(choice, replies.map((reply) => reply.policy));
  else if (turn.isPair && !(turn.votable && turn === turns.at(-1))) turn.showUnvoted("Not voted.", turn.votable);
}

function setRunning(controller) {
  running = controller;
  composer.setRunning(controller !== null);
  document.body.classList.toggle("running", controller !== null);
}

function failed(error) {
  if (error.isOfOldKey) return;   // its form would stand before the new one's answers
  if (error.needsKey) {
    keyForm.show(error.message);
    trouble.textContent = "";
    announce(error.message);
  } else {
    trouble.textContent = messageOf(error);
  }
  toEnd();
}

function toEnd() { if (atEnd) talk.scrollTop = talk.scrollHeight; }

talk.addEventListener("scroll", () => {
  atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < NEAR_END;
}, { passive: true });
new ResizeObserver(toEnd).observe(talk);

async function showStatus() {
  const line = byId("status");
  try {
    const now = await call("GET", "/v1/status", { user: false });
    const stage = now.cycle_stage;
    const learning = stage === "duel" ? "a new policy is on trial" : `learning now (${stage})`;
    const cycle = stage ? `, ${learning}` : "";
    line.textContent = `${now.live} answers. ${now.votes} votes, ${now.cycles} cycles so far${cycle}.`;
    line.classList.remove("trouble");
  } catch (error) {
    if (error.isOfOldKey) return;
    line.textContent = error.needsKey ? "" : messageOf(error);
    line.classList.add("trouble");
    if (error.needsKey && byId("key-form").hidden) failed(error);
  }
}

function start() {
  trouble.textContent = "";
  byId("forget").hidden = !readKey();
  showStatus();
  list.load();
  if (list.current && list.current !== conversation) open(list.current);
}

byId("forget").addEventListener("click", () => {
  forgetKey();
  location.reload();
});
start();
setInterval(showStatus, STATUS_MS);
