"""SwiGLU: down(SiLU(gate(x)) * up(x)), without biases ("GLU Variants Improve Transformer", arXiv 2002.05202)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..graph.primitives import Matrix, Primitives, Value
from .base import FFN


class SwiGLU(nn.Module):
    """[.., inputs] -> [.., outputs] through `width`."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(inputs, width, bias=False)
        self.up_proj = nn.Linear(inputs, width, bias=False)
        self.down_proj = nn.Linear(width, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True)
class SwiGLUConfig(FFN):
    kind = "swiglu"
    hidden_act = "silu"
    matrices = 3
    residual = ("mlp.down_proj.weight",)

    def module(self, inputs: int, width: int, outputs: int) -> SwiGLU:
        return SwiGLU(inputs, width, outputs)

    def program(self, g: Primitives, h: Value, prefix: str, width: int, outputs: int) -> Value:
        gate, up = Matrix(f"{prefix}.gate_proj", width), Matrix(f"{prefix}.up_proj", width)
        both = g.linear(h, gate, up, name=f"{prefix}.gate_up")
        return g.linear(self.gated(g, both, prefix), Matrix(f"{prefix}.down_proj", outputs))

    def gated(self, g: Primitives, both: Value, name: str) -> Value:
        """Of the gate's columns and those of `up` behind them."""
        return g.swiglu(both, name)
