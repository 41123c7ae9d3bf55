"""GeGLU: down(GELU(gate(x)) * up(x)) with GELU in its tanh form, without biases, as Gemma has it (arXiv 2002.05202)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..graph.primitives import Primitives, Value
from .swiglu import SwiGLU, SwiGLUConfig


class GeGLU(SwiGLU):
    """[.., inputs] -> [.., outputs] through `width`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


@dataclass(frozen=True)
class GeGLUConfig(SwiGLUConfig):
    kind = "geglu"
    hidden_act = "gelu_pytorch_tanh"

    def module(self, inputs: int, width: int, outputs: int) -> GeGLU:
        return GeGLU(inputs, width, outputs)

    def gated(self, g: Primitives, both: Value, name: str) -> Value:
        return g.geglu(both, name)
