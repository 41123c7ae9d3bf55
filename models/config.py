"""Model configurations: what fixes the shapes and the arithmetic of a decoder with a row memory.

This module needs neither PyTorch nor ONNX, so that the command lines can name models cheaply.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """A configuration that no model can have."""


_WIDTH = 1 << 20
_SIZES = {
    "vocab_size": 2**31 - 1,
    "layers": 65_535,
    "context": 2**31 - 1,
    **dict.fromkeys(("hidden", "ffn", "heads", "kv_heads", "head_dim", "memory_dim"), _WIDTH),
}
"""The largest that the package format holds."""


def check_field(name: str, value: object) -> None:
    """ConfigError if a field of ModelConfig cannot have this value, whatever the others are."""

    def positive(number: object) -> bool:
        return isinstance(number, int | float) and type(number) is not bool and 0 < number < math.inf

    if name in _SIZES:
        least, most = 0 if name == "memory_dim" else 1, _SIZES[name]
        good, expected = type(value) is int and least <= value <= most, f"an integer from {least} to {most}"
    elif name in ("rope_theta", "norm_eps"):
        good, expected = positive(value), "a positive number"
    elif name == "rope_factors":
        good, expected = isinstance(value, tuple) and all(map(positive, value)), "positive numbers"
    else:
        good, expected = isinstance(value, bool), "true or false"
    if not good:
        raise ConfigError(f"{name} must be {expected}, got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family (RMSNorm, rotary positions, grouped queries, SwiGLU) with an optional MeKi memory.

    The defaults are Qwen3's, as the paper has it. `memory_dim == 0` is the dense backbone. Equations: "MeKi:
    Memory-based Expert Knowledge Injection for Efficient LLM Scaling" (arXiv 2602.03359), equations 1-17.
    """

    vocab_size: int
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    memory_dim: int = 0
    """m, the width of one layer's memory row; 0 switches the memory off."""
    context: int = 4096
    """Longest sequence the model was trained for, in tokens."""
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = True
    """RMSNorm over the head dimension of queries and keys, before RoPE (Qwen3 has it)."""
    projector_norm: bool = False
    """RMSNorm on the word embedding before the projector G (the published training code's checkpoints have it)."""
    qkv_bias: bool = False
    """The query, key and value projections have biases (Qwen2.5 has them)."""
    tied_embeddings: bool = True
    """The output head is the embedding; False: it is a matrix of its own."""
    rope_factors: tuple[float, ...] = ()
    """What the rotary frequencies are divided by, head_dim / 2 numbers (Llama 3's long context); empty: nothing."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_field(field.name, getattr(self, field.name))
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for RoPE, got {self.head_dim}")
        if self.memory_dim and self.hidden % 2:
            raise ConfigError(f"hidden must be even for the memory projector (hidden / 2), got {self.hidden}")
        factors = len(self.rope_factors)
        if factors not in (0, self.head_dim // 2):
            raise ConfigError(f"rope_factors must be head_dim / 2 = {self.head_dim // 2} numbers, got {factors}")

    @property
    def rom_weights(self) -> int:
        """Elements of the folded table: layers * vocab_size * memory_dim."""
        return self.layers * self.vocab_size * self.memory_dim

    @property
    def ram_parameters(self) -> int:
        """Parameters that stay in memory at inference; a tied embedding counts once."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        if self.qkv_bias:
            attention += self.head_dim * (self.heads + 2 * self.kv_heads)
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        memory = 2 * self.hidden * self.memory_dim + self.hidden if self.memory_dim else 0
        layer = attention + norms + 3 * self.hidden * self.ffn + memory
        tables = 1 if self.tied_embeddings else 2
        return tables * self.vocab_size * self.hidden + self.layers * layer + self.hidden

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {**dataclasses.asdict(self), "rope_factors": list(self.rope_factors)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown configuration keys {unknown}; known: {sorted(known)}")
        try:
            factors = values.get("rope_factors", ())
            return cls(**{**values, "rope_factors": tuple(factors) if isinstance(factors, list) else factors})
        except TypeError as error:
            raise ConfigError(f"incomplete configuration: {error}") from error


def _paper_size(layers: int, hidden: int, ffn: int, heads: int, memory_dim: int) -> ModelConfig:
    # Qwen3's 151,669 tokens padded to 151,680; trained at sequence length 4096, used up to 40,960 as Qwen3 is.
    return ModelConfig(
        vocab_size=151_680,
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        memory_dim=memory_dim,
        context=40_960,
    )


CONFIGS: dict[str, ModelConfig] = {
    "meki-tiny": ModelConfig(
        vocab_size=4096,
        layers=8,
        hidden=256,
        ffn=512,
        heads=8,
        kv_heads=2,
        head_dim=32,
        memory_dim=128,
        context=512,
        rope_theta=10_000.0,
    ),
    "meki-0.6b": _paper_size(28, 1024, 3072, 16, 128),
    "meki-1.7b": _paper_size(28, 2048, 6144, 16, 256),
    "meki-4b": _paper_size(36, 2560, 9728, 32, 512),
}
"""Known configurations by name. Only meki-tiny comes with weights."""
