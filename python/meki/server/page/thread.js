/** The messages of the open conversation. */

import { branch, versions } from "./conversation.js";
import { copyText, part, stamp } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { numbersOf } from "./numbers.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {import("./conversation.js").Message} Message
 *
 * @typedef {object} Actions what a reader asks for
 * @property {(message: Message, text: string) => void} edit
 * @property {(message: Message) => void} again
 * @property {(message: Message) => void} choose
 * @property {(model: string) => string} label of a model
 */

export class Thread {
  /**
   * @param {HTMLElement} scroller
   * @param {HTMLElement} latest the button that leads to the end
   * @param {Actions} actions
   */
  constructor(scroller, latest, actions) {
    this.scroller = scroller;
    this.list = part(scroller, "#messages");
    this.actions = actions;
    /** @type {Map<string, MessageView>} */
    this.views = new Map();
    this.atEnd = true;
    const follow = () => {
      if (this.atEnd) scroller.scrollTop = scroller.scrollHeight;
      latest.hidden = this.atEnd;
    };
    scroller.addEventListener("scroll", () => {
      this.atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
      latest.hidden = this.atEnd;
    });
    latest.addEventListener("click", () => this.toEnd());
    const observer = new ResizeObserver(follow);
    observer.observe(scroller);
    observer.observe(/** @type {Element} */ (scroller.firstElementChild));
  }

  toEnd() {
    this.atEnd = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /**
   * @param {Conversation} conversation
   * @param {boolean} running its last message is being written
   */
  show(conversation, running) {
    const shown = branch(conversation);
    const views = new Map();
    for (const message of shown) {
      const known = this.views.get(message.id);
      const view = known?.message === message ? known : new MessageView(message, this.actions);
      views.set(message.id, view);
      if (!view.article.isConnected) this.list.append(view.article);
      view.place(versions(conversation, message), running && message === shown.at(-1));
    }
    for (const [id, view] of this.views) if (views.get(id) !== view) view.article.remove();
    this.views = views;
  }

  /** @param {Message} message which has changed */
  update(message) {
    this.views.get(message.id)?.update();
  }

  /** Lets the last message of the reader be edited. */
  editLast() {
    [...this.views.values()].findLast((view) => view.message.role === "user")?.edit();
  }
}

class MessageView {
  /**
   * @param {Message} message
   * @param {Actions} actions
   */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.running = false;
    this.article = stamp("message");
    this.article.classList.add(message.role);
    this.body = part(this.article, ".body");
    this.markdown = new MarkdownView(this.body);
    /** @type {Message[]} */
    this.versions = [];
    this.pending = false;
    const user = message.role === "user";
    part(this.article, ".edit").hidden = !user;
    part(this.article, ".again").hidden = user;
    this.#on(".copy", (button) => copyText(message.content, button));
    this.#on(".edit", () => this.edit());
    this.#on(".again", () => actions.again(message));
    this.#on(".retry", () => actions.again(message));
    this.#on(".earlier", () => actions.choose(this.#version(-1)));
    this.#on(".later", () => actions.choose(this.#version(1)));
    this.body.addEventListener("click", (event) => {
      const button = /** @type {Element} */ (event.target).closest(".copy-code");
      const code = button?.closest(".code")?.querySelector("code");
      if (button && code) copyText(code.textContent ?? "", button);
    });
  }

  /**
   * @param {Message[]} versions of the message
   * @param {boolean} running it is being written
   */
  place(versions, running) {
    this.versions = versions;
    this.running = running;
    this.#draw();
  }

  /** Draws it again with the next frame. */
  update() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.#draw();
    });
  }

  edit() {
    if (this.article.querySelector(".editor")) return;
    const form = /** @type {HTMLFormElement} */ (stamp("editor"));
    const field = /** @type {HTMLTextAreaElement} */ (part(form, "textarea"));
    const close = () => {
      form.remove();
      this.article.classList.remove("editing");
      part(this.article, ".edit").focus();
    };
    field.value = this.message.content;
    field.rows = Math.min(12, field.value.split("\n").length + 1);
    part(form, ".cancel").addEventListener("click", close);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = field.value.trim();
      close();
      if (text) this.actions.edit(this.message, text);
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === field) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    this.article.classList.add("editing");
    this.body.after(form);
    field.focus();
  }

  #draw() {
    const { article, message, running } = this;
    const user = message.role === "user";
    const answered = Boolean(message.content || message.calls.length);
    part(article, ".who").textContent = user ? "You" : this.actions.label(message.model ?? "");
    article.setAttribute("aria-busy", String(running));
    article.classList.toggle("running", running);
    article.classList.toggle("waiting", running && !answered && !message.reasoning);
    const thinking = part(article, ".thinking");
    thinking.hidden = !message.reasoning;
    if (message.reasoning) {
      const still = running && !answered;
      const seconds = Math.round(message.thought ?? 0);
      part(thinking, "summary").textContent = still ? "Thinking…" : seconds ? `Thought for ${seconds} s` : "Thought";
      part(thinking, ".thoughts").textContent = message.reasoning.trim();
    }
    if (user) this.body.textContent = message.content;
    else this.markdown.set(message.content);
    part(article, ".calls").replaceChildren(...message.calls.map(callElement));
    part(article, ".problem").hidden = !message.problem || running;
    part(article, ".problem span").textContent = message.problem ?? "";
    part(article, "footer").hidden = running;
    part(article, ".copy").hidden = !message.content;
    part(article, ".again").hidden = user || Boolean(message.problem);
    const several = this.versions.length > 1;
    part(article, ".versions").hidden = !several;
    if (several) {
      const at = this.versions.indexOf(message);
      part(article, ".count").textContent = `${at + 1} of ${this.versions.length}`;
      /** @type {HTMLButtonElement} */ (part(article, ".earlier")).disabled = at === 0;
      /** @type {HTMLButtonElement} */ (part(article, ".later")).disabled = at === this.versions.length - 1;
    }
    part(article, ".numbers").textContent = user || running ? "" : numbersOf(message);
  }

  /** @param {number} step */
  #version(step) {
    return this.versions[this.versions.indexOf(this.message) + step];
  }

  /**
   * @param {string} selector of a button
   * @param {(button: HTMLElement) => void} act
   */
  #on(selector, act) {
    const button = part(this.article, selector);
    button.addEventListener("click", () => act(button));
  }
}

/** @param {import("./conversation.js").Call} call */
function callElement(call) {
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const pre = document.createElement("pre");
  figure.className = "code call";
  caption.textContent = `Calls ${call.name}`;
  pre.textContent = call.arguments;
  pre.tabIndex = 0;
  figure.append(caption, pre);
  return figure;
}
