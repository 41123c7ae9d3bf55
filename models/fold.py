"""Folds the memories of a model, block of tokens by block of tokens, so that no whole table is ever in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig
from .memory import MeKi
from .quantize import Floats

ALL = slice(None)

Read = Callable[[str, slice], Floats]
"""Gives rows of a weight by its name in `Decoder.state_dict()`, float32; `ALL` of them where it is no table."""


def tokens_per_block(config: ModelConfig, block_bytes: int = 32 << 20) -> int:
    """How many tokens' rows of all layers take about `block_bytes` in float32."""
    return max(1, block_bytes // (4 * config.layers * config.memory_dim))


def token_blocks(config: ModelConfig, block_bytes: int = 32 << 20) -> Iterator[slice]:
    """The vocabulary in pieces of `tokens_per_block`."""
    step = tokens_per_block(config, block_bytes)
    for start in range(0, config.vocab_size, step):
        yield slice(start, min(start + step, config.vocab_size))


def folded_blocks(config: ModelConfig, read: Read, block_bytes: int = 32 << 20) -> Iterator[Floats]:
    """The folded rows of all layers, float32 [layers, n, memory_dim], for consecutive n tokens: input of `write_rom`.

    Computed in float32 with PyTorch's threads. In memory are a block, of about `block_bytes`, and the projectors.
    """
    memories = [_without_table(config, layer, read) for layer in range(config.layers)]
    for tokens in token_blocks(config, block_bytes):
        with torch.no_grad():
            words = torch.from_numpy(read("embed_tokens.weight", tokens))
            rows = np.empty((config.layers, len(words), config.memory_dim), np.float32)
            for layer, memory in enumerate(memories):
                static = torch.from_numpy(read(f"layers.{layer}.meki.embeddings.weight", tokens))
                rows[layer] = memory.mix(static, words).numpy()
            yield rows


def stored_blocks(config: ModelConfig, read: Read) -> Iterator[Floats]:
    """The same of a model whose memories are folded already."""
    for tokens in token_blocks(config):
        yield np.stack([read(f"layers.{layer}.meki.folded_table", tokens) for layer in range(config.layers)])


def _without_table(config: ModelConfig, layer: int, read: Read) -> MeKi:
    """A layer's memory, of which only what `MeKi.mix` needs has values."""
    with torch.device("meta"):
        memory = MeKi(config.vocab_size, config.hidden, config.memory_dim, config.norm_eps, config.projector_norm)
    state: dict[str, Tensor] = {}
    for name in memory.state_dict():
        if name.startswith(("word_emb_projection.", "mix_norm.", "alpha_scale", "beta_scale")):
            state[name] = torch.from_numpy(read(f"layers.{layer}.meki.{name}", ALL))
    memory.load_state_dict(state, strict=False, assign=True)
    return memory
