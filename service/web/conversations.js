// The list of conversations at the side; on a phone it slides in. Which one is open stands in the address (#conv-...).

import { call, segment } from "/web/api.js";
import { button, byId, make } from "/web/element.js";

const PATH = "/v1/conversations";

export class ConversationList {
  // open(id) shows one, or a new one for null; deleted(id) is told of one that is gone.
  constructor({ open, deleted, failed }) {
    this.list = byId("conversations");
    this.rows = [];
    this.failed = failed;
    this.deleted = deleted;
    byId("new").addEventListener("click", () => {
      this.slide(false);
      open(null);
      byId("text").focus();
    });
    byId("older").addEventListener("click", () => this.load(this.rows.at(-1)?.id));
    byId("side-open").addEventListener("click", () => this.slide(true));
    byId("side-close").addEventListener("click", () => this.slide(false));
    byId("side").addEventListener("keydown", (event) => { if (event.key === "Escape") this.slide(false); });
    addEventListener("hashchange", () => {
      this.slide(false);
      open(this.current);
    });
  }

  get current() { return /^#(conv-\w+)$/.exec(location.hash)?.[1] ?? null; }

  // What is open, without loading it again.
  mark(id) {
    history.replaceState(null, "", id ? `#${id}` : location.pathname);
    this.show();
  }

  // Reads the newest, or those before one.
  async load(before) {
    try {
      const { data, has_more: hasMore } = await call("GET", PATH, { query: before ? { before } : {} });
      this.rows = before ? [...this.rows, ...data] : data;
      byId("older").hidden = !hasMore;
      this.show();
    } catch (error) {
      this.failed(error);
    }
  }

  show() {
    this.list.replaceChildren(...this.rows.map((row) => {
      const title = row.title || "Untitled";
      const link = make("a", { href: `#${row.id}`, dir: "auto", "aria-current": row.id === this.current ? "page" : null }, title);
      const remove = button("Delete", () => this.remove(row), { class: "plain", "aria-label": `Delete: ${title}` });
      return make("li", {}, link, remove);
    }));
  }

  async remove(row) {
    if (!confirm("Delete this conversation, with the votes in it?")) return;
    try {
      await call("DELETE", `${PATH}/${segment(row.id)}`);
    } catch (error) {
      if (error.status !== 404) {
        this.failed(error);
        return;
      }
    }
    this.rows = this.rows.filter((other) => other !== row);
    this.show();
    this.deleted(row.id);
  }

  slide(out) {
    const hadFocus = byId("side").contains(document.activeElement);
    document.body.classList.toggle("side-out", out);
    byId("side-open").setAttribute("aria-expanded", String(out));
    if (out) byId("side-close").focus();
    else if (hadFocus && getComputedStyle(byId("side-open")).display !== "none") byId("side-open").focus();
  }
}

export const beginConversation = async () => (await call("POST", PATH, { body: {} })).id;
export const readConversation = (id) => call("GET", `${PATH}/${segment(id)}`);
