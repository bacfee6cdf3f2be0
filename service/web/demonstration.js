// A form in which a person writes an answer, or corrects one.

import { call } from "/web/api.js";
import { announce, button, make } from "/web/element.js";

// what: { messages } or { corrects }. `text` is what the field begins with. Calls done() once it is kept or left.
export function demonstrationForm({ label, what, text = "", failed, done }) {
  const field = make("textarea", { "aria-label": label, rows: 4, dir: "auto", required: true, maxlength: 100_000 });
  field.value = text;
  const save = make("button", { type: "submit", class: "primary" }, "Keep it");
  const form = make("form", { class: "demonstration" }, field,
    make("div", { class: "line" }, save, button("Cancel", () => { form.remove(); done(null); })));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    save.disabled = true;
    try {
      const body = { ...what, content: field.value };
      const kept = await call("POST", "/v1/demonstrations", { body });
      form.replaceWith(make("p", { class: "quiet" }, "Kept. It is learnt from in the next cycle."));
      announce("Kept.");
      done(kept);
    } catch (error) {
      save.disabled = false;
      failed(error);
    }
  });
  return form;
}
