/** Conversations, kept in this browser's IndexedDB, which the page's tabs share. */

const STORE = "conversations";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {(id: string, conversation?: Conversation) => void} Changed is told what another tab keeps, or deletes
 */

export class Store {
  /** @param {IDBDatabase | null} database null: nothing is kept */
  constructor(database) {
    this.database = database;
    /** @type {Conversation[]} what was kept when the page was opened */
    this.kept = [];
    /** @type {[string, Conversation | undefined][]} what other tabs tell before somebody watches */
    this.early = [];
    /** @type {Changed} */
    this.changed = (id, conversation) => {
      this.early.push([id, conversation]);
    };
    this.tabs = database && new BroadcastChannel("meki");
    if (this.tabs) this.tabs.onmessage = ({ data }) => this.changed(data.id, data.conversation);
  }

  /** @returns {Promise<Store>} one that keeps nothing where the browser does not let it, or cannot read what is there */
  static async open() {
    try {
      const request = indexedDB.open("meki", 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
      const store = new Store(await done(request));
      store.kept = await done(store.#objects("readonly").getAll());
      return store;
    } catch {
      return new Store(null);
    }
  }

  /** @returns {boolean} */
  get keeps() {
    return this.database !== null;
  }

  /** @param {Changed} changed */
  watch(changed) {
    this.changed = changed;
    for (const [id, conversation] of this.early.splice(0)) changed(id, conversation);
  }

  /** @param {Conversation} conversation */
  async put(conversation) {
    if (!this.database) return;
    const kept = structuredClone(conversation); // it may be more when it is written
    await written(this.#objects("readwrite").put(kept));
    this.tabs?.postMessage({ id: kept.id, conversation: kept });
  }

  /** @param {string} id of a conversation */
  async delete(id) {
    if (!this.database) return;
    await written(this.#objects("readwrite").delete(id));
    this.tabs?.postMessage({ id });
  }

  /** @param {IDBTransactionMode} mode */
  #objects(mode) {
    return /** @type {IDBDatabase} */ (this.database).transaction(STORE, mode).objectStore(STORE);
  }
}

/**
 * @template T
 * @param {IDBRequest<T>} request
 * @returns {Promise<T>}
 */
function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/**
 * @param {IDBRequest} request that writes
 * @returns {Promise<void>} when it is kept: a full disk ends the transaction after the request's own success
 */
function written(request) {
  const transaction = /** @type {IDBTransaction} */ (request.transaction);
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}
