"""What the rest of meki.models asks of a row memory, of whichever kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from torch import Tensor, nn

from ..blocks import Floats
from ..config import Rule
from ..graph.primitives import Primitives, Value
from ..graph.weights import Weights

ALL = slice(None)
SIGMOID, SILU, GELU_TANH = range(3)
"""Activations of the gate."""
BLOCK_BYTES = 32 << 20
"""Of float32 rows that are in memory at a time."""

Read = Callable[[str, slice], Floats]
"""Gives rows of a weight by its name in the PyTorch model, float32; `ALL` of them where it is no table."""


def fusion(activation: int, multiply: bool) -> dict[str, int]:
    """These attributes of the operator Injection."""
    values = {"activation": activation, "multiply": int(multiply)}
    return {name: value for name, value in values.items() if value}


def blocks(entries: int, width: int) -> Iterator[slice]:
    """Entries of `width` float32 values in pieces of about BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // (4 * width))
    for start in range(0, entries, step):
        yield slice(start, min(start + step, entries))


class Tokens(NamedTuple):
    """What decides the rows of a memory in training form."""

    ids: Tensor
    """int64 [b, t]."""
    words: Tensor
    """embedding(ids), [b, t, hidden]."""
    embedding: nn.Embedding


class MemoryLayer(nn.Module):
    """A layer's memory in PyTorch, in training form. x: the residual stream, [b, t, hidden], to which it adds."""

    @property
    def table(self) -> nn.Embedding | None:
        """What becomes the rows, or the part of it that is a table."""
        return next((child for child in self.children() if isinstance(child, nn.Embedding)), None)

    def see_tokens(self, canonical: Callable[[], Sequence[int]]) -> None:
        """Before training: what it has to know of the tokenizer. canonical: gives the tokens' canonical ids."""

    def indices(self, ids: Tensor) -> Tensor:
        """Rows of the table that tokens read. ids: int64 [b, t] -> int64 [b, t] or [b, t, rows a token]."""
        return ids

    def before_attention(self, x: Tensor, tokens: Tokens) -> Tensor:
        return x

    def after_attention(self, x: Tensor, h: Tensor, tokens: Tokens) -> Tensor:
        """h: attention's normed input."""
        return x

    def after_ffn(self, x: Tensor, h: Tensor, tokens: Tokens) -> Tensor:
        """h: the FFN's normed input."""
        return x


@dataclass(frozen=True)
class Memory(ABC):
    """A memory's configuration, an immutable value. Its programs compute what its PyTorch layer does, with `g.rows` in
    place of the table. `config`: of the decoder. The names of its weights begin with `layers.N.KIND.`."""

    dim: int
    """Width of one layer's row."""

    kind: ClassVar[str]
    SETTINGS: ClassVar[Mapping[str, str]]
    """Its fields, `dim` first, by what `--set` and config.json call them, beside the decoder's."""
    RULES: ClassVar[Mapping[str, Rule]]
    """Of its settings; with `dim` 0 a decoder does not have this memory."""
    STATED: ClassVar[tuple[str, ...]] = ()
    """Settings that a checkpoint must give, though a new model makes them: its rows were trained with them."""
    KEPT: ClassVar[tuple[str, ...]] = ()
    """Of its weights in a layer those that stay at inference; all others go into the rows."""
    JOINT_TABLE: ClassVar[str | None] = None
    """The weight [bundles, layers * dim] that is the rows as they are, all layers' of a bundle together; None: there is
    none, the rows are made of others."""
    RESIDUAL: ClassVar[tuple[str, ...]]
    """How names of weights end that write to the residual stream."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """settings: any, `frozen`; those of other kinds, and of the decoder, do not matter."""
        fields = {field: settings[name] for name, field in cls.SETTINGS.items() if name in settings}
        return cls(**{"dim": 0, **fields})

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, field) for name, field in self.SETTINGS.items()}

    def manifest(self, config: Any, files: Mapping[str, bytes]) -> dict[str, Any]:
        """What the member `memory` of a package's manifest says of the kind. files: what `files` gave."""
        (_, row_dim), *own = self.settings().items()
        shape = {"layers": self.layers(config), "row_dim": row_dim}
        return {"kind": self.kind, "address": self.address(config), **shape, **dict(own)}

    @classmethod
    def from_manifest(cls, entry: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that `manifest` gave, or an earlier version of it, which had fewer."""
        dim, *own = cls.SETTINGS
        return {dim: entry["row_dim"], **{name: entry[name] for name in own if name in entry}}

    def in_rows(self, name: str) -> bool:
        """Whether the weight `name` of the decoder goes into the rows."""
        its = f".{self.kind}."
        return name == self.JOINT_TABLE or (its in name and not name.endswith(tuple(its + kept for kept in self.KEPT)))

    def layers(self, config: Any) -> int:
        """Of the memory: what `Primitives.rows` counts."""
        return int(config.layers)

    def entries(self, config: Any) -> int:
        """Rows of a layer's table."""
        return int(config.vocab_size)

    def tables(self, config: Any) -> dict[str, tuple[int, int]]:
        """Names and shapes of the tables in folded form."""
        layers = range(self.layers(config))
        return dict.fromkeys(
            (f"layers.{layer}.{self.kind}.folded_table" for layer in layers), (self.entries(config), self.dim)
        )

    def bundles(self, config: Any) -> tuple[int, int, int]:
        """What is read at a time: how many there are, and the rows of each and their width."""
        return self.entries(config), self.layers(config), self.dim

    def cut(self, config: Any, rows: Floats) -> Sequence[Floats]:
        """`tables` of all rows, float32 [rows of a bundle, bundles, width]."""
        return list(rows)

    def files(self, config: Any, weights: Weights) -> dict[str, bytes]:
        """What else a package has for the memory, by file names."""
        return {}

    def fixed(self, config: Any, name: str) -> Floats | None:
        """The weight `name` where no random values will do."""
        return None

    def address(self, config: Any) -> dict[str, Any]:
        """Where a token's rows are found, as the manifest has it."""
        return {"kind": "token"}

    def check(self, config: Any) -> None:  # noqa: B027 (most have nothing to check)
        """ConfigError if a decoder of this shape cannot have the memory."""

    @abstractmethod
    def module(self, config: Any, layer: int) -> MemoryLayer | None:
        """None: the layer has no memory."""

    def before_attention(self, g: Primitives, layer: int, x: Value, words: Value) -> Value:
        return x

    def after_attention(self, g: Primitives, layer: int, x: Value, h: Value, words: Value) -> Value:
        return x

    def after_ffn(self, g: Primitives, layer: int, x: Value, h: Value, words: Value) -> Value:
        return x

    @abstractmethod
    def folded_rows(self, config: Any, read: Read) -> Iterator[Floats]:
        """The rows, float32 [rows of a bundle, n, width], of consecutive n bundles: input of `write_rom`.

        In memory is a block, never a table.
        """

    def stored_rows(self, config: Any, read: Read) -> Iterator[Floats]:
        """The same of a model whose memory is folded already, to tables `layers.N.KIND.folded_table`."""
        for tokens in self.token_blocks(config):
            layers = range(self.layers(config))
            yield np.stack([read(f"layers.{layer}.{self.kind}.folded_table", tokens) for layer in layers])

    def token_blocks(self, config: Any) -> Iterator[slice]:
        """The bundles in pieces of about BLOCK_BYTES."""
        bundles, rows, width = self.bundles(config)
        return blocks(bundles, rows * width)

    @classmethod
    def megatron_settings(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """What the tensors of a Megatron-LM checkpoint tell of the settings."""
        return {}

    def megatron_names(self) -> dict[str, str]:
        """Where a layer's weights, by their names after `layers.N.`, are in a Megatron-LM checkpoint, after
        `decoder.layers.N.`. What several share has their rows one below the other, in this order."""
        return {}
