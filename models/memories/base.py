"""What the rest of meki.models asks of a row memory, of whichever kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor, nn

from ..config import Rule
from ..graph.primitives import Primitives, Value
from ..quantize import Floats

ALL = slice(None)
BLOCK_BYTES = 32 << 20
"""Of float32 rows that are in memory at a time."""

Read = Callable[[str, slice], Floats]
"""Gives rows of a weight by its name in the PyTorch model, float32; `ALL` of them where it is no table."""


class Tokens(NamedTuple):
    """What decides the rows of a memory in training form."""

    ids: Tensor
    """int64 [b, t]."""
    words: Tensor
    """embedding(ids), [b, t, hidden]."""
    embedding: nn.Embedding


class MemoryLayer(nn.Module):
    """A layer's memory in PyTorch, in training form. x: the residual stream, [b, t, hidden], to which it adds."""

    def before_attention(self, x: Tensor, tokens: Tokens) -> Tensor:
        return x

    def after_ffn(self, x: Tensor, h: Tensor, tokens: Tokens) -> Tensor:
        """h: the FFN's normed input."""
        return x


class Memory(ABC):
    """A memory's configuration, an immutable value.

    `layers.N.KIND.` is before the names of its weights. Its programs compute what its PyTorch layer does, with `g.rows`
    in place of the table.
    """

    kind: ClassVar[str]
    RULES: ClassVar[Mapping[str, Rule]]
    """Its settings, as `--set` and config.json have them beside the decoder's."""
    ABSENT: ClassVar[Mapping[str, Any]]
    """Their values in a model without it."""
    KEPT: ClassVar[tuple[str, ...]]
    """The weights that stay at inference; all others go into the rows."""
    RESIDUAL: ClassVar[tuple[str, ...]]
    """How names of weights end that write to the residual stream."""
    address: ClassVar[dict[str, Any]] = {"kind": "token"}
    """Where a token's rows are found, as the manifest has it."""

    @classmethod
    @abstractmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Memory | None:
        """settings: all of RULES. None: the model does not have this memory."""

    @classmethod
    @abstractmethod
    def from_manifest(cls, entry: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of which a manifest has `row_dim` and what `own` gave."""

    @abstractmethod
    def settings(self) -> dict[str, Any]: ...

    @property
    @abstractmethod
    def row_dim(self) -> int: ...

    def own(self) -> dict[str, Any]:
        """What a manifest has of this kind alone."""
        return {}

    def layers(self, config: Any) -> int:
        """Layers of the table."""
        return int(config.layers)

    def check(self, config: Any) -> None:  # noqa: B027 (most have nothing to check)
        """ConfigError if a decoder of this shape cannot have the memory."""

    def widths(self) -> dict[str, int]:
        """Inputs of its matrices beside `hidden`, which quantised weights want to be of whole blocks."""
        return {}

    @abstractmethod
    def module(self, config: Any, layer: int) -> MemoryLayer | None:
        """None: the layer has no memory."""

    def before_attention(self, g: Primitives, layer: int, x: Value, words: Value) -> Value:
        return x

    def after_ffn(self, g: Primitives, layer: int, x: Value, h: Value, words: Value) -> Value:
        return x

    @abstractmethod
    def folded_rows(self, config: Any, read: Read, block_bytes: int = BLOCK_BYTES) -> Iterator[Floats]:
        """The rows of all layers, float32 [layers, n, row_dim], for consecutive n tokens: input of `write_rom`.

        In memory is a block of about `block_bytes`, never a table.
        """

    def stored_rows(self, config: Any, read: Read) -> Iterator[Floats]:
        """The same of a model whose memory is folded already, to tables `layers.N.KIND.folded_table`."""
        for tokens in self.token_blocks(config):
            layers = range(self.layers(config))
            yield np.stack([read(f"layers.{layer}.{self.kind}.folded_table", tokens) for layer in layers])

    def token_blocks(self, config: Any, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
        """The vocabulary in pieces whose rows of all layers take about `block_bytes` in float32."""
        step = max(1, block_bytes // (4 * self.layers(config) * self.row_dim))
        for start in range(0, config.vocab_size, step):
            yield slice(start, min(start + step, config.vocab_size))

    @classmethod
    def megatron_settings(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """What the tensors of a Megatron-LM checkpoint tell of the settings."""
        return {}

    def megatron_names(self) -> dict[str, str]:
        """Where a layer's weights, by their names after `layers.N.`, are in a Megatron-LM checkpoint, after
        `decoder.layers.N.`. What several share has their rows one below the other, in this order."""
        return {}
