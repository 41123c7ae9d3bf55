"""Folding block by block, from whatever gives the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from meki.models.architectures.llama import Decoder
from meki.models.memories import base
from meki.models.quantize import Floats


def reader_of(model: Decoder) -> Callable[[str, slice], Floats]:
    state = model.state_dict()
    return lambda name, rows: state[name].numpy()[rows] if state[name].dim() else state[name].numpy()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"projector_norm": True},
        {"memory_experts": "static"},
        {"memory_experts": "dynamic", "memory_projector": "linear", "projector_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("block_bytes", [1, 10_000, 1 << 20])
def test_folded_blocks(
    make_model: Callable[..., Decoder], overrides: dict[str, Any], block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of tokens over all layers are what training looks up, one layer over the whole vocabulary."""
    model = make_model(**overrides)
    config = model.config
    monkeypatch.setattr(base, "BLOCK_BYTES", block_bytes)
    blocks = list(config.memory.folded_rows(config, reader_of(model)))
    assert all(block.nbytes <= max(block_bytes, 4 * config.layers * config.memory.dim) for block in blocks)
    table = np.concatenate(blocks, axis=1)
    words = model.embed_tokens.weight.detach()
    ids = torch.arange(config.vocab_size)
    with torch.no_grad():
        expected = torch.stack([layer.meki.experts(ids, words) for layer in model.layers]).numpy()
    # Matrix products of other heights may sum in another order: some 64 * 2^-24 on values of about 1.
    np.testing.assert_allclose(table, expected, rtol=2e-5, atol=2e-5)


def test_stored_blocks(make_model: Callable[..., Decoder]) -> None:
    """Folded tables go through as they are; each block has the next tokens of every layer."""
    config = make_model(vocab_size=200_000).config  # 77 MB in float32: several blocks
    tables = np.arange(config.layers * config.vocab_size, dtype=np.float32).reshape(config.layers, -1)

    def read(name: str, rows: slice) -> Floats:
        layer = int(name.removeprefix("layers.").removesuffix(".meki.folded_table"))
        return np.repeat(tables[layer, rows, None], config.memory.dim, axis=1)

    blocks = list(config.memory.stored_rows(config, read))
    assert len(blocks) > 1
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1)[:, :, 0], tables)
