/** Conversations as a file, and back. */

import { SAMPLING } from "./conversation.js";

const MESSAGE = {
  id: "string", parent: "string", role: "string", content: "string", reasoning: "string", thought: "number",
  model: "string", finish: "string", problem: "string",
};
const CALL = { name: "string", arguments: "string" };
const CONVERSATION = { id: "string", title: "string", changed: "number", head: "string" };
const SETTINGS = { model: "string", system: "string" };

/**
 * @param {Iterable<import("./conversation.js").Conversation>} conversations
 * @returns {string} JSON
 */
export function exported(conversations) {
  return JSON.stringify({ format: "meki-conversations", version: 1, conversations: [...conversations] }, null, 1);
}

/**
 * @param {string} text of a file that anyone may have written
 * @returns {import("./conversation.js").Conversation[]} with what is known of them, and nothing else
 * @throws {Error} with what is wrong, in words
 */
export function imported(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("it is not JSON");
  }
  if (file?.format !== "meki-conversations" || file.version !== 1) throw new Error("it has no conversations of this page");
  return list(file.conversations).map(conversation);
}

/** @param {any} value */
function conversation(value) {
  const ids = new Set([null]);
  const messages = list(value?.messages).map((item) => {
    const message = { parent: null, content: "", reasoning: "", ...pick(item, MESSAGE) };
    if (message.role !== "user" && message.role !== "assistant") throw new Error("a message is of nobody known");
    if (!message.id || ids.has(message.id)) throw new Error("a message has no id of its own");
    if (!ids.has(message.parent)) message.parent = null; // the one it followed is lost: it begins a branch
    ids.add(message.id);
    const calls = list(item.calls ?? []).map((call) => ({ name: "", arguments: "", ...pick(call, CALL) }));
    const stats = Object.fromEntries(Object.entries(item.stats ?? {}).filter(([, part]) => typeof part === "number"));
    return { ...message, calls, stats };
  });
  const checked = { head: null, title: "", changed: 0, ...pick(value, CONVERSATION) };
  if (!checked.id || !ids.has(checked.head)) throw new Error("a conversation is incomplete");
  return { ...checked, messages, settings: settingsOf(value.settings) };
}

/**
 * @param {any} value
 * @returns {import("./conversation.js").Settings} what is known of it, and nothing else
 * @throws {Error} with what is wrong, in words
 */
export function settingsOf(value) {
  const sampling = pick(value?.sampling, Object.fromEntries(SAMPLING.map((name) => [name, "number"])));
  return { ...pick(value, SETTINGS), sampling };
}

/**
 * @param {any} value
 * @returns {any[]}
 */
function list(value) {
  if (!Array.isArray(value)) throw new Error("a list is missing");
  return value;
}

/**
 * @param {any} value
 * @param {Record<string, string>} types by name, of what is taken if it is there
 * @returns {any}
 */
function pick(value, types) {
  const known = Object.entries(types).filter(([name]) => (value?.[name] ?? null) !== null);
  for (const [name, type] of known) if (typeof value[name] !== type) throw new Error(`"${name}" is no ${type}`);
  return Object.fromEntries(known.map(([name]) => [name, value[name]]));
}
