"""MeKi against the published module's own outputs (tests/data/*.npz), in training form and folded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from meki.models.architectures.llama import LlamaConfig
from meki.models.memories import base
from meki.models.memories.meki import MeKi, MeKiConfig

DATA = Path(__file__).parents[1] / "data"

# Sums of up to 48 float32 products in another order: a few times 48 * 2^-24 = 3e-6 on values of about 1.
TOLERANCE = 1e-5


@pytest.fixture(params=["meki_module", "meki_module_fc1norm"])
def golden(request: pytest.FixtureRequest) -> tuple[MeKi, dict[str, torch.Tensor]]:
    with np.load(DATA / f"{request.param}.npz") as file:
        tensors = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    vocab_size, memory_dim = tensors["meki.embeddings.weight"].shape
    config = MeKiConfig(memory_dim, projector_norm=request.param.endswith("fc1norm"))
    module = MeKi(vocab_size, tensors["word_emb"].shape[1], float(tensors["eps"]), config)
    weights = {name.removeprefix("meki."): tensor for name, tensor in tensors.items() if name.startswith("meki.")}
    module.load_state_dict(weights)
    return module, tensors


@torch.no_grad()
def test_training_form(golden: tuple[MeKi, dict[str, torch.Tensor]]) -> None:
    module, tensors = golden
    ids = tensors["input_ids"]
    y = module.inject(module.experts(ids, tensors["word_emb"][ids]), tensors["hidden"])
    torch.testing.assert_close(y, tensors["y_train"], rtol=TOLERANCE, atol=TOLERANCE)


def fold(module: MeKi, tensors: dict[str, torch.Tensor], block: int) -> torch.Tensor:
    """The folded table, computed in blocks of so many tokens."""
    vocab_size, dim = module.embeddings.weight.shape
    config = LlamaConfig(
        vocab_size=vocab_size, layers=1, hidden=tensors["word_emb"].shape[1], ffn=1, heads=1, kv_heads=1, head_dim=2,
        norm_eps=float(tensors["eps"]), memory=module.memory,
    )  # fmt: skip
    state = {f"layers.0.meki.{name}": value for name, value in module.state_dict().items()}
    state["embed_tokens.weight"] = tensors["word_emb"]

    def read(name: str, rows: slice) -> np.ndarray:
        return (state[name][rows] if state[name].dim() else state[name]).numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "BLOCK_BYTES", block * 4 * dim)
        blocks = [rows[0] for rows in module.memory.folded_rows(config, read)]
    assert max(map(len, blocks)) == min(block, vocab_size)
    return torch.from_numpy(np.concatenate(blocks))


@pytest.mark.parametrize("block", [1, 10, 4096])
def test_folded_table(golden: tuple[MeKi, dict[str, torch.Tensor]], block: int) -> None:
    module, tensors = golden
    table = fold(module, tensors, block)
    torch.testing.assert_close(table, tensors["folded_table"], rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def test_folded_form(golden: tuple[MeKi, dict[str, torch.Tensor]]) -> None:
    module, tensors = golden
    rows = fold(module, tensors, 4096)[tensors["input_ids"]]
    y = module.inject(rows, tensors["hidden"])
    torch.testing.assert_close(y, tensors["y_folded"], rtol=TOLERANCE, atol=TOLERANCE)
