"""Sessions that are computed together: the same tokens as alone, of every kind of model and KV cache.

Weights are packed: of float32 ones ONNX Runtime may round a step of several tokens otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from meki import Engine, _core
from tests.engine.test_speculation import MODELS, package  # noqa: F401  # a fixture

SAMPLED = _core.SamplingOptions(temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=11)
LENGTHS = (1, 63, 20, 90, 5)


def begin(engine: Engine, number: int) -> _core.Session:
    its = _core.Session(engine._core, _core.SessionOptions(context=120 + number % 3))
    its.append(np.random.default_rng(number).integers(1, 300, LENGTHS[number]).tolist())
    its.start(SAMPLED, 24, [])
    return its


@pytest.mark.parametrize(
    ("weights", "kv_type"),
    [("int8", "float32"), ("int8", "float16"), ("int8", "int8"), ("int8", "int4"), ("int4", "int8")],
)
@pytest.mark.parametrize("model", [*MODELS, "gemma3", "gemma4"])
def test_the_same_tokens(package: Callable[..., Path], model: str, weights: str, kv_type: str) -> None:  # noqa: F811
    engine = Engine(package(model, weights), kv_type=kv_type)
    alone = [list(iter(begin(engine, number).next, None)) for number in range(len(LENGTHS))]
    sessions = [begin(engine, number) for number in range(len(LENGTHS))]
    made: list[list[int]] = [[] for _ in sessions]
    for step in range(24):
        before = [its.stats.decode_ns for its in sessions]
        _core.step(sessions)
        taken = {its.stats.decode_ns - was for its, was in zip(sessions, before, strict=True)}
        assert step == 0 or (len(taken) == 1 and 0 not in taken)  # it was one step of all
        for its, tokens in zip(sessions, made, strict=True):
            tokens.append(its.next())  # type: ignore[arg-type]
    assert made == alone


def test_float32_weights_in_threads_of_onnx_runtime(package: Callable[..., Path]) -> None:  # noqa: F811
    """Operators run on the thread that calls, where they learn whose tokens these are; else the step would fail, and
    every session take one of its own, whose time is not that of the others."""
    engine = Engine(package("meki", "float32"), threads=2)
    sessions = [begin(engine, number) for number in range(len(LENGTHS))]
    for its in sessions:
        its.next()
    before = [its.stats.decode_ns for its in sessions]
    _core.step(sessions)
    (taken,) = {its.stats.decode_ns - was for its, was in zip(sessions, before, strict=True)}
    assert taken > 0
