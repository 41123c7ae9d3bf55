/** Text of a model, shown as its Markdown. */

import { markdown } from "./server.js";

const SOONEST = 125; // milliseconds between two renderings
const SHARE = 10; // of the time one takes: a long text does not keep the server from its model

/** The one place where a text becomes HTML: the server's, in which nothing runs. */
const types = /** @type {any} */ (window).trustedTypes;
const policy = types?.createPolicy("markdown", { createHTML: (/** @type {string} */ html) => html });

/** Keeps an element at the newest of a growing text. */
export class MarkdownView {
  /** @param {HTMLElement} element */
  constructor(element) {
    this.element = element;
    this.text = "";
    this.working = false;
    this.raw = true; // until there is HTML, and where there cannot be any
  }

  /** @param {string} text */
  set(text) {
    if (text === this.text) return;
    const grown = text.startsWith(this.text) ? text.slice(this.text.length) : null;
    this.text = text;
    if (this.raw && grown !== null) this.element.append(grown);
    else if (this.raw) this.element.textContent = text;
    this.element.classList.toggle("raw", this.raw);
    if (!this.working) this.#work();
  }

  async #work() {
    this.working = true;
    this.element.ariaBusy = "true";
    for (let shown = ""; shown !== this.text && this.element.isConnected; ) {
      const text = this.text;
      const start = performance.now();
      let html;
      try {
        html = await markdown(text);
      } catch {
        this.#showRaw();
        return; // and no other try: the text is readable as it is
      }
      if (html) this.#show(html);
      shown = text;
      const took = performance.now() - start;
      if (shown !== this.text) await new Promise((resolve) => setTimeout(resolve, Math.max(SOONEST, SHARE * took)));
    }
    this.working = false;
    this.element.ariaBusy = "false";
  }

  #showRaw() {
    this.raw = true;
    this.element.ariaBusy = "false";
    this.element.classList.add("raw");
    this.element.textContent = this.text;
  }

  /** @param {string} html */
  #show(html) {
    const template = document.createElement("template");
    template.innerHTML = policy ? policy.createHTML(html) : html;
    if (this.raw) this.element.replaceChildren();
    this.raw = false;
    this.element.classList.remove("raw");
    // What is as before stays, so that a selection in it does, too.
    const fresh = [...template.content.childNodes];
    const there = this.element.childNodes;
    let same = 0;
    while (same < Math.min(fresh.length, there.length) && there[same].isEqualNode(fresh[same])) same++;
    while (there.length > same) there[there.length - 1].remove();
    this.element.append(...fresh.slice(same));
  }
}
