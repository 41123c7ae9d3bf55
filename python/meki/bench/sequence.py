"""Sessions that are measured: one that prefills, and one that is held at a depth and decodes there again and again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .. import _core
from .machine import storage_bytes

GREEDY = _core.SamplingOptions(temperature=0.0)
_SEED = 20_260_203
_STARTS = 100
"""Tokens from which a generation may start, tried one after the other when the model ends its text."""


class SessionStats(Protocol):
    """What is read of `_core.Stats`."""

    @property
    def prefill_tokens(self) -> int: ...
    @property
    def prefill_ns(self) -> int: ...
    @property
    def prefill_stall_ns(self) -> int: ...
    @property
    def decode_tokens(self) -> int: ...
    @property
    def decode_ns(self) -> int: ...
    @property
    def sample_ns(self) -> int: ...
    @property
    def stall_ns(self) -> Sequence[int]: ...


class MeasuredSession(Protocol):
    """What is used of `_core.Session`."""

    @property
    def stats(self) -> SessionStats: ...
    def append(self, token_ids: Sequence[int]) -> None: ...
    def start(self, sampling: _core.SamplingOptions, max_new_tokens: int) -> None: ...
    def next(self) -> int | None: ...
    def rewind(self, length: int) -> None: ...
    def fill_synthetic(self, count: int) -> None: ...
    def kv_bytes(self, tokens: int) -> int: ...
    def reset_stats(self) -> None: ...


@dataclass(frozen=True)
class Block:
    """What one prefill, or some decode steps in a row, took."""

    tokens: int
    ns: int
    """Inside the engine, without Python."""
    sample_ns: int
    """Of `ns`: in the sampler."""
    stall_ns: tuple[int, ...]
    """The wait for rows: of each decode step, or of a prefill the mean of its tokens; empty in a dense model."""
    storage_bytes: int | None
    """What the whole process fetched from storage in the meantime; None: the system does not tell."""


def capacity(depth: int, steps: int) -> int:
    """Tokens that a session needs for `steps` decode steps at `depth`: the sequence, and the token that the last step
    makes. A generation needs a token to start from, so depth 0 is one token."""
    return max(depth, 1) + steps + 1


def random_ids(count: int, vocab_size: int) -> list[int]:
    """Pseudo-random token ids, the same at every call."""
    ids: list[int] = np.random.default_rng(_SEED).integers(vocab_size, size=count).tolist()
    return ids


class PrefillSequence:
    """Computes the same `tokens` pseudo-random tokens from an empty cache. The session holds one token more."""

    def __init__(
        self,
        session: MeasuredSession,
        tokens: int,
        vocab_size: int,
        *,
        has_rows: bool,
        before_step: Callable[[], None],
    ) -> None:
        self._session = session
        self._ids = random_ids(tokens, vocab_size)
        self._has_rows = has_rows
        self._before_step = before_step

    def run(self) -> Block:
        session = self._session
        session.rewind(0)
        session.append(self._ids)
        session.start(GREEDY, 1)
        session.reset_stats()
        self._before_step()
        stored = storage_bytes()
        session.next()
        stats = session.stats
        _check_count("prefill", stats.prefill_tokens, len(self._ids))
        stall = (stats.prefill_stall_ns // stats.prefill_tokens,) if self._has_rows else ()
        return Block(stats.prefill_tokens, stats.prefill_ns, 0, stall, _since(stored))


class DecodeSequence:
    """Greedy decode steps from a cache of max(depth, 1) tokens on.

    The tokens are the same after every `rewind`, so that their rows are in the page cache from the second time on. When
    the model ends its text, the sequence goes back to its depth and starts from another token. `before_step` is called
    before every step, and so before the request for the rows of the next one.
    """

    def __init__(
        self,
        session: MeasuredSession,
        depth: int,
        vocab_size: int,
        *,
        synthetic: bool,
        before_step: Callable[[], None],
    ) -> None:
        """Fills the cache: by a prefill, or `synthetic`, with what was not computed. `session` is empty and has the
        `capacity` for all steps between two rewinds."""
        self._session = session
        self._base = max(depth, 1) - 1  # the last token of the depth is the one that a generation starts from
        self._before_step = before_step
        self._start_ids = random_ids(_STARTS, vocab_size)
        self._starts: Iterator[int] = iter(())
        self.history: list[bool] = []
        """For every step of one token so far: whether a block that `decode` returned counts it."""
        if self._base and synthetic:
            session.fill_synthetic(self._base)
        elif self._base:
            session.append(random_ids(self._base, vocab_size))
            session.start(GREEDY, 1)
            session.next()

    def rewind(self) -> None:
        """Back to the depth."""
        self._starts = itertools.cycle(self._start_ids)
        self._begin()

    def decode(self, tokens: int) -> Block:
        """`tokens` steps that are measured, after one that is not: the rows of a block's first step were requested
        before it, perhaps long before."""
        self._step(counted=False)
        self._session.reset_stats()
        stored = storage_bytes()
        for _ in range(tokens):
            self._step(counted=True)
        stats = self._session.stats
        _check_count("decode", stats.decode_tokens, tokens)
        return Block(tokens, stats.decode_ns, stats.sample_ns, tuple(stats.stall_ns), _since(stored))

    def _step(self, *, counted: bool) -> None:
        self._before_step()
        self.history.append(counted)
        if self._session.next() is None:  # the step was computed, but ended the text
            self._begin()

    def _begin(self) -> None:
        """Computes the last token of the depth and has the next one pending. No decode step in the statistics."""
        for _ in range(_STARTS):
            self._session.rewind(self._base)
            self._session.append([next(self._starts)])
            self._session.start(GREEDY, 0)
            self._before_step()
            self.history.append(False)
            if self._session.next() is not None:
                return
        raise RuntimeError(
            f"the model ends its text after every one of {_STARTS} pseudo-random tokens, so that no decode step can be "
            "measured; measure a package whose manifest names no end token (tokenizer.eos_token_ids)"
        )


def _check_count(kind: str, got: int, expected: int) -> None:
    if got != expected:
        raise RuntimeError(f"the engine counted {got} {kind} tokens, expected {expected}; the measurement is void")


def _since(stored: int | None) -> int | None:
    now = storage_bytes()
    return None if stored is None or now is None else now - stored
