/** The dialog with a conversation's system prompt and sampling, and the one that asks for a key. */

import { SAMPLING } from "./conversation.js";
import { part } from "./dom.js";
import { useKey } from "./server.js";
import { local } from "./storage.js";
import { settingsOf } from "./transfer.js";

/** @typedef {import("./conversation.js").Settings} Settings */

const LAST = "settings";

/** @returns {Settings} what a new conversation begins with */
export function lastSettings() {
  try {
    return settingsOf(JSON.parse(local.get(LAST) ?? "null"));
  } catch {
    return { sampling: {} }; // what is kept is none of this page
  }
}

/** @param {Settings} settings that new conversations begin with */
export function keepSettings(settings) {
  local.set(LAST, JSON.stringify(settings));
}

/**
 * Lets a reader change the settings; what is valid holds at once.
 * @param {Settings} settings are changed
 * @param {() => void} changed is called behind every change
 */
export function editSettings(settings, changed) {
  const dialog = /** @type {HTMLDialogElement} */ (document.getElementById("settings-dialog"));
  const form = /** @type {HTMLFormElement} */ (part(dialog, "form"));
  const field = (/** @type {string} */ name) => /** @type {HTMLInputElement} */ (form.elements.namedItem(name));
  field("system").value = settings.system ?? "";
  for (const name of SAMPLING) field(name).value = String(settings.sampling[name] ?? "");
  form.oninput = () => {
    settings.system = field("system").value.trim() || undefined;
    const given = SAMPLING.filter((name) => field(name).value && field(name).checkValidity());
    settings.sampling = Object.fromEntries(given.map((name) => [name, field(name).valueAsNumber]));
    changed();
  };
  dialog.showModal();
}

/**
 * Asks for an API key.
 * @returns {Promise<boolean>} whether there is one now
 */
export function askForKey() {
  const dialog = /** @type {HTMLDialogElement} */ (document.getElementById("key-dialog"));
  const field = /** @type {HTMLInputElement} */ (part(dialog, "input"));
  const form = /** @type {HTMLFormElement} */ (part(dialog, "form"));
  field.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    let given = false;
    form.onsubmit = () => {
      given = true;
      useKey(field.value);
    };
    dialog.onclose = () => {
      field.value = "";
      resolve(given);
    };
  });
}
