"""Settings of known models by name. Only meki-tiny comes with weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Qwen3's 151,669 tokens padded to 151,680; trained at sequence length 4096, used up to 40,960 as Qwen3 is.
_PAPER = {"vocab_size": 151_680, "kv_heads": 8, "head_dim": 128, "context": 40_960}

_GEMMA_4 = {
    **{"vocab_size": 262_144, "heads": 8, "head_dim": 256, "full_head_dim": 512, "window": 512, "context": 131_072},
    **{"norm_eps": 1e-6, "logit_softcap": 30.0, "per_layer_dim": 256},
}

SIZES: dict[str, Mapping[str, Any]] = {
    "meki-tiny": {
        "vocab_size": 4096,
        "layers": 8,
        "hidden": 256,
        "ffn": 512,
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 32,
        "context": 512,
        "rope_theta": 10_000.0,
        "memory_dim": 128,
    },
    "meki-0.6b": {**_PAPER, "layers": 28, "hidden": 1024, "ffn": 3072, "heads": 16, "memory_dim": 128},
    "meki-1.7b": {**_PAPER, "layers": 28, "hidden": 2048, "ffn": 6144, "heads": 16, "memory_dim": 256},
    "meki-4b": {**_PAPER, "layers": 36, "hidden": 2560, "ffn": 9728, "heads": 32, "memory_dim": 512},
}
"""Of the architecture llama."""

GEMMA_SIZES: dict[str, Mapping[str, Any]] = {
    "gemma-4-e2b": {
        **_GEMMA_4,
        **{"layers": 35, "full_layers": tuple(range(4, 35, 5)), "shared_layers": 20, "double_wide": True},
        **{"hidden": 1536, "ffn": 6144, "kv_heads": 1},
    },
    "gemma-4-e4b": {
        **_GEMMA_4,
        **{"layers": 42, "full_layers": tuple(range(5, 42, 6)), "shared_layers": 18, "double_wide": False},
        **{"hidden": 2560, "ffn": 10_240, "kv_heads": 2},
    },
}
"""Of the architecture gemma4: the shapes of the published models, to measure speed with."""
