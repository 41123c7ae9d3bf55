"""PLE, the per-layer embedding of Gemma 3n and Gemma 4: a table for every layer, behind its FFN; rows by token id.

Source: transformers' `Gemma4TextModel`, whose parameters these are: those that it has for all layers together are cut
by layer here, and its one `per_layer_projection_norm` is each layer's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import Floats
from ..config import WIDTH, ConfigError, integer
from ..graph.primitives import Matrix, Primitives, Value
from .base import GELU_TANH, Memory, MemoryLayer, Read, Tokens, fusion

_TABLE = "embed_tokens.weight"


class PLE(MemoryLayer):
    """One layer's memory. p: width of a row, d: hidden, E: the word embedding.

    context  c = RMSNorm_p(W_model E[id] / sqrt(d))
    input    i = (c + sqrt(p) * T[id]) / sqrt(2)            the second term is what the ROM has
    output   y = RMSNorm_d(W_out (gelu_tanh(W_gate x) * i))     x: the residual stream behind the FFN
    """

    def __init__(self, entries: int, hidden: int, row_dim: int, eps: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(entries, row_dim)
        self.model_projection = nn.Linear(hidden, row_dim, bias=False)
        self.projection_norm = nn.RMSNorm(row_dim, eps=eps)
        self.input_gate = nn.Linear(hidden, row_dim, bias=False)
        self.projection = nn.Linear(row_dim, hidden, bias=False)
        self.post_norm = nn.RMSNorm(hidden, eps=eps)

    def indices(self, ids: Tensor) -> Tensor:
        """Ids beyond the table read its first row."""
        return ids.where(ids < self.embed_tokens.num_embeddings, 0)

    def rows(self, ids: Tensor) -> Tensor:
        """What the ROM has, [.., p]."""
        table = self.embed_tokens
        return table(self.indices(ids)) * (table.embedding_dim / 2) ** 0.5

    def inject(self, rows: Tensor, x: Tensor, words: Tensor) -> Tensor:
        """The part that stays at inference. rows: [.., p]; x and words: E[ids], [.., d] -> y [.., d]."""
        context = self.projection_norm(self.model_projection(words * words.shape[-1] ** -0.5))
        inputs = rows + context * 2**-0.5
        return self.post_norm(self.projection(F.gelu(self.input_gate(x), approximate="tanh") * inputs))

    def after_ffn(self, x: Tensor, h: Tensor, tokens: Tokens) -> Tensor:
        return x + self.inject(self.rows(tokens.ids), x, tokens.words)


@dataclass(frozen=True)
class TokenTable(Memory):
    """A memory whose table may have fewer rows than the model has tokens; its settings are `dim` and `vocab_size`."""

    vocab_size: int = 0
    """Of the table, whose first row serves all tokens beyond it; 0: the model's."""

    def entries(self, config: Any) -> int:
        return self.vocab_size or super().entries(config)

    def address(self, config: Any) -> dict[str, Any]:
        """With `vocab_size` only if it is not the model's."""
        entries = self.entries(config)
        return {"kind": "token"} | ({"vocab_size": entries} if entries != config.vocab_size else {})

    def check(self, config: Any) -> None:
        if self.vocab_size > config.vocab_size:
            _, setting = self.SETTINGS
            raise ConfigError(f"{setting} is {self.vocab_size}, the model has {config.vocab_size} tokens; give fewer")


@dataclass(frozen=True)
class PLEConfig(TokenTable):
    """A per-layer embedding behind every FFN."""

    kind = "ple"
    SETTINGS: ClassVar = {"ple_dim": "dim", "ple_vocab_size": "vocab_size"}
    RULES: ClassVar = {"ple_dim": integer(0, WIDTH), "ple_vocab_size": integer(0, 2**31 - 1)}
    KEPT = (
        "model_projection.weight",
        "projection_norm.weight",
        "input_gate.weight",
        "projection.weight",
        "post_norm.weight",
    )
    RESIDUAL = ("ple.post_norm.weight",)

    def module(self, config: Any, layer: int) -> PLE:
        return PLE(self.entries(config), config.hidden, self.dim, config.norm_eps)

    def after_ffn(self, g: Primitives, layer: int, x: Value, h: Value, words: Value) -> Value:
        prefix, hidden, added = f"layers.{layer}.ple", g.config.hidden, f"layers.{layer}.injected"
        row = g.rows(layer, self.dim)
        projected = g.linear(g.scaled(words, hidden**-0.5), Matrix(f"{prefix}.model_projection", self.dim))
        context = g.scaled(g.norm(projected, f"{prefix}.projection_norm"), 2**-0.5)
        inputs = g.op("Add", [row, context], f"{prefix}.inputs")
        gate_proj, out_proj = Matrix(f"{prefix}.input_gate", self.dim), Matrix(f"{prefix}.projection", hidden)
        fused = [x, x, "", gate_proj, inputs, out_proj, g.vector(f"{prefix}.post_norm.weight")]
        if injected := g.fused("Injection", fused, added, layer=0, **fusion(GELU_TANH, True)):
            return injected
        gate = g.gelu(g.linear(x, gate_proj), f"{prefix}.input_gate")
        out = g.linear(g.op("Mul", [gate, inputs], f"{prefix}.gated"), out_proj)
        return g.add(x, g.norm(out, f"{prefix}.post_norm"), added)

    def folded_rows(self, config: Any, read: Read) -> Iterator[Floats]:
        scale = np.float32((self.dim / 2) ** 0.5)
        for tokens in self.token_blocks(config):
            yield np.stack([read(f"layers.{n}.ple.{_TABLE}", tokens) * scale for n in range(self.layers(config))])
