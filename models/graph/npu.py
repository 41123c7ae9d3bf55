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
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto

from ..blocks import BLOCK, BLOCK_TYPES, Blocks, Codes, Floats
from ..config import CompileError
from .builder import GraphBuilder
from .primitives import Attention, Dimensions, Lazy, Matrix, Primitives, Tables, Value, Vector
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


def tables_of(frequencies: Sequence[float]) -> Tables:
    """Rotary tables of the pairs that have a frequency."""

    def tables(positions: int) -> tuple[ArrayLike, ArrayLike]:
        angles = np.arange(positions)[:, None] * np.array(frequencies)
        return np.cos(angles), np.sin(angles)

    return tables


class StoredWeights(Protocol):
    """The weights of a package, by the names that its graphs have for them. n: `rows` of a matrix, k its columns."""

    type: str

    def vector(self, its: Vector) -> Floats: ...

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
    STREAM = 1 / 16
    """Gemma 3 270M reaches 104,000, float16 ends at 65,504. (In norms of the stream norm_eps is not scaled: of a stream
    of RMS 1 and an epsilon of 1e-6 that is one part in 8,000, less than a rounding.)"""

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
                table = graph.constant(tensors.store(name, to_float16(weights.vector(Vector(f"{name}.weight")), name)))
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
        self.stages[-1].layers.append(its.layer)
        heads, kv_heads, dim, name = its.heads, its.kv_heads, its.head_dim, its.name
        tokens, context = self.shape.tokens, self.shape.context
        counts = {"q": heads, "k": kv_heads, "v": kv_heads} if its.source is None else {"q": heads}
        qkv = self._reshape(qkv, f"{name}.qkv.heads", tokens, sum(counts.values()), dim)
        if its.source is None:
            q, k, v = self._split(qkv, [f"{name}.{part}" for part in counts], list(counts.values()), axis=1)
            self._give(self._placed(k, kv_heads, its, 1), v, its)
        else:
            q = qkv
        past_key, past_value, key, value = self._seen(its)

        # The queries of a group of heads are rows of one matrix: each key is read once for all of them.
        q, scale = self._placed(q, heads, its, 0), dim**-0.5 if its.scale is None else its.scale
        q = self._reshape(self.scaled(q, scale), f"{name}.groups", kv_heads, heads // kv_heads * tokens, dim)
        parts = [self.op("MatMul", [q, k], f"{name}.scores.{k}") for k in (past_key, key)]
        scores = self.op("Concat", parts, f"{name}.scores", axis=-1)
        mask = self._mask(heads // kv_heads, its.window if its.window < context else 0)
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

    def _placed(self, x: str, heads: int, its: Attention, number: int) -> str:
        """Queries (number 0) or keys (1), normed and rotated: [T, heads, head_dim] -> [heads, T, head_dim]."""
        part = f"{its.name}.{'qk'[number]}"
        if its.norms:
            x = self._normed(x, part, heads, its.head_dim, self.vector(f"{its.norms[number]}.weight"))
        x = self.op("Transpose", [x], f"{part}.heads", perm=[1, 0, 2])
        return self._rotated(x, part, its.head_dim // 2, *self._turns(its)) if its.rotary else x

    def _give(self, k: str, v: str, its: Attention) -> None:
        """The step's keys, [kv_heads, T, head_dim], and values, [T, kv_heads, head_dim], become outputs."""
        stage, layer, dim = self.stages[-1], its.layer, its.head_dim
        if its.value_norm:
            v = self._normed(v, f"{its.name}.v", its.kv_heads, dim, self._half(f"ones.{dim}", lambda: np.ones(dim)))
        key = self.op("Transpose", [k], f"new_key.{layer}", perm=[0, 2, 1])
        value = self.op("Transpose", [v], f"new_value.{layer}", perm=[1, 0, 2])
        stage.output(key, [its.kv_heads, dim, self.shape.tokens], TensorProto.FLOAT16)
        stage.output(value, [its.kv_heads, self.shape.tokens, dim], TensorProto.FLOAT16)

    def _seen(self, its: Attention) -> list[str]:
        """Past keys and values, and the step's: the layer's own, or those of its source, which an earlier stage may
        have made."""
        source = its.layer if its.source is None else its.source
        whose = "" if f"new_key.{source}" in self._here else "shared_"
        names = []
        for when, tokens in (("past", self.shape.context), ("new", self.shape.tokens)):
            shapes = {"key": [its.kv_heads, its.head_dim, tokens], "value": [its.kv_heads, tokens, its.head_dim]}
            for what, shape in shapes.items():
                name = f"{whose}{when}_{what}.{source}"
                names.append(name if name in self._here else self.input(name, shape, TensorProto.FLOAT16))
        return names

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

    def compute(self, value: Lazy) -> str:
        if isinstance(value, Vector):
            return self._half(value.tensor, lambda: self.weights.vector(value))
        return super().compute(value)

    def vector(self, name: str, parts: Sequence[str] = ()) -> str:
        return self.use(Vector(name))

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

    def _mask(self, group: int, window: int) -> str:
        """What a token sees, by the step's place in the sequence, made once a stage: float16 [1, group * T, C + T], or
        [1, 1, C + 1] if T is 1. group: query heads of a key head; window: as `Attention` has it."""
        mask = f"mask.{group}.{window}"
        if mask in self._here:
            return mask
        tokens, context = self.shape.tokens, self.shape.context
        cache = self._slots_seen()
        if window:
            steps = self.array(f"{mask}.steps", lambda: np.arange(tokens, dtype=np.int32)[:, None] - window)
            out = self.op("Add", [steps, self._past()], f"{mask}.out")  # the last position that the token does not see
            near = self.op("Less", [out, "slots"], f"{mask}.near")
            cache = self.op("Where", [near, cache, "mask.closed"], f"{mask}.slots")
        cache = self._reshape(cache, f"{mask}.row", 1, tokens if window else 1, context)
        if tokens > 1 and not window:
            cache = self.op("Expand", [cache, self._ints(1, tokens, context)], f"{mask}.cache")
        distance = np.arange(tokens)[:, None] - np.arange(tokens)
        seen = (distance >= 0) & (distance < (window or tokens))
        own = self._half(f"{mask}.own", lambda: np.where(seen, 0, MASKED)[None])
        if tokens == 1:  # one row serves all query heads of a group
            return self.op("Concat", [cache, own], mask, axis=-1)
        rows = self.op("Concat", [cache, own], f"{mask}.tokens", axis=-1)
        return self.op("Concat", [rows] * group, mask, axis=1)

    def _slots_seen(self) -> str:
        """Of the cache, whether there is something in it: float16 [C]. Made once a stage, with its constants."""
        if "mask.slots" in self._here:
            return "mask.slots"
        slots = self.array("slots", lambda: np.arange(self.shape.context, dtype=np.int32))
        values = [
            self._half("mask.open", lambda: np.zeros(1)),
            self._half("mask.closed", lambda: np.full(1, MASKED)),
        ]
        return self.op("Where", [self.op("Less", [slots, self._past()], "mask.seen"), *values], "mask.slots")

    def _turns(self, its: Attention) -> list[str]:
        """The rotary cos and sin of the step's tokens, made once a stage for all layers that have the same, float16
        [T, head_dim / 2]."""
        tokens, context, rotary, still = self.shape.tokens, self.shape.context, its.rotary, 0
        assert rotary
        if isinstance(rotary, tuple):
            suffix, tables = f".{its.head_dim}.{rotary[0]}.{rotary[-1]}", tables_of(rotary)
            still = its.head_dim // 2 - len(rotary)  # pairs that do not turn
        else:
            suffix, tables = "", rotary

        def table(index: int) -> np.ndarray:
            # The padding of the last chunk may stand behind the context: it gets a line, whichever.
            return np.pad(np.asarray(tables(context)[index]), ((0, tokens), (0, 0)), "edge")

        def turns(index: int, name: str, angle_0: int) -> str:
            if name in self._here:
                return name
            half = self._half(f"rope.{name}", lambda: table(index))
            turning = self.op("Gather", [half, self._position()], f"{name}.turning" if still else name, axis=0)
            if not still:
                return turning
            rest = self._half(f"{name}.still", lambda: np.full((tokens, still), angle_0))
            return self.op("Concat", [turning, rest], name, axis=-1)

        return [turns(0, f"cos{suffix}", 1), turns(1, f"sin{suffix}", 0)]

    def _position(self) -> str:
        """Of the step's tokens, int32 [T]."""
        if "position" not in self._here:
            steps = self.array("steps", lambda: np.arange(self.shape.tokens, dtype=np.int32))
            self.op("Add", [steps, self._past()], "position")
        return "position"

    def _past(self) -> str:
        return self.input("past_length", [1], TensorProto.INT32)

    def _normed(self, x: str, name: str, heads: int, dim: int, weight: str) -> str:
        """RMSNorm of each head. x: [T, heads, dim]."""
        # QAIRT 2.51 norms wrongly over some shapes whose first dimension is not 1, such as [16, 2, 32].
        rows = self._reshape(x, f"{name}.rows", 1, self.shape.tokens * heads, dim)
        epsilon = self.config.norm_eps
        normed = self.op("RMSNormalization", [rows, weight], f"{name}.normed", axis=-1, epsilon=epsilon)
        return self._reshape(normed, f"{name}.normed.heads", self.shape.tokens, heads, dim)

    def _rotated(self, x: str, name: str, half: int, cos: str, sin: str) -> str:
        """x: [heads, T, 2 * half]."""
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
