/**
 * A conversation: a tree of messages, of which one branch is shown. Editing a message or asking again adds a branch;
 * nothing is lost.
 *
 * @typedef {{name: string, arguments: string}} Call
 * @typedef {object} Message
 * @property {string} id
 * @property {string | null} parent the message before it; null: the first
 * @property {"user" | "assistant"} role
 * @property {string} content
 * @property {string} reasoning what the model thought, "" if nothing
 * @property {number} [thought] seconds it thought for
 * @property {Call[]} calls
 * @property {string} [model]
 * @property {string} [finish] why it ended: as the server says, or "stopped" by the user, or "failed"; none: it has not
 * @property {string} [problem] in words, if it failed
 * @property {import("./server.js").Stats} [stats]
 *
 * @typedef {object} Settings
 * @property {string} [model]
 * @property {string} [system]
 * @property {Record<string, number>} sampling by the names of the API
 *
 * @typedef {object} Conversation
 * @property {string} id
 * @property {string} title
 * @property {number} changed milliseconds since 1970: when it got its last message, name or settings
 * @property {Settings} settings
 * @property {Message[]} messages in the order of their making: a parent before its children
 * @property {string | null} head the last message of the branch that is shown
 */

export const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

/** @returns {string} an identifier; crypto.randomUUID is missing where the page comes by plain HTTP */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * @param {Settings} settings are copied
 * @returns {Conversation}
 */
export function newConversation(settings) {
  return { id: newId(), title: "", changed: Date.now(), settings: structuredClone(settings), messages: [], head: null };
}

/**
 * Adds a message behind `parent` and shows it.
 * @param {Conversation} conversation
 * @param {string | null} parent
 * @param {Pick<Message, "role" | "content"> & Partial<Message>} message
 * @returns {Message}
 */
export function add(conversation, parent, message) {
  /** @type {Message} */
  const added = { reasoning: "", calls: [], ...message, id: newId(), parent };
  conversation.messages.push(added);
  conversation.head = added.id;
  conversation.changed = Date.now();
  return added;
}

/**
 * Empties an answer, to be written again.
 * @param {Conversation} conversation
 * @param {Message} message
 * @param {string} [model]
 */
export function restart(conversation, message, model) {
  const nothing = { thought: undefined, finish: undefined, problem: undefined, stats: undefined };
  Object.assign(message, { content: "", reasoning: "", calls: [], model, ...nothing });
  conversation.changed = Date.now();
}

/**
 * @param {Conversation} conversation
 * @returns {Message[]} the branch that is shown, from its first message on
 */
export function branch(conversation) {
  const byId = new Map(conversation.messages.map((message) => [message.id, message]));
  const shown = [];
  for (let at = byId.get(conversation.head ?? ""); at; at = byId.get(at.parent ?? "")) shown.push(at);
  return shown.reverse();
}

/**
 * @param {Conversation} conversation
 * @param {Message} message
 * @returns {Message[]} all versions of it, itself among them
 */
export function versions(conversation, message) {
  return conversation.messages.filter((other) => other.parent === message.parent);
}

/**
 * Shows the branch of a message, as far as it was last gone on with.
 * @param {Conversation} conversation
 * @param {Message} message
 */
export function show(conversation, message) {
  conversation.head = message.id;
  const next = conversation.messages.findLast((other) => other.parent === message.id);
  if (next) show(conversation, next);
}

/**
 * What the server is asked for: the answer to the branch that ends with `last`.
 * @param {Conversation} conversation
 * @param {Message} last
 * @returns {object}
 */
export function requestBody(conversation, last) {
  const { model, system, sampling } = conversation.settings;
  const shown = branch({ ...conversation, head: last.id });
  const messages = shown.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: /** @type {any} */ ("system"), content: system });
  return { model, messages, ...sampling };
}

/**
 * Takes over what another tab has made of a conversation.
 * @param {Conversation} mine
 * @param {Conversation} theirs
 * @param {ReadonlySet<string>} writing the messages that this tab writes itself
 */
export function merge(mine, theirs, writing) {
  const known = new Map(mine.messages.map((message) => [message.id, message]));
  for (const message of theirs.messages) {
    const its = known.get(message.id);
    const older = its?.finish && !message.finish; // a copy from before it was complete
    if (its && !older && !writing.has(its.id)) Object.assign(its, message);
    if (its) continue;
    mine.messages.push(message);
    if (message.parent === mine.head) mine.head = message.id; // who looks at the end sees it grow
  }
  if (theirs.changed < mine.changed) return;
  const { settings } = mine; // the same object: a dialog may be changing it
  mine.title = theirs.title;
  mine.changed = theirs.changed;
  Object.assign(settings, { model: undefined, system: undefined }, theirs.settings);
}

/**
 * @param {string} text
 * @returns {string} its beginning, for a list
 */
export function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}
