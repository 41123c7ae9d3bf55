"""What the rest of meki.models asks of a feed-forward network, of whichever kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self

from torch import nn

from ..config import ConfigError, Rule
from ..graph.primitives import Primitives, Value


@dataclass(frozen=True)
class FFN(ABC):
    """An FFN's configuration, an immutable value; its fields are settings beside the decoder's. [.., inputs] ->
    [.., outputs] through `width`; the program computes what the PyTorch module does."""

    kind: ClassVar[str]
    RULES: ClassVar[Mapping[str, Rule]] = {}
    """Of its fields."""
    hidden_act: ClassVar[str]
    """What Hugging Face calls its activation."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """settings: any; those of the decoder do not matter. ConfigError if one that has no default is missing."""
        needed = [field.name for field in fields(cls) if field.default is MISSING]
        if missing := [name for name in needed if name not in settings]:
            raise ConfigError(f"ffn_kind {cls.kind} needs {' and '.join(missing)}, which nobody gave")
        return cls(**{name: settings[name] for name in cls.RULES if name in settings})

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.RULES}

    def check(self) -> None:  # noqa: B027 (most have nothing to check)
        """ConfigError for fields that do not go together."""

    @property
    @abstractmethod
    def residual(self) -> tuple[str, ...]:
        """How names of weights end that write to the residual stream."""

    @property
    @abstractmethod
    def matrices(self) -> int:
        """How many a layer has."""

    def idle_parameters(self, inputs: int, width: int, outputs: int) -> int:
        """Parameters that take no part in computing a token."""
        return 0

    @abstractmethod
    def module(self, inputs: int, width: int, outputs: int) -> nn.Module: ...

    @abstractmethod
    def program(self, g: Primitives, h: Value, prefix: str, width: int, outputs: int) -> Value: ...
