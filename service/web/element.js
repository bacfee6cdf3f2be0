// Makes elements. Text is only ever set as text.

export const byId = (id) => document.getElementById(id);

// make("button", { class: "plain", type: "button", onclick: f }, "Copy"). Attributes that are null or false are left out, and so
// are children that are null.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function button(label, onclick, attributes = {}) {
  return make("button", { type: "button", onclick, ...attributes }, label);
}

// One that copies what `read` gives; none where the browser lets no page copy (without https).
export function copyButton(read, label = "Copy") {
  if (!navigator.clipboard) return "";
  const copy = button(label, async () => {
    try {
      await navigator.clipboard.writeText(read());
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Not copied";
    }
    setTimeout(() => { copy.textContent = label; }, 2000);
  }, { class: "plain" });
  return copy;
}

// Says something to a screen reader, once, whatever is shown.
export function announce(text) {
  byId("announcer").replaceChildren(document.createTextNode(text));
}

// What is typed is kept for the tab, also over a reload. Gives what says that it changed by other means.
export function keepTyped(field, name) {
  field.value ||= sessionStorage.getItem(name) ?? "";
  const keep = () => {
    try { sessionStorage.setItem(name, field.value); } catch { /* longer than a browser keeps */ }
  };
  field.addEventListener("input", keep);
  return keep;
}
