"""PLE against the parts of transformers' Gemma 4 that it is, and what its table may be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from meki import Engine, PackageError
from meki.models.architectures.llama import Decoder
from meki.models.config import ConfigError
from meki.models.memories.ple import PLE

LAYERS, VOCAB, TABLE, HIDDEN, DIM = 3, 50, 40, 24, 8


@torch.no_grad()
def test_the_module_is_gemma_4s() -> None:
    gemma = pytest.importorskip("transformers.models.gemma4", reason="these transformers have no Gemma 4")
    config = gemma.Gemma4TextConfig(
        vocab_size=VOCAB, vocab_size_per_layer_input=TABLE, hidden_size=HIDDEN, hidden_size_per_layer_input=DIM,
        num_hidden_layers=LAYERS, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        global_head_dim=16,
    )  # fmt: skip
    theirs = gemma.modeling_gemma4.Gemma4TextModel(config)
    generator = torch.Generator().manual_seed(2)
    for parameter in theirs.parameters():
        parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3, generator=generator)
    ids = torch.randint(0, TABLE, (2, 9), generator=generator)
    words, x = torch.randn(2, 2, 9, HIDDEN, generator=generator)
    inputs = theirs.project_per_layer_inputs(words, theirs.get_per_layer_inputs(ids, words))
    for index, layer in enumerate(theirs.layers):
        ours, rows = PLE(TABLE, HIDDEN, DIM, config.rms_norm_eps), slice(index * DIM, (index + 1) * DIM)
        ours.embed_tokens.weight.copy_(theirs.embed_tokens_per_layer.weight[:, rows])
        ours.model_projection.weight.copy_(theirs.per_layer_model_projection.weight[rows])
        ours.projection_norm.weight.copy_(theirs.per_layer_projection_norm.weight)
        ours.input_gate.weight.copy_(layer.per_layer_input_gate.weight)
        ours.projection.weight.copy_(layer.per_layer_projection.weight)
        ours.post_norm.weight.copy_(layer.post_per_layer_input_norm.weight)
        gated = layer.act_fn(layer.per_layer_input_gate(x)) * inputs[:, :, index]
        expected = layer.post_per_layer_input_norm(layer.per_layer_projection(gated))
        # Factors in another order, on values of about 1: some roundings.
        torch.testing.assert_close(ours.inject(ours.rows(ids), x, words), expected, rtol=0, atol=1e-5)


def test_tokens_beyond_the_table_read_its_first_row(
    make_model: Callable[..., Decoder], make_package: Callable[..., Path]
) -> None:
    small = {"memory_dim": 0, "ple_dim": 16, "ple_vocab_size": 100}
    engine = Engine(make_package(rows="float32", **small), kv_type="float32")
    ids = [5, 99, 100, 299, 250, 7]
    with torch.no_grad():
        expected = make_model(**small)(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(engine.logits(ids), expected, rtol=0, atol=1e-4)  # as in test_graph.py
    assert engine.manifest["memory"]["address"] == {"kind": "token", "vocab_size": 100}
    assert engine.manifest["parameters"]["rom"] == 3 * 100 * 16


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [(99, "its vocabulary size is 100, expected 99"), (301, "an integer from 1 to 300"), (0, "from 1 to 300")],
)
def test_a_table_of_another_size(
    make_package: Callable[..., Path], tmp_path: Path, vocab_size: int, message: str
) -> None:
    package = make_package(memory_dim=0, ple_dim=16, ple_vocab_size=100)
    copy = Path(shutil.copytree(package, tmp_path / "package"))
    manifest = (copy / "manifest.json").read_text()
    assert manifest.count('"vocab_size": 100') == 1
    (copy / "manifest.json").write_text(manifest.replace('"vocab_size": 100', f'"vocab_size": {vocab_size}'))
    with pytest.raises(PackageError, match=message):
        Engine(copy)


def test_a_table_larger_than_the_vocabulary(make_model: Callable[..., Decoder]) -> None:
    with pytest.raises(ConfigError, match="ple_vocab_size is 301, the model has 300 tokens; give fewer"):
        make_model(memory_dim=0, ple_dim=16, ple_vocab_size=301)
