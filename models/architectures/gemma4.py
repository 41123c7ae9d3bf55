"""Gemma 4 E2B and E4B, the text models: a per-layer embedding, and last layers that see the keys and values of others.

Source: transformers' `Gemma4TextModel`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import FLAG, WIDTH, ConfigError, Rule, integer, is_positive
from ..graph.primitives import Attention, Primitives, Value
from ..memories.gemma_ple import GemmaPLEConfig
from .base import load_weights
from .gemma import Gemma, GemmaDecoder, GemmaLayer, frequencies
from .llama import MOST_LAYERS

if TYPE_CHECKING:
    from ..source import Source


@dataclass(frozen=True, kw_only=True)
class Gemma4Config(Gemma):
    full_head_dim: int
    """Of `full_layers`, in place of `head_dim`."""
    rotary_part: float = 0.25
    """Of the pairs of a head of full layers: what RoPE turns."""
    shared_layers: int = 0
    """The last ones, which have no keys and values: they see those of the last layer of their kind before them."""
    double_wide: bool = False
    """The FFNs of the shared layers have twice the width."""

    kind = "gemma4"
    RULES: ClassVar = {
        **Gemma.RULES,
        "full_head_dim": integer(1, WIDTH),
        "rotary_part": Rule(
            "a number above 0, at most 1", lambda its: isinstance(its, float | int) and is_positive(its) and its <= 1
        ),
        "shared_layers": integer(0, MOST_LAYERS),
        "double_wide": FLAG,
    }
    STATED: ClassVar[tuple[str, ...]] = (*Gemma.STATED, "full_head_dim")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory and not isinstance(self.memory, GemmaPLEConfig):
            raise ConfigError(
                f"a decoder of kind gemma4 has its own per-layer embedding, not the memory {self.memory.kind}"
            )
        own = range(self.first_narrow)
        for full in {self.is_full(layer) for layer in range(own.stop, self.layers)}:
            if not any(self.is_full(layer) == full for layer in own):
                kind = "in full_layers" if full else "outside full_layers"
                raise ConfigError(
                    f"shared_layers is {self.shared_layers}: among the {own.stop} layers before them none is {kind}, "
                    "whose keys and values a shared one would see"
                )
        if not int(self.rotary_part * self.full_head_dim // 2):
            raise ConfigError(f"rotary_part is {self.rotary_part}, which is no pair of {self.full_head_dim} elements")

    @property
    def head_dims(self) -> tuple[int, ...]:
        return (self.head_dim, self.full_head_dim)

    @property
    def first_narrow(self) -> int:
        return max(0, self.layers - self.shared_layers)

    def width(self, layer: int) -> int:
        return 2 * self.ffn if self.double_wide and layer >= self.first_narrow else self.ffn

    @functools.cache  # noqa: B019 (configurations are few, and small)
    def attention(self, layer: int) -> Attention:
        full, name = self.is_full(layer), f"layers.{layer}.self_attn"
        source = None
        if layer >= self.first_narrow:
            source = next(own for own in reversed(range(self.first_narrow)) if self.is_full(own) == full)
        if full:
            rotary = frequencies(self.rope_theta, self.full_head_dim, part=self.rotary_part)
        else:
            rotary = frequencies(self.local_rope_theta, self.head_dim)
        norms = (f"{name}.q_norm", f"{name}.k_norm")
        return Attention(
            layer=layer,
            name=name,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.full_head_dim if full else self.head_dim,
            norms=norms if source is None else norms[:1],
            rotary=rotary,
            scale=1.0,
            window=0 if full else self.window,
            value_norm=source is None,
            source=source,
        )

    def module(self) -> Gemma4Decoder:
        return Gemma4Decoder(self)

    def _layer(self, g: Primitives, layer: int, x: Value, words: Value) -> Value:
        x = super()._layer(g, layer, x, words)
        scalar = f"layers.{layer}.layer_scalar"
        if isinstance(self.memory, GemmaPLEConfig):
            return self.memory.inject(g, layer, x, words, scalar)
        return g.op("Mul", [x, g.vector(scalar)], f"layers.{layer}.scaled")


class Gemma4Layer(GemmaLayer):
    """And what the per-layer embedding adds; all of it times a number."""

    def __init__(self, config: Gemma4Config, layer: int) -> None:
        super().__init__(config, layer)
        self.layer_scalar = nn.Buffer(torch.ones(1))
        self.layer = layer
        if config.memory is not None:
            self.per_layer_input_gate = nn.Linear(config.hidden, config.memory.dim, bias=False)
            self.per_layer_projection = nn.Linear(config.memory.dim, config.hidden, bias=False)
            self.post_per_layer_input_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)

    def forward(  # type: ignore[override]
        self, x: Tensor, seen: dict[int, tuple[Tensor, Tensor]], inputs: Tensor | None
    ) -> Tensor:
        x = super().forward(x, seen)
        if inputs is not None:
            gate = nn.functional.gelu(self.per_layer_input_gate(x), approximate="tanh")
            out = self.per_layer_projection(gate * inputs[..., self.layer, :])
            x = x + self.post_per_layer_input_norm(out)
        return x * self.layer_scalar


class Gemma4Decoder(GemmaDecoder):
    LAYER = Gemma4Layer
    embed_tokens_per_layer: nn.Embedding | SomeRows

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__(config)
        if isinstance(config.memory, GemmaPLEConfig):
            self.embed_tokens_per_layer = nn.Embedding(config.memory.entries(config), config.layers * config.memory.dim)
            self.per_layer_model_projection = nn.Linear(config.hidden, config.layers * config.memory.dim, bias=False)
            self.per_layer_projection_norm = nn.RMSNorm(config.memory.dim, eps=config.norm_eps)

    def load_begin(self, source: Source, ids: Tensor) -> None:
        """Of the per-layer embedding the rows of these tokens alone."""
        super().load_begin(source, ids)
        if isinstance(self.config.memory, GemmaPLEConfig):
            for name in ("per_layer_model_projection", "per_layer_projection_norm"):
                load_weights(self.get_submodule(name), source, f"{name}.")
            self.embed_tokens_per_layer = SomeRows(source, self._rows(ids).unique())

    def begin(self, ids: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        words = self.embed_tokens(ids)
        return words * self.config.hidden**0.5, ({}, self._layer_inputs(ids, words))

    def _layer_inputs(self, ids: Tensor, words: Tensor) -> Tensor | None:
        """[b, t, layers, p], as memories/gemma_ple.py has them; None without a memory."""
        memory = self.config.memory
        if not isinstance(memory, GemmaPLEConfig):
            return None
        shape = (self.config.layers, memory.dim)
        rows = self.embed_tokens_per_layer(self._rows(ids)).unflatten(-1, shape)
        contexts = self.per_layer_projection_norm(self.per_layer_model_projection(words).unflatten(-1, shape))
        return rows * (memory.dim / 2) ** 0.5 + contexts * 2**-0.5

    def _rows(self, ids: Tensor) -> Tensor:
        """Of the table."""
        assert self.config.memory is not None
        return ids.where(ids < self.config.memory.entries(self.config), 0)


class SomeRows(nn.Module):
    """Some rows of a per-layer embedding, by their numbers in the whole table: [..] -> [.., layers * p]."""

    def __init__(self, source: Source, numbers: Tensor) -> None:
        """Reads the table once, a block of it at a time. numbers: int64 [n], ascending."""
        super().__init__()
        self.numbers, found, first = numbers, [], 0
        for block in source.row_blocks():  # [layers, entries, p]
            last = first + block.shape[1]
            inside = numbers[(numbers >= first) & (numbers < last)] - first
            found.append(torch.from_numpy(block[:, inside.numpy()]).transpose(0, 1).flatten(1))
            first = last
        self.rows = torch.cat(found)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.rows[torch.searchsorted(self.numbers, numbers)]
