"""Text as it is generated: token ids to characters, and where a stop string ends it."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile

from tokenizers import Tokenizer

BROKEN = "\ufffd"
"""Stands for bytes that make no character."""
CONTEXT = 4
"""Tokens behind which nothing that came before changes a text: a character has at most four bytes, a token one or more,
and what a decoder does at the beginning of a text it does to the first of them."""
PROVEN = 16
"""Bytes that are characters so far, from which on a run of byte tokens is taken to go on so."""


def _byte_level_alphabet() -> dict[str, int]:
    """The bytes by the characters that stand for them in the tokens of a byte-level tokenizer: printable ones of
    Latin-1 stand for themselves, the others are counted through from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(0x100) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()


class Vocabulary:
    """What the tokens of a tokenizer are to its text. Immutable and thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.added_tokens = {token.content: id for id, token in added.items()}
        """Ids by their texts, of the tokens that are found in a text before it is cut."""
        self.special_tokens = {token.content: id for id, token in added.items() if token.special}
        """Those of them that have no text."""
        self._special_ids = frozenset(self.special_tokens.values())
        ids = {tokenizer.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        falls_back = "ByteFallback" in repr(tokenizer.decoder)
        self.bytes: Mapping[int | None, int] = ids if falls_back else {}
        """Of a decoder that makes characters of tokens such as <0x0A>: their bytes by their ids."""
        self._byte_level = "ByteLevel" in repr(tokenizer.decoder)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def has_text(self, token_id: int) -> bool:
        """False: the token is special, or an id that the tokenizer does not have (a padded vocabulary)."""
        return token_id not in self._special_ids and self.tokenizer.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, which need not be whole characters; of a special token its name, of an id that
        the tokenizer does not have nothing."""
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._special_ids:
            return str(token).encode()
        if (byte := self.bytes.get(token_id)) is not None:
            return bytes((byte,))
        if self._byte_level and all(character in _BYTES for character in token):
            return bytes(_BYTES[character] for character in token)
        before, text = (self.decode([*self._text_before, *ids]) for ids in ([], [token_id]))
        return (text.removeprefix(before) if text.startswith(before) else self.decode([token_id])).encode()

    @cached_property
    def _text_before(self) -> list[int]:
        """A token that has text, behind which nothing is done that is done to the beginning of a text; or none."""
        ids = (id for id in range(self.tokenizer.get_vocab_size()) if self.has_text(id) and id not in self.bytes)
        return next(([id] for id in ids if self.decode([id]).isalpha()), [])


class Detokenizer:
    """The text of the tokens behind a prompt, piece by piece: `decode` of the whole sequence without the beginning that
    it shares with `decode` of the prompt. A character that spans tokens comes out whole, and with its last token.

    A tokenizer with byte tokens makes characters of a run of them only if all of it is UTF-8, and else of each byte a
    U+FFFD. So a run is held back until it ends, but not for more than `PROVEN` bytes, whole characters; from there on
    it comes out character by character, and a byte that makes none leaves those before it as they are.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._window: list[int] = []  # the last tokens that have text
        self._shown = 0  # characters of the window's text that came out
        self._known = ""  # what came out, in a flush, of text that further tokens may change
        self._run: _ByteRun | None = None
        for token_id in self._last_tokens(prompt_ids):
            self._advance(token_id)
        self.flush()  # the prompt's own

    def push(self, token_id: int) -> str:
        """The characters that this token completes, maybe none."""
        piece = self._advance(token_id)
        if not self._known:
            return piece
        common = _in_common(self._known, piece)
        self._known = self._known[common:] if common == len(piece) else ""
        return piece[common:]

    def flush(self) -> str:
        """What the last tokens leave incomplete, with U+FFFD where bytes are missing."""
        rest = self._vocabulary.decode(self._window)[self._shown :] + self._unfinished()
        known, self._known = self._known, rest
        return rest[_in_common(known, rest) :]

    def _last_tokens(self, prompt_ids: Sequence[int]) -> Sequence[int]:
        """From the last `CONTEXT` tokens that have text on, byte tokens not counted."""
        wanted = CONTEXT
        for start in reversed(range(len(prompt_ids))):
            token_id = prompt_ids[start]
            wanted -= token_id not in self._vocabulary.bytes and self._vocabulary.has_text(token_id)
            if not wanted:
                return prompt_ids[start:]
        return prompt_ids

    def _advance(self, token_id: int) -> str:
        """The text that is certain with this token and was not before."""
        if not self._vocabulary.has_text(token_id):
            return ""
        if (byte := self._vocabulary.bytes.get(token_id)) is not None:
            return self._advance_run(token_id, byte)
        late, self._run = self._unfinished(), None
        self._window.append(token_id)
        text = self._vocabulary.decode(self._window)
        held = text.endswith(BROKEN)  # it may be the beginning of a character; one at the most is
        piece = text[self._shown : len(text) - held]
        if len(self._window) > 2 * CONTEXT:  # not each time: it costs as much as the token itself
            self._window = self._window[-CONTEXT:]
            text = self._vocabulary.decode(self._window)
        self._shown = len(text) - held
        return late + piece

    def _advance_run(self, token_id: int, byte: int) -> str:
        if self._run is None:
            self._run = _ByteRun()
        certain = self._run.certain
        text = self._run.push(byte)
        if certain:
            return text
        self._window.append(token_id)
        if not self._run.certain:
            return ""
        text = self._vocabulary.decode(self._window)
        piece, self._shown = text[self._shown :], len(text)
        return piece

    def _unfinished(self) -> str:
        return self._run.unfinished() if self._run is not None and self._run.certain else ""


class _ByteRun:
    """Byte tokens in a row."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._broken = False
        self._length = 0
        self.certain = False
        """What its bytes so far become will not change: they are not UTF-8, or they were for long enough."""

    def push(self, byte: int) -> str:
        """The text that the byte completes, in a run that is `certain`."""
        if self._broken:
            return BROKEN
        self._length += 1
        waiting = self.unfinished()
        try:
            text = self._decoder.decode(bytes((byte,)))
        except UnicodeDecodeError:
            self._broken = self.certain = True
            return waiting + BROKEN
        self.certain = self.certain or (self._length >= PROVEN and text != "")
        return text

    def unfinished(self) -> str:
        """A U+FFFD for each byte of a character that is not complete."""
        return "" if self._broken else BROKEN * len(self._decoder.getstate()[0])


def _in_common(one: str, two: str) -> int:
    """Characters at the beginning that both have."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


class StopStrings:
    """Ends a text before the stop string that is completed first; of several completed by the same character, before
    the longest. The result does not depend on how the text is cut into pieces.

    Special tokens have no text. Where a stop string spells one out, the token itself (`mark`) counts as that.
    """

    def __init__(self, stops: Sequence[str], special_tokens: Mapping[str, int] | None = None) -> None:
        """special_tokens: ids by their texts."""
        named = {text: id for text, id in (special_tokens or {}).items() if any(text in stop for stop in stops)}
        # In a text each is one character that no decoded text has: half of a UTF-16 pair.
        marks = {text: chr(0xD800 + index) for index, text in enumerate(sorted(named, key=len, reverse=True))}
        self._marks = {named[text]: mark for text, mark in marks.items()}
        self._stops = list(stops)
        if marks:
            pattern = re.compile("|".join(map(re.escape, marks)))
            self._stops += [pattern.sub(lambda match: marks[match[0]], stop) for stop in stops]
        self._given = list(stops)
        self._held = ""
        self.completed: str | None = None
        """The stop string that ended the text, as it was given; None: none yet."""

    def mark(self, token_id: int) -> str:
        """What stands in a text for this token, if it is special and part of a stop string."""
        return self._marks.get(token_id, "")

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string was completed. What may be the beginning of a stop
        string is held back."""
        text = self._held + piece
        found = [
            (start + len(stop), start, index)
            for index, stop in enumerate(self._stops)
            if (start := text.find(stop)) >= 0
        ]
        if found:
            _, start, index = min(found)
            self._held = ""
            self.completed = self._given[index % len(self._given)]  # behind those given come the same with marks
            return self._without_marks(text[:start]), True
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        # The leftmost suffix that a stop string could begin with; any later one lies inside it.
        first = max(0, len(text) - longest)
        starts = range(first, len(text))
        cut = next((at for at in starts if any(stop.startswith(text[at:]) for stop in self._stops)), len(text))
        self._held = text[cut:]
        return self._without_marks(text[:cut]), False

    def flush(self) -> str:
        """The text held back, once no more can follow."""
        held, self._held = self._held, ""
        return self._without_marks(held)

    def _without_marks(self, text: str) -> str:
        for mark in self._marks.values():
            text = text.replace(mark, "")
        return text
