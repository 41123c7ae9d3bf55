"""Text as it is generated: token ids to characters, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Turns the tokens of one generation into text. A character that spans tokens comes out whole; special tokens
    have no text. All pieces and `flush()` together are `tokenizer.decode(ids)`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._length = 0

    def push(self, token_id: int) -> str:
        """The characters that this token completes, maybe none."""
        self._ids.append(token_id)
        piece: str = self._stream.step(self._tokenizer, token_id) or ""
        self._length += len(piece)
        return piece

    def flush(self) -> str:
        """What the end of the tokens leaves incomplete, with U+FFFD where bytes are missing."""
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return text[self._length :]


class StopStrings:
    """Ends a text before the stop string that is completed first; of several completed by the same character, before
    the longest. The result does not depend on how the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is now certain, and whether a stop string was completed. What may be the beginning of a stop
        string is held back."""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        # The leftmost suffix that a stop string could begin with; any later one lies inside it.
        first = max(0, len(text) - longest)
        starts = range(first, len(text))
        cut = next((at for at in starts if any(stop.startswith(text[at:]) for stop in self._stops)), len(text))
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """The text held back, once no more can follow."""
        held, self._held = self._held, ""
        return held
