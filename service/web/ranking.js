// A list of answers to be put in order: by dragging, by buttons, or by keys. Says aloud where one went. Sends nothing.

import { announce, button, make } from "/web/element.js";
import { Prose } from "/web/prose.js";

export class Ranking {
  // correct(reply, item) begins a correction of one; save() is the key S.
  constructor(list, { correct, save }) {
    this.list = list;
    this.correct = correct;
    this.ties = new Set();   // items that are tied with the one above
    list.addEventListener("keydown", (event) => {
      const item = event.target.closest("li");
      if (!item || event.target.matches("textarea, input") || event.ctrlKey || event.metaKey) return;
      const key = event.key.toLowerCase();
      const number = Number(key);
      if (key === "arrowup" || key === "arrowdown") this.step(item, key === "arrowup" ? -1 : 1, event.altKey);
      else if (event.altKey) return;
      else if (number >= 1 && number <= this.items.length) this.move(item, number - 1);
      else if (key === "=") this.toggleTie(item);
      else if (key === "s") save();
      else return;
      event.preventDefault();
    });
  }

  get items() { return [...this.list.children]; }

  // Element i is the rank of the reply that was given at position i.
  get ranks() {
    const ranks = [];
    let rank = 0;
    for (const item of this.items) {
      if (!this.ties.has(item)) rank += 1;
      ranks[Number(item.dataset.position)] = rank;
    }
    return ranks;
  }

  async show(replies) {
    this.ties.clear();
    const prose = [];
    this.list.replaceChildren(...replies.map((reply, position) => {
      const body = make("div");
      prose.push(new Prose(body).finish(reply.content));
      const item = make("li", { tabindex: 0, "data-position": position },
        make("div", { class: "place" }, make("span", { class: "number" }), this.handle()),
        body,
        make("div", { class: "actions" },
          button("Up", () => this.step(item, -1, true), { class: "plain" }),
          button("Down", () => this.step(item, 1, true), { class: "plain" }),
          button("Tie with the one above", () => this.toggleTie(item), { class: "plain tie" }),
          button("Correct", () => this.correct(reply, item), { class: "plain" })));
      return item;
    }));
    this.number();
    await Promise.all(prose);
  }

  // Moves the focus up or down the list, or the item itself.
  step(item, by, moves) {
    const to = this.items.indexOf(item) + by;
    if (to < 0 || to >= this.items.length) return;
    if (moves) this.move(item, to);
    else this.items[to].focus();
  }

  move(item, to) {
    const above = this.above();
    const others = this.items.filter((other) => other !== item);
    const focused = document.activeElement;
    this.list.insertBefore(item, others[to] ?? null);
    this.keepTies(above);
    if (item.contains(focused)) focused.focus();   // moving it took the focus away
    this.number();
    announce(`Now at place ${to + 1} of ${this.items.length}.`);
  }

  toggleTie(item) {
    if (this.items[0] === item) return;
    if (!this.ties.delete(item)) this.ties.add(item);
    this.number();
    announce(this.ties.has(item) ? "Tied with the one above." : "No longer tied.");
  }

  above() { return new Map(this.items.map((item, i, all) => [item, all[i - 1]])); }

  // A tie is between two neighbours: it ends when they are none any more.
  keepTies(before) {
    for (const [item, above] of this.above()) if (before.get(item) !== above) this.ties.delete(item);
  }

  number() {
    const ranks = this.ranks;
    this.items.forEach((item, i) => {
      const tied = this.ties.has(item);
      const rank = ranks[Number(item.dataset.position)];
      item.classList.toggle("tied", tied);
      item.querySelector(".number").textContent = tied ? `= ${rank}` : rank;
      item.setAttribute("aria-label", `Rank ${rank}${tied ? ", tied with the one above" : ""}`);
      const tie = item.querySelector(".tie");
      tie.hidden = i === 0;
      tie.setAttribute("aria-pressed", String(tied));
    });
  }

  // Dragged by mouse, pen or finger.
  handle() {
    const handle = make("span", { class: "handle", "aria-hidden": "true" }, "⠿");
    let before = null;
    handle.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      handle.setPointerCapture(event.pointerId);
      before = this.above();
      handle.closest("li").classList.add("dragged");
    });
    handle.addEventListener("pointermove", (event) => {
      const item = handle.closest("li");
      if (!before) return;
      const next = this.items.find((other) => other !== item && event.clientY < middle(other));
      if (next !== item.nextElementSibling) {
        this.list.insertBefore(item, next ?? null);
        handle.setPointerCapture(event.pointerId);
      }
    });
    const drop = () => {
      if (!before) return;
      handle.closest("li").classList.remove("dragged");
      this.keepTies(before);
      before = null;
      this.number();
    };
    handle.addEventListener("pointerup", drop);
    handle.addEventListener("pointercancel", drop);
    return handle;
  }
}

function middle(element) {
  const box = element.getBoundingClientRect();
  return box.top + box.height / 2;
}
