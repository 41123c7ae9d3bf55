"""Gemma 4's per-layer embedding: one table with the rows of all layers, behind every FFN; rows by token id.

Source: transformers' `Gemma4TextModel`, whose parameters these are; the decoder (architectures/gemma4.py) has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..blocks import Floats
from ..config import WIDTH, ConfigError, integer
from ..graph.primitives import Columns, Matrix, Primitives, Value, Vector
from .base import GELU_TANH, Read, fusion
from .ple import TokenTable

_PROJECTION, _NORM = "per_layer_model_projection", "per_layer_projection_norm"


@dataclass(frozen=True)
class GemmaPLEConfig(TokenTable):
    """p: width of a row, d: hidden, E: the word embedding, T: the table, whose rows the ROM has as they are.

    context  c = RMSNorm_p(W_model E[id])                   a p of it for each layer
    input    i = (c + sqrt(p) * T[id]) / sqrt(2)
    output   y = RMSNorm_d(W_out (gelu_tanh(W_gate x) * i))     x: the residual stream behind the FFN
    """

    kind = "gemma_ple"
    SETTINGS: ClassVar = {"per_layer_dim": "dim", "per_layer_vocab_size": "vocab_size"}
    RULES: ClassVar = {"per_layer_dim": integer(0, WIDTH), "per_layer_vocab_size": integer(0, 2**31 - 1)}
    RESIDUAL = ("post_per_layer_input_norm.weight",)
    JOINT_TABLE = "embed_tokens_per_layer.weight"

    def check(self, config: Any) -> None:
        if config.kind != "gemma4":
            raise ConfigError(
                f"per_layer_dim is {self.dim}, which decoders of kind gemma4 alone have, not {config.kind}"
            )
        super().check(config)

    def module(self, config: Any, layer: int) -> None:
        """None: what a layer has of it is the decoder's."""

    def inject(self, g: Primitives, layer: int, x: Value, words: Value, scalar: str) -> Value:
        """x, the stream times `g.STREAM`, with what the memory adds, times the number `scalar`. words: E[ids]."""
        prefix, layers, hidden = f"layers.{layer}", self.layers(g.config), g.config.hidden
        row, scale = g.rows(layer, self.dim), (self.dim / 2) ** 0.5
        contexts = g.here(g.linear(words, Matrix(_PROJECTION, layers * self.dim)))
        gate_proj = Matrix(f"{prefix}.per_layer_input_gate", self.dim)
        out_proj = Matrix(f"{prefix}.per_layer_projection", hidden)
        norm, added = f"{prefix}.post_per_layer_input_norm", f"{prefix}.injected"
        fused = [x, x, "", gate_proj, row, out_proj, Vector(f"{norm}.weight")]
        fused += [contexts, Vector(f"{_NORM}.weight", 2**-0.5), Vector(scalar)]
        attributes = {"layer": 0, "context_layer": layer, "row_scale": scale, **fusion(GELU_TANH, True)}
        if injected := g.fused("Injection", fused, added, **attributes):
            return injected
        context = g.norm(Columns(contexts, layer, layers), _NORM, 2**-0.5)
        inputs = g.op("Add", [g.scaled(row, scale), context], f"{prefix}.inputs")
        gate = g.gelu(g.scaled(g.linear(x, gate_proj), 1 / g.STREAM), gate_proj.name)
        out = g.linear(g.op("Mul", [gate, inputs], f"{prefix}.gated"), out_proj)
        return g.op("Mul", [g.add(x, g.norm(out, norm, g.STREAM), added), g.vector(scalar)], f"{prefix}.scaled")

    def tables(self, config: Any) -> dict[str, tuple[int, int]]:
        return {self.JOINT_TABLE: (self.entries(config), self.layers(config) * self.dim)}

    def cut(self, config: Any, rows: Floats) -> list[Floats]:
        return [rows.transpose(1, 0, 2).reshape(rows.shape[1], -1)]

    def folded_rows(self, config: Any, read: Read) -> Iterator[Floats]:
        for tokens in self.token_blocks(config):
            rows = read(self.JOINT_TABLE, tokens)
            yield np.ascontiguousarray(rows.reshape(len(rows), -1, self.dim).transpose(1, 0, 2))

    stored_rows = folded_rows
