"""Log-probabilities of tokens through the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..engine import Engine
from ..prefix_cache import common_prefix

_ROWS = 256
"""Rows of logits in memory at a time: those of a long text would take gigabytes."""


class Scorer:
    """Scores sequences one after the other, in one session: what a sequence has in common with the one before is not
    computed again. For one thread at a time."""

    def __init__(self, engine: Engine, context: int) -> None:
        """context: most tokens of a sequence without its last, which is predicted only."""
        self._session = engine.session(context=context)

    def score(self, token_ids: Sequence[int], start: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """ln p(token | all before it) for each token from position `start`, at least 1, to the end; and whether it is
        the most probable one."""
        scores = [
            (log_probabilities(logits, targets), logits.argmax(axis=1) == targets)
            for logits, targets in self.logits(token_ids, start)
        ]
        return np.concatenate([log for log, _ in scores]), np.concatenate([best for _, best in scores])

    def logits(self, token_ids: Sequence[int], start: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.integer]]]:
        """What predicts each token from position `start`, at least 1, to the end, piece by piece: logits
        [n, vocab_size], and the tokens [n]."""
        session = self._session
        known = common_prefix(session.tokens, token_ids[: start - 1])
        session.rewind(known)
        for first in range(start, len(token_ids), _ROWS):
            end = min(first + _ROWS, len(token_ids))
            yield session.logits(token_ids[known : end - 1], first - 1 - known), np.array(token_ids[first:end])
            known = end - 1


def log_probabilities(logits: NDArray[np.float32], token_ids: NDArray[np.integer]) -> NDArray[np.float64]:
    """ln of the softmax of each row of logits [n, vocab_size] at its token [n]."""
    largest = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - largest).sum(axis=1, dtype=np.float64)
    picked = np.take_along_axis(logits, token_ids[:, None], axis=1) - largest
    return picked[:, 0].astype(np.float64) - np.log(total)
