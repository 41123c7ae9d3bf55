"""Engram: hashes against a naive recomputation, the module against transformers' own, and the engine against both."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from meki import Engine, _core
from meki.models.architectures.llama import Decoder
from meki.models.checkpoints import open_checkpoint
from meki.models.checkpoints.checkpoint import CheckpointError
from meki.models.checkpoints.huggingface import save_pretrained
from meki.models.config import frozen
from meki.models.memories.engram import Engram, EngramConfig

VOCAB, EOS = 300, 7
ENGRAM: dict[str, Any] = {
    "memory_dim": 0,
    "engram_dim": 96,
    "engram_layers": (0, 2),
    "engram_heads": 3,
    "engram_rows": 90,
    "engram_pad": EOS,
    "engram_reset": (EOS,),
}


Ngrams = Callable[[dict[str, Any], list[int]], list[list[int]]]
"""`naive_ngrams` of conftest.py."""


def config(**overrides: Any) -> EngramConfig:
    settings = {name: frozen(value) for name, value in overrides.items()}
    return EngramConfig.from_settings({**ENGRAM, "vocab_size": VOCAB, **settings})


@torch.no_grad()
@pytest.mark.parametrize("ngram", [2, 3, 4])
def test_the_module_is_transformers(ngram: int) -> None:
    qwen = pytest.importorskip("transformers.models.qwen4_exp", reason="these transformers have no qwen4_exp")
    hidden, heads = 24, 2
    theirs = qwen.modeling_qwen4_exp.Qwen4ExpTextPLELayer(
        SimpleNamespace(
            hidden_size=hidden, hc_count=1, ple_embed_dim=(ngram - 1) * heads * 5, ple_conv_kernel_size=4,
            ngram_size=ngram, heads_per_ngram=heads, vocab_size=VOCAB, ngram_vocab_size_base=50, seed=3,
            eos_token_id=EOS, rms_norm_eps=1e-6, make_ngram_vocab_size_divisible_by=64,
        ),
        layer_idx=4, ple_layer_index=1,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    for parameter in theirs.parameters():
        parameter.normal_(0.0, 0.3, generator=generator)
    table = theirs.ple_embedding
    memory = config(
        engram_dim=(ngram - 1) * heads * 5, engram_layers=(4,), engram_ngram=ngram, engram_heads=heads,
        engram_multipliers=[table.layer_multipliers.tolist()],
        engram_primes=[table.ngram_heads_vocab_sizes.tolist()],
    )  # fmt: skip
    ours = Engram(VOCAB, hidden, 1e-6, memory, 0)
    for norm in ("norm_key", "norm_query", "norm_conv"):
        getattr(ours, norm).weight.copy_(1 + getattr(theirs, norm).weight)
    for name in ("key_proj", "value_proj", "conv1d"):
        getattr(ours, name).weight.copy_(getattr(theirs, name).weight)
    ours.embedding.weight.copy_(table.ngram_embedding.weight[: len(ours.embedding.weight)])

    ids = torch.randint(0, VOCAB, (2, 40), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.15] = EOS
    x = torch.randn(2, 40, hidden, generator=generator)
    expected = theirs(x, ids, None)
    got = ours.inject(ours.embedding(ours.indices(ids)).flatten(-2), x)
    # The same float32 operations on values of about 1, sums in another order.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize("reset", [(), (EOS,), (3, EOS, 250)])
def test_pytorch_hashes_are_the_naive_ones(ngrams: Ngrams, reset: tuple[int, ...], canonical: bool) -> None:
    memory = config(engram_reset=reset, engram_canonical=canonical, engram_ngram=4, engram_dim=288)
    ids = torch.randint(0, 12, (1, 200), generator=torch.Generator().manual_seed(1))
    for index in range(2):
        module = Engram(VOCAB, 8, 1e-6, memory, index)
        known = ids
        if canonical:
            module.canonical_ids.copy_(torch.arange(VOCAB) // 2)
            known = ids // 2
        got = module.indices(ids)[0].tolist()
        for end, rows in enumerate(got, 1):
            # Resets are of tokens: a naive window of canonical ids keeps the tokens that reset apart.
            marked = [int(c) if int(t) not in reset else -1 - int(c) for t, c in zip(ids[0], known[0], strict=True)]
            window = marked[:end]
            window[-1] = int(known[0, end - 1])
            hashes = {
                "multipliers": memory.multipliers[index],
                "primes": memory.primes[index],
                "offsets": memory.offsets(index),
            }
            marks = [token for token in window if token < 0]
            address = {"ngram": 4, "heads": 3, "pad": EOS, "reset": marks, "layers": [hashes]}
            assert [rows] == ngrams(address, window)


def test_hashes_of_a_million_windows(ngrams: Ngrams, make_package: Callable[..., Path]) -> None:
    engine = Engine(make_package(**ENGRAM))
    generator = np.random.default_rng(5)
    ids = np.where(generator.random(1_000_000) < 0.1, EOS, generator.integers(0, VOCAB, 1_000_000))
    got = engine._core.row_indices(ids.tolist())
    address = engine.manifest["memory"]["address"]
    assert got.shape == (1_000_000, 2 * 2 * 3)
    # The same with numpy over all windows at once: uint64 as Python's integers, since no product exceeds 63 bits.
    column = 0
    for layer in address["layers"]:
        reach = np.zeros(len(ids), bool)
        mix = ids.astype(np.uint64) * np.uint64(layer["multipliers"][0])
        for back in range(1, address["ngram"]):
            earlier = np.concatenate((np.full(back, EOS), ids[:-back]))
            reach |= earlier == EOS
            mix ^= np.where(reach, EOS, earlier).astype(np.uint64) * np.uint64(layer["multipliers"][back])
            for _ in range(address["heads"]):
                head = column % 6
                rows = mix % np.uint64(layer["primes"][head]) + np.uint64(layer["offsets"][head])
                np.testing.assert_array_equal(got[:, column], rows)
                column += 1
    for end in range(1, 2000):
        assert got[end - 1].tolist() == np.concatenate(ngrams(address, ids[:end].tolist())).tolist()


IDS = [5, 17, 250, EOS, 3, 5, 17, 250, 250, 250, 9, EOS, EOS, 5, 17, 99, 120, 5, 17, 250] * 3
VARIANTS: dict[str, dict[str, Any]] = {
    "resets": {},
    "no convolution": {"engram_kernel": 0},
    "no resets": {"engram_reset": ()},
    "longer": {"engram_ngram": 4, "engram_dim": 288, "engram_kernel": 3, "engram_layers": (1,)},
    "canonical": {"engram_canonical": True},
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**ENGRAM, **VARIANTS[request.param]}


def test_logits_are_pytorchs_however_they_are_computed(
    variant: dict[str, Any], make_model: Callable[..., Decoder], make_package: Callable[..., Path]
) -> None:
    with torch.no_grad():
        expected = make_model(**variant)(torch.tensor([IDS]))[0].numpy()
    engine = Engine(make_package(rows="float32", **variant), kv_type="float32")
    once = engine.logits(IDS)
    np.testing.assert_allclose(once, expected, rtol=0, atol=1e-4)  # as in test_graph.py
    for chunk in (1, 2, 7, 256):
        session = _core.Session(engine._core, _core.SessionOptions(chunk=chunk))
        session.append(IDS)
        np.testing.assert_allclose(session.logits(), once, rtol=0, atol=1e-4)


@pytest.mark.parametrize("missing", ["engram_multipliers", "engram_primes"])
def test_a_checkpoint_without_its_numbers(make_model: Callable[..., Decoder], tmp_path: Path, missing: str) -> None:
    """They are never made again: rows of other numbers would be wrong."""
    save_pretrained(tmp_path / "saved", make_model(**ENGRAM), provenance={})
    file = tmp_path / "saved" / "config.json"
    file.write_text(
        json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != missing})
    )
    with pytest.raises(CheckpointError, match=f"does not say what {missing} is; expected the numbers"):
        open_checkpoint(tmp_path / "saved", {})


@pytest.mark.parametrize(
    ("token", "value", "layer", "message"),
    [
        (3, 300.0, 0, "layers.0.engram.canonical_ids: token 3 has 300, expected an integer from 0 to 299"),
        (0, -1.0, 0, "token 0 has -1, expected"),
        (9, 2.5, 0, "token 9 has 2.5, expected"),
        (9, np.nan, 0, "token 9 has nan, expected"),
        (5, 4.0, 2, "layers.2.engram.canonical_ids: differs from layers.0.engram.canonical_ids"),
    ],
)
def test_canonical_ids_that_are_none(token: int, value: float, layer: int, message: str) -> None:
    ids = {f"layers.{number}.engram.canonical_ids": np.arange(VOCAB, dtype=np.float32) for number in (0, 2)}
    ids[f"layers.{layer}.engram.canonical_ids"][token] = value
    memory = config(engram_canonical=True)
    with pytest.raises(ValueError, match=message):
        memory.files(SimpleNamespace(vocab_size=VOCAB), ids.__getitem__)


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_a_sequence_is_taken_back_and_copied(make_package: Callable[..., Path], weights: str) -> None:
    engine = Engine(make_package(weights, "float32", **ENGRAM))._core

    def session(ids: Sequence[int] = ()) -> _core.Session:
        made = _core.Session(engine, _core.SessionOptions())
        made.append(ids)
        return made

    expected = session(IDS).logits()[41:]
    first, other = session(IDS[:30]), session([9, 9])
    first.logits()
    first.append([1, 2, 3, EOS, 4, 5, 6, 7, 8, 9, 10, 11])
    first.logits()
    first.rewind(20)
    first.append(IDS[20:41])
    first.logits()
    snapshot = first.snapshot()
    first.append([8, 8, 8, 8, 8])
    for taken in (first, other):
        taken.logits()
        taken.restore(snapshot)
        taken.append(IDS[41:])
        # Attention over one step of many tokens, or over several, rounds otherwise.
        np.testing.assert_allclose(taken.logits(), expected, rtol=0, atol=2e-3)
