// What is worth labelling next. What was done in this browser is not shown again.

import { call } from "/web/api.js";
import { byId, button, make } from "/web/element.js";

const DONE = "ratchet-labelled", MOST_DONE = 500;
const WHY = { neither: "neither was good", tie: "a tie" };

export class Queue {
  // pick(item) takes one up.
  constructor({ pick, failed }) {
    this.pick = pick;
    this.failed = failed;
    this.done = JSON.parse(localStorage.getItem(DONE) ?? "[]");
  }

  async load() {
    try {
      const { data } = await call("GET", "/v1/comparisons/queue", { user: false });
      const open = data.filter((item) => !this.done.includes(item.comparison_id));
      byId("queue").replaceChildren(...open.map((item) => make("li", {},
        button(item.messages.at(-1).content, () => this.pick(item), { class: "plain prompt", dir: "auto" }),
        make("span", { class: "quiet" }, WHY[item.choice]))));
      byId("queue").hidden = !open.length;
      if (!open.length) byId("queue-note").textContent = "Nothing waits: no vote of late said neither or tie.";
    } catch (error) {
      this.failed(error);
    }
  }

  // It need not be shown again.
  tick(item) {
    if (!item) return;
    this.done = [...this.done, item.comparison_id].slice(-MOST_DONE);
    localStorage.setItem(DONE, JSON.stringify(this.done));
    this.load();
  }
}
