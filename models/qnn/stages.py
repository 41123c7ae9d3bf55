"""Cuts a package's decoder into static stages for an NPU and writes them as ONNX."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from ..config import ConfigError
from ..tensors import TensorFile
from .graph import PRECISIONS, Shape, StaticStage, file_name
from .weights import PackageWeights

SHARD_BYTES = 1 << 30
"""Of weights in one stage. A compiled binary must stay below 2 GB, and compiling takes about five times its size."""


@dataclass(frozen=True)
class Layers:
    """Layers `first` .. `last` - 1 of a decoder, as one stage.

    In a model with a memory layer 0 stands alone, without its injection: while it computes, the memory rows arrive. Its
    injection opens the stage after it.
    """

    first: int
    last: int
    memory: bool

    @property
    def rows(self) -> range | None:
        """The layers whose memory rows the stage takes."""
        if not self.memory or self.first == 0:
            return None
        return range(0 if self.first == 1 else self.first, self.last)


@dataclass(frozen=True)
class StagePlan:
    """A stage that is not written yet."""

    name: str
    shape: Shape
    layers: Layers | None
    """None: the head."""


@dataclass(frozen=True)
class Options:
    """What a package is compiled to."""

    context: int
    """Capacity of the KV cache, tokens."""
    chunk: int
    """Tokens of a prefill step."""
    precision: str
    """Of the weights, one of PRECISIONS."""
    dense: bool
    """The backbone without its memory as well."""

    def check(self, weights: PackageWeights) -> None:
        """ConfigError if the package cannot be compiled so."""
        config = weights.config
        if not 2 <= self.context <= config.context:
            raise ConfigError(f"context is {self.context}, this model's can be 2 to {config.context} tokens")
        if not 2 <= self.chunk <= self.context:
            raise ConfigError(f"chunk is {self.chunk}, expected 2 to the context of {self.context} tokens")
        if self.precision not in precisions(weights):
            raise ConfigError(
                f"precision {self.precision}: the package has {weights.type} weights, which can be compiled as "
                f"{' or '.join(precisions(weights))}; convert the model with --weights {self.precision}"
            )
        if self.dense and not config.memory_dim:
            raise ConfigError("--dense: the model has no memory and is dense as it is; leave it away")


def precisions(weights: PackageWeights) -> list[str]:
    """What the package's weights can be compiled as, the default first: quantised ones keep their codes."""
    return [name for name in (weights.type, "float16") if name in PRECISIONS]


def cut(weights: PackageWeights, precision: str, memory: bool) -> list[Layers]:
    """The stages of a decoder, in order: as few as have at most SHARD_BYTES of weights each, of even sizes."""
    config = weights.config
    tables = (1 if config.tied_embeddings else 2) * config.vocab_size * config.hidden
    bits = PRECISIONS[precision]
    bytes_a_weight = 2.0 if bits is None else (bits + 0.5) / 8  # 16 bits of scale for 32 weights
    layer_bytes = (config.ram_parameters - tables) / config.layers * bytes_a_weight
    first = int(memory)
    layers = config.layers - first
    count = max(1, -(-layers // max(1, int(SHARD_BYTES // layer_bytes))))
    ends = [first + layers * index // count for index in range(count + 1)]
    alone = [Layers(0, 1, memory)] if memory else []
    return alone + [Layers(start, end, memory) for start, end in itertools.pairwise(ends)]


def plan(weights: PackageWeights, options: Options) -> dict[str, list[StagePlan]]:
    """Lists of stages by their names in the manifest; "head" is a list of one."""
    memory = weights.config.memory_dim > 0

    def stages(name: str, tokens: int, memory: bool) -> list[StagePlan]:
        shape = Shape(tokens, options.context, options.precision)
        layers = cut(weights, options.precision, memory)
        return [StagePlan(f"{name}.{index}", shape, part) for index, part in enumerate(layers)]

    plans = {"decode": stages("decode", 1, memory), "prefill": stages("prefill", options.chunk, memory)}
    if options.dense:
        plans["dense_decode"] = stages("dense_decode", 1, False)
        plans["dense_prefill"] = stages("dense_prefill", options.chunk, False)
    plans["head"] = [StagePlan("head", Shape(1, options.context, options.precision), None)]
    return plans


def write_stage(weights: PackageWeights, stage: StagePlan, directory: Path) -> Path:
    """Writes the stage as `directory`/NAME.onnx, its large tensors beside it as NAME.bin; returns the path.

    CompileError for a weight that float16 does not hold.
    """
    path = directory / f"{stage.name}.onnx"
    with (directory / file_name(path)).open("wb") as file:
        graph = StaticStage(weights, stage.shape, TensorFile(file, file_name(path)))
        if stage.layers is None:
            graph.head()
        else:
            _add_layers(graph, stage.layers, weights.config.layers)
    graph.save(path)
    return path


def _add_layers(graph: StaticStage, layers: Layers, count: int) -> None:
    """The layers, between the inputs from the stage before and the outputs for the one behind."""
    rows = layers.rows
    if layers.memory and layers.first == 0:
        a = graph.attention(graph.enter("embedding"), 0)
        graph.leave(a, "attended.0")
        graph.leave(graph.ffn(a, 0), "fed.0")
        return
    if rows is not None and rows.start == 0:
        x = graph.inject(graph.enter("fed.0"), graph.enter("attended.0"), 0, rows)
    else:
        x = graph.enter(f"hidden.{layers.first}" if layers.first else "embedding")
    for layer in range(layers.first, layers.last):
        x = graph.layer(x, layer, rows)
    graph.leave(x, "final" if layers.last == count else f"hidden.{layers.last}")
