"""MeKi: a table for every layer, beside its FFN; rows by token id.

Source: "MeKi: Memory-based Expert Knowledge Injection for Efficient LLM Scaling" (arXiv 2602.03359), equations 1-17.
Parameter names are those of the published module, so that its state dicts load as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import Floats
from ..config import FLAG, WIDTH, ConfigError, integer, one_of
from ..ffns.swiglu import SwiGLU
from ..graph.primitives import Matrix, Primitives, Value
from .base import ALL, SIGMOID, SILU, Memory, MemoryLayer, Read, Tokens, fusion

_TABLE, _PROJECTOR = "embeddings.weight", "word_emb_projection"
_MEGATRON = "meki_module."
_MEGATRON_NORM = f"{_PROJECTOR}.linear_fc1.layer_norm_weight"


class SwiGLUProjector(SwiGLU):
    """G: word embedding [.., d] -> [.., m] through d/2, with the training code's optional RMSNorm before it."""

    def __init__(self, hidden: int, row_dim: int, norm: nn.Module) -> None:
        super().__init__(hidden, hidden // 2, row_dim)
        self.fc1_norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.fc1_norm(x))


class LinearProjector(nn.Linear):
    """G as one matrix (section 5.6)."""

    def __init__(self, hidden: int, row_dim: int, norm: nn.Module) -> None:
        super().__init__(hidden, row_dim, bias=False)
        self.fc1_norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.fc1_norm(x))


EXPERTS = ("both", "static", "dynamic")
"""What a row is made of: the table M and the projector G, or one of them."""
PROJECTORS: dict[str, type[SwiGLUProjector] | type[LinearProjector]] = {
    "swiglu": SwiGLUProjector,
    "linear": LinearProjector,
}
POSITIONS = ("parallel_ffn", "parallel_attention", "after_attention", "after_ffn")
"""What the gate sees: the normed input of the FFN or of attention, or the stream behind either through `pre_norm`."""
FUSIONS = {
    "add_sigmoid": ("Add", SIGMOID),
    "multiply_sigmoid": ("Mul", SIGMOID),
    "add_silu": ("Add", SILU),
    "multiply_silu": ("Mul", SILU),
}
"""How a row and the gate become one, and the gate's activation."""


class MeKi(MemoryLayer):
    """One layer's memory. With the defaults of `MeKiConfig`:

    expert   e = alpha * RMSNorm_m(M[id] + beta * G(E[id]))      looked up by token id; what folding tabulates
    gate     g = sigmoid(W_gate h)
    output   y = RMSNorm_d(W_out (e + g))
    """

    def __init__(self, vocab_size: int, hidden: int, eps: float, config: MeKiConfig) -> None:
        super().__init__()
        self.memory, row_dim = config, config.dim
        if config.experts != "dynamic":
            self.embeddings = nn.Embedding(vocab_size, row_dim)
        if config.experts != "static":
            norm = nn.RMSNorm(hidden, eps=eps) if config.projector_norm else nn.Identity()
            self.word_emb_projection = PROJECTORS[config.projector](hidden, row_dim, norm)
            self.beta_scale = nn.Parameter(torch.ones(()))
        if config.position.startswith("after"):
            self.pre_norm = nn.RMSNorm(hidden, eps=eps)
        self.gate_proj = nn.Linear(hidden, row_dim, bias=False)
        self.out_proj = nn.Linear(row_dim, hidden, bias=False)
        self.mix_norm = nn.RMSNorm(row_dim, eps=eps)
        self.post_norm = nn.RMSNorm(hidden, eps=eps)
        self.alpha_scale = nn.Parameter(torch.ones(()))

    def experts(self, ids: Tensor, word_embedding: Tensor) -> Tensor:
        """Rows of the folded table. ids: int64 [n]; word_embedding: E[ids], [n, d] -> [n, m]."""
        return self.mix(self.embeddings(ids) if self.memory.experts != "dynamic" else None, word_embedding)

    def mix(self, static: Tensor | None, word_embedding: Tensor) -> Tensor:
        """The same from the table's own rows. static: M[ids], [n, m]; word_embedding: E[ids], [n, d] -> [n, m]."""
        parts = [] if static is None else [static]
        if self.memory.experts != "static":
            parts.append(self.beta_scale * self.word_emb_projection(word_embedding))
        return self.alpha_scale * self.mix_norm(sum(parts))

    def inject(self, rows: Tensor, h: Tensor) -> Tensor:
        """The part that stays at inference. rows: [.., m]; h: what the gate sees, [.., d] -> y [.., d]."""
        operator, activation = FUSIONS[self.memory.fusion]
        gate = self.gate_proj(h)
        gate = torch.sigmoid(gate) if activation == SIGMOID else F.silu(gate)
        return self.post_norm(self.out_proj(rows + gate if operator == "Add" else rows * gate))

    def after_attention(self, x: Tensor, h: Tensor, tokens: Tokens) -> Tensor:
        return self._injected(x, h, tokens) if self.memory.position.endswith("attention") else x

    def after_ffn(self, x: Tensor, h: Tensor, tokens: Tokens) -> Tensor:
        return self._injected(x, h, tokens) if self.memory.position.endswith("ffn") else x

    def _injected(self, x: Tensor, h: Tensor, tokens: Tokens) -> Tensor:
        # A row depends on the token id alone: each distinct id is computed once.
        unique, inverse = tokens.ids.unique(return_inverse=True)
        rows = self.experts(unique, tokens.embedding(unique))[inverse]
        return x + self.inject(rows, self.pre_norm(x) if self.memory.position.startswith("after") else h)


@dataclass(frozen=True)
class MeKiConfig(Memory):
    """A MeKi memory in every layer. The defaults are the paper's model, the other values its ablations (section 5)."""

    projector_norm: bool = False
    """RMSNorm on the word embedding before the projector G (the published training code's checkpoints have it)."""
    experts: str = "both"
    projector: str = "swiglu"
    position: str = "parallel_ffn"
    fusion: str = "add_sigmoid"

    kind = "meki"
    SETTINGS: ClassVar = {
        "memory_dim": "dim",
        "projector_norm": "projector_norm",
        "memory_experts": "experts",
        "memory_projector": "projector",
        "memory_position": "position",
        "memory_fusion": "fusion",
    }
    RULES: ClassVar = {
        "memory_dim": integer(0, WIDTH),
        "projector_norm": FLAG,
        "memory_experts": one_of(EXPERTS),
        "memory_projector": one_of(PROJECTORS),
        "memory_position": one_of(POSITIONS),
        "memory_fusion": one_of(FUSIONS),
    }
    KEPT = ("gate_proj.weight", "out_proj.weight", "post_norm.weight", "pre_norm.weight")
    RESIDUAL = ("meki.post_norm.weight",)

    def check(self, config: Any) -> None:
        if self.experts == "static":
            if self.projector_norm or self.projector != "swiglu":
                raise ConfigError("a memory with memory_experts=static has no projector: leave its settings out")
        elif self.projector == "swiglu" and config.hidden % 2:
            raise ConfigError(f"hidden must be even for the memory projector (hidden / 2), got {config.hidden}")

    def module(self, config: Any, layer: int) -> MeKi:
        return MeKi(config.vocab_size, config.hidden, config.norm_eps, self)

    def after_attention(self, g: Primitives, layer: int, x: Value, h: Value, words: Value) -> Value:
        return self._injected(g, layer, x, h) if self.position.endswith("attention") else x

    def after_ffn(self, g: Primitives, layer: int, x: Value, h: Value, words: Value) -> Value:
        return self._injected(g, layer, x, h) if self.position.endswith("ffn") else x

    def _injected(self, g: Primitives, layer: int, x: Value, h: Value) -> Value:
        """x + RMSNorm(W_out (row + sigmoid(W_gate h)))."""
        prefix, out = f"layers.{layer}.meki", f"layers.{layer}.injected"
        row = g.rows(layer, self.dim)
        if self.position.startswith("after"):
            h = g.norm(x, f"{prefix}.pre_norm")
        gate_proj, out_proj = Matrix(f"{prefix}.gate_proj", self.dim), Matrix(f"{prefix}.out_proj", g.config.hidden)
        operator, activation = FUSIONS[self.fusion]
        inputs = [x, h, gate_proj, row, out_proj, g.vector(f"{prefix}.post_norm.weight")]
        if injected := g.fused("Injection", inputs, out, **fusion(activation, operator == "Mul")):
            return injected
        projected = g.linear(h, gate_proj)
        gate = g.op("Sigmoid", [projected], f"{prefix}.gate")
        if activation == SILU:
            gate = g.op("Mul", [projected, gate], f"{prefix}.silu")
        fused = g.op(operator, [row, gate], f"{prefix}.fused")
        return g.add(x, g.norm(g.linear(fused, out_proj), f"{prefix}.post_norm"), out)

    def folded_rows(self, config: Any, read: Read) -> Iterator[Floats]:
        """Computed in float32 with PyTorch's threads."""
        memories = [self._without_table(config, layer, read) for layer in range(config.layers)]
        for tokens in self.token_blocks(config):
            with torch.no_grad():
                words = torch.from_numpy(read("embed_tokens.weight", tokens))
                rows = np.empty((config.layers, len(words), self.dim), np.float32)
                for layer, memory in enumerate(memories):
                    table = f"layers.{layer}.meki.{_TABLE}"
                    static = torch.from_numpy(read(table, tokens)) if self.experts != "dynamic" else None
                    rows[layer] = memory.mix(static, words).numpy()
                yield rows

    def _without_table(self, config: Any, layer: int, read: Read) -> MeKi:
        """A layer's memory, of which only what `MeKi.mix` needs has values."""
        with torch.device("meta"):
            memory = self.module(config, layer)
        needed = [name for name in memory.state_dict() if name not in (_TABLE, *self.KEPT)]
        state = {name: torch.from_numpy(read(f"layers.{layer}.meki.{name}", ALL)) for name in needed}
        memory.load_state_dict(state, strict=False, assign=True)
        return memory

    @classmethod
    def megatron_settings(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        table = next((name for name in shapes if name.endswith(f"{_MEGATRON}{_TABLE}")), None)
        if table is None:
            return {}
        if len(shapes[table]) != 2:
            raise ConfigError(f"tensor {table} has shape {list(shapes[table])}, expected [tokens, width]")
        norm = any(name.endswith(_MEGATRON_NORM) for name in shapes)
        return {"memory_dim": shapes[table][1], "projector_norm": norm}

    def megatron_names(self) -> dict[str, str]:
        scales = ("alpha_scale", "beta_scale")
        kept = (name for name in self.KEPT if name != "pre_norm.weight")
        names = {name: name for name in (_TABLE, *kept, "mix_norm.weight", *scales)}
        names |= {f"{_PROJECTOR}.{part}_proj.weight": f"{_PROJECTOR}.linear_fc1.weight" for part in ("gate", "up")}
        names[f"{_PROJECTOR}.down_proj.weight"] = f"{_PROJECTOR}.linear_fc2.weight"
        if self.projector_norm:
            names[f"{_PROJECTOR}.fc1_norm.weight"] = _MEGATRON_NORM
        return {f"meki.{ours}": f"{_MEGATRON}{theirs}" for ours, theirs in names.items()}
