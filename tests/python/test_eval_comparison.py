"""Two models' predictions of a text, against softmaxes of all their logits, and fakes of known logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from meki import Engine
from meki.evaluation import scorer
from meki.evaluation.comparison import Comparison, compare
from meki.evaluation.perplexity import HeldOut

TEXT = "The keeper wrote the name of the ship in the blue book, and the cat looked at the fish. " * 4
CONTEXT = 40


class FakeEngine:
    """Says at every position what it is given, float32 [positions, vocab_size]; a session of its own, too."""

    path = Path("fake")

    def __init__(self, logits: NDArray[np.float32]) -> None:
        self.said, self.tokens = logits, list[int]()

    def session(self, *, context: int) -> FakeEngine:
        return self

    def rewind(self, length: int) -> None:
        del self.tokens[length:]

    def logits(self, token_ids: list[int], start: int = 0) -> NDArray[np.float32]:
        first = len(self.tokens) + start
        self.tokens += token_ids
        return self.said[first : len(self.tokens)]


def compare_fakes(reference: Any, model: Any) -> Comparison:
    engines: list[Any] = [FakeEngine(np.asarray(logits, np.float32)) for logits in (reference, model)]
    count = len(engines[0].said)
    held_out = HeldOut([([0] * (count + 1), 1)], bytes=count)
    return compare(*engines, held_out, count, lambda done, total: None)


def naive(reference: Engine, model: Engine, held_out: HeldOut) -> Comparison:
    rows = []
    for token_ids, start in held_out.windows:
        p, q = (
            np.exp(logits := engine.logits(token_ids[:-1]).astype(np.float64))
            / np.exp(logits).sum(axis=1, keepdims=True)
            for engine in (reference, model)
        )
        for at in range(start, len(token_ids)):
            a, b, token = p[at - 1], q[at - 1], token_ids[at]
            rows.append((sum(a * np.log(a / b)), -math.log(b[token]), -math.log(a[token]), a.argmax() == b.argmax()))
    kl, nats, reference_nats, same = np.array(rows).T
    error = math.sqrt(sum((kl - kl.mean()) ** 2) / (len(kl) - 1) / len(kl))
    return Comparison(math.exp(nats.mean()), math.exp(reference_nats.mean()), kl.mean(), error, same.mean())


@pytest.fixture(scope="module")
def engines(make_package: Callable[..., Path]) -> tuple[Engine, Engine]:
    exact = Engine(make_package("float32", rows="float32"), threads=1, kv_type="float32")
    return exact, Engine(make_package("int4", rows="int4"), threads=1)


def test_against_softmaxes_of_all_logits(engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = HeldOut.of_text(engines[1], TEXT, CONTEXT)
    assert len(held_out.windows) > 2 and held_out.bytes == len(TEXT)
    expected = naive(*engines, held_out)
    assert expected.kl_divergence > 0.001 and 0 < expected.same_top_token < 1
    for rows in (256, 7):
        monkeypatch.setattr(scorer, "_ROWS", rows)
        steps: list[tuple[int, int]] = []
        found = compare(*engines, held_out, CONTEXT, lambda done, total, steps=steps: steps.append((done, total)))
        # Steps of other lengths: a key or value may move to the next int8 code, which moves logits by some 1e-3.
        np.testing.assert_allclose(astuple(found)[:4], astuple(expected)[:4], rtol=0.02)
        assert found.same_top_token == pytest.approx(expected.same_top_token, abs=2 / held_out.tokens)
        assert steps == sorted(set(steps)) and steps[-1] == (held_out.tokens, held_out.tokens)


def test_exact_models_against_softmaxes_of_all_logits(make_package: Callable[..., Path]) -> None:
    """With float32 caches how a text is cut into steps moves nothing by more than rounding."""
    engines = [Engine(make_package(weights), threads=1, kv_type="float32") for weights in ("float32", "int8")]
    held_out = HeldOut.of_text(engines[1], TEXT, CONTEXT)
    expected = naive(engines[0], engines[1], held_out)
    found = compare(engines[0], engines[1], held_out, CONTEXT, lambda done, total: None)
    # Logits of float32 sums in another order: 1e-5 of values around 1; KL is a second-order difference of those.
    np.testing.assert_allclose(astuple(found), astuple(expected), rtol=1e-3)


def test_a_model_is_no_distance_from_itself(engines: tuple[Engine, Engine], make_package: Callable[..., Path]) -> None:
    again = Engine(make_package("int4", rows="int4"), threads=1)
    held_out = HeldOut.of_text(again, TEXT, CONTEXT)
    found = compare(engines[1], again, held_out, CONTEXT, lambda done, total: None)
    assert (found.kl_divergence, found.kl_standard_error, found.same_top_token) == (0, 0, 1)
    assert found.perplexity == found.reference_perplexity


LOGITS = arrays(np.float32, (3, 5), elements=st.floats(-100, 100, width=32))


@given(LOGITS, LOGITS)
def test_divergences_of_any_logits(reference: NDArray[np.float32], model: NDArray[np.float32]) -> None:
    found = compare_fakes(reference, model)
    kl, nats = [], []
    for a, b in zip(reference.tolist(), model.tolist(), strict=True):
        p, q = (
            [value - max(row) - math.log(math.fsum(math.exp(value - max(row)) for value in row)) for value in row]
            for row in (a, b)
        )
        kl.append(math.fsum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True)))
        nats.append(-q[0])
    # Differences of up to 200 in float64: 200 * 2^-52, some of them.
    assert found.kl_divergence == pytest.approx(sum(kl) / 3, rel=1e-12, abs=1e-12)
    assert found.kl_divergence >= -1e-12
    assert math.log(found.perplexity) == pytest.approx(sum(nats) / 3, rel=1e-12, abs=1e-12)


def test_divergence_is_from_the_reference() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4)."""
    p, q = np.log([[0.5, 0.5]] * 2), np.log([[0.25, 0.75]] * 2)
    found = compare_fakes(p, q)
    assert found.kl_divergence == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-7)
    assert (found.perplexity, found.reference_perplexity) == (pytest.approx(4, rel=1e-6), pytest.approx(2, rel=1e-6))
    assert (found.same_top_token, found.kl_standard_error) == (0, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_predictions_that_are_no_numbers(value: float) -> None:
    with pytest.raises(RuntimeError, match=r"fake: .* expected a finite number; convert the model again"):
        compare_fakes([[0, 0], [0, 0]], [[0, value], [0, 0]])
