// The API key, where the service wants one: kept for this tab, or in this browser if its owner asks for that.

const NAME = "ratchet-key";

export function readKey() {
  return sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME) ?? "";
}

export function keepKey(key, { remember }) {
  forgetKey();
  (remember ? localStorage : sessionStorage).setItem(NAME, key);
}

export function forgetKey() {
  sessionStorage.removeItem(NAME);
  localStorage.removeItem(NAME);
}

// What a request says of who asks.
export function keyHeaders() {
  const key = readKey();
  return key ? { authorization: `Bearer ${key}` } : {};
}

// A form (`#key-form`: a field `key`, a checkbox `remember`) that is shown where a key is missing or refused.
// It takes no focus by itself. `onKey` is called with a new one in place.
export class KeyForm {
  constructor(form, onKey) {
    this.form = form;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const key = form.elements.key.value.trim();
      if (!key) return;
      keepKey(key, { remember: form.elements.remember.checked });
      form.elements.key.value = "";
      this.hide();
      onKey();
    });
  }

  show(message) {
    this.form.querySelector("[data-message]").textContent = message;
    this.form.hidden = false;
  }

  hide() { this.form.hidden = true; }
}
