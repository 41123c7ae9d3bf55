"""Graphs for the CPU: ONNX stages whose weights lie in one file (docs/package-format.md).

Written with onnx's helpers, not traced, so that every node, name and byte is decided here. Matrices are float32 or
packed in symmetric blocks of 8 or 4 bits. Attention and what takes packed matrices are operators of the domain "meki",
which the runtime itself executes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from ..blocks import BLOCK_TYPES, Floats
from ..config import ConfigError
from .primitives import Attention, Dimensions, KeyBias, Lazy, Matrix, Narrowed, Norm, Primitives, Row, Value, Vector
from .tensors import tensor_bytes
from .weights import Weights, WeightStore

_DOMAIN = "meki"
_TYPES_OF_INPUTS = {("Injection", 3): "gate_proj_type", ("Injection", 5): "out_proj_type"}
"""Attributes that have the type of a packed input, by operator and input."""
_FLOAT32 = 0
"""In place of the number of a block type."""


def key_offsets(weights: Weights, bias: KeyBias, kv_heads: int) -> Floats:
    """What of a bias of keys is kept out of the cache, float32 [kv_heads * head_dim]: the pairs of channels that RoPE
    turns together which are longer than four times the RMS of their head's keys without bias, and zeros.

    That RMS is estimated from the weights: what a norm gives has channels of RMS 1 times the norm's weight, taken as
    independent. The largest channel of a key is a few RMS, so that what stays hardly makes its scale coarser.
    """
    projection = weights(f"{bias.projection}.weight") * weights(f"{bias.norm}.weight")
    rms = np.sqrt(np.square(projection).sum(axis=1).reshape(kv_heads, -1).mean(axis=1))
    pairs = weights(f"{bias.projection}.bias").reshape(kv_heads, 2, -1)
    large = np.hypot(pairs[:, 0], pairs[:, 1]) > 4 * rms[:, None]
    return np.where(large[:, None], pairs, np.float32(0)).reshape(-1)


@dataclass(frozen=True)
class Mixture(Lazy):
    """A mixture of experts: an operator that can add a residual, too."""

    h: Value
    name: str
    experts: int
    experts_per_token: int
    norm_topk_prob: bool


class CpuGraph(Primitives):
    """A graph with float32 matrices, in operators of standard ONNX but for attention and experts. T is dynamic."""

    DOMAIN = _DOMAIN
    tokens = "T"

    def __init__(self, config: Dimensions, store: WeightStore) -> None:
        super().__init__(config)
        self.store = store
        self.looked_up: set[str] = set()
        """Constants of which a decode step reads a line."""
        self.mixtures: dict[str, tuple[int, int]] = {}
        """Constants of all experts: of how many a decode step reads the weights, and how many there are."""
        self.narrowed = False
        """The program goes on with the tokens whose logits are wanted."""

    @property
    def decode_bytes(self) -> int:
        """Bytes of weights that one decode step reads; not the tables of which it reads one line."""
        tensors = {name: tensor for stage in self.stages for name, tensor in stage.initializers.items()}
        read = 0
        for name in tensors.keys() - self.looked_up:
            if tensors[name].data_type != TensorProto.INT64:  # an index
                chosen, experts = self.mixtures.get(name, (1, 1))
                read += tensor_bytes(tensors[name]) // experts * chosen
        return read

    def embedding(self, name: str) -> Value:
        ids, table = self.input("token_ids", [1, "T"], TensorProto.INT64), self.table(name)
        self.looked_up.add(table)
        return self.lookup(ids, table)

    def experts(self, h: Value, name: str, experts: int, experts_per_token: int, norm_topk_prob: bool) -> Value:
        return Mixture(h, name, experts, experts_per_token, norm_topk_prob)

    def add(self, a: Value, b: Value, name: str) -> Value:
        return self._mixture(b, a) if isinstance(b, Mixture) else super().add(a, b, name)

    def compute(self, value: Lazy) -> str:
        match value:
            case Mixture():
                return self._mixture(value)
            case Vector(name, factor):
                return self.array(value.tensor, lambda: self.store.joined([name]) * np.float32(factor))
            case Narrowed(x):
                name = self.use(x)
                return self.op("Gather", [name, self._logit_index()], f"{name}.wanted", axis=1)
        return super().compute(value)

    def _mixture(self, mixture: Mixture, residual: Value = "") -> str:
        name, experts, chosen = mixture.name, mixture.experts, mixture.experts_per_token
        assert isinstance(mixture.h, Norm)
        inputs: list[Value] = [mixture.h.x, self.vector(f"{mixture.h.name}.weight"), self.vector(f"{name}.gate.weight")]
        types = {}
        for matrix, parts in (("gate_up", ("gate", "up")), ("down", ("down",))):
            weights = [f"{name}.experts.{expert}.{part}_proj.weight" for expert in range(experts) for part in parts]
            stacked, types[f"{matrix}_type"] = self.stacked(f"{name}.experts.{matrix}", weights)
            self.mixtures[stacked] = chosen, experts
            inputs.append(stacked)
        return self.op(
            "Experts",
            [*inputs, residual] if residual else inputs,
            f"{name}.out",
            domain=_DOMAIN,
            experts=experts,
            experts_per_token=chosen,
            norm_topk_prob=int(mixture.norm_topk_prob),
            epsilon=self.config.norm_eps,
            **types,
        )

    def attention(self, qkv: Value, its: Attention) -> Value:
        stage, own = self.stages[-1], its.source is None
        blocks = f"blocks.{its.window}" if its.window else "blocks"
        size = "block_bytes" if its.head_dim == self.config.head_dim else f"block_bytes.{its.head_dim}"
        cache: list[int | str] = [blocks, its.kv_heads, size]
        stage.layers.append(its.layer)
        if own:
            past = self.input(f"past.{its.layer}", cache, TensorProto.UINT8)
        elif (past := f"present.{its.source}") not in stage.outputs:  # an earlier stage has added to it
            past = self.input(f"shared.{its.source}", cache, TensorProto.UINT8)
        length = self.input("total_sequence_length", [], TensorProto.INT32)
        cos, sin, frequencies = self._rotary(its)
        norms = [self.vector(f"{norm}.weight") for norm in its.norms]
        inputs = [qkv, past, length, cos, sin, *norms, *[""] * (2 - len(norms))]
        inputs += [self._key_offsets(its), frequencies]
        while not inputs[-1]:
            inputs.pop()
        attributes: dict[str, int | float] = {} if own else {"shared": 1}
        if frequencies:  # in tables it can be seen
            attributes["head_dim"] = its.head_dim
        for name in ("scale", "window", "value_norm"):
            if value := getattr(its, name):
                attributes[name] = int(value) if isinstance(value, bool) else value
        outputs = [f"{its.name}.heads"]
        if own:
            outputs.append(stage.output(f"present.{its.layer}", cache, TensorProto.UINT8))
        return self.op(
            "Attention",
            inputs,
            outputs,
            domain=_DOMAIN,
            heads=its.heads,
            kv_heads=its.kv_heads,
            epsilon=self.config.norm_eps,
            **attributes,
        )

    def _rotary(self, its: Attention) -> tuple[str, str, str]:
        """The inputs cos, sin and frequencies."""
        context, rotary = self.config.context, its.rotary
        if isinstance(rotary, tuple):
            values = np.array(rotary, np.float64)
            return "", "", self.array(f"rope.{its.head_dim}.{rotary[0]}.{rotary[-1]}", lambda: values)
        if rotary:
            cos = self.array("rope.cos", lambda: np.asarray(rotary(context)[0]))
            sin = self.array("rope.sin", lambda: np.asarray(rotary(context)[1]))
        else:  # the operator always rotates: by nothing
            shape = (context, its.head_dim // 2)
            cos = self.array("nope.cos", lambda: np.ones(shape, np.float32))
            sin = self.array("nope.sin", lambda: np.zeros(shape, np.float32))
        self.looked_up |= {cos, sin}
        return cos, sin, ""

    def _key_offsets(self, its: Attention) -> str:
        if not its.bias or its.norms:  # which would come between
            return ""
        offsets = key_offsets(self.store.weights, its.bias, its.kv_heads)
        return self.array(f"{its.name}.key_offsets", lambda: offsets) if offsets.any() else ""

    def convolution(self, x: Value, number: int, norm: str, name: str, dilation: int) -> Value:
        cache: list[int | str] = ["context", "token_bytes"]
        past = self.input(f"past_convolution.{number}", cache, TensorProto.UINT8)
        present = self.stages[-1].output(f"present_convolution.{number}", cache, TensorProto.UINT8)
        length = self.input("total_sequence_length", [], TensorProto.INT32)
        weight = self.array(f"{name}.taps", lambda: self.store.joined([f"{name}.weight"])[:, 0].T)
        return self.op(
            "ShortConvolution",
            [x, past, length, self.vector(f"{norm}.weight"), weight],
            [f"{name}.out", present],
            domain=_DOMAIN,
            dilation=dilation,
            epsilon=self.config.norm_eps,
        )

    def narrow(self, x: Value) -> Value:
        self.narrowed = True
        return Narrowed(x)

    def here(self, x: Value) -> Value:
        return Narrowed(x) if self.narrowed else x

    def rows_tensor(self) -> str:
        return self.use(self.here("rows"))

    def selected(self, x: Value) -> Value:
        """[K, hidden], of the positions in logit_index."""
        batch_axis = self.array("batch_axis", lambda: np.zeros(1, np.int64))
        tokens = self.op("Squeeze", [x, batch_axis], "final.tokens")
        return tokens if self.narrowed else self.op("Gather", [tokens, self._logit_index()], "final.selected")

    def _logit_index(self) -> str:
        return self.input("logit_index", ["K"], TensorProto.INT64)

    def head(self, x: Value, name: str) -> Value:
        table = self.table(name)
        self.looked_up.discard(table)
        return self.multiply_table(x, table, name)

    def logits(self, x: Value) -> None:
        name, last = self.use(x), self.stages[-1].nodes[-1]
        assert [name] == last.output, "the logits are not what the program computes last"
        last.output[0] = last.name = self.stages[-1].output("logits", ["K", self.config.vocab_size])

    # Where matrices are float32.

    def table(self, name: str) -> str:
        return self.vector(f"{name}.weight")

    def lookup(self, ids: str, table: str) -> Value:
        return self.op("Gather", [table, ids], "embedding")

    def multiply_table(self, x: Value, table: str, name: str) -> Value:
        # Gemm takes the table as the embedding has it; MatMul would want a transposed copy.
        return self.op("Gemm", [x, table], f"{name}.out", transB=1)

    def product(self, x: Value, matrices: Sequence[Matrix], name: str) -> Value:
        weights = [f"{matrix.name}.weight" for matrix in matrices]
        return self.op("MatMul", [x, self.array(name, lambda: self.store.joined(weights).T)], f"{name}.out")

    def stacked(self, name: str, weights: Sequence[str]) -> tuple[str, int]:
        """Matrices one below the other, and the number of their type."""
        return self.vector(name, weights), _FLOAT32

    def vector(self, name: str, parts: Sequence[str] = ()) -> str:
        return self.array(name, lambda: self.store.joined(parts or [name]))

    def array(self, name: str, make: Callable[[], np.ndarray]) -> str:
        return self._constant(self.store.constant(name, make))

    def number(self, value: float) -> str:
        return self.array(f"number.{value}", lambda: np.full(1, value, np.float32))

    def _constant(self, tensor: TensorProto) -> str:
        self._here[tensor.name] = tensor.name
        return self.stages[-1].constant(tensor)

    def enter(self, name: str) -> str:
        shape: list[int | str] = [1, self.tokens, self.config.hidden]
        self._makers[name].output(name, shape)
        return self.input(name, shape)


@dataclass(frozen=True)
class Product(Lazy):
    """x times packed matrices: an operator that can add a residual, too."""

    x: Value
    matrices: tuple[Matrix, ...]
    name: str


@dataclass(frozen=True)
class Gated(Lazy):
    """What the function `kind`, "swiglu" or "geglu", makes of x."""

    x: Value
    name: str
    kind: str


class PackedGraph(CpuGraph):
    """A graph with packed matrices. The operators that take them compute what stands before them, a norm or a gate, and
    behind them, a norm or a residual, too."""

    def swiglu(self, x: Value, name: str) -> Value:
        return Gated(x, name, "swiglu")

    def geglu(self, x: Value, name: str) -> Value:
        return Gated(x, name, "geglu")

    def product(self, x: Value, matrices: Sequence[Matrix], name: str) -> Value:
        if not self.store.is_packed([f"{matrix.name}.weight" for matrix in matrices]):
            return super().product(x, matrices, name)
        return Product(x, tuple(matrices), name)

    def add(self, a: Value, b: Value, name: str) -> Value:
        match b:
            case Product():
                return self._linear(b, a)
            case Norm(Product() as product, norm, 1.0):
                return self._linear(product, a, norm)
        return super().add(a, b, name)

    def compute(self, value: Lazy) -> str:
        match value:
            case Product():
                return self._linear(value)
            case Gated(x, name, kind):
                return self.use(super().swiglu(x, name) if kind == "swiglu" else super().geglu(x, name))
        return super().compute(value)

    def fused(self, kind: str, inputs: Sequence[Value | Matrix], output: str, **attributes: int) -> Value | None:
        weights = [f"{value.name}.weight" for value in inputs if isinstance(value, Matrix)]
        if not all(self.store.is_packed([weight]) and self.store.order([weight]) is None for weight in weights):
            return None  # which the operator does not take
        passed: list[Value] = []
        for value in inputs:
            match value:
                case Norm(x, norm, 1.0):
                    passed += [x, self.vector(f"{norm}.weight")]
                case Matrix():
                    weight, attributes[_TYPES_OF_INPUTS[kind, len(passed)]] = self._matrix(value.name)
                    passed.append(weight)
                case Row(layer):
                    passed.append(self.rows_tensor())
                    attributes["layer"] = layer - self._stage_rows().start
                case _:
                    passed.append(value)
        return self.op(kind, passed, output, domain=_DOMAIN, epsilon=self.config.norm_eps, **attributes)

    def table(self, name: str) -> str:
        return self._matrix(name)[0] if self.store.is_packed([f"{name}.weight"]) else super().table(name)

    def stacked(self, name: str, weights: Sequence[str]) -> tuple[str, int]:
        if any(self.store.order([weight]) is not None for weight in weights):
            raise ConfigError(
                f"{name}: its groups are of inputs in an order of their own (act-order), which is supported in the "
                "linear layers of attention and of a dense FFN; have the weights rounded anew: --weights int8"
            )
        if not self.store.is_packed(weights):
            return super().stacked(name, weights)
        panels = self._constant(self.store.packed(f"{name}.panels", weights, alike=True))
        ((type, _),) = self.store.parts[panels]
        return panels, BLOCK_TYPES[type].code

    def lookup(self, ids: str, table: str) -> Value:
        if table not in self.store.parts:
            return super().lookup(ids, table)
        ((type, rows),) = self.store.parts[table]
        code = BLOCK_TYPES[type].code
        return self.op("Embedding", [ids, table], "embedding", domain=_DOMAIN, outputs=rows, type=code)

    def multiply_table(self, x: Value, table: str, name: str) -> Value:
        if table not in self.store.parts:
            return super().multiply_table(x, table, name)
        return self.linear(x, Matrix(name, self.config.vocab_size))

    def _linear(self, product: Product, residual: Value = "", post_norm: str = "") -> str:
        parts = [f"{matrix.name}.weight" for matrix in product.matrices]
        x, weight = self._in_order(product, parts), ""
        attributes = {"swiglu": 0}
        match x:
            case Norm(normed, norm, 1.0):
                x, weight = normed, self.vector(f"{norm}.weight")
            case Gated(both, _, kind):
                x = both
                attributes[kind] = 1
        panels = self._constant(self.store.packed(f"{product.name}.panels", parts))
        its = [[BLOCK_TYPES[type].code, rows] for type, rows in self.store.parts[panels]]
        inputs = [x, panels, self.array(f"{product.name}.parts", lambda: np.array(its, np.int64)), weight, residual]
        inputs.append(self.vector(f"{post_norm}.weight") if post_norm else "")
        while not inputs[-1]:
            inputs.pop()
        out, epsilon = f"{product.name}.out", self.config.norm_eps
        return self.op("Linear", inputs, out, domain=_DOMAIN, epsilon=epsilon, **attributes)

    def _in_order(self, product: Product, parts: Sequence[str]) -> Value:
        """What the matrices are multiplied with, in the order of their columns: another than its own is made here."""
        order = self.store.order(parts)
        if order is None:
            return product.x
        index = self.array(f"{product.name}.order", lambda: order)
        return self.op("Gather", [product.x, index], f"{product.name}.in", axis=-1)

    def _matrix(self, name: str) -> tuple[str, int]:
        """One packed matrix, and the number of its type."""
        return self.stacked(name, [f"{name}.weight"])
