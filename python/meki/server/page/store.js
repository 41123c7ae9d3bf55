/** Conversations, kept in this browser's IndexedDB, which the page's tabs share. */

const STORE = "conversations";

/** @typedef {import("./conversation.js").Conversation} Conversation */

export class Store {
  /** @param {IDBDatabase | null} database null: nothing is kept */
  constructor(database) {
    this.database = database;
    this.tabs = new BroadcastChannel("meki");
  }

  /** @returns {Promise<Store>} one that keeps nothing where the browser does not let it, or cannot read what is there */
  static async open() {
    try {
      const request = indexedDB.open("meki", 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
      const store = new Store(await done(request));
      await store.all();
      return store;
    } catch {
      return new Store(null);
    }
  }

  /** @returns {boolean} */
  get keeps() {
    return this.database !== null;
  }

  /** @returns {Promise<Conversation[]>} */
  async all() {
    return this.database ? done(this.#objects("readonly").getAll()) : [];
  }

  /** @param {(id: string, conversation?: Conversation) => void} changed is told what another tab keeps or deletes */
  watch(changed) {
    this.tabs.onmessage = ({ data }) => changed(data.id, data.conversation);
  }

  /** @param {Conversation} conversation */
  async put(conversation) {
    if (!this.database) return;
    this.tabs.postMessage({ id: conversation.id, conversation });
    await written(this.#objects("readwrite").put(conversation));
  }

  /** @param {string} id of a conversation */
  async delete(id) {
    if (!this.database) return;
    this.tabs.postMessage({ id });
    await written(this.#objects("readwrite").delete(id));
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
