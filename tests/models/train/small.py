"""Small models of every kind, and what they are trained on."""

from __future__ import annotations

from typing import Any

from meki.models.train.trainer import Recipe

STORIES = [
    "The baker's dog\n\nA dog lived with a baker, and every morning it carried a loaf to the miller.",
    "The miller's cat\n\nThe cat of the miller did not like the dog, but it liked the loaf.",
    "The loaf\n\nOne morning there was no loaf. The dog sat before the oven, and the cat sat beside it.",
] * 4
SMALL: dict[str, Any] = {
    **{"vocab_size": 300, "layers": 2, "hidden": 32, "ffn": 32, "heads": 2, "kv_heads": 1, "head_dim": 16},
    **{"context": 16, "memory_dim": 16},
}
KINDS: dict[str, dict[str, Any]] = {
    "meki": {},
    "dense": {"memory_dim": 0},
    "ple": {"memory_dim": 0, "ple_dim": 16},
    "engram": {"memory_dim": 0, "engram_dim": 32, "engram_layers": (1,), "engram_heads": 2, "engram_rows": 50},
    "experts": {"memory_dim": 0, "ffn_kind": "moe", "experts": 3, "experts_per_token": 2},
}


def recipe(steps: int, **changes: Any) -> Recipe:
    values = {"batch": 4, "micro_batch": 4, "length": 16, "rate": 2e-3, "last_rate": 2e-4, "warmup": 3, **changes}
    return Recipe(tokens=steps * values["batch"] * values["length"], **values)
