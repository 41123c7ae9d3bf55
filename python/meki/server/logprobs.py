"""Log-probabilities of tokens, in the two forms of OpenAI's API."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any

from ..answers import Content, Reasoning, ToolCallArguments
from ..generation import TokenLogprobs, TopLogprob

IMPOSSIBLE = -9999.0
"""OpenAI's number for minus infinity, which is no JSON."""


def chat_logprobs(tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Of a chat's choice, or of a chunk of one."""
    return {"content": text_logprobs(tokens), "refusal": None}


def text_logprobs(tokens: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """Of a text, token by token."""
    return [{**_described(token), "top_logprobs": [_described(top) for top in token.top]} for token in tokens]


class PartTokens:
    """Which tokens the texts of an answer were written with: markers, and spaces beside them, are of none."""

    def __init__(self, take: Callable[[], Sequence[TokenLogprobs]]) -> None:
        """take: the tokens since the last call, those of the next part among them."""
        self._take = take
        self._tokens: list[TokenLogprobs] = []
        self._last: type[Content] | type[Reasoning] | type[ToolCallArguments] | None = None

    def of(self, part: Content | Reasoning | ToolCallArguments) -> list[TokenLogprobs]:
        """Of the answer's next text: all that have a byte of it. One that two texts share is the first one's."""
        self._tokens += self._take()
        written = b"".join(token.text for token in self._tokens)
        its = part.text.encode()
        # A marker before the text may have it, too; what comes behind is held back, and hardly ever anything.
        found = written.rfind(its) if type(part) is not self._last else written.find(its)
        begin = max(found, 0)  # not there: bytes that are no characters were written in its place
        self._last = type(part)
        end = begin + len(its) if its in written else len(written)
        tokens, left, at = [], [], 0
        for token in self._tokens:
            if at >= end:
                left.append(token)
            elif at + len(token.text) > begin:
                tokens.append(token)
            at += len(token.text)
        self._tokens = left
        return tokens


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
