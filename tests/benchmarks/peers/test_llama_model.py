"""The GGUF models that other engines are measured with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.peers import llama_model
from meki.models.architectures.gemma4 import Gemma4Config
from meki.models.architectures.llama import LlamaConfig
from meki.models.checkpoints import open_checkpoint
from meki.models.ffns.moe import MoEConfig

SMALL = LlamaConfig.from_settings(
    dict(vocab_size=96, layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=32, memory_dim=16, context=256)
)

GEMMA = Gemma4Config.from_settings(
    dict(
        **dict(vocab_size=96, layers=5, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=32, full_head_dim=64),
        **dict(full_layers=(1, 4), window=16, shared_layers=2, double_wide=True, per_layer_dim=32, context=256),
        **dict(norm_eps=2.0**-20, logit_softcap=30.0),
    )
)
"""Layers 3 and 4 see the keys and values of 2 and 1. Its epsilon is one that float32, as files have it, holds."""


def naive_q4_0(block: bytes) -> list[float]:
    """The 32 values of one block: float16 scale, then 16 bytes; low nibbles are the first half of the values."""
    scale = float(np.frombuffer(block[:2], "<f2")[0])
    codes = [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]
    return [scale * (code - 8) for code in codes]


def test_random_q4_0_has_mean_0_and_variance_1_over_columns() -> None:
    rows, columns = 64, 256
    packed = llama_model.random_q4_0(np.random.default_rng(3), rows, columns)
    assert packed.shape == (rows, columns // 32 * 18)
    values = np.array([naive_q4_0(block.tobytes()) for block in packed.reshape(-1, 18)])
    # Scaled to variance 1, 16,384 values have a standard error of 0.008 in the mean and 0.007 in the mean square (which
    # the scale's spread lifts by 1.3%): five of them, and room for the lift.
    assert abs(values.mean() * columns**0.5) < 0.04
    assert abs((values**2).mean() * columns - 1) < 0.05
    assert len(np.unique(packed, axis=0)) == rows


@pytest.mark.parametrize(("qk_norm", "tied"), [(True, True), (False, True), (True, False)])
def test_gguf_reads_back(tmp_path: Path, qk_norm: bool, tied: bool) -> None:
    config = replace(SMALL.without_memory(), qk_norm=qk_norm, tied_embeddings=tied)
    path = tmp_path / "deeper" / "model.gguf"
    llama_model.write_gguf(config, path)
    assert [file.name for file in path.parent.iterdir()] == ["model.gguf"]
    reader = gguf.GGUFReader(path)

    arch = "qwen3" if qk_norm else "llama"
    fields = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": arch,
        "general.file_type": 2,  # mostly Q4_0
        "tokenizer.ggml.model": "no_vocab",
        f"{arch}.vocab_size": 96,
        f"{arch}.context_length": 256,
        f"{arch}.embedding_length": 64,
        f"{arch}.block_count": 2,
        f"{arch}.feed_forward_length": 96,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.key_length": 32,
        f"{arch}.attention.value_length": 32,
        f"{arch}.rope.dimension_count": 32,
        f"{arch}.rope.freq_base": 500_000.0,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields[f"{arch}.attention.layer_norm_rms_epsilon"] == np.float32(1e-6)

    layer = {
        "attn_norm": [64],
        "attn_q": [64, 128],  # GGUF lists the inputs first
        "attn_k": [64, 64],
        "attn_v": [64, 64],
        "attn_output": [128, 64],
        "ffn_norm": [64],
        "ffn_gate": [64, 96],
        "ffn_up": [64, 96],
        "ffn_down": [96, 64],
    } | ({"attn_q_norm": [32], "attn_k_norm": [32]} if qk_norm else {})
    shapes = {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    shapes |= {"token_embd.weight": [64, 96], "output_norm.weight": [64]} | (
        {} if tied else {"output.weight": [64, 96]}
    )
    assert {tensor.name: tensor.shape.tolist() for tensor in reader.tensors} == shapes
    assert sum(tensor.n_elements for tensor in reader.tensors) == config.ram_parameters
    for tensor in reader.tensors:
        if len(tensor.shape) == 2:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert np.isfinite(values).all() and 0 < np.abs(values).max() < 1.0
        else:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and (tensor.data == 1).all()


def test_a_gemma4_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_model, "PIECE", 1000)  # of a table of 96 * 160 weights
    path = tmp_path / "model.gguf"
    llama_model.write_gguf(GEMMA, path)
    reader = gguf.GGUFReader(path)

    fields = {name: field.contents() for name, field in reader.fields.items()}
    # What llama.cpp's loader of gemma4 asks for.
    expected = {
        "context_length": 256,
        "embedding_length": 64,
        "block_count": 5,
        "feed_forward_length": [96, 96, 96, 192, 192],
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.key_length_swa": 32,
        "attention.value_length_swa": 32,
        "attention.sliding_window": 16,
        "attention.sliding_window_pattern": [True, False, True, True, False],
        "attention.shared_kv_layers": 2,
        "embedding_length_per_layer_input": 32,
        "rope.dimension_count": 64,
        "rope.dimension_count_swa": 32,
        "rope.freq_base": 1_000_000.0,
        "rope.freq_base_swa": 10_000.0,
        "final_logit_softcapping": 30.0,
    }
    assert fields["general.architecture"] == "gemma4"
    assert {name: fields[f"gemma4.{name}"] for name in expected} == expected

    shapes = {
        "token_embd": [64, 96],  # GGUF lists the inputs first
        "output_norm": [64],
        "per_layer_token_embd": [160, 96],
        "per_layer_model_proj": [64, 160],
        "per_layer_proj_norm": [32],
        "rope_freqs": [32],
    }
    for layer in range(5):
        head_dim, ffn = 64 if layer in (1, 4) else 32, 192 if layer > 2 else 96
        inner = {
            "attn_norm": [64],
            "attn_q": [64, 4 * head_dim],
            "attn_q_norm": [head_dim],
            "attn_output": [4 * head_dim, 64],
            "post_attention_norm": [64],
            "ffn_norm": [64],
            "ffn_gate": [64, ffn],
            "ffn_up": [64, ffn],
            "ffn_down": [ffn, 64],
            "post_ffw_norm": [64],
            "inp_gate": [64, 32],
            "proj": [32, 64],
            "post_norm": [64],
            "layer_output_scale": [1],
        }
        if layer < 3:
            inner |= {"attn_k": [64, 2 * head_dim], "attn_v": [64, 2 * head_dim], "attn_k_norm": [head_dim]}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in inner.items()}
    tensors = {tensor.name.removesuffix(".weight"): tensor for tensor in reader.tensors}
    assert {name: tensor.shape.tolist() for name, tensor in tensors.items()} == shapes
    # A quarter of the pairs turns.
    assert tensors.pop("rope_freqs").data.tolist() == [1.0] * 8 + [np.float32(1e30)] * 24
    for tensor in tensors.values():
        if len(tensor.shape) == 2:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0
        else:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and (tensor.data == 1).all()
    assert open_checkpoint(path, {}).config == GEMMA
    # Pieces of 6 rows of 160: each in its place, none twice.
    rows = gguf.dequantize(tensors["per_layer_token_embd"].data, gguf.GGMLQuantizationType.Q4_0)
    assert len(np.unique(rows, axis=0)) == 96 and 0 < np.abs(rows).max() < 1


def test_gguf_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_down\.weight: 80 inputs, expected a multiple of 32"):
        llama_model.write_gguf(replace(SMALL, ffn=80), tmp_path / "model.gguf")

    with pytest.raises(ValueError, match="has biases of query, key and value"):
        llama_model.write_gguf(replace(SMALL, qkv_bias=True), tmp_path / "model.gguf")

    with pytest.raises(ValueError, match="the model's FFN is moe; compare one with swiglu"):
        mixture = MoEConfig(experts=4, experts_per_token=2)
        llama_model.write_gguf(replace(SMALL, feed_forward=mixture), tmp_path / "model.gguf")

    with pytest.raises(ValueError, match="has 48 rows, expected one for each of the 96 tokens"):
        fewer = replace(GEMMA, memory=replace(GEMMA.memory, vocab_size=48))
        llama_model.write_gguf(fewer, tmp_path / "model.gguf")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(llama_model, "random_q4_0", full)
    with pytest.raises(OSError, match="no space"):
        llama_model.write_gguf(SMALL, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_models_are_cached_by_shape(tmp_path: Path) -> None:
    path = llama_model.cached_gguf(SMALL, tmp_path)
    path.write_bytes(b"kept")
    # The memory is no part of the backbone.
    assert llama_model.cached_gguf(SMALL.without_memory(), tmp_path) == path
    assert path.read_bytes() == b"kept"
    other = llama_model.cached_gguf(replace(SMALL, kv_heads=4), tmp_path)
    assert other != path and other.stat().st_size > 4
