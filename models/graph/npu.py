"""Graphs for an NPU: static shapes, float16 values, a KV cache that is only read (docs/qnn.md).

T, the tokens of a step, is 1 in decode and the chunk's length in prefill; C is the capacity of the cache. Attention
over the cache and over the step's own tokens meet in the softmax only: no node copies the cache, and what a stage
gives back is the new keys and values alone. Everything is an operator that Qualcomm's compiler takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ..blocks import BLOCK, BLOCK_TYPES, Blocks, Codes, Floats
from ..config import CompileError
from .builder import GraphBuilder
from .primitives import Attention, Dimensions, Matrix, Primitives, Tables, Value
from .tensors import TensorFile

MASKED = -30_000.0
"""Added to the scores of what must not be seen: float16 holds it, and e^MASKED is 0."""

Halves = NDArray[np.float16]


def to_float16(values: NDArray[np.floating], what: str) -> Halves:
    """CompileError, naming `what`, for values beyond float16."""
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise CompileError(f"{what}: largest magnitude {np.abs(values).max():g} is beyond float16's 65504")
    return halves


class StoredWeights(Protocol):
    """The weights of a package, by the names that its graphs have for them. n: `rows` of a matrix, k its columns."""

    type: str

    def vector(self, name: str) -> Floats: ...

    def panels(self, name: str) -> Codes: ...

    def float16(self, name: str, rows: int) -> Halves:
        """[n, k]. CompileError if float16 does not hold them."""

    def parts(self, name: str) -> list[tuple[str, int]]:
        """Type and rows of packed matrices, one below the other; none, if they are float32."""

    def inputs(self, name: str) -> int:
        """k, of packed matrices."""

    def blocks(self, name: str) -> list[Blocks]:
        """Of packed matrices, one below the other."""


@dataclass(frozen=True)
class Shape:
    """What is static in a set of stages."""

    tokens: int
    """T: of one step."""
    context: int
    """C: of the cache."""
    precision: str
    """Of the weights, one of PRECISIONS; values are float16."""


class NpuGraph(Primitives):
    """Values are float16 [1, T, ..]. Between stages they are float32; the head is a stage of its own, for one token."""

    DOMAIN = "com.microsoft"

    def __init__(
        self,
        config: Dimensions,
        shape: Shape,
        weights: StoredWeights,
        cuts: Collection[int] = (),
        wanted: int | None = None,
        tensors: TensorFile | None = None,
    ) -> None:
        """cuts: layers that begin a stage; wanted: the stage that is to be saved, whose constants go to `tensors`."""
        super().__init__(config)
        self.shape, self.weights, self.cuts, self.wanted, self.tensors = shape, weights, cuts, wanted, tensors
        self.tokens: int = shape.tokens
        self._crossings = {"embedding": "embedding"}

    def embedding(self, name: str) -> Value:
        self.table = name
        return "embedding"

    def save_embedding(self, path: Path) -> None:
        """Writes the lookup of the token's embedding, token_ids int64 [1, T] -> embedding float32 [1, T, hidden], and
        its table. It runs on the CPU: it reads one row a token, of a table that an NPU would hold in memory."""
        name, weights, config = self.table, self.weights, self.config
        with path.with_suffix(".bin").open("wb") as file:
            tensors = TensorFile(file)
            graph = GraphBuilder("meki")
            ids = graph.input("token_ids", [1, "T"], TensorProto.INT64)
            out = graph.output("embedding", [1, "T", config.hidden])
            if not weights.parts(name):
                table = graph.constant(tensors.store(name, to_float16(weights.vector(f"{name}.weight"), name)))
                found = graph.op("Gather", [table, ids], "embedding.float16")
                graph.op("Cast", [found], out, to=TensorProto.FLOAT)  # the next stage rounds it to float16 all the same
            else:
                table = graph.constant(tensors.store(name, np.asarray(weights.panels(name))))
                ((type, _),) = weights.parts(name)
                code = BLOCK_TYPES[type].code
                graph.op("Embedding", [ids, table], out, domain="meki", outputs=config.vocab_size, type=code)
        graph.save(path)

    def begin_layer(self, layer: int) -> None:
        if layer in self.cuts:
            self._begin()

    def product(self, x: Value, matrices: Sequence[Matrix], name: str) -> Value:
        if self.shape.precision == "float16":
            rows = sum(matrix.outputs for matrix in matrices)
            return self.op("MatMul", [x, self.array(name, lambda: self.weights.float16(name, rows).T)], f"{name}.out")
        types, inputs = self.weights.parts(name), self.weights.inputs(name)
        blocks = functools.cache(lambda: self.weights.blocks(name))

        def part(number: int) -> str:
            type, rows = types[number]
            its, bits = name if len(types) == 1 else f"{name}.part{number}", BLOCK_TYPES[type].bits

            def codes() -> Codes:
                signed = blocks()[number].codes.astype(np.int16)
                unsigned = (signed + 2 ** (bits - 1)).astype(np.uint8).reshape(rows, -1, BLOCK)
                return unsigned if bits == 8 else unsigned[..., ::2] | (unsigned[..., 1::2] << 4)

            scales = lambda: blocks()[number].scales.astype(np.float16).reshape(-1)  # noqa: E731
            return self.op(
                "MatMulNBits",
                [x, self.array(its, codes), self.array(f"{its}.scales", scales)],
                f"{its}.out",
                domain=self.DOMAIN,
                K=inputs,
                N=rows,
                bits=bits,
                block_size=BLOCK,
            )

        parts = [part(number) for number in range(len(types))]
        return parts[0] if len(parts) == 1 else self.op("Concat", parts, f"{name}.out", axis=-1)

    def experts(self, h: Value, name: str, experts: int, experts_per_token: int, norm_topk_prob: bool) -> Value:
        raise CompileError(
            f"{name}: a mixture of {experts} experts, which an NPU's static graph would all compute for every token, "
            f"not the {experts_per_token} that the token is sent to; run the model on the CPU"
        )

    def attention(self, qkv: Value, its: Attention) -> Value:
        """The cache is an input, the new keys and values are outputs. It is of float16: a bias does it no harm."""
        if its.window or its.source is not None or its.value_norm or isinstance(its.rotary, tuple):
            raise CompileError(f"{its.name}: attention over a window or another layer's cache is not supported yet")
        layer, name, norms = its.layer, its.name, its.norms
        config, tokens, context, stage = self.config, self.shape.tokens, self.shape.context, self.stages[-1]
        stage.layers.append(layer)
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        mask = self._mask(heads // kv_heads)
        names = [f"{name}.{part}" for part in "qkv"]
        total = heads + 2 * kv_heads
        qkv = self._reshape(qkv, f"{name}.qkv.heads", tokens, total, dim)
        q, k, v = self._split(qkv, names, [heads, kv_heads, kv_heads], axis=1)
        if norms:
            q, k = self._normed(q, heads, norms[0]), self._normed(k, kv_heads, norms[1])
        q, k = (
            self.op("Transpose", [x], f"{part}.heads", perm=[1, 0, 2]) for x, part in zip((q, k), names, strict=False)
        )
        if its.rotary:
            turns = self._turns(its.rotary)
            q, k = (self._rotated(x, part, *turns) for x, part in zip((q, k), names, strict=False))
        key = self.op("Transpose", [k], f"new_key.{layer}", perm=[0, 2, 1])
        value = self.op("Transpose", [v], f"new_value.{layer}", perm=[1, 0, 2])
        stage.output(key, [kv_heads, dim, tokens], TensorProto.FLOAT16)
        stage.output(value, [kv_heads, tokens, dim], TensorProto.FLOAT16)
        past_key = self.input(f"past_key.{layer}", [kv_heads, dim, context], TensorProto.FLOAT16)
        past_value = self.input(f"past_value.{layer}", [kv_heads, context, dim], TensorProto.FLOAT16)

        # The queries of a group of heads are rows of one matrix: each key is read once for all of them.
        q = self.op("Mul", [q, self._half("attention.scale", lambda: np.full(1, dim**-0.5))], f"{name}.scaled")
        q = self._reshape(q, f"{name}.groups", kv_heads, heads // kv_heads * tokens, dim)
        parts = [self.op("MatMul", [q, k], f"{name}.scores.{k}") for k in (past_key, key)]
        scores = self.op("Concat", parts, f"{name}.scores", axis=-1)
        weights = self.op("Softmax", [self.op("Add", [scores, mask], f"{name}.masked")], f"{name}.softmax", axis=-1)
        names = [f"{name}.weights.{part}" for part in ("past", "own")]
        past_weights, own_weights = self._split(weights, names, [context, tokens], axis=-1)
        sums = [
            self.op("MatMul", [past_weights, past_value], f"{name}.sum.past"),
            self.op("MatMul", [own_weights, value], f"{name}.sum.own"),
        ]
        out = self._reshape(self.op("Add", sums, f"{name}.sum"), f"{name}.out.heads", heads, tokens, dim)
        out = self.op("Transpose", [out], f"{name}.out.tokens", perm=[1, 0, 2])
        return self._reshape(out, f"{name}.joined", 1, tokens, heads * dim)

    def convolution(self, x: Value, number: int, norm: str, name: str, dilation: int) -> Value:
        raise CompileError(
            f"{name}: a convolution over earlier tokens, whose inputs compiled stages do not keep; run the model on "
            "the CPU, or convert a model that was trained without one (engram_kernel=0)"
        )

    def selected(self, x: Value) -> Value:
        """Of one token: what the last stage calls `final` is the input of the head's."""
        name = self.use(x)
        self._crossings[name] = "final"
        self._begin()
        self.tokens = 1
        return name

    def logits(self, x: Value) -> None:
        """float32 [1, vocab_size]."""
        shape = (1, self.config.vocab_size)
        logits = self.stages[-1].output("logits", shape)
        self.op("Cast", [self._reshape(x, "head.row", *shape)], logits, to=TensorProto.FLOAT)

    def vector(self, name: str, parts: Sequence[str] = ()) -> str:
        return self._half(name, lambda: self.weights.vector(name))

    def array(self, name: str, make: Callable[[], np.ndarray]) -> str:
        self._here[name], stage = name, self.stages[-1]
        if self.wanted == len(self.stages) - 1 and name not in stage.initializers:
            assert self.tensors is not None
            stage.constant(self.tensors.store(name, np.ascontiguousarray(make())))
        return name

    def number(self, value: float) -> str:
        return self._half(f"number.{value}", lambda: np.full(1, value))

    def enter(self, name: str) -> str:
        crossing, maker = self._crossings.get(name, f"{name}.float32"), self._makers.get(name)
        if maker is not None and crossing not in maker.outputs:
            maker.output(crossing, [1, self.shape.tokens, self.config.hidden])
            maker.op("Cast", [name], crossing, to=TensorProto.FLOAT)
        entered = self.input(crossing, [1, self.tokens, self.config.hidden])
        return self.op("Cast", [entered], f"{crossing}.float16", to=TensorProto.FLOAT16)

    def rows_tensor(self) -> str:
        halves = "rows.float16"
        return halves if halves in self._here else self.op("Cast", ["rows"], halves, to=TensorProto.FLOAT16)

    def _mask(self, group: int) -> str:
        """What a token sees, by the step's place in the sequence, made once a stage: float16 [1, group * T, C + T], or
        [1, 1, C + 1] if T is 1. group: query heads of a key head."""
        if "mask" in self._here:
            return "mask"
        tokens, context = self.shape.tokens, self.shape.context
        slots = self.array("slots", lambda: np.arange(context, dtype=np.int32))
        values = [
            self._half("mask.open", lambda: np.zeros(1)),
            self._half("mask.closed", lambda: np.full(1, MASKED)),
        ]
        cache = self.op("Where", [self.op("Less", [slots, self._past()], "mask.seen"), *values], "mask.slots")
        cache = self._reshape(cache, "mask.row", 1, 1, context)
        if tokens > 1:
            cache = self.op("Expand", [cache, self._ints(1, tokens, context)], "mask.cache")
        own = self._half("mask.own", lambda: np.triu(np.full((1, tokens, tokens), MASKED), 1))
        if tokens == 1:  # one row serves all query heads of a group
            return self.op("Concat", [cache, own], "mask", axis=-1)
        rows = self.op("Concat", [cache, own], "mask.tokens", axis=-1)
        return self.op("Concat", [rows] * group, "mask", axis=1)

    def _turns(self, tables: Tables) -> tuple[str, str]:
        """The rotary cos and sin of the step's tokens, made once a stage, float16 [T, head_dim / 2]."""
        if "cos" in self._here:
            return "cos", "sin"
        tokens, context = self.shape.tokens, self.shape.context
        steps = self.array("steps", lambda: np.arange(tokens, dtype=np.int32))
        position = self.op("Add", [steps, self._past()], "position")

        def table(index: int) -> np.ndarray:
            # The padding of the last chunk may stand behind the context: it gets a line, whichever.
            return np.pad(np.asarray(tables(context)[index]), ((0, tokens), (0, 0)), "edge")

        for index, name in enumerate(("cos", "sin")):
            half = self._half(f"rope.{name}", functools.partial(table, index))
            self.op("Gather", [half, position], name, axis=0)
        return "cos", "sin"

    def _past(self) -> str:
        return self.input("past_length", [1], TensorProto.INT32)

    def _normed(self, x: str, heads: int, norm: str) -> str:
        """RMSNorm of each head. x: [T, heads, head_dim]."""
        tokens, dim = self.shape.tokens, self.config.head_dim
        # QAIRT 2.51 norms wrongly over some shapes whose first dimension is not 1, such as [16, 2, 32].
        rows = self._reshape(x, f"{x}.rows", 1, tokens * heads, dim)
        return self._reshape(self.norm(rows, norm), f"{x}.normed.heads", tokens, heads, dim)

    def _rotated(self, x: str, name: str, cos: str, sin: str) -> str:
        """x: [heads, T, head_dim]."""
        half = self.config.head_dim // 2
        a, b = self._split(x, [f"{name}.a", f"{name}.b"], [half, half], axis=-1)

        def turned(kind: str, u: str, v: str, out: str) -> str:
            """u * cos (+ or -) v * sin."""
            parts = [self.op("Mul", [u, cos], f"{out}.cos"), self.op("Mul", [v, sin], f"{out}.sin")]
            return self.op(kind, parts, out)

        left, right = turned("Sub", a, b, f"{name}.left"), turned("Add", b, a, f"{name}.right")
        return self.op("Concat", [left, right], f"{name}.rotated", axis=-1)

    def _ints(self, *values: int) -> str:
        return self.array("ints." + "_".join(map(str, values)), lambda: np.array(values, np.int64))

    def _half(self, name: str, make: Callable[[], np.ndarray]) -> str:
        return self.array(name, lambda: to_float16(make(), name))

    def _reshape(self, x: Value, out: str, *shape: int) -> str:
        return self.op("Reshape", [x, self._ints(*shape)], out)

    def _split(self, x: str, names: Sequence[str], sizes: Sequence[int], axis: int) -> list[str]:
        self.op("Split", [x, self._ints(*sizes)], names, axis=axis)
        return list(names)
