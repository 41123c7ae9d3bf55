"""Log-probabilities of tokens, in the two forms of OpenAI's API."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from ..generation import TokenLogprobs, TopLogprob

IMPOSSIBLE = -9999.0
"""OpenAI's number for minus infinity, which is no JSON."""


def chat_logprobs(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Of a chat's choice, or of a chunk of one."""
    content = [{**_described(token), "top_logprobs": [_described(top) for top in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Of a text completion's choice, chunk after chunk."""

    def __init__(self) -> None:
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Of the next tokens. Those of `text_offset` are characters of the text, from its beginning."""
        shown, offsets = [], []
        for token in tokens:
            # The chosen one as well, if it is none of the most probable ones.
            tops = [*token.top, TopLogprob(token.token_id, token.text, token.logprob)]
            shown.append({_shown(top.text): max(top.logprob, IMPOSSIBLE) for top in tops})
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(token.text))
        return {
            "tokens": [_shown(token.text) for token in tokens],
            "token_logprobs": [max(token.logprob, IMPOSSIBLE) for token in tokens],
            "top_logprobs": shown,
            "text_offset": offsets,
        }


def _described(token: TokenLogprobs | TopLogprob) -> dict[str, Any]:
    return {"token": _shown(token.text), "logprob": max(token.logprob, IMPOSSIBLE), "bytes": list(token.text)}


def _shown(text: bytes) -> str:
    """A token as a text; one that is no whole characters by its bytes, as OpenAI writes such."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
