"""Gemma 3, the text model: layers whose attention sees a window, every sixth one sees all.

Source: "Gemma 3 Technical Report" (arXiv 2503.19786) and transformers' `Gemma3TextModel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config import POSITIVE, ConfigError
from ..graph.primitives import Attention
from .gemma import Gemma, GemmaDecoder, frequencies


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(Gemma):
    query_scalar: float
    """Products of queries and keys are divided by its root."""
    rope_factor: float = 1.0
    """What the rotary frequencies of full layers are divided by (linear scaling)."""

    kind = "gemma3"
    RULES: ClassVar = {**Gemma.RULES, "query_scalar": POSITIVE, "rope_factor": POSITIVE}
    STATED: ClassVar[tuple[str, ...]] = (*Gemma.STATED, "query_scalar")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory:
            raise ConfigError(f"a decoder of kind gemma3 has no memory, got {self.memory.kind}")

    def attention(self, layer: int) -> Attention:
        full, name = self.is_full(layer), f"layers.{layer}.self_attn"
        theta, factor = (self.rope_theta, self.rope_factor) if full else (self.local_rope_theta, 1.0)
        return Attention(
            layer=layer,
            name=name,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            norms=(f"{name}.q_norm", f"{name}.k_norm"),
            rotary=frequencies(theta, self.head_dim, factor),
            scale=self.query_scalar**-0.5,
            window=0 if full else self.window,
        )

    def module(self) -> GemmaDecoder:
        return GemmaDecoder(self)
