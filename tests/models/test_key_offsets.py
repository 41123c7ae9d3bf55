"""Large channels of the keys' bias, which are kept out of the cache: which they are, and that nothing else changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from meki import Engine
from meki.models.architectures.llama import Decoder
from meki.models.graph import cpu
from meki.models.graph.cpu import key_offsets
from meki.models.graph.primitives import KeyBias
from meki.models.package import export_package
from meki.models.tokenizer import TokenizerSpec

IDS = np.random.default_rng(4).integers(0, 300, 100)
BIAS = KeyBias("k", "norm")


def chosen(weights: dict[str, np.ndarray], kv_heads: int) -> np.ndarray:
    """`key_offsets` from its definition, a channel at a time."""
    weight, norm, bias = weights["k.weight"], weights["norm.weight"], weights["k.bias"]
    head_dim = len(bias) // kv_heads
    out = np.zeros_like(bias)
    for first in range(0, len(bias), head_dim):
        rows = range(first, first + head_dim)
        rms = (sum(float(w * n) ** 2 for row in rows for w, n in zip(weight[row], norm, strict=True)) / head_dim) ** 0.5
        for low in range(first, first + head_dim // 2):
            high = low + head_dim // 2
            if (bias[low] ** 2 + bias[high] ** 2) ** 0.5 > 4 * rms:
                out[low], out[high] = bias[low], bias[high]
    return out


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_which_channels(kv_heads: int) -> None:
    random = np.random.default_rng(kv_heads)
    scales = np.repeat(random.uniform(0.1, 5, kv_heads), 16)[:, None]  # of each head its own
    weights = {
        "k.weight": (random.standard_normal((kv_heads * 16, 24)) * scales).astype(np.float32),
        "norm.weight": random.uniform(0, 2, 24).astype(np.float32),
        "k.bias": (random.standard_cauchy(kv_heads * 16) * 30).astype(np.float32),
    }
    expected = chosen(weights, kv_heads)
    assert 0 < np.count_nonzero(expected) < kv_heads * 16  # or it would say nothing
    np.testing.assert_array_equal(key_offsets(weights.__getitem__, BIAS, kv_heads), expected)


def test_no_channels_of_a_small_bias() -> None:
    weights = {name: np.ones(shape, np.float32) for name, shape in
               {"k.weight": (32, 16), "norm.weight": (16,), "k.bias": (32,)}.items()}  # fmt: skip
    assert not key_offsets(weights.__getitem__, BIAS, 2).any()


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Decoder]) -> Decoder:
    """Of each head the channels 7 and 10 have a bias of 40 and -30, some thirty times their values. They are turned
    by 0.0003 and 0.06 a position."""
    model = make_model(qkv_bias=True, qk_norm=False, nope_layers=(1,))
    with torch.no_grad():
        for layer in model.layers:
            bias = layer.self_attn.k_proj.bias.view(2, 16)
            bias[:, 7], bias[:, 10] = 40.0, -30.0
    return model


@pytest.fixture(scope="module")
def package(model: Decoder, tokenizer_spec: TokenizerSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offsets") / "package"
    export_package(model, tokenizer_spec, path, name="x", weights="float32", rows="float32", provenance={})
    return path


@pytest.fixture(scope="module")
def in_the_keys(model: Decoder, tokenizer_spec: TokenizerSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the whole bias in the cache."""
    path = tmp_path_factory.mktemp("no-offsets") / "package"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "key_offsets", lambda *_: np.zeros(32, np.float32))
        export_package(model, tokenizer_spec, path, name="x", weights="float32", rows="float32", provenance={})
    return path


@functools.cache
@torch.no_grad()
def expected(model: Decoder) -> np.ndarray:
    return model(torch.from_numpy(IDS)[None])[0].numpy()


def inputs_of_attention(package: Path) -> list[list[str]]:
    stages = [onnx.load(package / f"stage{stage}.onnx", load_external_data=False).graph for stage in (0, 1)]
    return [list(node.input) for graph in stages for node in graph.node if node.op_type == "Attention"]


def test_the_graph_has_them(package: Path, in_the_keys: Path) -> None:
    assert [inputs[5:] for inputs in inputs_of_attention(package)] == [
        ["", "", f"layers.{layer}.self_attn.key_offsets"] for layer in range(3)
    ]
    assert [inputs[5:] for inputs in inputs_of_attention(in_the_keys)] == [[]] * 3


def test_the_result_is_the_models(package: Path, model: Decoder, reference_session: Any) -> None:
    # As in test_graph.py: 1e-5 was seen. Without the offsets' part in the scores it is more than 1.
    np.testing.assert_allclose(reference_session(package).step(IDS), expected(model), rtol=0, atol=1e-4)
    np.testing.assert_allclose(Engine(package, kv_type="float32").logits(IDS), expected(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kv_type", ["float16", "int8"])
def test_the_cache_keeps_its_steps(package: Path, in_the_keys: Path, model: Decoder, kv_type: str) -> None:
    """A key's largest channel is some 3 without the bias and 40 with it, and so are float16's steps to one another.
    Keys of int8 are rotated, which spreads the 40 over 16 channels."""
    apart, within = (Engine(path, kv_type=kv_type).logits(IDS) - expected(model) for path in (package, in_the_keys))
    most = {"float16": 0.3, "int8": 0.5}[kv_type]
    assert np.linalg.norm(apart) < most * np.linalg.norm(within)
