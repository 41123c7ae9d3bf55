"""Gemma's static stages in a naive loop, beside PyTorch: windows, caches that layers share, per-layer embeddings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from meki.models.qnn import stages as stages_module
from meki.models.qnn.stages import Options, plan, write_stage
from meki.models.source import model_source
from meki.models.tokenizer import TokenizerSpec
from tests.engine.gemma_models import export, gemma3, gemma4

from .conftest import open_weights

CHUNK, CONTEXT = 6, 32
IDS = np.random.default_rng(6).integers(0, 300, CONTEXT).tolist()
CASES: dict[str, Callable[[], Any]] = {
    "gemma3": functools.partial(gemma3, window=10),
    # Narrower than a chunk; the layers of a stage have head counts of their own.
    "gemma3-narrow": functools.partial(gemma3, window=4, num_key_value_heads=1),
    "gemma4": functools.partial(gemma4, window=10),
    "gemma4-nothing-shared": functools.partial(gemma4, layers=4, window=10, num_kv_shared_layers=0),
    "gemma4-no-memory": functools.partial(gemma4, window=10, hidden_size_per_layer_input=0),
    # A window that the context does not reach; the layers that are shared are in the stage before the rows.
    "gemma4-two-own-layers": functools.partial(gemma4, layers=4, pattern=2, num_kv_shared_layers=2, window=40),
}


@pytest.fixture
def differs(tokenizer_spec: TokenizerSpec, naive_stages: Any, tmp_path: Path) -> Callable[[Any], float]:
    """differs(model): the largest difference of a logit from PyTorch's, in parts of their RMS. The stages stay."""

    def compare(model: Any) -> float:
        weights = open_weights(export(model, tokenizer_spec, tmp_path / "package"))
        plans = plan(weights, Options(CONTEXT, CHUNK, "float16", dense=False))
        paths = {name: [write_stage(weights, stage, tmp_path) for stage in stages] for name, stages in plans.items()}
        with torch.no_grad():
            expected = model(torch.tensor([IDS]))[0].numpy()
        embedded = model.embed_tokens.weight.detach().numpy()[IDS]
        rows = np.concatenate(list(model_source(model).row_blocks()), axis=1)[:, IDS] if model.config.memory else None
        naive = naive_stages(model.config, CONTEXT)
        got = []

        def step(kind: str, start: int, width: int, kept: int) -> None:
            index = [min(start + t, start + kept - 1) for t in range(width)]
            its = None if rows is None else rows[:, index]
            got.append(naive.step(paths[kind], paths["head"][0], embedded[index], its, kept))

        # Full chunks, one with padding, some tokens one by one, and a chunk whose padding exceeds the context.
        for start, kept in ((0, CHUNK), (CHUNK, CHUNK), (2 * CHUNK, 2)):
            step("prefill", start, CHUNK, kept)
        for start in range(2 * CHUNK + 2, CONTEXT - 3):
            step("decode", start, 1, 1)
        step("prefill", CONTEXT - 3, CHUNK, 3)
        scale = np.sqrt(np.mean(np.square(expected)))
        return float(np.abs(np.concatenate(got) - expected).max() / scale)

    return compare


@pytest.mark.parametrize(
    ("case", "shard"), [*((case, stages_module.SHARD_BYTES) for case in CASES), ("gemma3", 1), ("gemma4", 1)]
)
def test_decode_and_prefill_equal_pytorch(
    case: str, shard: int, differs: Callable[[Any], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = CASES[case]()
    monkeypatch.setattr(stages_module, "SHARD_BYTES", shard)
    # As in test_stages.py, for two to three times as many operators.
    assert differs(model) < 0.03
    stages = sorted(tmp_path.glob("decode.*.onnx"))
    assert len(stages) == (model.config.layers if shard == 1 else 2 if model.config.memory else 1)
    inputs = [value.name for stage in stages for value in onnx.load(stage, load_external_data=False).graph.input]
    its_source_is_before = case == "gemma4" and shard == 1
    assert any(name.startswith("shared_") for name in inputs) == (its_source_is_before or "two-own" in case)


def test_a_residual_stream_beyond_float16(differs: Callable[[Any], float]) -> None:
    """Which Gemma 3 has; norms take it back, so that nothing else is large."""
    _, model = gemma3(window=10)
    reached = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, x: reached.append(x.abs().max().item()))
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight.data *= 30_000
    assert differs(model) < 0.03
    assert max(reached) > 70_000
