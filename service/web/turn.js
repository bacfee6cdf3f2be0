// One turn: what was said, the answer or the two answers to it, and what became of them.

import { button, copyButton, make } from "/web/element.js";
import { Prose } from "/web/prose.js";

const NAMES = ["First answer", "Second answer"];
const LONG = 4000;   // characters from which on a message gets a scroll bar of its own

export class Turn {
  // actions: { edit(turn, text), retry(turn), undo(turn), reopen(turn), explain(turn, comment) }, what its buttons do
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.replies = [];        // { id, text, policy, element, prose }
    this.comparison = null;   // its id
    this.chosen = 0;
    this.choice = null;       // "first", "second", "tie", "neither", "skip"
    this.failed = false;      // the service does not go on from it
    this.stopped = false;
    this.votable = false;
    this.said = make("div", { class: "said" });
    this.answers = make("div", { class: "answers" });
    this.note = make("div", { class: "note quiet" });
    this.element = make("article", { class: "turn" }, this.said, this.answers, this.note);
    this.showMessage();
  }

  // The reply that the conversation goes on from; empty where there is none.
  get replyId() { return !this.failed && this.replies[this.chosen]?.text ? this.replies[this.chosen].id : ""; }

  get isPair() { return this.replies.length > 1; }

  showMessage() {
    const bubble = make("div", { class: "bubble", dir: "auto" }, this.message);
    if (this.message.length > LONG) {
      bubble.tabIndex = 0;
      bubble.setAttribute("role", "group");
      bubble.setAttribute("aria-label", "Your message");
    }
    this.said.replaceChildren(
      make("h2", { class: "unseen" }, "You said"),
      bubble,
      make("div", { class: "actions" },
        copyButton(() => this.message),
        button("Edit", () => this.edit(), { class: "plain" })),
    );
  }

  edit() {
    const text = make("textarea", { "aria-label": "Edit your message", rows: 2 });
    text.value = this.message;
    const save = () => {
      if (!text.value.trim()) return;
      if (this.actions.edit(this, text.value.trim())) this.showMessage();
    };
    text.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.showMessage();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        save();
      }
    });
    this.said.replaceChildren(text, make("div", { class: "actions" },
      button("Send again", save, { class: "primary" }),
      button("Cancel", () => this.showMessage())));
    text.focus();
  }

  // Room for so many replies, all at once: what comes after does not move what is there.
  open(count) {
    for (let i = this.replies.length; i < count; i++) {
      const body = make("div", { class: "body" });
      const element = make("div", { class: "answer", role: "group", "aria-label": count > 1 ? NAMES[i] : "Answer" },
        make("h2", { class: count > 1 ? "name" : "unseen" }, count > 1 ? NAMES[i] : "The answer"), body);
      this.replies.push({ id: "", text: "", policy: null, element, prose: new Prose(body) });
      this.answers.append(element);
    }
    this.answers.classList.toggle("pair", count > 1);
    if (count > 1) {
      this.answers.tabIndex = 0;
      this.answers.setAttribute("role", "group");
      this.answers.setAttribute("aria-label", "Two answers");
    }
  }

  grow(texts) {
    texts.forEach((text, i) => {
      this.replies[i].text = text;
      this.replies[i].prose.grow(text);
    });
  }

  async finish() {
    await Promise.all(this.replies.map((reply) => reply.prose.finish(reply.text)));
    for (const reply of this.replies) {
      reply.element.querySelector(":scope > .actions")?.remove();
      reply.element.append(make("div", { class: "actions" },
        copyButton(() => reply.text),
        button("Retry", () => this.actions.retry(this), { class: "plain retry" })));
    }
  }

  // One answer is shown as the conversation's, the other put away.
  settle(chosen) {
    this.chosen = chosen;
    if (!this.isPair) return;
    this.answers.classList.add("settled");
    this.replies.forEach((reply, i) => {
      reply.element.classList.toggle("chosen", i === chosen);
      reply.element.hidden = i !== chosen;
    });
  }

  unsettle() {
    this.answers.classList.remove("settled");
    for (const reply of this.replies) {
      reply.element.classList.remove("chosen");
      reply.element.hidden = false;
    }
    this.note.replaceChildren();
  }

  say(...content) { this.note.replaceChildren(...content); }

  // After the vote: the quiet line that says which policy was which.
  showVote(choice, policies) {
    this.choice = choice;
    this.settle(choice === "second" ? 1 : 0);
    this.say(
      make("p", { class: "verdict" }, verdictOf(choice, policies)),
      make("div", { class: "actions" },
        this.otherButton(),
        button("Say why", () => this.explain(), { class: "plain why" }),
        button("Undo", () => this.actions.undo(this), { class: "plain undo", "aria-keyshortcuts": "U" })),
    );
  }

  showUnvoted(why, canVote) {
    this.choice = "skip";
    this.settle(this.chosen);
    this.say(
      make("p", { class: "verdict" }, why),
      make("div", { class: "actions" },
        this.otherButton(),
        canVote ? button("Vote after all", () => this.actions.reopen(this), { class: "plain undo" }) : ""),
    );
  }

  otherButton() {
    const other = this.replies[1 - this.chosen].element;
    const toggle = button("Show the other answer", () => {
      other.hidden = !other.hidden;
      toggle.setAttribute("aria-expanded", String(!other.hidden));
    }, { class: "plain", "aria-expanded": "false" });
    return toggle;
  }

  explain() {
    const text = make("input", { "aria-label": "Why", maxlength: 4000, placeholder: "Why?" });
    const form = make("form", { class: "explain" }, text, make("button", { type: "submit" }, "Keep"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.actions.explain(this, text.value.trim());
    });
    this.note.querySelector(".why")?.remove();
    this.note.append(form);
    text.focus();
  }
}

export function verdictOf(choice, policies) {
  const chose = {
    first: "You chose the first.", second: "You chose the second.",
    tie: "A tie: it goes on with the first.", neither: "Neither: it goes on with the first.",
  }[choice];
  return `${chose} First: ${policies[0] ?? "unknown"}, second: ${policies[1] ?? "unknown"}.`;
}
