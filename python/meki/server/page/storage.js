/** Small texts that the browser keeps, or the page alone where the browser does not let it. */

class Texts {
  /** @param {() => Storage} storage asked for at every use: where site data is blocked, that throws */
  constructor(storage) {
    this.storage = storage;
    /** @type {Map<string, string | null>} what the browser did not take */
    this.unkept = new Map();
  }

  /**
   * @param {string} name
   * @returns {string | null} null: there is none
   */
  get(name) {
    const unkept = this.unkept.get(name);
    if (unkept !== undefined) return unkept;
    try {
      return this.storage().getItem(name);
    } catch {
      return null;
    }
  }

  /**
   * @param {string} name
   * @param {string | null} text null: none
   */
  set(name, text) {
    try {
      if (text === null) this.storage().removeItem(name);
      else this.storage().setItem(name, text);
      this.unkept.delete(name);
    } catch {
      this.unkept.set(name, text);
    }
  }
}

export const local = new Texts(() => localStorage);
export const ofTab = new Texts(() => sessionStorage);
