/** The list of conversations. */

import { part, stamp } from "./dom.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 *
 * @typedef {object} Actions what a reader asks for
 * @property {(conversation: Conversation, title: string) => void} rename
 * @property {(conversation: Conversation) => void} remove
 */

export class Sidebar {
  /**
   * @param {HTMLElement} list
   * @param {Actions} actions
   */
  constructor(list, actions) {
    this.list = list;
    this.actions = actions;
    /** @type {Map<Conversation, {entry: HTMLElement, link: HTMLElement}>} */
    this.entries = new Map();
    list.addEventListener("keydown", (event) => this.#arrows(event));
  }

  /**
   * @param {Iterable<Conversation>} conversations
   * @param {Conversation} open the one that is shown
   */
  show(conversations, open) {
    const newestFirst = [...conversations].sort((first, second) => second.changed - first.changed);
    // What is there stays: somebody may be writing or pressing something in it.
    const entries = new Map(newestFirst.map((conversation) => [conversation, this.#entry(conversation)]));
    for (const [conversation, { entry }] of this.entries) if (!entries.has(conversation)) entry.remove();
    [...entries.values()].forEach(({ entry }, at) => {
      if (this.list.children[at] !== entry) this.list.insertBefore(entry, this.list.children[at] ?? null);
    });
    for (const [conversation, { entry, link }] of entries) {
      link.textContent = conversation.title;
      link.ariaCurrent = conversation === open ? "page" : null;
      part(entry, ".entry-tools").hidden = conversation !== open;
    }
    this.entries = entries;
  }

  /** @param {Conversation} conversation */
  #entry(conversation) {
    const known = this.entries.get(conversation);
    if (known) return known;
    const entry = stamp("entry");
    const link = /** @type {HTMLAnchorElement} */ (part(entry, "a"));
    link.href = `#${conversation.id}`;
    part(entry, ".rename").addEventListener("click", () => this.#rename(conversation, link));
    part(entry, ".delete").addEventListener("click", () => this.actions.remove(conversation));
    return { entry, link };
  }

  /**
   * @param {Conversation} conversation
   * @param {HTMLElement} link gives its place to a field
   */
  #rename(conversation, link) {
    const field = document.createElement("input");
    field.value = conversation.title;
    field.setAttribute("aria-label", "Title");
    let over = false;
    const end = (/** @type {boolean} */ keep) => {
      if (over) return;
      over = true;
      field.replaceWith(link);
      const title = field.value.trim();
      if (keep && title) this.actions.rename(conversation, title);
      else link.focus();
    };
    field.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter" && !event.isComposing) end(true);
      if (event.key === "Escape") end(false);
    });
    field.addEventListener("blur", () => end(true));
    link.replaceWith(field);
    field.select();
  }

  /** @param {KeyboardEvent} event */
  #arrows(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const links = [...this.list.querySelectorAll("a")];
    const at = links.indexOf(/** @type {HTMLAnchorElement} */ (document.activeElement));
    links[at + step]?.focus();
    event.preventDefault();
  }
}
