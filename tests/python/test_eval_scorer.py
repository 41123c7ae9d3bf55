"""Scores of tokens against a prefill of each sequence from scratch, and windows of a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from meki import Engine, Session
from meki.evaluation import scorer
from meki.evaluation.perplexity import HeldOut, engine_score, measure, windows
from meki.evaluation.scorer import Scorer, log_probabilities


@pytest.fixture(scope="module")
def exact(make_package: Callable[..., Path]) -> Engine:
    return Engine(make_package(), threads=1, kv_type="float32")


def naive(engine: Engine, token_ids: list[int], start: int) -> NDArray[np.float64]:
    logits = engine.logits(token_ids).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return np.array([logs[at - 1, token_ids[at]] for at in range(start, len(token_ids))])


def random_ids(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 300, count).tolist()


def test_sequences_one_after_the_other_are_scored_as_each_alone(exact: Engine) -> None:
    header, rest = random_ids(1, 40), random_ids(2, 30)
    sequences = [
        ([*header, *rest], 45),
        ([*header, *rest[:20], 7, 8, 9], 60),  # as long in common as the context
        ([*header, *rest[:20], 7, 8, 5], 60),
        (header[:10], 9),  # the beginning of the last
        ([*header[:10], 3], 1),
        ([*header[:10], 3], 1),  # the same again
        (rest, 29),  # nothing in common
    ]
    scored = Scorer(exact, 127)
    for token_ids, start in sequences:
        scores, best = scored.score(token_ids, start)
        # float32 sums over 64 inputs in another order: 1e-5 of scores around -6.
        np.testing.assert_allclose(scores, naive(exact, token_ids, start), rtol=0, atol=1e-4)
        assert best.tolist() == (exact.logits(token_ids).argmax(axis=1)[start - 1 : -1] == token_ids[start:]).tolist()


def test_the_most_probable_token_is_told(exact: Engine) -> None:
    token_ids = random_ids(3, 20)
    token_ids.append(int(exact.logits(token_ids)[-1].argmax()))
    assert Scorer(exact, 32).score(token_ids, 20)[1].tolist() == [True]
    assert Scorer(exact, 32).score([*token_ids[:-1], 299 - token_ids[-1]], 20)[1].tolist() == [False]


def test_rows_of_logits_are_made_piece_by_piece(exact: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    token_ids = random_ids(4, 100)
    expected = naive(exact, token_ids, 10)
    made = []
    whole = Session.logits

    def logits(session: Session, token_ids: list[int], start: int = 0) -> NDArray[np.float32]:
        made.append(whole(session, token_ids, start))
        return made[-1]

    monkeypatch.setattr(Session, "logits", logits)
    monkeypatch.setattr(scorer, "_ROWS", 8)
    np.testing.assert_allclose(Scorer(exact, 100).score(token_ids, 10)[0], expected, rtol=0, atol=1e-4)
    assert sum(map(len, made)) == 90 and max(map(len, made)) == 8


def test_log_probabilities_of_large_logits() -> None:
    logits = np.array([[1000.0, 999.0], [-1e30, 0.0]], np.float32)
    expected = [-math.log1p(math.exp(-1)), 0.0]
    np.testing.assert_allclose(log_probabilities(logits, np.array([0, 1])), expected, rtol=1e-6)


@given(st.integers(0, 60), st.integers(1, 20))
def test_windows_predict_every_token_once(count: int, size: int) -> None:
    token_ids = list(range(count))
    pieces = list(windows(token_ids, -1, size))
    assert [token for piece, start in pieces for token in piece[start:]] == token_ids
    assert all(1 <= start < len(piece) <= size + 1 for piece, start in pieces)
    for piece, _start in pieces:  # a window is a piece of the text, as long as there can be one
        assert piece == list(range(piece[0], piece[0] + len(piece)))
        assert len(piece) == min(size, count) + 1


def test_perplexity_of_windows(exact: Engine) -> None:
    token_ids = random_ids(5, 70)
    pieces = list(windows(token_ids, 0, 32))
    found = measure(engine_score(exact, 32), HeldOut(pieces, 200))
    nats = -sum(naive(exact, piece, start).sum() for piece, start in pieces)
    assert found.tokens == 70
    assert found.nats_per_token == pytest.approx(nats / 70, abs=1e-5)
    assert found.per_token == pytest.approx(math.exp(nats / 70), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 200, rel=1e-5)
