"""Where a package's values come from: a model in training form, or a random generator for speed measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .config import ModelConfig
from .decoder import Decoder
from .quantize import Floats
from .rom import folded_blocks, tokens_per_block
from .weights import Weights


@dataclass(frozen=True)
class Source:
    """A model as an export takes it: piece by piece."""

    config: ModelConfig
    weights: Weights
    row_blocks: Callable[[], Iterator[Floats]]
    """The folded rows of a model with memory: float32 [layers, n, memory_dim] of the next n tokens, until the last."""


def model_source(model: Decoder) -> Source:
    """The model's own values. model: float32, training form."""
    state = model.state_dict()
    return Source(model.config, lambda name: state[name].numpy(), lambda: folded_blocks(model))


def random_source(config: ModelConfig) -> Source:
    """Random values of a trained model's magnitudes, so that activations stay of order 1 through all layers.

    The same at every call. A weight exists only while it is exported; the model never does.
    """
    with torch.device("meta"):  # shapes without storage
        shapes = {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}
    residual = (2 * config.layers) ** -0.5  # of what adds to the residual stream, as in Decoder.initialise

    def weight(name: str) -> Floats:
        shape = shapes[name]
        values = np.asarray(_generator(name).standard_normal(shape, dtype=np.float32))
        if len(shape) == 2:
            values *= np.float32(shape[1] ** -0.5)
        else:  # gains and scalars
            values *= np.float32(0.1)
            values += 1
        if name.endswith(("o_proj.weight", "down_proj.weight", "post_norm.weight")):
            values *= np.float32(residual)
        return values

    def row_blocks() -> Iterator[Floats]:
        generator = _generator("memory rows")
        step = tokens_per_block(config)
        for start in range(0, config.vocab_size, step):
            tokens = min(step, config.vocab_size - start)
            # Of RMS 1, as the RMSNorm of the folding leaves rows.
            yield generator.standard_normal((config.layers, tokens, config.memory_dim), dtype=np.float32)

    return Source(config, weight, row_blocks)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))
