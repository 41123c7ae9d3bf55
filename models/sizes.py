"""Known configurations by name. Only meki-tiny comes with weights."""

from __future__ import annotations

from .architectures.base import Architecture
from .architectures.llama import LlamaConfig
from .memories.meki import MeKiConfig


def _paper_size(layers: int, hidden: int, ffn: int, heads: int, memory_dim: int) -> LlamaConfig:
    # Qwen3's 151,669 tokens padded to 151,680; trained at sequence length 4096, used up to 40,960 as Qwen3 is.
    return LlamaConfig(
        vocab_size=151_680,
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=8,
        head_dim=128,
        context=40_960,
        memory=MeKiConfig(memory_dim),
    )


CONFIGS: dict[str, Architecture] = {
    "meki-tiny": LlamaConfig(
        vocab_size=4096,
        layers=8,
        hidden=256,
        ffn=512,
        heads=8,
        kv_heads=2,
        head_dim=32,
        context=512,
        rope_theta=10_000.0,
        memory=MeKiConfig(128),
    ),
    "meki-0.6b": _paper_size(28, 1024, 3072, 16, 128),
    "meki-1.7b": _paper_size(28, 2048, 6144, 16, 256),
    "meki-4b": _paper_size(36, 2560, 9728, 32, 512),
}
