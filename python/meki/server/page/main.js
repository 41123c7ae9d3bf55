/** The page: its state, and what each control does. */

import { answer } from "./answer.js";
import { add, branch, merge, newConversation, restart, show, titleOf } from "./conversation.js";
import { fit, part } from "./dom.js";
import { count } from "./numbers.js";
import { models as askForModels } from "./server.js";
import { askForKey, editSettings, keepSettings, lastSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { local } from "./storage.js";
import { Store } from "./store.js";
import { Thread } from "./thread.js";
import { exported, imported } from "./transfer.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {import("./conversation.js").Message} Message
 */

const TRY_AGAIN = 3000; // milliseconds until a server that does not answer is asked again

const byId = (/** @type {string} */ id) => part(document, `#${id}`);
const prompt = /** @type {HTMLTextAreaElement} */ (byId("prompt"));
const select = /** @type {HTMLSelectElement} */ (byId("model"));

const store = await Store.open();
/** @type {Map<string, Conversation>} */
const conversations = new Map(store.kept.map((conversation) => [conversation.id, conversation]));
/** @type {Map<string, AbortController>} what is being answered, by conversation */
const running = new Map();
/** @type {Set<string>} the messages that these answers are */
const writing = new Set();
/** @type {import("./server.js").Model[]} */
let models = [];
/** @type {Conversation} the one that is shown; not in `conversations` before its first message */
let open = newConversation(lastSettings());

const sidebar = new Sidebar(byId("conversations"), { rename, remove });
const thread = new Thread(byId("thread"), byId("latest"), { edit, again, choose, label });

// ---- Showing ----

function draw() {
  const busy = running.has(open.id);
  const shown = branch(open);
  byId("welcome").hidden = shown.length > 0;
  thread.show(open, busy);
  sidebar.show(conversations.values(), open);
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  document.title = open.title ? `${open.title} – MeKi` : "MeKi";
  const system = byId("system");
  system.hidden = !open.settings.system;
  part(system, "p").textContent = open.settings.system ?? "";
  drawModel(shown);
}

/** @param {Message[]} shown */
function drawModel(shown) {
  const model = modelOf(open);
  if (!model) return;
  select.value = model.id;
  const said = [];
  if (model.random_weights) said.push("Its weights are random: nobody trained it, and its text means nothing.");
  if (!model.can_chat) said.push("It has no chat template: it goes on with a text, but cannot answer here.");
  said.push(`It sees ${count(model.context)} tokens of a conversation at once.`);
  byId("welcome-model").textContent = model.id;
  byId("welcome-text").textContent = said.join(" ");
  const { prompt_tokens = 0, completion_tokens = 0 } = shown.at(-1)?.stats ?? {};
  const used = prompt_tokens + completion_tokens;
  byId("room").textContent = used ? `${count(used)} of ${count(model.context)} tokens` : "";
}

/**
 * @param {Conversation} conversation
 * @returns {import("./server.js").Model | undefined} its own, or else the first that can chat
 */
function modelOf({ settings }) {
  return models.find(({ id }) => id === settings.model) ?? models.find((model) => model.can_chat) ?? models[0];
}

/** @param {string} id of a model */
function label(id) {
  return models.find((model) => model.id === id)?.random_weights ? `${id} (random weights)` : id;
}

/**
 * @param {string} text "": none
 * @param {() => void} [retry]
 */
function notice(text, retry) {
  const line = byId("notice");
  const button = part(line, "button");
  line.hidden = !text;
  part(line, "span").textContent = text;
  button.hidden = !retry;
  button.onclick = retry ?? null;
}

let toastTimer = 0;

/**
 * @param {string} text
 * @param {() => void} [undo]
 */
function toast(text, undo) {
  const box = byId("toast");
  const button = part(box, "button");
  box.hidden = false;
  part(box, "span").textContent = text;
  button.hidden = !undo;
  button.onclick = () => {
    box.hidden = true;
    undo?.();
  };
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (box.hidden = true), 8000);
}

/** @param {boolean} wanted on a small screen, where the list lies over the conversation */
function drawer(wanted) {
  document.body.classList.toggle("drawer", wanted);
  byId("scrim").hidden = !wanted;
  byId("main").inert = wanted;
  byId("menu").setAttribute("aria-expanded", String(wanted));
  if (wanted) byId("new").focus();
}

// ---- Conversations ----

/** @param {Conversation} conversation */
async function save(conversation) {
  if (!conversations.has(conversation.id)) return;
  await store.put(conversation).catch(() => toast("This browser could not keep the conversation; export it."));
}

/** Opens what the address names: a conversation, or else a new one. */
function route() {
  const named = conversations.get(location.hash.slice(1));
  if (named !== open) open = named ?? newConversation(lastSettings());
  drawer(false);
  draw();
  thread.toEnd();
  if (!matchMedia("(pointer: coarse)").matches) prompt.focus(); // to a finger that would bring the keyboard
}

function newChat() {
  history.pushState(null, "", location.pathname);
  route();
}

/**
 * @param {Conversation} conversation
 * @param {string} title
 */
function rename(conversation, title) {
  conversation.title = title;
  conversation.changed = Date.now();
  save(conversation);
  draw();
}

/** @param {Conversation} conversation */
function remove(conversation) {
  running.get(conversation.id)?.abort();
  conversations.delete(conversation.id);
  store.delete(conversation.id).catch(() => toast("This browser could not delete the conversation: it will be back."));
  if (conversation === open) newChat();
  else draw();
  toast("Conversation deleted.", () => {
    conversations.set(conversation.id, conversation);
    save(conversation);
    location.hash = conversation.id;
  });
}

/** Follows what another tab does. */
store.watch((id, theirs) => {
  const mine = conversations.get(id);
  if (theirs && mine) merge(mine, theirs, writing);
  else if (theirs) conversations.set(id, theirs);
  else {
    running.get(id)?.abort();
    conversations.delete(id);
  }
  if (mine && mine === open && !theirs) newChat();
  else draw();
});

function exportAll() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([exported(conversations.values())], { type: "application/json" }));
  link.download = "meki-conversations.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** @param {File} file */
async function importAll(file) {
  try {
    const added = imported(await file.text());
    // What is here and was changed later stays.
    const taken = added.filter(({ id, changed }) => changed > (conversations.get(id)?.changed ?? -1));
    for (const conversation of taken) {
      conversations.set(conversation.id, conversation);
      await save(conversation);
    }
    if (taken.some(({ id }) => id === open.id)) route();
    else draw();
    toast(`Imported ${taken.length} of ${added.length} conversations${taken.length < added.length ? "; the others are here already" : ""}.`);
  } catch (error) {
    toast(`The file was not imported: ${/** @type {Error} */ (error).message}.`);
  }
}

// ---- Messages ----

/** @param {string} text */
function send(text) {
  if (!conversations.has(open.id)) {
    open.title = titleOf(text);
    conversations.set(open.id, open);
    history.replaceState(null, "", `#${open.id}`);
  }
  answerTo(open, add(open, branch(open).at(-1)?.id ?? null, { role: "user", content: text }));
}

/**
 * @param {Message} message of the reader
 * @param {string} text in its place
 */
function edit(message, text) {
  running.get(open.id)?.abort();
  answerTo(open, add(open, message.parent, { role: "user", content: text }));
}

/** @param {Message} message an answer that is wanted anew */
function again(message) {
  const question = open.messages.find(({ id }) => id === message.parent);
  if (!question) return;
  const isLast = !open.messages.some(({ parent }) => parent === message.id);
  // One that failed before it began becomes the answer. Another tab would bring it back if it were taken out.
  answerTo(open, question, message.problem && !message.content && isLast ? message : undefined);
}

/** @param {Message} message */
function choose(message) {
  running.get(open.id)?.abort();
  show(open, message);
  save(open);
  draw();
}

/**
 * @param {Conversation} conversation
 * @param {Message} question
 * @param {Message} [message] that becomes the answer; none: a new one
 */
async function answerTo(conversation, question, message) {
  conversation.settings.model = modelOf(conversation)?.id ?? conversation.settings.model;
  const controller = new AbortController();
  running.set(conversation.id, controller);
  const { model } = conversation.settings;
  if (message) restart(conversation, message, model);
  else message = add(conversation, question.id, { role: "assistant", content: "", model });
  writing.add(message.id);
  draw();
  thread.toEnd();
  byId("announce").textContent = "Answering";
  await save(conversation);
  let saved = Date.now();
  await answer(conversation, question, message, controller.signal, () => {
    thread.update(message);
    if (Date.now() - saved > 1000) {
      saved = Date.now();
      save(conversation);
    }
  });
  if (running.get(conversation.id) === controller) running.delete(conversation.id);
  await save(conversation);
  writing.delete(message.id);
  draw();
  byId("announce").textContent = message.problem ?? "Answer complete";
}

// ---- The server ----

let meeting = 0; // the timer of the next try

async function meetServer() {
  clearTimeout(meeting);
  try {
    models = await askForModels();
  } catch (error) {
    const { status, message } = /** @type {import("./server.js").ServerError} */ (error);
    if (status === 401 && (await askForKey())) return meetServer();
    notice(message, meetServer);
    if (status === 0) meeting = setTimeout(meetServer, TRY_AGAIN);
    return;
  }
  notice(store.keeps ? "" : "This browser does not let the page keep conversations: they are gone when it is closed.");
  select.replaceChildren(...models.map(({ id }) => new Option(label(id), id)));
  draw();
}

// ---- Controls ----

prompt.addEventListener("input", () => fit(prompt));
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    /** @type {HTMLFormElement} */ (byId("composer")).requestSubmit();
  } else if (event.key === "ArrowUp" && !prompt.value && !running.has(open.id)) {
    event.preventDefault();
    thread.editLast();
  }
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || running.has(open.id)) return;
  prompt.value = "";
  fit(prompt);
  send(text);
});
byId("stop").addEventListener("click", () => {
  running.get(open.id)?.abort();
  prompt.focus();
});
byId("new").addEventListener("click", newChat);
byId("menu").addEventListener("click", () => drawer(true));
byId("scrim").addEventListener("click", () => drawer(false));
byId("export").addEventListener("click", exportAll);
byId("import").addEventListener("click", () => byId("import-file").click());
byId("import-file").addEventListener("change", (event) => {
  const field = /** @type {HTMLInputElement} */ (event.target);
  if (field.files?.[0]) importAll(field.files[0]);
  field.value = "";
});
byId("settings").addEventListener("click", () => editSettings(open.settings, settingsChanged));
select.addEventListener("change", () => {
  open.settings.model = select.value;
  settingsChanged();
});

function settingsChanged() {
  open.changed = Date.now();
  keepSettings(open.settings);
  save(open);
  draw();
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
const drawTheme = () => byId("theme").setAttribute("aria-pressed", String(theme() === "dark"));
dark.addEventListener("change", drawTheme);
byId("theme").addEventListener("click", () => {
  const wanted = theme() === "dark" ? "light" : "dark";
  const system = dark.matches ? "dark" : "light";
  // The system's own is followed from now on.
  if (wanted === system) {
    delete document.documentElement.dataset.theme;
    local.set("theme", null);
  } else {
    document.documentElement.dataset.theme = wanted;
    local.set("theme", wanted);
  }
  drawTheme();
});

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && !event.altKey && !event.shiftKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    newChat();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (document.body.classList.contains("drawer")) {
      drawer(false);
      byId("menu").focus();
    } else running.get(open.id)?.abort();
  }
});
window.addEventListener("popstate", route);

if (navigator.userAgent.includes("Mac")) part(byId("new"), "kbd").textContent = "⌘ K";
drawTheme();
route();
meetServer();
