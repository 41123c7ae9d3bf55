"""MeKi's ablations in training form against their equations, a token at a time in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from meki.models.architectures.llama import Decoder
from meki.models.config import ConfigError
from meki.models.memories.base import Tokens
from meki.models.memories.meki import EXPERTS, FUSIONS, POSITIONS, PROJECTORS, MeKi

VOCAB, HIDDEN, DIM, EPS = 20, 12, 8, 1e-6
VARIANTS = [
    *itertools.product(EXPERTS[1:], PROJECTORS, POSITIONS[:1], ["add_sigmoid"], [False]),
    *itertools.product(EXPERTS[:1], ["linear"], POSITIONS[1:], FUSIONS, [True]),
]


def naive(
    weights: dict[str, np.ndarray], words: np.ndarray, token: int, h: np.ndarray, fusion: str, position: str
) -> np.ndarray:
    """y, [hidden], of spec equations; h: the normed input, or with a norm of its own the stream."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2) + EPS) * weights[f"{name}.weight"]

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    mixed = np.zeros(DIM)
    if "embeddings.weight" in weights:
        mixed += weights["embeddings.weight"][token]
    projector = {name.partition(".")[2]: value for name, value in weights.items() if name.startswith("word_emb")}
    if projector:
        u = words[token]
        if "fc1_norm.weight" in projector:
            u = norm(u, "word_emb_projection.fc1_norm")
        if "weight" in projector:
            dynamic = projector["weight"] @ u
        else:
            gate = projector["gate_proj.weight"] @ u
            dynamic = projector["down_proj.weight"] @ (gate * sigmoid(gate) * (projector["up_proj.weight"] @ u))
        mixed += weights["beta_scale"] * dynamic
    expert = weights["alpha_scale"] * norm(mixed, "mix_norm")
    if position.startswith("after"):
        h = norm(h, "pre_norm")
    gate = weights["gate_proj.weight"] @ h
    gate = gate * sigmoid(gate) if fusion.endswith("silu") else sigmoid(gate)
    fused = expert + gate if fusion.startswith("add") else expert * gate
    return norm(weights["out_proj.weight"] @ fused, "post_norm")


@pytest.mark.parametrize(("experts", "projector", "position", "fusion", "projector_norm"), VARIANTS)
def test_equations(
    make_model: Callable[..., Decoder], experts: str, projector: str, position: str, fusion: str, projector_norm: bool
) -> None:
    static = {"memory_projector": "swiglu", "projector_norm": False} if experts == "static" else {}
    model = make_model(
        **{
            "layers": 1, "vocab_size": VOCAB, "hidden": HIDDEN, "memory_dim": DIM, "memory_experts": experts,
            "memory_projector": projector, "memory_position": position, "memory_fusion": fusion,
            "projector_norm": projector_norm, **static,
        }
    )  # fmt: skip
    memory: MeKi = model.layers[0].meki
    weights = {name: value.double().numpy() for name, value in memory.state_dict().items()}
    random = np.random.default_rng(1)
    x, of_attention, of_ffn = random.standard_normal((3, 1, 9, HIDDEN), dtype=np.float32)
    ids = random.integers(0, VOCAB, (1, 9))
    tokens = Tokens(torch.from_numpy(ids), model.embed_tokens(torch.from_numpy(ids)), model.embed_tokens)
    inputs = {"parallel_ffn": of_ffn, "parallel_attention": of_attention}.get(position, x)
    words = model.embed_tokens.weight.detach().double().numpy()
    y = np.stack(
        [naive(weights, words, ids[0, t], inputs[0, t].astype(np.float64), fusion, position) for t in range(9)]
    )
    with torch.no_grad():
        attended = memory.after_attention(torch.from_numpy(x), torch.from_numpy(of_attention), tokens)[0].numpy()
        fed = memory.after_ffn(torch.from_numpy(x), torch.from_numpy(of_ffn), tokens)[0].numpy()
    # Some 20 float32 roundings, of sums of 12 products among them, on values of about 1.
    here, elsewhere = (attended, fed) if position.endswith("attention") else (fed, attended)
    np.testing.assert_allclose(here, x[0] + y, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(elsewhere, x[0])


def test_a_static_memory_has_no_projector(make_model: Callable[..., Decoder]) -> None:
    for settings in ({"projector_norm": True}, {"memory_projector": "linear"}):
        with pytest.raises(ConfigError, match="has no projector"):
            make_model(memory_experts="static", **settings)


def test_a_model_has_one_memory(make_model: Callable[..., Decoder]) -> None:
    with pytest.raises(ConfigError, match="memory_dim and ple_dim are not 0: a model has one memory"):
        make_model(ple_dim=8)
