"""Where a package's values come from: a model in training form, a checkpoint, or a random generator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .config import ModelConfig
from .decoder import Decoder
from .fold import ALL, Read, folded_blocks, stored_blocks, token_blocks
from .quantize import Floats
from .weights import Weights


@dataclass(frozen=True)
class Source:
    """A model as an export takes it: piece by piece."""

    config: ModelConfig
    weights: Weights
    row_blocks: Callable[[], Iterator[Floats]]
    """The folded rows of a model with memory: float32 [layers, n, memory_dim] of the next n tokens, until the last."""


def decoder_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of `Decoder(config)`."""
    with torch.device("meta"):  # shapes without storage
        state = Decoder(dataclasses.replace(config, layers=1)).state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in state.items():
        layers = range(config.layers) if name.startswith("layers.0.") else range(1)  # all layers are alike
        shapes |= {name.replace("layers.0.", f"layers.{layer}.", 1): tuple(tensor.shape) for layer in layers}
    return shapes


def lazy_source(config: ModelConfig, read: Read, folded: bool = False) -> Source:
    """Values that are read when they are needed. folded: the memories are tables `layers.N.meki.folded_table`."""
    blocks = stored_blocks if folded else folded_blocks
    return Source(config, lambda name: read(name, ALL), lambda: blocks(config, read))


def model_source(model: Decoder) -> Source:
    """The model's own values. model: float32, training form."""
    state = model.state_dict()

    def read(name: str, rows: slice) -> Floats:
        values: Floats = state[name].numpy()
        return values if rows == ALL else values[rows]

    return lazy_source(model.config, read)


def random_source(config: ModelConfig) -> Source:
    """Random values of a trained model's magnitudes, so that activations stay of order 1 through all layers.

    The same at every call. A weight exists only while it is exported; the model never does.
    """
    shapes = decoder_shapes(config)
    residual = (2 * config.layers) ** -0.5  # of what adds to the residual stream, as in Decoder.initialise

    def weight(name: str) -> Floats:
        shape = shapes[name]
        values = np.asarray(_generator(name).standard_normal(shape, dtype=np.float32))
        if len(shape) == 2:
            values *= np.float32(shape[1] ** -0.5)
        else:
            values *= np.float32(0.1)
            if not name.endswith(".bias"):  # gains and scalars
                values += 1
        if name.endswith(("o_proj.weight", "down_proj.weight", "post_norm.weight")):
            values *= np.float32(residual)
        return values

    def row_blocks() -> Iterator[Floats]:
        generator = _generator("memory rows")
        for tokens in token_blocks(config):
            # Of RMS 1, as the RMSNorm of the folding leaves rows.
            shape = (config.layers, tokens.stop - tokens.start, config.memory_dim)
            yield generator.standard_normal(shape, dtype=np.float32)

    return Source(config, weight, row_blocks)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))
