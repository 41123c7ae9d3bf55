/** What the page asks its server for. */

import { eventData } from "./sse.js";
import { ofTab } from "./storage.js";

/**
 * @typedef {{id: string, random_weights: boolean, can_chat: boolean, context: number}} Model
 * @typedef {{content?: string, reasoning_content?: string, tool_calls?: ToolCallPart[]}} Delta
 * @typedef {{index: number, function?: {name?: string, arguments?: string}}} ToolCallPart
 * @typedef {Record<string, number>} Stats numbers of a generation, by the server's names
 * @typedef {{delta?: Delta, finish?: string, stats?: Stats}} Part
 */

/** What went wrong, in words for a reader. */
export class ServerError extends Error {
  /**
   * @param {string} words
   * @param {number} status of HTTP; 0: there was no answer
   */
  constructor(words, status) {
    super(words);
    this.status = status;
  }
}

const KEY = "api-key";

/** @param {string} key used until the tab is closed */
export function useKey(key) {
  ofTab.set(KEY, key);
}

/** @returns {Promise<Model[]>} */
export async function models() {
  const response = await ask("v1/models", {});
  return (await response.json()).data;
}

/**
 * @param {string} text Markdown
 * @returns {Promise<string>} HTML without anything that runs or loads
 */
export async function markdown(text) {
  const response = await ask("markdown", { method: "POST", body: JSON.stringify({ text }) });
  return (await response.json()).html;
}

/**
 * The answer to a conversation, part by part.
 * @param {object} body of /v1/chat/completions
 * @param {AbortSignal} signal ends it
 * @returns {AsyncGenerator<Part>}
 */
export async function* chat(body, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await ask("v1/chat/completions", { method: "POST", body: JSON.stringify(request), signal });
  try {
    for await (const data of eventData(/** @type {any} */ (response.body))) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(`The server could not go on: ${chunk.error.message}`, 500);
      const choice = chunk.choices?.[0];
      yield { delta: choice?.delta, finish: choice?.finish_reason, stats: chunk.usage && statsOf(chunk) };
    }
  } catch (error) {
    if (signal.aborted || error instanceof ServerError) throw error;
    throw new ServerError("The connection was lost before the answer was complete.", 0);
  }
  throw new ServerError("The connection ended before the answer was complete.", 0);
}

/**
 * @param {any} chunk with the usage
 * @returns {Stats}
 */
function statsOf({ usage, meki }) {
  const { prompt_tokens, completion_tokens, prompt_tokens_details: details } = usage;
  const stats = { prompt_tokens, completion_tokens, cached_tokens: details?.cached_tokens, ...meki?.[0] };
  return Object.fromEntries(Object.entries(stats).filter(([, value]) => typeof value === "number"));
}

/**
 * @param {string} path
 * @param {RequestInit} options
 * @returns {Promise<Response>} an answer that is no error
 */
async function ask(path, options) {
  /** @type {Record<string, string>} */
  const headers = { "content-type": "application/json" };
  const key = ofTab.get(KEY);
  // A header is bytes, which fetch wants as Latin-1.
  if (key !== null) headers.authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError("The server does not answer. Is it still running?", 0);
  }
  if (!response.ok) throw new ServerError(await words(response), response.status);
  return response;
}

/**
 * @param {Response} response an error
 * @returns {Promise<string>}
 */
async function words(response) {
  const error = await response.json().then((body) => body.error ?? {}, () => ({}));
  const said = error.message ?? response.statusText;
  const wait = response.headers.get("retry-after");
  switch (response.status) {
    case 401:
      return "The server wants an API key, and this is not it.";
    case 413:
      return "This is more text than the server takes at once. Shorten the message or start a new chat.";
    case 429:
    case 503:
      return `The server is busy. Try again in ${wait ? `${wait} seconds` : "a moment"}.`;
    default:
      if (error.code === "context_length_exceeded")
        return `This chat no longer fits the model's context (${said}). Shorten it, or start a new one.`;
      if (error.code === "model_not_found") return `${said} Choose another model above.`;
      return response.status >= 500 ? `The server failed: ${said}` : `The server refused: ${said}`;
  }
}
