/** One answer, as it arrives. */

import { requestBody } from "./conversation.js";
import { chat, ServerError } from "./server.js";
import { askForKey } from "./settings.js";

/**
 * @typedef {import("./conversation.js").Conversation} Conversation
 * @typedef {import("./conversation.js").Message} Message
 */

/**
 * Fills `message` with the answer to `question`; whatever happens, it is over at the end.
 * @param {Conversation} conversation
 * @param {Message} question
 * @param {Message} message
 * @param {AbortSignal} signal ends it early
 * @param {() => void} changed is called when there is more of it
 */
export async function answer(conversation, question, message, signal, changed) {
  let began = 0; // when it began to think
  try {
    for await (const { delta, finish, stats } of chat(requestBody(conversation, question), signal)) {
      if (delta?.reasoning_content) {
        began ||= performance.now();
        message.reasoning += delta.reasoning_content;
      }
      if (began && message.thought === undefined && (delta?.content || delta?.tool_calls || finish))
        message.thought = (performance.now() - began) / 1000;
      message.content += delta?.content ?? "";
      for (const { index, function: called } of delta?.tool_calls ?? []) {
        message.calls[index] ??= { name: "", arguments: "" };
        message.calls[index].name += called?.name ?? "";
        message.calls[index].arguments += called?.arguments ?? "";
      }
      if (finish) message.finish = finish;
      if (stats) message.stats = stats;
      changed();
    }
    message.finish ??= "stop";
  } catch (error) {
    if (signal.aborted) {
      message.finish = "stopped";
    } else if (error instanceof ServerError && error.status === 401 && (await askForKey())) {
      await answer(conversation, question, message, signal, changed);
    } else {
      message.finish = "failed";
      message.problem = /** @type {Error} */ (error).message;
    }
  }
}
