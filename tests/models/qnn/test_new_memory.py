"""What a new memory takes: the class below and its line in the registry, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from meki.models.blocks import Floats
from meki.models.config import integer
from meki.models.graph.primitives import Matrix, Primitives, Value
from meki.models.memories import MEMORIES
from meki.models.memories.base import Memory, MemoryLayer, Read, Tokens
from meki.models.qnn.stages import Options
from meki.models.quantize import quantize_weight

from .conftest import write_stages

IDS = np.random.default_rng(4).integers(0, 300, 12)


class OpenedLayer(MemoryLayer):
    """x + W row before attention, x + RMSNorm(W_out (sigmoid(W_gate E[id]) * row)) after the FFN."""

    def __init__(self, config: Any, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, dim)
        self.before = nn.Linear(dim, config.hidden, bias=False)
        self.gate = nn.Linear(config.hidden, dim, bias=False)
        self.out = nn.Linear(dim, config.hidden, bias=False)
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)

    def before_attention(self, x: Tensor, tokens: Tokens) -> Tensor:
        return x + self.before(self.table(tokens.ids))

    def after_ffn(self, x: Tensor, h: Tensor, tokens: Tokens) -> Tensor:
        return x + self.norm(self.out(torch.sigmoid(self.gate(tokens.words)) * self.table(tokens.ids)))


@dataclass(frozen=True)
class Opened(Memory):
    """In all layers but the first, so that the stage without rows is longer than MeKi's."""

    kind = "opened"
    SETTINGS: ClassVar = {"opened_dim": "dim"}
    RULES: ClassVar = {"opened_dim": integer(0, 1024)}
    KEPT = ("before.weight", "gate.weight", "out.weight", "norm.weight")
    RESIDUAL = ("norm.weight",)

    def module(self, config: Any, layer: int) -> OpenedLayer | None:
        return OpenedLayer(config, self.dim) if layer else None

    def before_attention(self, g: Primitives, layer: int, x: Value, words: Value) -> Value:
        if layer == 0:
            return x
        prefix, row = f"layers.{layer}.opened", g.rows(layer, self.dim)
        return g.add(x, g.linear(row, Matrix(f"{prefix}.before", g.config.hidden)), f"{prefix}.added")

    def after_ffn(self, g: Primitives, layer: int, x: Value, h: Value, words: Value) -> Value:
        if layer == 0:
            return x
        prefix, row = f"layers.{layer}.opened", g.rows(layer, self.dim)
        gate = g.op("Sigmoid", [g.linear(words, Matrix(f"{prefix}.gate", self.dim))], f"{prefix}.opening")
        out = g.linear(g.op("Mul", [gate, row], f"{prefix}.open"), Matrix(f"{prefix}.out", g.config.hidden))
        return g.add(x, g.norm(out, f"{prefix}.norm"), f"{prefix}.injected")

    def folded_rows(self, config: Any, read: Read) -> Iterator[Floats]:
        for tokens in self.token_blocks(config):
            tables = [read(f"layers.{layer}.opened.table.weight", tokens) for layer in range(1, config.layers)]
            yield np.stack([np.zeros_like(tables[0]), *tables])


@pytest.fixture
def variant(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Overrides of a small model that has the memory, which is registered as long as the test runs."""
    monkeypatch.setitem(MEMORIES, "opened", Opened)
    return {"memory_dim": 0, "opened_dim": 32}


def logits(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS)[None])[0].numpy()


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_packages_equal_pytorch(
    variant: dict[str, int],
    make_model: Callable[..., nn.Module],
    make_package: Callable[..., Path],
    reference_session: Any,
    weights: str,
) -> None:
    model = make_model(**variant)
    session = reference_session(make_package(weights, "float32", **variant))
    for name, parameter in model.named_parameters():
        if weights != "float32" and parameter.dim() == 2 and "table" not in name:
            parameter.data = torch.from_numpy(quantize_weight(parameter.detach().numpy(), weights, name).values())
    assert session.manifest["memory"].items() >= {"kind": "opened", "layers": 3, "row_dim": 32}.items()
    assert [stage["rows"] for stage in session.manifest["stages"]] == [None, [1, 3]]
    # Float32 on both sides, as in test_graph.py.
    np.testing.assert_allclose(session.step(IDS), logits(model), rtol=0, atol=1e-4)


def test_static_stages_equal_pytorch(
    variant: dict[str, int],
    make_model: Callable[..., nn.Module],
    make_package: Callable[..., Path],
    naive_stages: Any,
    tmp_path: Path,
) -> None:
    model, package = make_model(**variant), make_package("float32", "float32", **variant)
    write_stages(package, Options(24, 12, "float16", dense=False), tmp_path)
    embedded = model.embed_tokens.weight.detach().numpy()[IDS]
    tables = [layer.opened.table.weight.detach().numpy()[IDS] for layer in model.layers[1:]]
    rows = np.stack(tables)
    naive = naive_stages(model.config, 24)
    got = naive.step(sorted(tmp_path.glob("prefill.*.onnx")), tmp_path / "head.onnx", embedded, rows, 12)
    expected = logits(model)
    # As in test_stages.py: float16 after every operator.
    assert np.abs(got - expected).max() < 0.01 * np.sqrt(np.mean(np.square(expected)))
