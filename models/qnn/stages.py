"""Cuts a package's decoder into static stages for an NPU and writes them as ONNX."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ..architectures.base import Architecture
from ..config import ConfigError
from ..graph.npu import NpuGraph, Shape
from ..graph.tensors import TensorFile
from ..quantize import PRECISIONS
from .weights import PackageWeights

SHARD_BYTES = 1 << 30
"""Of weights in one stage. A compiled binary must stay below 2 GB, and compiling takes about five times its size."""


@dataclass(frozen=True)
class StaticStage:
    """A stage that is not written yet."""

    name: str
    config: Architecture
    shape: Shape
    cuts: frozenset[int]
    """Layers that begin a stage of their set. The first memory row that is used begins one, too: while the stages
    before it compute, the rows arrive."""
    index: int
    """Of the stage in its set."""
    layers: tuple[int, ...] = ()
    """Of the decoder, whose attention it has."""
    rows: range | None = None
    """Layers of the memory whose rows it takes."""

    def graph(self, weights: PackageWeights, tensors: TensorFile | None = None) -> NpuGraph:
        """The whole set, of which the stage has constants, if there are `tensors`."""
        wanted = None if tensors is None else self.index
        graph = NpuGraph(self.config, self.shape, weights, self.cuts, wanted, tensors)
        self.config.program(graph)
        return graph


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
        if self.dense and not config.memory:
            raise ConfigError("--dense: the model has no memory and is dense as it is; omit it")


def precisions(weights: PackageWeights) -> list[str]:
    """What the package's weights can be compiled as, the default first: quantised ones keep their codes."""
    return [name for name in (weights.type, "float16") if name in PRECISIONS]


def plan(weights: PackageWeights, options: Options) -> dict[str, list[StaticStage]]:
    """Lists of stages by their names in the manifest; "head" is a list of one."""
    sets = {"decode": (weights.config, 1), "prefill": (weights.config, options.chunk)}
    if options.dense:
        sets |= {f"dense_{name}": (config.without_memory(), tokens) for name, (config, tokens) in sets.items()}
    plans: dict[str, list[StaticStage]] = {}
    heads = []
    for name, (config, tokens) in sets.items():
        *plans[name], head = cut(name, config, Shape(tokens, options.context, options.precision), weights)
        heads.append(dataclasses.replace(head, name="head"))
    return {**plans, "head": heads[:1]}


def cut(name: str, config: Architecture, shape: Shape, weights: PackageWeights) -> list[StaticStage]:
    """A set of stages, in order, the head's last: where the memory wants it a cut, and of what is between as few as
    have at most SHARD_BYTES of weights each, of even numbers of layers."""

    def stages(cuts: frozenset[int]) -> list[StaticStage]:
        whole = StaticStage(name, config, shape, cuts, 0)
        return [
            StaticStage(f"{name}.{index}", config, shape, cuts, index, tuple(stage.layers), stage.rows)
            for index, stage in enumerate(whole.graph(weights).stages)
        ]

    a_stage = max(1, int(SHARD_BYTES // weights.layer_bytes(shape.precision)))
    cuts: set[int] = set()
    for first, count in ((stage.layers[0], len(stage.layers)) for stage in stages(frozenset()) if stage.layers):
        shards = -(-count // a_stage)
        cuts |= {first + count * index // shards for index in range(1, shards)}
    return stages(frozenset(cuts))


def write_stage(weights: PackageWeights, stage: StaticStage, directory: Path) -> Path:
    """Writes the stage as `directory`/NAME.onnx, its large tensors beside it as NAME.bin; returns the path.

    CompileError for a weight that float16 does not hold.
    """
    path = directory / f"{stage.name}.onnx"
    with path.with_suffix(".bin").open("wb") as file:
        graph = stage.graph(weights, TensorFile(file))
    graph.stages[stage.index].save(path)
    return path
