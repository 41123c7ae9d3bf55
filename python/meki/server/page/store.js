/** Conversations, kept in this browser's IndexedDB. */

const STORE = "conversations";

/** @typedef {import("./conversation.js").Conversation} Conversation */

export class Store {
  /** @param {IDBDatabase | null} database null: nothing is kept */
  constructor(database) {
    this.database = database;
  }

  /** @returns {Promise<Store>} one that keeps nothing where the browser does not let it */
  static async open() {
    try {
      const request = indexedDB.open("meki", 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
      return new Store(await done(request));
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

  /** @param {Conversation} conversation */
  async put(conversation) {
    if (this.database) await written(this.#objects("readwrite").put(conversation));
  }

  /** @param {string} id */
  async delete(id) {
    if (this.database) await written(this.#objects("readwrite").delete(id));
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
