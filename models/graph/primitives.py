"""What a decoder's program is written against, and what both kinds of graphs have in common.

A program (of an architecture, an FFN or a memory) says what a model computes, calling `Primitives`; graph/cpu.py and
graph/npu.py make nodes of it. A value stands for a tensor [1, T, width], T being the tokens of a step: float32 on the
CPU, float16 on the NPU. Stages need no word in a program: the first memory row that is asked for begins a stage, and a
value [1, T, hidden] that is used in a later stage than it was made in becomes an output of that and an input of this.
From `narrow` on, T is the number of tokens whose logits are wanted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from onnx import TensorProto

from .builder import GraphBuilder


class Matrix(NamedTuple):
    """The weight `name`.weight, [outputs, inputs]."""

    name: str
    outputs: int


class KeyBias(NamedTuple):
    """Keys are `projection`.weight times what the norm `norm` gives, plus `projection`.bias."""

    projection: str
    norm: str


Tables = Callable[[int], tuple[ArrayLike, ArrayLike]]
"""Rotary tables of so many positions: cos and sin, float32 [positions, head_dim / 2]."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """A layer's causal attention. An immutable value."""

    layer: int
    name: str
    """What the names of its weights begin with."""
    heads: int
    kv_heads: int
    head_dim: int
    norms: tuple[str, ...] = ()
    """Of queries and keys, over head_dim, before they are rotated; of queries alone with `source`; or none."""
    rotary: Tables | tuple[float, ...] | None
    """Positions of queries and keys. Tables, the same in all layers; or frequencies: at position t the elements i and
    i + head_dim / 2 turn by t * rotary[i], those that have none do not turn; None: it knows no positions."""
    scale: float | None = None
    """Of the products of queries and keys; None: head_dim ** -0.5."""
    window: int = 0
    """Positions that a token sees, the last ones, itself included; 0: all."""
    value_norm: bool = False
    """Values are divided by their RMS over head_dim."""
    source: int | None = None
    """The earlier layer whose keys and values it sees, and whose cache; None: its own."""
    bias: KeyBias | None = None
    """That its keys have; the large channels may be kept out of the cache."""

    def __post_init__(self) -> None:
        assert not (self.bias and self.source is not None), self.name


class Lazy:
    """A value that is computed in each stage that uses it, unless the operator that uses it computes it itself."""


@dataclass(frozen=True)
class Norm(Lazy):
    x: Value
    name: str
    factor: float = 1.0


@dataclass(frozen=True)
class Scaled(Lazy):
    x: Value
    factor: float


@dataclass(frozen=True)
class Row(Lazy):
    layer: int


@dataclass(frozen=True)
class Columns(Lazy):
    """A piece of the last axis, of so many equal ones."""

    x: Value
    number: int
    count: int


@dataclass(frozen=True)
class Narrowed(Lazy):
    """Of those tokens alone whose logits are wanted."""

    x: Value


@dataclass(frozen=True)
class Vector(Lazy):
    """The weight `name` times a factor."""

    name: str
    factor: float = 1.0

    @property
    def tensor(self) -> str:
        """What a package's graphs call it."""
        return self.name if self.factor == 1 else f"{self.name}.times.{self.factor}"


Value = str | Lazy
"""The name of a tensor, or what is none yet."""


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """What graphs want to know of a decoder."""

    vocab_size: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int = 4096
    """Longest sequence the model was trained for, in tokens."""
    norm_eps: float = 1e-6


class StageGraph(GraphBuilder):
    """One stage."""

    def __init__(self, *domains: str) -> None:
        super().__init__(*domains)
        self.layers: list[int] = []
        """Of the decoder, whose attention it has."""
        self.rows: range | None = None
        """Layers of the memory whose rows it takes."""


class Primitives(ABC):
    """A graph under construction, in stages."""

    DOMAIN: ClassVar[str]
    """Of the operators that are not ONNX's own."""
    tokens: int | str
    """T."""
    STREAM: ClassVar[float] = 1.0
    """What a residual stream is multiplied with that is too large for the graph's values; Gemma's is."""

    def __init__(self, config: Dimensions) -> None:
        self.config = config
        self.stages: list[StageGraph] = []
        self._makers: dict[str, StageGraph] = {}
        self._begin()

    # What programs call.

    @abstractmethod
    def embedding(self, name: str) -> Value:
        """The rows `token_ids` of the table `name`.weight, [vocab_size, hidden]."""

    def begin_layer(self, layer: int) -> None:  # noqa: B027 (not every graph is)
        """Here a graph may be cut for its size."""

    def norm(self, x: Value, name: str, factor: float = 1.0) -> Value:
        """x / sqrt(mean(x^2) + norm_eps) * `name`.weight * factor, over the last axis."""
        return Norm(x, name, factor)

    def linear(self, x: Value, *matrices: Matrix, name: str = "", bias: bool = False) -> Value:
        """x times the transposed matrices, one below the other in one called `name`: [.., sum of their outputs].

        bias: plus their biases, MATRIX.bias.
        """
        name = name or matrices[0].name
        if (x, name) not in self._products:  # several layers may want a part of it
            self._products[x, name] = self.product(x, matrices, name)
        product = self._products[x, name]
        if not bias:
            return product
        joined = self.vector(f"{name}.bias", [f"{matrix.name}.bias" for matrix in matrices])
        return self.op("Add", [product, joined], f"{name}.biased")

    def scaled(self, x: Value, factor: float) -> Value:
        """x * factor."""
        return x if factor == 1 else Scaled(x, factor)

    def sum(self, x: Value, name: str) -> Value:
        """Over the last axis, which stays with one element."""
        axes = self.array("axes.last", lambda: np.array([-1], np.int64))
        return self.op("ReduceSum", [x, axes], name, keepdims=1)

    def gelu(self, x: Value, name: str) -> Value:
        """x * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, in the form x * sigmoid(2 sqrt(2 / pi) (..))."""
        slope = 2 * (2 / math.pi) ** 0.5
        square = self.scaled(self.op("Mul", [x, x], f"{name}.square"), 0.044715 * slope)
        inner = self.op("Mul", [x, self.op("Add", [square, self.number(slope)], f"{name}.slope")], f"{name}.inner")
        return self.op("Mul", [x, self.op("Sigmoid", [inner], f"{name}.gate")], f"{name}.gelu")

    def swiglu(self, x: Value, name: str) -> Value:
        """SiLU of the first half of the columns, times the second half."""
        gate, up = self._halves(x, name)
        silu = self.op("Mul", [gate, self.op("Sigmoid", [gate], f"{gate}.sigmoid")], f"{gate}.silu")
        return self.op("Mul", [silu, up], f"{name}.product")

    def geglu(self, x: Value, name: str) -> Value:
        """`gelu` of the first half of the columns, times the second half."""
        gate, up = self._halves(x, name)
        return self.op("Mul", [self.gelu(gate, gate), up], f"{name}.product")

    def _halves(self, x: Value, name: str) -> tuple[str, str]:
        gate, up = f"{name}.gate", f"{name}.up"
        self.op("Split", [x], [gate, up], axis=-1, num_outputs=2)
        return gate, up

    def softcap(self, x: Value, cap: float, name: str) -> Value:
        """cap * tanh(x / cap)."""
        squashed = self.op("Tanh", [self.scaled(x, 1 / cap)], f"{name}.tanh")
        return self.op("Mul", [squashed, self.number(cap)], name)

    @abstractmethod
    def experts(self, h: Value, name: str, experts: int, experts_per_token: int, norm_topk_prob: bool) -> Value:
        """A mixture of experts (ffns/moe.py), whose weights' names begin with `name`. h: what a norm gives."""

    @abstractmethod
    def attention(self, qkv: Value, its: Attention) -> Value:
        """Causal attention over a layer's cache, to which the step's keys and values are added, if they are its own.

        qkv: [1, T, (heads + 2 * kv_heads) * head_dim], with `its.source` [1, T, heads * head_dim]
        -> [1, T, heads * head_dim].
        """

    @abstractmethod
    def convolution(self, x: Value, number: int, norm: str, name: str, dilation: int) -> Value:
        """x + SiLU(a causal convolution of `norm` of x over the tokens, of each channel by itself, dilated).

        Its weight is `name`.weight, [hidden, 1, kernel]; what it has seen of the sequence is the state `number`.
        """

    def add(self, a: Value, b: Value, name: str) -> Value:
        return self.op("Add", [a, b], name)

    def rows(self, layer: int, width: int) -> Value:
        """What the memory's layer `layer` has for the tokens, [1, T, width]. To be called in ascending order."""
        if not any(stage.rows for stage in self.stages) and self.stages[-1].nodes:
            self._begin()
        stage = self.stages[-1]
        stage.rows = range(stage.rows.start if stage.rows else layer, layer + 1)
        self.input("rows", [len(stage.rows), self.tokens, width])
        return Row(layer)

    def narrow(self, x: Value) -> Value:
        """Goes on with those tokens alone whose logits are wanted, the last ones; x: the residual stream. What was made
        before, `here` takes along. (An NPU's graph, whose shapes are static, goes on with all.)"""
        return x

    def here(self, x: Value) -> Value:
        """A value made before `narrow`, of the tokens that the program goes on with."""
        return x

    @abstractmethod
    def selected(self, x: Value) -> Value:
        """The tokens whose logits are wanted."""

    def head(self, x: Value, name: str) -> Value:
        """`linear`, with a matrix [vocab_size, hidden] that may be the embedding."""
        return self.linear(x, Matrix(name, self.config.vocab_size))

    @abstractmethod
    def logits(self, x: Value) -> None:
        """The end of the program: x, [.., vocab_size], is what it computes."""

    def op(
        self, kind: str, inputs: Sequence[Value], outputs: str | Sequence[str], /, domain: str = "", **attributes: Any
    ) -> str:
        """An operator of standard ONNX; its first output. `outputs` are names that nothing else has."""
        names = [self.use(value) if value else "" for value in inputs]
        outputs = [outputs] if isinstance(outputs, str) else outputs
        for name in outputs:
            self._makers[name], self._here[name] = self.stages[-1], name
        return self.stages[-1].op(kind, names, outputs, domain, **attributes)

    def fused(self, kind: str, inputs: Sequence[Value | Matrix], output: str, **attributes: int) -> Value | None:
        """An operator of the domain meki (docs/package-format.md) in place of plain ones; None: the graph has none.

        A norm is passed as what is normed and the weight, a matrix in panels, a memory row as the rows of the stage.
        """
        return None

    @abstractmethod
    def vector(self, name: str, parts: Sequence[str] = ()) -> str:
        """The weight `name` as it is, for `op` and `fused`; with `parts`: those, one after the other."""

    # What the two kinds of graphs add.

    @abstractmethod
    def product(self, x: Value, matrices: Sequence[Matrix], name: str) -> Value: ...

    @abstractmethod
    def array(self, name: str, make: Callable[[], np.ndarray]) -> str:
        """A constant that is no weight."""

    @abstractmethod
    def number(self, value: float) -> str:
        """A constant [1]."""

    @abstractmethod
    def enter(self, name: str) -> str:
        """Takes a value of an earlier stage into this one."""

    def input(self, name: str, shape: Sequence[int | str], data_type: int = TensorProto.FLOAT) -> str:
        self._here[name] = name
        return self.stages[-1].input(name, shape, data_type)

    def use(self, value: Value) -> str:
        """The name of the tensor in this stage."""
        if value not in self._here:
            self._here[value] = self.enter(value) if isinstance(value, str) else self.compute(value)
        return self._here[value]

    def compute(self, value: Lazy) -> str:
        if isinstance(value, Norm):
            weight, x, out = Vector(f"{value.name}.weight", value.factor), self.use(value.x), f"{value.name}.out"
            out = f"{out}.of.{x}" if out in self._here else out  # several values may have one norm
            return self.op("RMSNormalization", [x, weight], out, axis=-1, epsilon=self.config.norm_eps)
        if isinstance(value, Scaled):
            x = self.use(value.x)
            return self.op("Mul", [x, self.number(value.factor)], f"{x}.times.{value.factor}")
        if isinstance(value, Columns):
            x = self.use(value.x)
            names = [f"{x}.columns.{number}" for number in range(value.count)]
            self.op("Split", [x], names, axis=-1, num_outputs=value.count)
            self._here |= {Columns(value.x, number, value.count): name for number, name in enumerate(names)}
            return names[value.number]
        assert isinstance(value, Row)
        place = value.layer - self._stage_rows().start
        index = self.array(f"rows.{place}", lambda: np.array([place], np.int64))
        return self.op("Gather", [self.rows_tensor(), index], f"rows.of.{value.layer}", axis=0)

    def rows_tensor(self) -> str:
        """Has this stage's memory rows as values, [layers, T, width]."""
        return "rows"

    def _stage_rows(self) -> range:
        rows = self.stages[-1].rows
        assert rows is not None, "a memory row is used in another stage than it was asked for in"
        return rows

    def _begin(self) -> None:
        self.stages.append(StageGraph(self.DOMAIN))
        self._here: dict[Value, str] = {}
        """What this stage has of the values, by name."""
        self._products: dict[tuple[Value, str], Value] = {}
        """Of `linear`, in this stage."""
