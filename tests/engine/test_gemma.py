"""Gemma 3 and Gemma 4 in the engine, against transformers: windows, caches that layers share, per-layer embeddings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from meki import Engine, _core
from meki.models.tokenizer import TokenizerSpec
from tests.engine.gemma_models import export, gemma3, gemma4

IDS = np.random.default_rng(3).integers(0, 300, 1800).tolist()
Logits = NDArray[np.float32]

CASES: dict[str, Callable[[], Any]] = {
    "gemma3": gemma3,
    "gemma3-pattern-6": functools.partial(gemma3, layers=8, pattern=6, num_key_value_heads=1),
    "gemma4": gemma4,
    "gemma4-pattern-5": functools.partial(gemma4, layers=10, pattern=5, num_kv_shared_layers=5),
    "gemma4-pattern-6-one-kv-head": functools.partial(
        gemma4, layers=12, pattern=6, num_kv_shared_layers=6, num_key_value_heads=1
    ),
    "gemma4-nothing-shared": functools.partial(gemma4, layers=5, num_kv_shared_layers=0, use_double_wide_mlp=False),
    "gemma4-not-double-wide": functools.partial(gemma4, use_double_wide_mlp=False),
    "gemma4-no-memory": functools.partial(gemma4, hidden_size_per_layer_input=0),
    "gemma4-no-softcap": functools.partial(gemma4, final_logit_softcapping=None, window=300),
    "gemma4-two-own-layers": functools.partial(gemma4, layers=4, pattern=2, num_kv_shared_layers=2),
    # Whose keys and values all others see is in the stage before the memory's rows are needed.
    "gemma4-one-own-layer": functools.partial(gemma4, layers=3, pattern=1, num_kv_shared_layers=2),
}


def session(engine: Engine, **options: Any) -> _core.Session:
    return _core.Session(engine._core, _core.SessionOptions(**options))


def logits(engine: Engine, ids: list[int], **options: Any) -> Logits:
    its = session(engine, **options)
    its.append(ids)
    return its.logits()


@torch.no_grad()
def reference(model: torch.nn.Module, ids: list[int]) -> Logits:
    # As an index: of a number of tokens without per-layer embeddings, transformers 5.24 fails.
    values: Logits = model(torch.tensor([ids]), logits_to_keep=torch.arange(len(ids))).logits[0].numpy()
    return values


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tokenizer_spec: TokenizerSpec, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, torch.nn.Module]:
    theirs, ours = CASES[request.param]()
    path = export(ours, tokenizer_spec, tmp_path_factory.mktemp("gemma") / "package")
    return Engine(path, kv_type="float32"), theirs


# Float32 on both sides: what differs is the order of sums, some 1e-6 of logits that reach 10.
def close(got: Logits, expected: Logits) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_equals_transformers_however_the_tokens_are_cut(case: tuple[Engine, torch.nn.Module]) -> None:
    engine, model = case
    expected = reference(model, IDS[:200])
    for chunk in (256, 64, 7, 1):
        close(logits(engine, IDS[:200], chunk=chunk), expected)


def test_logits_of_the_last_tokens_alone(case: tuple[Engine, torch.nn.Module]) -> None:
    engine, model = case
    expected = reference(model, IDS[:200])
    for first in (199, 150, 30):
        its = session(engine, chunk=64)
        its.append(IDS[:first])
        its.logits(first)  # of none of them
        its.append(IDS[first:200])
        close(its.logits(), expected[first:])


def test_rewinding_across_the_edge_of_the_window(case: tuple[Engine, torch.nn.Module]) -> None:
    engine, model = case
    its = session(engine, chunk=16)
    its.append(IDS[:200])
    its.logits(200)
    for length in (190, 150, 23, 1, 0):
        its.rewind(length)
        continued = IDS[300 : 300 + 60]
        its.append(continued)
        got = its.logits()
        assert len(got) == 60  # what was there is not computed again
        close(got, reference(model, IDS[:length] + continued)[length:])
        its.rewind(length)


def test_a_ring_holds_what_is_seen_and_a_rewind_beyond_it_computes_again(
    tokenizer_spec: TokenizerSpec, tmp_path: Path
) -> None:
    _, ours = gemma4()
    engine = Engine(export(ours, tokenizer_spec, tmp_path / "package"), kv_type="float32")

    @torch.no_grad()
    def exact(ids: list[int]) -> Logits:
        """By our own model: transformers has angles in float32, which are off by 1e-4 after 1,000 tokens."""
        values: Logits = ours(torch.tensor([ids]))[0].numpy()
        return values

    expected = exact(IDS)
    its = session(engine, chunk=16, context=4096)
    its.append(IDS)
    close(its.logits(), expected)
    saved = its.snapshot()
    its.rewind(1500)
    its.append(IDS[1500:1520])
    close(its.logits(), expected[1500:1520])  # of these alone: the ring still has what came before
    its.rewind(300)
    its.append(IDS[300:])
    close(its.logits(), expected)  # of all: it does not

    other = session(engine, chunk=100, context=2000)  # whose rings are of another size
    other.restore(saved)
    other.append(IDS[:30])
    close(other.logits(), exact(IDS + IDS[:30])[1800:])


def test_a_file_of_a_ring_goes_on_from_every_length(tokenizer_spec: TokenizerSpec, tmp_path: Path) -> None:
    _, ours = gemma4()
    engine = Engine(export(ours, tokenizer_spec, tmp_path / "package"), kv_type="float32")
    its = engine.session()
    its.logits(IDS)
    its.save(tmp_path / "file")
    loaded = engine.session()
    for length in (len(IDS), len(IDS) - 1, len(IDS) - 40, 1000, 20, 0):
        loaded.load(tmp_path / "file")
        loaded.rewind(length)
        other = engine.session()
        other.logits([*IDS[:length], 7])
        close(loaded.logits([7, 8])[1:], other.logits([8]))


def test_conversations_with_rings_alternate(tokenizer_spec: TokenizerSpec, tmp_path: Path) -> None:
    """A copy serves a conversation that goes on; where it is left before its end, all is computed."""
    _, ours = gemma4()
    spec = dataclasses.replace(tokenizer_spec, chat_template=TEMPLATE, special_tokens={"bos_token": ""})
    engine = Engine(export(ours, spec, tmp_path / "package"), kv_type="float32")
    options: Any = {"max_new_tokens": 8, "ignore_eos": True}
    first, second = ([{"role": "user", "content": f"{word} " * 40}] for word in ("ship", "cat"))
    turn = [{"role": "assistant", "content": "thoughts<channel|>The cat."}, {"role": "user", "content": "And?"}]
    for messages, cached in ((first, False), (second, False), (first, True), (second, True), (first + turn, True)):
        got = engine.chat(messages, **options)
        assert got.token_ids == engine.session().chat(messages, **options).token_ids
        assert (got.stats.cached_tokens > 30) == cached


TEMPLATE = """{{ bos_token }}{% for message in messages -%}
<|turn>{{ "model" if message.role == "assistant" else message.role }}
{{ message.content.split("<channel|>")[-1] }}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""
"""Gemma 4's turns, in short: of an answer the thoughts are left out once it has been given."""


def test_a_chat_goes_back_further_than_the_rings_hold(tokenizer_spec: TokenizerSpec, tmp_path: Path) -> None:
    _, ours = gemma4()
    spec = dataclasses.replace(tokenizer_spec, chat_template=TEMPLATE, special_tokens={"bos_token": ""})
    engine = Engine(export(ours, spec, tmp_path / "package"), kv_type="float32")
    question = {"role": "user", "content": "Once the ship had come to the lighthouse, what did the keeper do?"}
    options: Any = {"max_new_tokens": 8, "ignore_eos": True, "temperature": 0.0}
    for length in (30, 1500):  # of an answer of which nothing is kept; the rings have 1,024 positions beside the window
        its = engine.session()
        first = its.chat([question], **{**options, "max_new_tokens": length})
        turns = [question, {"role": "assistant", "content": "thoughts<channel|>The cat."}, question]
        again = its.chat(turns, **options)
        assert again.token_ids == engine.session().chat(turns, **options).token_ids
        assert first.stats.new_tokens == length
        assert (again.stats.cached_tokens > 0) == (length == 30)


@pytest.mark.parametrize("make", [gemma3, gemma4])
def test_generates_what_transformers_does(
    make: Callable[[], Any], tokenizer_spec: TokenizerSpec, tmp_path: Path
) -> None:
    theirs, ours = make()
    engine = Engine(export(ours, tokenizer_spec, tmp_path / "package"), kv_type="float32")
    its = session(engine)
    its.append(IDS[:50])
    its.start(_core.SamplingOptions(temperature=0.0), 40, [])
    ids = list(iter(its.next, None))
    expected = reference(theirs, IDS[:50] + ids)[49:-1]
    assert ids == expected.argmax(axis=1).tolist()


# Relative RMS error of the logits: half a step of 8 bits is 0.4% of a block's largest weight or input, of 4 bits 7%;
# seven layers with four products each add theirs.
@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.1), ("int4", 0.8)])
@pytest.mark.parametrize("make", [gemma3, gemma4])
def test_packed_weights_cost_what_their_precision_says(
    make: Callable[[], Any], weights: str, bound: float, tokenizer_spec: TokenizerSpec, tmp_path: Path
) -> None:
    theirs, ours = make()
    engine = Engine(export(ours, tokenizer_spec, tmp_path / "package", weights, "float16"), kv_type="float32")
    expected = reference(theirs, IDS[:200])
    error = logits(engine, IDS[:200], chunk=50) - expected
    assert 0 < np.sqrt(np.mean(error**2)) / expected.std() < bound
    # In other steps a sum may differ by its last bit, and an input of a product be rounded to another code.
    one_by_one = logits(engine, IDS[:200], chunk=1) - logits(engine, IDS[:200], chunk=200)
    assert np.sqrt(np.mean(one_by_one**2)) / expected.std() < 0.01


@pytest.mark.parametrize(("kv_type", "bound"), [("float16", 0.002), ("int8", 0.03), ("int4", 0.4)])
def test_types_of_cache_cost_what_their_precision_says(
    kv_type: str, bound: float, tokenizer_spec: TokenizerSpec, tmp_path: Path
) -> None:
    theirs, ours = gemma4(head_dim=32, global_head_dim=64)
    engine = Engine(export(ours, tokenizer_spec, tmp_path / "package"), kv_type=kv_type)
    expected = reference(theirs, IDS[:200])
    error = logits(engine, IDS[:200]) - expected
    assert 0 < np.sqrt(np.mean(error**2)) / expected.std() < bound


def test_the_memory_can_be_off(tokenizer_spec: TokenizerSpec, tmp_path: Path) -> None:
    _, ours = gemma4()
    path = export(ours, tokenizer_spec, tmp_path / "package")
    with_it, without = (Engine(path, kv_type="float32", memory=memory) for memory in (True, False))
    assert np.abs(logits(with_it, IDS[:20]) - logits(without, IDS[:20])).max() > 0.1
