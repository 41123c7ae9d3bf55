/** What an answer cost, in a line. */

const ENDS = {
  stopped: "stopped",
  length: "cut off at the most tokens allowed",
  failed: "incomplete",
};

/**
 * @param {import("./conversation.js").Message} message an answer that is over
 * @returns {string}
 */
export function numbersOf({ finish, stats = {} }) {
  const parts = [finish === undefined ? "interrupted" : ENDS[/** @type {keyof typeof ENDS} */ (finish)]];
  const { completion_tokens, decode_tokens_per_s, time_to_first_token_s, prompt_tokens, cached_tokens } = stats;
  if (completion_tokens !== undefined) parts.push(`${count(completion_tokens)} ${completion_tokens === 1 ? "token" : "tokens"}`);
  if (decode_tokens_per_s !== undefined) parts.push(`${decode_tokens_per_s.toFixed(1)} tokens/s`);
  if (time_to_first_token_s !== undefined) parts.push(`first after ${time_to_first_token_s.toFixed(2)} s`);
  if (prompt_tokens !== undefined)
    parts.push(`prompt ${count(prompt_tokens)}${cached_tokens ? `, ${count(cached_tokens)} cached` : ""}`);
  if (stats.stall_us_p50 !== undefined)
    parts.push(`ROM wait ${micros(stats.stall_us_p50)}${stats.stall_us_p99 === undefined ? "" : `, p99 ${micros(stats.stall_us_p99)}`}`);
  return parts.filter(Boolean).join("  ·  ");
}

/** @param {number} number */
export function count(number) {
  return number.toLocaleString("en");
}

/** @param {number} value microseconds */
function micros(value) {
  return value < 1000 ? `${Math.round(value)} µs` : `${(value / 1000).toFixed(1)} ms`;
}
