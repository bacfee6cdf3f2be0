// The page: shows the conversation, two answers side by side, and takes the vote.
// What people or models write is only ever set as textContent.

import { Trouble, chat, status, vote } from "/web/api.js";

const byId = (id) => document.getElementById(id);
const talk = byId("talk"), text = byId("text"), send = byId("send"), stop = byId("stop");
const CHOICES = [["first", "First"], ["second", "Second"], ["tie", "Tie"], ["neither", "Neither"]];

const NOT_VOTABLE = {
  replies_alike: "The two answers say the same, so there is nothing to choose.",
  comparison_cut_off: "One of the answers was cut off, so they cannot be compared.",
  comparison_failed: "One of the answers failed, so they cannot be compared.",
};

let messages = [];       // the conversation as the model sees it
let running = null;      // AbortController of the answer that is coming

function add(parent, tag, className, content = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = content;
  parent.append(element);
  return element;
}

function toEnd() { talk.scrollTop = talk.scrollHeight; }

function showTrouble(error) {
  if (error.name === "AbortError") return;
  add(talk, "p", "trouble", error instanceof Trouble ? error.message : "Something went wrong on this page.");
  if (!(error instanceof Trouble)) console.error(error);
}

async function ask(content) {
  byId("hint")?.remove();
  add(talk, "div", "bubble user", content);
  messages.push({ role: "user", content });
  const turn = add(talk, "section", "turn");
  setRunning(new AbortController());
  try {
    await answer(turn);
  } catch (error) {
    turn.remove();
    messages.pop();
    if (!text.value) text.value = content;   // nothing typed is lost
    showTrouble(error);
  } finally {
    setRunning(null);
    toEnd();
  }
  showStatus();
}

async function answer(turn) {
  const mode = byId("always").checked ? "always" : "auto";
  const bubbles = [];
  let comparison = null;
  for await (const chunk of chat(messages, mode, running.signal)) {
    comparison = chunk.comparison ?? comparison;   // the last one says whether the replies are worth a vote
    for (const choice of chunk.choices) {
      bubbles[choice.index] ??= add(turn, "div", "bubble reply");
      bubbles[choice.index].textContent += choice.delta.content ?? "";
    }
    turn.classList.toggle("pair", bubbles.length > 1);
    toEnd();
  }
  const reply = { role: "assistant", content: bubbles[0].textContent };
  messages.push(reply);
  if (comparison?.votable) offerVote(turn, bubbles, comparison.id, reply);
  else if (comparison) add(turn, "p", "quiet note", NOT_VOTABLE[comparison.why_not] ?? "");
}

// Until a vote says otherwise the conversation goes on with the first answer.
function offerVote(turn, bubbles, comparisonId, reply) {
  const bar = add(turn, "div", "votes");
  add(bar, "span", "quiet", "Which is better?");
  const note = add(turn, "p", "quiet note");
  const buttons = CHOICES.map(([choice, label]) => {
    const button = add(bar, "button", "", label);
    button.type = "button";
    button.dataset.choice = choice;
    button.addEventListener("click", () => cast(choice));
    return button;
  });

  async function cast(choice) {
    try {
      const { policies } = await vote(comparisonId, choice);
      note.textContent = `Thank you. First: ${policies[0]}, second: ${policies[1]}.`;
      const chosen = choice === "second" ? 1 : 0;
      reply.content = bubbles[chosen].textContent;
      bubbles.forEach((bubble, i) => bubble.classList.toggle("chosen", choice !== "neither" && (i === chosen || choice === "tie")));
      buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.choice === choice)));
      showStatus();
    } catch (error) {
      note.textContent = error instanceof Trouble ? error.message : "The vote could not be sent.";
      if (error.code?.startsWith("replies_") || error.code?.startsWith("comparison_")) bar.remove();
    }
    toEnd();
  }
  toEnd();
}

function setRunning(controller) {
  running = controller;
  send.hidden = controller !== null;
  stop.hidden = controller === null;
}

async function showStatus() {
  try {
    const now = await status();
    const stage = now.cycle_stage;
    const learning = stage === "duel" ? "a new policy is on trial" : `learning now (${stage})`;
    const cycle = stage ? `, ${learning}` : "";
    byId("status").textContent = `${now.live} answers. ${now.votes} votes, ${now.cycles} cycles so far${cycle}.`;
  } catch (error) {
    byId("status").textContent = error instanceof Trouble ? error.message : "";
  }
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = text.value.trim();
  if (!content || running) return;
  text.value = "";
  ask(content);
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
stop.addEventListener("click", () => running?.abort());
byId("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  talk.replaceChildren();
  text.focus();
});
showStatus();
setInterval(showStatus, 10_000);
