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

from ..config import FLAG, WIDTH, ConfigError, integer
from ..ffns.swiglu import SwiGLU
from ..graph.primitives import Matrix, Primitives, Value
from ..quantize import Floats
from .base import ALL, Memory, MemoryLayer, Read, Tokens

_TABLE, _PROJECTOR = "embeddings.weight", "word_emb_projection"
_MEGATRON = "meki_module."
_MEGATRON_NORM = f"{_PROJECTOR}.linear_fc1.layer_norm_weight"


class Projector(SwiGLU):
    """G: word embedding [.., d] -> [.., m] through d/2, with the training code's optional RMSNorm before it."""

    def __init__(self, hidden: int, row_dim: int, eps: float, norm: bool) -> None:
        super().__init__(hidden, hidden // 2, row_dim)
        if norm:
            self.fc1_norm = nn.RMSNorm(hidden, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.fc1_norm(x) if hasattr(self, "fc1_norm") else x)


class MeKi(MemoryLayer):
    """One layer's memory.

    expert   e = alpha * RMSNorm_m(M[id] + beta * G(E[id]))      looked up by token id; what folding tabulates
    gate     g = sigmoid(W_gate h)
    output   y = RMSNorm_d(W_out (e + g))
    """

    def __init__(self, vocab_size: int, hidden: int, row_dim: int, eps: float, projector_norm: bool = False) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, row_dim)
        self.word_emb_projection = Projector(hidden, row_dim, eps, projector_norm)
        self.gate_proj = nn.Linear(hidden, row_dim, bias=False)
        self.out_proj = nn.Linear(row_dim, hidden, bias=False)
        self.mix_norm = nn.RMSNorm(row_dim, eps=eps)
        self.post_norm = nn.RMSNorm(hidden, eps=eps)
        self.alpha_scale = nn.Parameter(torch.ones(()))
        self.beta_scale = nn.Parameter(torch.ones(()))

    def experts(self, ids: Tensor, word_embedding: Tensor) -> Tensor:
        """Rows of the folded table. ids: int64 [n]; word_embedding: E[ids], [n, d] -> [n, m]."""
        return self.mix(self.embeddings(ids), word_embedding)

    def mix(self, static: Tensor, word_embedding: Tensor) -> Tensor:
        """The same from the table's own rows. static: M[ids], [n, m]; word_embedding: E[ids], [n, d] -> [n, m]."""
        return self.alpha_scale * self.mix_norm(static + self.beta_scale * self.word_emb_projection(word_embedding))

    def inject(self, rows: Tensor, h: Tensor) -> Tensor:
        """The part that stays at inference. rows: [.., m]; h: the FFN's normed input, [.., d] -> y [.., d]."""
        return self.post_norm(self.out_proj(rows + torch.sigmoid(self.gate_proj(h))))

    def after_ffn(self, x: Tensor, h: Tensor, tokens: Tokens) -> Tensor:
        # A row depends on the token id alone: each distinct id is computed once.
        unique, inverse = tokens.ids.unique(return_inverse=True)
        return x + self.inject(self.experts(unique, tokens.embedding(unique))[inverse], h)


@dataclass(frozen=True)
class MeKiConfig(Memory):
    """A MeKi memory beside every FFN."""

    projector_norm: bool = False
    """RMSNorm on the word embedding before the projector G (the published training code's checkpoints have it)."""

    kind = "meki"
    SETTINGS: ClassVar = {"memory_dim": "dim", "projector_norm": "projector_norm"}
    RULES: ClassVar = {"memory_dim": integer(0, WIDTH), "projector_norm": FLAG}
    KEPT = ("gate_proj.weight", "out_proj.weight", "post_norm.weight")
    RESIDUAL = ("meki.post_norm.weight",)

    def check(self, config: Any) -> None:
        if config.hidden % 2:
            raise ConfigError(f"hidden must be even for the memory projector (hidden / 2), got {config.hidden}")

    def module(self, config: Any, layer: int) -> MeKi:
        return MeKi(config.vocab_size, config.hidden, self.dim, config.norm_eps, self.projector_norm)

    def after_ffn(self, g: Primitives, layer: int, x: Value, h: Value, words: Value) -> Value:
        """x + RMSNorm(W_out (row + sigmoid(W_gate h)))."""
        prefix, out = f"layers.{layer}.meki", f"layers.{layer}.injected"
        row = g.rows(layer, self.dim)
        gate_proj, out_proj = Matrix(f"{prefix}.gate_proj", self.dim), Matrix(f"{prefix}.out_proj", g.config.hidden)
        post_norm = g.vector(f"{prefix}.post_norm.weight")
        if injected := g.fused("Injection", [x, h, gate_proj, row, out_proj, post_norm], out):
            return injected
        gate = g.op("Sigmoid", [g.linear(h, gate_proj)], f"{prefix}.gate")
        fused = g.op("Add", [row, gate], f"{prefix}.fused")
        return g.add(x, g.norm(g.linear(fused, out_proj), f"{prefix}.post_norm"), out)

    def folded_rows(self, config: Any, read: Read) -> Iterator[Floats]:
        """Computed in float32 with PyTorch's threads."""
        memories = [self._without_table(config, layer, read) for layer in range(config.layers)]
        for tokens in self.token_blocks(config):
            with torch.no_grad():
                words = torch.from_numpy(read("embed_tokens.weight", tokens))
                rows = np.empty((config.layers, len(words), self.dim), np.float32)
                for layer, memory in enumerate(memories):
                    static = torch.from_numpy(read(f"layers.{layer}.meki.{_TABLE}", tokens))
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
        names = {name: name for name in (_TABLE, *self.KEPT, "mix_norm.weight", *scales)}
        names |= {f"{_PROJECTOR}.{part}_proj.weight": f"{_PROJECTOR}.linear_fc1.weight" for part in ("gate", "up")}
        names[f"{_PROJECTOR}.down_proj.weight"] = f"{_PROJECTOR}.linear_fc2.weight"
        if self.projector_norm:
            names[f"{_PROJECTOR}.fc1_norm.weight"] = _MEGATRON_NORM
        return {f"meki.{ours}": f"{_MEGATRON}{theirs}" for ours, theirs in names.items()}
