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
    list.addEventListener("keydown", (event) => this.#arrows(event));
  }

  /**
   * @param {Iterable<Conversation>} conversations
   * @param {string} open the id of the one that is shown
   */
  show(conversations, open) {
    const newestFirst = [...conversations].sort((first, second) => second.changed - first.changed);
    this.list.replaceChildren(...newestFirst.map((conversation) => this.#entry(conversation, conversation.id === open)));
  }

  /**
   * @param {Conversation} conversation
   * @param {boolean} open
   */
  #entry(conversation, open) {
    const entry = stamp("entry");
    const link = /** @type {HTMLAnchorElement} */ (part(entry, "a"));
    link.textContent = conversation.title;
    link.href = `#${conversation.id}`;
    if (open) link.setAttribute("aria-current", "page");
    part(entry, ".entry-tools").hidden = !open;
    part(entry, ".rename").addEventListener("click", () => this.#rename(conversation, link));
    part(entry, ".delete").addEventListener("click", () => this.actions.remove(conversation));
    return entry;
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
