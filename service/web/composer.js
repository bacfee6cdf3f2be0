// The message box. What is typed is kept for the tab, also over a reload; what could not be sent comes back into it.

import { byId, keepTyped } from "/web/element.js";

const MODE = "ratchet-mode";

export class Composer {
  // send(text): true where it was taken. stop(): ends what is coming.
  constructor({ send, stop }) {
    this.text = byId("text");
    this.mode = byId("mode");
    this.form = byId("ask");
    this.keep = keepTyped(this.text, "ratchet-draft");
    const mode = localStorage.getItem(MODE);
    if ([...this.mode.options].some((option) => option.value === mode)) this.mode.value = mode;
    this.mode.addEventListener("change", () => localStorage.setItem(MODE, this.mode.value));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      const content = this.text.value.trim();
      if (!content || !send(content)) return;
      this.text.value = "";
      this.keep();
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.form.requestSubmit();
      }
      if (event.key === "Escape") this.text.blur();
    });
    byId("stop").addEventListener("click", stop);
  }

  // How many answers to ask for: the field `comparison`.
  get comparison() { return this.mode.value; }

  // Puts a text that was not sent before what has been typed since; the cursor stays where it is.
  giveBack(content) {
    this.text.setRangeText(this.text.value ? `${content}\n\n` : content, 0, 0, "preserve");
    this.keep();
  }

  setRunning(running) {
    const hadFocus = document.activeElement === byId("send") || document.activeElement === byId("stop");
    byId("send").hidden = running;
    byId("stop").hidden = !running;
    if (hadFocus) byId(running ? "stop" : "send").focus();   // the button under the finger is another now
  }
}
