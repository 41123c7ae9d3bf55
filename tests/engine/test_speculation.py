"""Speculative decoding: the same text, to the token, as without a draft, of every kind of model and KV cache.

Contexts are below 128 tokens, where attention of several tokens has the same sums as of one, and weights are packed: of
float32 ones ONNX Runtime may round a step of several tokens otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meki import Engine, _core
from meki.models.tokenizer import TokenizerSpec
from tests.engine.gemma_models import export, gemma3, gemma4

PROMPT = np.random.default_rng(4).integers(1, 300, 20).tolist()
GREEDY, SAMPLED = (
    _core.SamplingOptions(temperature=0),
    _core.SamplingOptions(temperature=0.7, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.2, seed=11),
)
MODELS: dict[str, dict[str, Any]] = {
    "meki": {},
    "ple": {"memory_dim": 0, "ple_dim": 32},
    "dense": {"memory_dim": 0},
    "experts": {"memory_dim": 0, "ffn_kind": "moe", "experts": 4, "experts_per_token": 2},
    "engram": {
        "memory_dim": 0,
        "engram_dim": 96,
        "engram_layers": (0, 2),
        "engram_heads": 3,
        "engram_rows": 90,
        "engram_pad": 7,
        "engram_reset": (7,),
    },
}


@pytest.fixture(scope="module")
def package(
    make_package: Callable[..., Path], tokenizer_spec: TokenizerSpec, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """package(model, weights): the same at every call."""
    gemmas: dict[tuple[str, str], Path] = {}

    def make(model: str, weights: str = "int8") -> Path:
        if model in MODELS:
            return make_package(weights, head_dim=32, **MODELS[model])
        if (model, weights) not in gemmas:
            _, decoder = {"gemma3": gemma3, "gemma4": gemma4}[model](head_dim=32)
            path = tmp_path_factory.mktemp("gemma") / "package"
            gemmas[model, weights] = export(decoder, tokenizer_spec, path, weights, "float16")
        return gemmas[model, weights]

    return make


def session(engine: Engine, drafter: _core.MakeDrafter | None = None, **options: Any) -> _core.Session:
    return _core.Session(engine._core, _core.SessionOptions(drafter=drafter, **options))


def generate(its: _core.Session, sampling: _core.SamplingOptions, count: int) -> list[int]:
    its.start(sampling, count, [])
    return list(iter(its.next, None))


@pytest.mark.parametrize(
    ("weights", "kv_type"),
    [("int8", "float32"), ("int8", "float16"), ("int8", "int8"), ("int8", "int4"), ("int4", "int8")],
)
@pytest.mark.parametrize("model", [*MODELS, "gemma3", "gemma4"])
def test_the_same_text(package: Callable[..., Path], model: str, weights: str, kv_type: str) -> None:
    engine = Engine(package(model, weights), kv_type=kv_type)
    other = Engine(package("ple" if model == "dense" else "dense"))
    plain = session(engine, context=120)
    plain.append(PROMPT)
    drafters = {
        "lookup": _core.MakeDrafter.prompt_lookup(),
        "itself": _core.MakeDrafter.draft_model(engine._core),
        "another": _core.MakeDrafter.draft_model(other._core),
    }
    for sampling in (GREEDY, SAMPLED):
        plain.rewind(len(PROMPT))
        made = generate(plain, sampling, 20)
        # What the model has said stands in the prompt: it may say it again, or something else.
        plain.append(PROMPT)
        expected = generate(plain, sampling, 40)
        for name, drafter in drafters.items():
            for tokens in (2, 15):
                its = session(engine, drafter, context=120, draft_tokens=tokens)
                its.append(PROMPT)
                assert generate(its, sampling, 20) == made
                its.append(PROMPT)
                assert generate(its, sampling, 40) == expected
                stats = its.stats
                assert stats.decode_tokens == 58
                if name == "another":
                    assert stats.drafted_tokens > 0
                if name == "itself" and sampling is GREEDY:
                    assert stats.accepted_tokens == stats.drafted_tokens > 30


def operations() -> st.SearchStrategy[list[tuple[str, int]]]:
    """What a caller may do between two tokens."""
    number = st.integers(1, 8)
    names = st.sampled_from(["next", "next", "next", "start", "append", "rewind", "snapshot", "restore"])
    return st.lists(st.tuples(names, number), min_size=1, max_size=25)


@pytest.fixture(scope="module", params=["engram", "gemma4", "meki"])
def engine(request: pytest.FixtureRequest, package: Callable[..., Path]) -> Engine:
    return Engine(package(request.param))


@settings(max_examples=25, deadline=None)
@given(steps=operations(), tokens=st.sampled_from([1, 3, 15]), lookup=st.booleans())
def test_whatever_is_called_between_two_tokens(
    engine: Engine, steps: list[tuple[str, int]], tokens: int, lookup: bool
) -> None:
    """Appends are short, so that every step is: one of many tokens may round otherwise than one of few."""

    def outcome(drafter: _core.MakeDrafter | None) -> Iterator[object]:
        its = session(engine, drafter, context=120, draft_tokens=tokens)
        for at in range(0, 12, 4):
            its.append(PROMPT[at : at + 4])
            its.logits()
        snapshot, running = its.snapshot(), False
        for name, number in steps:
            if name == "next" and running:
                yield [its.next() for _ in range(number)]
            elif name == "start":
                its.start(SAMPLED if number % 2 else GREEDY, 4 * number, [])
                running = True
            elif name == "append" and len(its.tokens) + number <= its.context:
                its.append(PROMPT[-number:])
                running = False
            elif name == "rewind" and number < len(its.tokens):
                its.rewind(len(its.tokens) - number)
                running = False
            elif name == "snapshot":
                its.logits()  # a snapshot has computed tokens alone, and a draft may have computed one more
                snapshot = its.snapshot()
            elif name == "restore":
                its.restore(snapshot)
                running = False
            yield its.tokens
            yield its.finish_reason

    drafter = _core.MakeDrafter.prompt_lookup() if lookup else _core.MakeDrafter.draft_model(engine._core)
    assert list(outcome(drafter)) == list(outcome(None))


def test_a_window_whose_ring_has_wrapped(tokenizer_spec: TokenizerSpec, tmp_path: Path) -> None:
    """What is refused is taken out of a ring, too."""
    _, decoder = gemma4()
    engine = Engine(export(decoder, tokenizer_spec, tmp_path / "package"), kv_type="float32")
    ids = np.random.default_rng(5).integers(0, 300, 1600).tolist()  # a ring has 1,408 positions
    its = session(engine, _core.MakeDrafter.draft_model(engine._core), context=2000)  # greedy, and so not always right
    its.append(ids)
    made = generate(its, SAMPLED, 100)
    assert 0 < its.stats.accepted_tokens < its.stats.drafted_tokens
    its.append([1, 2, 3])
    got = its.logits()[-3:]
    fresh = session(engine, context=2000)
    fresh.append([*ids, *made, 1, 2, 3])
    expected = fresh.logits()[-3:]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)  # float32, sums in another order
