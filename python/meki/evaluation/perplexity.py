"""Perplexity of a text, in windows of the context."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ..engine import Engine
from ..package.files import open_text
from .scorer import Scorer

Score = Callable[[Sequence[int], int], NDArray[np.float64]]
"""score(token_ids, start): as the first of what `Scorer.score` returns."""


def windows(token_ids: Sequence[int], prefix: int, size: int) -> Iterator[tuple[list[int], int]]:
    """Cuts a text so that each of its tokens is predicted once: (tokens, position of the first that is predicted).

    The first window begins with `prefix`, the token that begins a text; each other one with the last token of the one
    before, the last one with as many as fill it. A model is given at most `size` tokens, all but the last.
    """
    whole = [prefix, *token_ids]
    for first in range(1, len(whole), size):
        end = min(first + size, len(whole))
        begin = max(0, end - size - 1)
        yield whole[begin:end], first - begin


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, which may be compressed: .xz or .gz. ValueError for one that is not there, not UTF-8,
    or has nothing to predict."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file of text")
    with open_text(file) as lines:
        text = lines.read()
    if not text:
        raise ValueError(f"{file}: has no text; give one with at least a character")
    return text


@dataclass(frozen=True)
class HeldOut:
    """Texts to predict: windows of them as `windows` cuts them, and what they stand for."""

    windows: list[tuple[list[int], int]]
    bytes: int
    """Of the texts in UTF-8."""

    @classmethod
    def of_text(cls, engine: Engine, text: str, context: int) -> Self:
        """A text in the tokens of the engine's model. context: the size of the windows. ValueError for a model that has
        no token that begins a text."""
        prefix = engine.requests.prompts.encode("", first=True)[0]
        token_ids = engine.requests.prompts.encode_text(text, special=False)
        return cls(list(windows(token_ids, prefix, context)), len(text.encode()))

    @property
    def tokens(self) -> int:
        return sum(len(token_ids) - start for token_ids, start in self.windows)


@dataclass(frozen=True)
class Perplexity:
    """How well texts are predicted."""

    nats: float
    """Sum of -ln p(token) over all tokens."""
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def per_token(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def measure(score: Score, held_out: HeldOut, name: str = "") -> Perplexity:
    """Shows progress on stderr, if that is a terminal, as of `name`."""
    nats = 0.0
    with tqdm(total=held_out.tokens, desc=name, unit="tok", disable=None) as bar:
        for token_ids, start in held_out.windows:
            nats -= float(score(token_ids, start).sum())
            bar.update(len(token_ids) - start)
    return Perplexity(nats, held_out.tokens, held_out.bytes)


def engine_score(engine: Engine, context: int) -> Score:
    """What `measure` needs of an engine. context: the size of the windows."""
    scorer = Scorer(engine, context)
    return lambda token_ids, start: scorer.score(token_ids, start)[0]
