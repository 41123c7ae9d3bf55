"""Random weights for speed measurements: shapes, magnitudes, memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meki.models.architectures.llama import Decoder
from meki.models.package import export_package
from meki.models.source import random_source
from meki.models.tokenizer import TokenizerSpec


@pytest.mark.parametrize("ffn", [{}, {"ffn_kind": "moe", "experts": 4, "experts_per_token": 2}], ids=str)
def test_activations_stay_of_order_one(make_model: Callable[..., Decoder], ffn: dict[str, Any]) -> None:
    """Through as many layers as the largest configuration has."""
    model = make_model(layers=36, hidden=128, qkv_bias=True, tied_embeddings=False, **ffn)
    source = random_source(model.config)
    state = {name: torch.from_numpy(source.weights(name)) for name in model.state_dict()}
    model.load_state_dict(state)  # every name, every shape
    residual: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, output: residual.append(output))
    with torch.no_grad():
        logits = model(torch.arange(64)[None])
    rms = torch.stack([x.square().mean().sqrt() for x in residual])
    # Each layer adds three terms of at most RMS (2 * 36)^-0.5, independent of one another: 1.2 in the end.
    assert rms.max() < 2 and rms.min() > 0.02
    # A normed vector times an embedding whose values are of RMS hidden^-0.5.
    assert 0.5 < logits.std() < 2
    norms = torch.cat([value for name, value in state.items() if name.endswith("layernorm.weight")])
    assert 0.95 < norms.mean() < 1.05 and norms.std() > 0.05


def test_every_weight_is_its_own_and_the_same_again(make_model: Callable[..., Decoder]) -> None:
    config = make_model().config
    first, again = random_source(config), random_source(config)
    q, k = "layers.0.self_attn.q_proj.weight", "layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(first.weights(q), again.weights(q))
    # Of 4,096 independent pairs the correlation is some 1/64.
    assert abs(np.corrcoef(first.weights(q).ravel(), first.weights(k).ravel())[0, 1]) < 0.1


def test_rows(make_model: Callable[..., Decoder]) -> None:
    config = make_model(vocab_size=200_000).config  # 77 MB in float32: several blocks
    tokens = 0
    squares = 0.0
    for block in random_source(config).row_blocks():
        assert block.dtype == np.float32 and block.nbytes <= 32 << 20
        assert block.shape[::2] == (config.layers, config.memory.dim)
        tokens += block.shape[1]
        squares += float(np.square(block).sum(dtype=np.float64))
    assert tokens == config.vocab_size
    assert squares / config.rom_parameters == pytest.approx(1, abs=0.01)  # 19 million samples: 0.0003


def test_export_does_not_hold_the_model(
    make_model: Callable[..., Decoder], tokenizer_spec: TokenizerSpec, tmp_path: Path
) -> None:
    config = make_model(memory_dim=0, layers=24, hidden=256, ffn=1024).config
    tracemalloc.start()
    try:
        export_package(random_source(config), tokenizer_spec, tmp_path / "p", name="p", weights="int4", provenance={})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 21 million weights, of which 0.3 million are in work at once, in a handful of arrays for each thread.
    assert peak < 4 * config.ram_parameters / 2
