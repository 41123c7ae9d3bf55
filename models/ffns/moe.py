"""A mixture of experts, as Qwen3-MoE has it: a router sends each token through k of E SwiGLUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import FLAG, ConfigError, integer
from ..graph.primitives import Primitives, Value
from .base import FFN
from .swiglu import SwiGLU

MOST_EXPERTS = 4096


class MoE(nn.Module):
    """[.., inputs] -> [.., outputs] through k of E experts of `width`: sum over them of share * expert(x).

    The shares are a softmax over all experts, in float32, of gate(x); k are the largest, of equal ones those of lower
    index. With `norm_topk_prob` they are divided by their sum.
    """

    def __init__(self, inputs: int, width: int, outputs: int, config: MoEConfig) -> None:
        super().__init__()
        self.config, self.outputs = config, outputs
        self.gate = nn.Linear(inputs, config.experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(inputs, width, outputs) for _ in range(config.experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        all_shares = torch.softmax(self.gate(flat), dim=-1, dtype=torch.float32)
        shares, chosen = all_shares.sort(dim=-1, descending=True, stable=True)  # topk has no order of equal values
        shares, chosen = (values[:, : self.config.experts_per_token] for values in (shares, chosen))
        if self.config.norm_topk_prob:
            shares = shares / shares.sum(dim=-1, keepdim=True)
        out = flat.new_zeros(len(flat), self.outputs)
        for index, expert in enumerate(self.experts):
            token, place = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(flat[token]) * shares[token, place, None].to(flat.dtype))
        return out.reshape(*x.shape[:-1], -1)


@dataclass(frozen=True)
class MoEConfig(FFN):
    experts: int
    """E."""
    experts_per_token: int
    """k."""
    norm_topk_prob: bool = True

    kind = "moe"
    hidden_act = "silu"
    RULES: ClassVar = {
        "experts": integer(1, MOST_EXPERTS),
        "experts_per_token": integer(1, MOST_EXPERTS),
        "norm_topk_prob": FLAG,
    }

    def check(self) -> None:
        if self.experts_per_token > self.experts:
            raise ConfigError(f"experts_per_token ({self.experts_per_token}) must be at most experts ({self.experts})")

    @property
    def matrices(self) -> int:
        return 1 + 3 * self.experts

    @property
    def residual(self) -> tuple[str, ...]:
        return tuple(f"mlp.experts.{expert}.down_proj.weight" for expert in range(self.experts))

    def idle_parameters(self, inputs: int, width: int, outputs: int) -> int:
        return (self.experts - self.experts_per_token) * width * (2 * inputs + outputs)

    def module(self, inputs: int, width: int, outputs: int) -> MoE:
        return MoE(inputs, width, outputs, self)

    def program(self, g: Primitives, h: Value, prefix: str, width: int, outputs: int) -> Value:
        return g.experts(h, prefix, **self.settings())
