"""Where a package's values come from: a model in training form, a checkpoint, or a random generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .architectures.base import Architecture, Model
from .blocks import Floats
from .graph.weights import MatrixBlocks, Weights
from .memories.base import ALL, Read
from .rom import StoredRows


@dataclass(frozen=True)
class SourceRows:
    """A memory's rows as a checkpoint holds them: with a scale for every 32 values."""

    row_type: str
    """int8 or int4."""
    blocks: Callable[[], Iterator[StoredRows]]
    """Of the next n bundles, until the last."""


@dataclass(frozen=True)
class Source:
    """A model as an export takes it: piece by piece."""

    config: Architecture
    weights: Weights
    row_blocks: Callable[[], Iterator[Floats]]
    """The rows of a model with memory: float32 [rows of a bundle, n, width] of the next n bundles, until the last."""
    blocks: MatrixBlocks | None = None
    """Of a checkpoint that has quantised matrices."""
    rows: SourceRows | None = None
    """Of a checkpoint that has the rows of its memory in a form that a ROM holds."""
    folded: bool = False
    """The memories are tables `layers.N.KIND.folded_table`; else in training form."""


def lazy_source(config: Architecture, read: Read, folded: bool = False) -> Source:
    """Values that are read when they are needed."""

    def row_blocks() -> Iterator[Floats]:
        assert config.memory is not None
        return config.memory.stored_rows(config, read) if folded else config.memory.folded_rows(config, read)

    return Source(config, lambda name: read(name, ALL), row_blocks, folded=folded)


def model_source(model: Model) -> Source:
    """The model's own values. model: float32, training form."""
    state = model.state_dict()

    def read(name: str, rows: slice) -> Floats:
        values: Floats = state[name].numpy()
        return values if rows == ALL else values[rows]

    return lazy_source(model.config, read)


def random_source(config: Architecture) -> Source:
    """Random values of a trained model's magnitudes, so that activations stay of order 1 through all layers.

    The same at every call. A weight exists only while it is exported; the model never does.
    """
    shapes = config.shapes()
    residual = (2 * config.layers) ** -0.5  # of what adds to the residual stream, as in Model.initialise

    def weight(name: str) -> Floats:
        fixed = config.memory.fixed(config, name) if config.memory else None
        if fixed is not None:
            return fixed
        shape = shapes[name]
        values = np.asarray(_generator(name).standard_normal(shape, dtype=np.float32))
        if len(shape) > 1:
            values *= np.float32(math.prod(shape[1:]) ** -0.5)
        else:
            values *= np.float32(0.1)
            if not name.endswith(".bias"):  # norms and scalars
                values += 1
        if name.endswith(config.residual):
            values *= np.float32(residual)
        return values

    def row_blocks() -> Iterator[Floats]:
        memory, generator = config.memory, _generator("memory rows")
        assert memory is not None
        for tokens in memory.token_blocks(config):
            # Of RMS 1, as an RMSNorm leaves rows.
            _, rows, width = memory.bundles(config)
            shape = (rows, tokens.stop - tokens.start, width)
            yield generator.standard_normal(shape, dtype=np.float32)

    return Source(config, weight, row_blocks)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))
