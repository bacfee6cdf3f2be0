// The bar in which one votes, by buttons or by single keys. It stands above the message box, so that growing answers do not
// move it, and it never takes the focus. A choice made while the answers still come is kept, and given once both have ended.

import { byId } from "/web/element.js";

const KEYS = { 1: "first", 2: "second", "=": "tie", 0: "neither", s: "skip" };
const COMING = "You can choose as soon as you have read enough.";
const CHOSEN = { first: "The first", second: "The second", tie: "A tie", neither: "Neither" };

export class VoteBar {
  // cast(turn, choice) gives the vote, undo() takes the last one back.
  constructor({ cast, undo }) {
    this.bar = byId("vote");
    this.keys = byId("vote-keys");
    this.cast = cast;
    this.turn = null;
    this.early = null;      // the choice made before both answers had ended
    this.running = false;
    this.buttons = [...this.bar.querySelectorAll("[data-choice]")];
    for (const button of this.buttons) button.addEventListener("click", () => this.choose(button.dataset.choice));
    this.keys.checked = localStorage.getItem("ratchet-vote-keys") !== "off";
    this.keys.addEventListener("change", () => {
      localStorage.setItem("ratchet-vote-keys", this.keys.checked ? "on" : "off");
    });
    document.addEventListener("keydown", (event) => {
      if (!this.keys.checked || event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
      const key = event.key.toLowerCase();
      if (key === "u") undo();
      else if (this.turn && KEYS[key]) this.choose(KEYS[key]);
      else return;
      event.preventDefault();
    });
  }

  // The answers of this turn begin to come.
  begin(turn) {
    this.turn = turn;
    this.running = true;
    this.press(null, COMING);
    this.bar.hidden = false;
  }

  // Both have ended: the early choice is given, else the question is asked.
  ready(turn) {
    this.turn = turn;
    this.running = false;
    const early = this.early;
    this.press(null, "Which answer is better?");
    this.bar.hidden = false;
    if (early) this.choose(early);
  }

  // True where the focus was in the bar: it has to go somewhere.
  end() {
    const hadFocus = this.bar.contains(document.activeElement);
    this.turn = null;
    this.early = null;
    this.running = false;
    this.bar.hidden = true;
    return hadFocus;
  }

  choose(choice) {
    if (!this.running) {
      this.cast(this.turn, choice);
    } else if (choice === "skip" || choice === this.early) {
      this.press(null, COMING);
    } else {
      this.press(choice, `${CHOSEN[choice]}: given once both have ended.`);
    }
  }

  press(choice, question) {
    this.early = choice;
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(button.dataset.choice === choice));
    byId("question").textContent = question;
  }
}

function isTyping(element) {
  return element.isContentEditable || ["TEXTAREA", "SELECT"].includes(element.tagName)
    || (element.tagName === "INPUT" && element.type !== "checkbox");
}
