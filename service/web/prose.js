// Shows a reply's Markdown, also while it grows. The service renders and sanitises it (POST /v1/markdown); texts without
// any mark are shown here, which gives the same. While a reply streams it is rendered once a second at most, and what has come
// since stands at its end as plain text.

import { call } from "/web/api.js";
import { copyButton, make } from "/web/element.js";

const EVERY_MS = 1000;
const MOST_CHARACTERS = 50_000;   // longer texts are shown as they are
const MOST_TEXTS = 9;
const MARKED = /[\\`*_[\]<>#|~&]|^(\s*([-+=]|\d+[.)])| {4}|\t)/m;

export class Prose {
  constructor(element) {
    this.element = element;
    element.classList.add("prose");
    element.dir = "auto";
    this.text = "";
    this.rendered = "";
    this.asked = 0;
    this.asking = null;
    this.last = null;      // the last block, as rendered
    this.growing = [];     // what stands there of it, and what has come since
  }

  // Shows a text that begins with the one before.
  grow(text) {
    if (text === this.text) return;
    this.text = text;
    if (!isMarked(text)) {
      showPlain(this.element, text);
      this.rendered = text.trimEnd();
      this.growing = [];
      return;
    }
    this.showTail();
    if (!this.asking && performance.now() - this.asked > EVERY_MS) this.refresh();
  }

  // Shows the whole text as it will stay.
  async finish(text = this.text) {
    this.text = text;
    await this.asking;
    if (isMarked(text)) await this.refresh();
    else showPlain(this.element, text);
    decorate(this.element);
  }

  refresh() {
    const text = this.text;
    this.asked = performance.now();
    this.asking = render(text).then((html) => {
      this.asking = null;
      if (html === null) {
        showPlain(this.element, text);
      } else {
        const parsed = new DOMParser().parseFromString(html, "text/html");
        for (const link of parsed.querySelectorAll("a")) link.target = "_blank";
        replaceWhatChanged(this.element, [...parsed.body.childNodes]);
      }
      this.growing = [];
      this.rendered = text.trimEnd();   // Markdown drops the space after it
      this.showTail();
    });
    return this.asking;
  }

  // What came after the last rendering: the rest of its last block, and paragraphs. The block is a new one each time: where a line
  // grows, Chromium takes text before it to have moved, and counts a layout shift that nobody sees.
  showTail() {
    const [rest, ...more] = this.text.slice(this.rendered.length).split(/\n{2,}/);
    if (!rest && !more.length) return;
    if (!this.growing.length) {
      const last = this.element.lastElementChild;
      this.last = last?.cloneNode(true) ?? make("p");
      this.growing = last ? [last] : [];
    }
    const block = this.last.cloneNode(true);
    lastBlock(block).append(make("span", { class: "tail" }, rest));
    for (const part of this.growing) part.remove();
    this.growing = [block, ...more.filter(Boolean).map((text) => make("p", { class: "lines" }, text))];
    this.element.append(...this.growing);
  }
}

// Blocks that are as before stay, and so does what is selected in them.
function replaceWhatChanged(element, nodes) {
  const before = [...element.childNodes];
  const same = nodes.findIndex((node, i) => !before[i]?.isEqualNode(node));
  const kept = same < 0 ? nodes.length : same;
  for (const node of before.slice(kept)) node.remove();
  element.append(...nodes.slice(kept));
}

function isMarked(text) { return text.length <= MOST_CHARACTERS && MARKED.test(text); }

// Paragraphs and lines. Adds to what is there, so that a growing text does not move.
function showPlain(element, text) {
  const paragraphs = text.split(/\n{2,}/).filter((paragraph) => paragraph.trim());
  while (element.children.length > paragraphs.length) element.lastChild.remove();
  paragraphs.forEach((paragraph, i) => {
    let shown = element.children[i];
    if (shown?.className !== "lines") {
      shown?.remove();
      shown = make("p", { class: "lines" });
      element.insertBefore(shown, element.children[i] ?? null);
    }
    if (shown.textContent !== paragraph.trim()) shown.textContent = paragraph.trim();
  });
}

function lastBlock(element) {
  let last = element;
  while (last.lastElementChild?.matches("p, pre, pre > code, ul, ol, li, blockquote, h1, h2, h3, h4, h5, h6")) last = last.lastElementChild;
  return last;
}

// Code can be copied; what is wider than the page can be scrolled by keys.
function decorate(element) {
  for (const pre of element.querySelectorAll("pre")) {
    const text = pre.textContent;
    pre.tabIndex = 0;
    const frame = make("div", { class: "code" });
    pre.replaceWith(frame);
    frame.append(pre, copyButton(() => text, "Copy code"));
  }
  for (const table of element.querySelectorAll("table")) {
    const frame = make("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
}

// Texts that are to be rendered at the same moment go in one call.
let waiting = [];

function render(text) {
  return new Promise((resolve) => {
    if (!waiting.length) setTimeout(flush, 20);
    waiting.push({ text, resolve });
  });
}

async function flush() {
  const batch = [];
  let size = 0;
  while (waiting.length && batch.length < MOST_TEXTS && size + waiting[0].text.length <= 2 * MOST_CHARACTERS) {
    size += waiting[0].text.length;
    batch.push(waiting.shift());
  }
  if (waiting.length) setTimeout(flush, 20);
  try {
    const { html } = await call("POST", "/v1/markdown", { body: { texts: batch.map((one) => one.text) }, user: false });
    batch.forEach((one, i) => one.resolve(html[i]));
  } catch {
    for (const one of batch) one.resolve(null);   // the text itself is still shown
  }
}
