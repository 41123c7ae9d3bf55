"""What the rest of meki.models asks of a decoder, of whichever architecture."""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..config import ConfigError, Rule, check, frozen
from ..ffns import FFNS
from ..ffns.base import FFN
from ..ffns.swiglu import SwiGLUConfig
from ..graph.primitives import Dimensions, Primitives
from ..memories import MEMORIES, Memory

if TYPE_CHECKING:
    from ..source import Source


def load_weights(module: nn.Module, source: Source, prefix: str = "") -> None:
    """Gives a module, which may be on the device "meta", its weights: those whose names begin with `prefix`."""
    state = {
        name: torch.from_numpy(source.weights(f"{prefix}{name}")).to(tensor.dtype)  # not all are float32: ids are not
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state, assign=True)


class Model(nn.Module, ABC):
    """A decoder in PyTorch, in training form. Token ids int64 [b, t] -> logits [b, t, vocab]."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    """Each takes the residual stream, [b, t, hidden], and gives the next."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def begin(self, ids: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """The first layer's residual stream, and what every layer is given beside it. ids: int64 [b, t]."""

    def load_begin(self, source: Source, ids: Tensor) -> None:
        """Gives a model on the device "meta" what `begin` needs for these tokens, or a part of them. ids: int64."""
        load_weights(self.embed_tokens, source, "embed_tokens.")

    def forward(self, ids: Tensor) -> Tensor:
        x, shared = self.begin(ids)
        for layer in self.layers:
            x = layer(x, *shared)
        return self.logits(x)

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """What the model says of a residual stream. x: [b, t, hidden] -> [b, t, vocab]."""

    @torch.no_grad()
    def initialise(self, seed: int, std: float = 0.02) -> Self:
        """Normal initialisation; what writes to the residual stream shrinks with depth, norms before it included.
        Convolutions begin at 0, as Engram's do."""
        generator = torch.Generator().manual_seed(seed)
        shrunk = (2 * self.config.layers) ** -0.5
        for name, parameter in self.named_parameters():
            residual = name.endswith(self.config.residual)
            if parameter.dim() == 2:
                parameter.normal_(0.0, std / (2 * self.config.layers) ** 0.5 if residual else std, generator=generator)
            elif residual:
                parameter.fill_(shrunk)
            elif name.endswith(".bias") or parameter.dim() > 2:
                parameter.zero_()
        return self


@dataclass(frozen=True, kw_only=True)
class Architecture(Dimensions, ABC):
    """A decoder's configuration, an immutable value: what fixes its shapes and its arithmetic.

    Weights have the names of its PyTorch model; those of layer N begin with `layers.N.`, the embedding is
    `embed_tokens.weight`.
    """

    kind: ClassVar[str]
    RULES: ClassVar[Mapping[str, Rule]]
    """Of `ffn_kind` and all fields but `feed_forward` and `memory`."""
    STATED: ClassVar[tuple[str, ...]]
    """Fields that a checkpoint or the user must give, defaults or not."""
    FFN_KIND: ClassVar[str] = SwiGLUConfig.kind
    """Of an FFN that is not stated."""

    layers: int
    tied_embeddings: bool = True
    """The output head is the embedding; False: it is a matrix of its own."""
    feed_forward: FFN = field(default_factory=SwiGLUConfig)
    memory: Memory | None = None

    def __post_init__(self) -> None:
        check(self.RULES, self.fields())
        check(self.feed_forward.RULES, self.feed_forward.settings())
        self.feed_forward.check()
        if self.memory:
            check(self.memory.RULES, self.memory.settings())
            self.memory.check(self)

    @property
    def ffn_kind(self) -> str:
        return self.feed_forward.kind

    def fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.RULES}

    def settings(self) -> dict[str, Any]:
        """All that fixes the model, flat and as JSON holds it: the inverse of `from_settings`."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in self.fields().items()}
        values |= self.feed_forward.settings()
        for kind in MEMORIES.values():
            values |= (self.memory if isinstance(self.memory, kind) else kind.from_settings({})).settings()
        return values

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """settings: fields, those of the FFN and of a memory; what is not given has its default. ConfigError."""
        ffn_kind = settings.get("ffn_kind", cls.FFN_KIND)
        check(cls.RULES, {"ffn_kind": ffn_kind})
        ffn = FFNS[ffn_kind]
        known = [*cls.RULES, *ffn.RULES, *(name for kind in MEMORIES.values() for name in kind.SETTINGS)]
        if unknown := sorted(settings.keys() - set(known)):
            raise ConfigError(f"unknown configuration keys {unknown}; known with ffn_kind {ffn_kind}: {sorted(known)}")
        values = {name: frozen(value) for name, value in settings.items()}
        fields = {name: value for name, value in values.items() if name in cls.RULES and name != "ffn_kind"}
        check(cls.RULES, fields)
        memories = [kind.from_settings(values) for kind in MEMORIES.values()]
        memories = [memory for memory in memories if memory.dim != 0]
        if len(memories) > 1:
            kinds = " and ".join(next(iter(memory.SETTINGS)) for memory in memories)
            raise ConfigError(f"{kinds} are not 0: a model has one memory; set all others to 0")
        memory = memories[0] if memories else None
        try:
            return cls(**fields, feed_forward=ffn.from_settings(values), memory=memory)
        except TypeError as error:
            raise ConfigError(f"incomplete configuration: {error}") from error

    def manifest(self) -> dict[str, Any]:
        """The member `architecture` of a package's manifest, without the memory."""
        return {"kind": self.kind, **{name: self.settings()[name] for name in (*self.RULES, *self.feed_forward.RULES)}}

    def without_memory(self) -> Self:
        return dataclasses.replace(self, memory=None)

    @property
    def head_dims(self) -> tuple[int, ...]:
        """That its layers' attention has."""
        return (self.head_dim,)

    def kv_caches(self) -> list[dict[str, int]] | None:
        """Of each layer, as the manifest has them; None: all have `kv_heads` heads of `head_dim`, and no window."""
        return None

    @property
    @abstractmethod
    def residual(self) -> tuple[str, ...]:
        """How names of weights end that write to the residual stream."""

    @abstractmethod
    def widths(self) -> dict[str, int]:
        """Inputs of matrices but the memory's, which quantised weights want to be of whole blocks."""

    @abstractmethod
    def module(self) -> Model: ...

    @abstractmethod
    def program(self, g: Primitives) -> None:
        """The decoder over graph primitives, from the tokens to the logits."""

    @functools.cache  # noqa: B019 (configurations are few, and small)
    def shapes(self, folded: bool = False) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the PyTorch model's parameters; with `folded` of those that stay at inference, and of
        tables `layers.N.KIND.folded_table`."""
        if not folded:
            with torch.device("meta"):  # shapes without storage
                return {name: tuple(tensor.shape) for name, tensor in self.module().state_dict().items()}
        shapes, memory = self.shapes(), self.memory
        if memory is None:
            return shapes
        stays = {name: shape for name, shape in shapes.items() if not memory.in_rows(name)}
        return stays | memory.tables(self)

    @property
    def rom_parameters(self) -> int:
        """Elements of the folded tables."""
        return sum(map(math.prod, self.memory.tables(self).values())) if self.memory else 0

    @property
    def ram_parameters(self) -> int:
        """Parameters that stay in memory at inference; a tied embedding counts once."""
        return sum(map(math.prod, self.shapes(folded=True).values())) - self.rom_parameters

    @property
    @abstractmethod
    def active_parameters(self) -> int:
        """Of `ram_parameters` those that take part in computing a token; of a table that is the head, all."""
