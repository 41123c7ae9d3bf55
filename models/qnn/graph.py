"""The stages of a decoder for an NPU: static shapes, float16 values, a KV cache that is only read (docs/qnn.md).

T, the tokens of a step, is 1 in decode and the chunk's length in prefill; C is the capacity of the cache. Attention
over the cache and over the step's own tokens meet in the softmax only: no node copies the cache, and what a stage
gives back is the new keys and values alone. Everything is an operator that Qualcomm's compiler takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto

from ..builder import GraphBuilder
from ..quantize import WEIGHT_BLOCK
from ..tensors import TensorFile
from .weights import Matrix, PackageWeights, to_float16

MASKED = -30_000.0
"""Added to the scores of what must not be seen: float16 holds it, and e^MASKED is 0."""
PRECISIONS = {"float16": None, "int8": 8, "int4": 4}
"""Bits of a weight in blocks of 32 with a float16 scale; None: float16 itself."""


@dataclass(frozen=True)
class Shape:
    """What is static in a set of stages."""

    tokens: int
    """T: of one step."""
    context: int
    """C: of the cache."""
    precision: str
    """Of the weights, one of PRECISIONS; values are float16."""


class StaticStage(GraphBuilder):
    """One stage under construction. Values are float16 [1, T, ..] unless a method says otherwise."""

    def __init__(self, weights: PackageWeights, shape: Shape, tensors: TensorFile) -> None:
        super().__init__("com.microsoft")
        self.config = weights.config
        self.weights = weights
        self.shape = shape
        self.tensors = tensors

    def array(self, name: str, values: np.ndarray) -> str:
        """A constant, stored once."""
        if name not in self.initializers:
            self.constant(self.tensors.store(name, np.ascontiguousarray(values)))
        return name

    def ints(self, *values: int) -> str:
        return self.array("ints." + "_".join(map(str, values)), np.array(values, np.int64))

    def half(self, name: str, values: np.ndarray) -> str:
        return self.array(name, to_float16(values, name))

    def reshape(self, x: str, out: str, *shape: int) -> str:
        return self.op("Reshape", [x, self.ints(*shape)], out)

    def split(self, x: str, names: Sequence[str], sizes: Sequence[int], axis: int) -> list[str]:
        self.op("Split", [x, self.ints(*sizes)], names, axis=axis)
        return list(names)

    def enter(self, name: str) -> str:
        """A float32 input [1, T, hidden] as float16."""
        x = self.input(name, [1, self.shape.tokens, self.config.hidden])
        return self.op("Cast", [x], f"{name}.float16", to=TensorProto.FLOAT16)

    def leave(self, x: str, name: str) -> None:
        """x as a float32 output [1, T, hidden]."""
        self.op("Cast", [x], self.output(name, [1, self.shape.tokens, self.config.hidden]), to=TensorProto.FLOAT)

    def norm(self, x: str, gain: str, out: str = "") -> str:
        """RMSNorm over the last axis with the gain `gain`.weight."""
        weight = self.half(f"{gain}.weight", self.weights.vector(f"{gain}.weight"))
        return self.op("RMSNormalization", [x, weight], out or f"{gain}.out", axis=-1, epsilon=self.config.norm_eps)

    def linear(self, x: str, name: str, matrix: Matrix) -> str:
        """x times the transposed matrix."""
        bits, out = PRECISIONS[self.shape.precision], f"{name}.out"
        if bits is None:
            return self.op("MatMul", [x, self.array(name, matrix.float16(name).T)], out)
        assert matrix.codes is not None and matrix.scales is not None, "a package of another weight type"
        codes = (matrix.codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
        if bits == 4:
            codes = codes[..., ::2] | (codes[..., 1::2] << 4)
        scales = matrix.scales.astype(np.float16).reshape(-1)
        inputs = [x, self.array(name, codes), self.array(f"{name}.scales", scales)]
        rows, blocks, _ = matrix.codes.shape
        return self.op(
            "MatMulNBits",
            inputs,
            out,
            domain="com.microsoft",
            K=blocks * WEIGHT_BLOCK,
            N=rows,
            bits=bits,
            block_size=WEIGHT_BLOCK,
        )

    def positions(self) -> tuple[str, str, str]:
        """What the step's place in the sequence decides, made once a stage.

        The mask, float16 [1, query heads of a key head * T, C + T], or [1, 1, C + 1] if T is 1; the rotary cos and sin,
        float16 [T, head_dim / 2].
        """
        if "mask" in self.made:
            return "mask", "cos", "sin"
        tokens, context = self.shape.tokens, self.shape.context
        past = self.input("past_length", [1], TensorProto.INT32)
        seen = self.op("Less", [self.array("slots", np.arange(context, dtype=np.int32)), past], "mask.seen")
        values = [self.half("mask.open", np.zeros(1)), self.half("mask.closed", np.full(1, MASKED))]
        cache = self.reshape(self.op("Where", [seen, *values], "mask.slots"), "mask.row", 1, 1, context)
        if tokens > 1:
            cache = self.op("Expand", [cache, self.ints(1, tokens, context)], "mask.cache")
        own = self.half("mask.own", np.triu(np.full((1, tokens, tokens), MASKED), 1))
        if tokens == 1:  # one row serves all query heads of a group
            self.op("Concat", [cache, own], "mask", axis=-1)
        else:
            rows = self.op("Concat", [cache, own], "mask.tokens", axis=-1)
            self.op("Concat", [rows] * (self.config.heads // self.config.kv_heads), "mask", axis=1)
        position = self.op("Add", [self.array("steps", np.arange(tokens, dtype=np.int32)), past], "position")
        for name in ("cos", "sin"):
            # The padding of the last chunk may stand behind the context: it gets a line, whichever.
            table = np.pad(self.weights.vector(f"rope.{name}")[:context], ((0, tokens), (0, 0)), "edge")
            self.op("Gather", [self.half(f"rope.{name}", table), position], name, axis=0)
        return "mask", "cos", "sin"

    def rotate(self, x: str, heads: int, prefix: str, norm: str) -> str:
        """[T, heads, head_dim] -> the same heads, normed if the model does that, and rotated: [heads, T, head_dim]."""
        _, cos, sin = self.positions()
        tokens, dim = self.shape.tokens, self.config.head_dim
        if self.config.qk_norm:
            # QAIRT 2.51 norms wrongly over some shapes whose first dimension is not 1, such as [16, 2, 32].
            x = self.norm(self.reshape(x, f"{prefix}.rows", 1, tokens * heads, dim), norm, f"{prefix}.normed")
            x = self.reshape(x, f"{prefix}.normed.heads", tokens, heads, dim)
        x = self.op("Transpose", [x], f"{prefix}.heads", perm=[1, 0, 2])
        half = dim // 2
        a, b = self.split(x, [f"{prefix}.a", f"{prefix}.b"], [half, half], axis=-1)

        def turned(kind: str, u: str, v: str, out: str) -> str:
            """u * cos (+ or -) v * sin."""
            parts = [self.op("Mul", [u, cos], f"{out}.cos"), self.op("Mul", [v, sin], f"{out}.sin")]
            return self.op(kind, parts, out)

        left, right = turned("Sub", a, b, f"{prefix}.left"), turned("Add", b, a, f"{prefix}.right")
        return self.op("Concat", [left, right], f"{prefix}.rotated", axis=-1)

    def attention(self, x: str, layer: int) -> str:
        """x + Attention(norm(x)); the cache is an input, the new keys and values are outputs."""
        config, tokens, context = self.config, self.shape.tokens, self.shape.context
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        prefix, group = f"layers.{layer}.self_attn", heads // kv_heads
        mask, _, _ = self.positions()
        total = heads + 2 * kv_heads
        normed = self.norm(x, f"layers.{layer}.input_layernorm")
        qkv = self.linear(normed, f"{prefix}.qkv", self.weights.matrix(f"{prefix}.qkv", 0, total * dim))
        if config.qkv_bias:
            bias = self.half(f"{prefix}.qkv.bias", self.weights.vector(f"{prefix}.qkv.bias"))
            qkv = self.op("Add", [qkv, bias], f"{prefix}.qkv.biased")
        names = [f"{prefix}.{part}" for part in "qkv"]
        qkv = self.reshape(qkv, f"{prefix}.qkv.heads", tokens, total, dim)
        q, k, v = self.split(qkv, names, [heads, kv_heads, kv_heads], axis=1)
        q = self.rotate(q, heads, q, f"{prefix}.q_norm")
        k = self.rotate(k, kv_heads, k, f"{prefix}.k_norm")
        key = self.op("Transpose", [k], f"new_key.{layer}", perm=[0, 2, 1])
        value = self.op("Transpose", [v], f"new_value.{layer}", perm=[1, 0, 2])
        self.output(key, [kv_heads, dim, tokens], TensorProto.FLOAT16)
        self.output(value, [kv_heads, tokens, dim], TensorProto.FLOAT16)
        past_key = self.input(f"past_key.{layer}", [kv_heads, dim, context], TensorProto.FLOAT16)
        past_value = self.input(f"past_value.{layer}", [kv_heads, context, dim], TensorProto.FLOAT16)

        # The queries of a group of heads are rows of one matrix: each key is read once for all of them.
        q = self.op("Mul", [q, self.half("attention.scale", np.full(1, dim**-0.5))], f"{prefix}.scaled")
        q = self.reshape(q, f"{prefix}.groups", kv_heads, group * tokens, dim)
        parts = [self.op("MatMul", [q, k], f"{prefix}.scores.{k}") for k in (past_key, key)]
        scores = self.op("Concat", parts, f"{prefix}.scores", axis=-1)
        weights = self.op("Softmax", [self.op("Add", [scores, mask], f"{prefix}.masked")], f"{prefix}.softmax", axis=-1)
        names = [f"{prefix}.weights.{part}" for part in ("past", "own")]
        past_weights, own_weights = self.split(weights, names, [context, tokens], axis=-1)
        sums = [
            self.op("MatMul", [past_weights, past_value], f"{prefix}.sum.past"),
            self.op("MatMul", [own_weights, value], f"{prefix}.sum.own"),
        ]
        out = self.reshape(self.op("Add", sums, f"{prefix}.sum"), f"{prefix}.out.heads", heads, tokens, dim)
        out = self.op("Transpose", [out], f"{prefix}.out.tokens", perm=[1, 0, 2])
        out = self.reshape(out, f"{prefix}.joined", 1, tokens, heads * dim)
        projected = self.linear(out, f"{prefix}.o_proj", self.weights.matrix(f"{prefix}.o_proj", 0, config.hidden))
        return self.op("Add", [x, projected], f"layers.{layer}.attended")

    def ffn(self, a: str, layer: int) -> str:
        """a + down(SiLU(gate(h)) * up(h)), h = norm(a)."""
        prefix, width = f"layers.{layer}.mlp", self.config.ffn
        h = self.norm(a, f"layers.{layer}.post_attention_layernorm")
        both = self.linear(h, f"{prefix}.gate_up", self.weights.matrix(f"{prefix}.gate_up", 0, 2 * width))
        gate, up = self.split(both, [f"{prefix}.gate", f"{prefix}.up"], [width, width], axis=-1)
        silu = self.op("Mul", [gate, self.op("Sigmoid", [gate], f"{prefix}.sigmoid")], f"{prefix}.silu")
        product = self.op("Mul", [silu, up], f"{prefix}.product")
        down = self.weights.matrix(f"{prefix}.down_proj", 0, self.config.hidden)
        return self.op("Add", [a, self.linear(product, f"{prefix}.down_proj", down)], f"layers.{layer}.fed")

    def inject(self, x: str, a: str, layer: int, rows: range) -> str:
        """x + RMSNorm_d(W_out (row + sigmoid(W_gate norm(a)))): MeKi's folded form.

        rows: the layers of which the input `rows`, float32 [len(rows), T, memory_dim], has the memory rows.
        """
        config, tokens = self.config, self.shape.tokens
        prefix, norm = f"layers.{layer}.meki", f"layers.{layer}.post_attention_layernorm"
        if "rows.float16" not in self.made:
            shape = [len(rows), tokens, config.memory_dim]
            self.op("Cast", [self.input("rows", shape)], "rows.float16", to=TensorProto.FLOAT16)
        if f"{norm}.out" not in self.made:  # the FFN is in an earlier stage
            self.norm(a, norm)
        opened = self.op(
            "Sigmoid",
            [self.linear(f"{norm}.out", f"{prefix}.gate_proj", self.weights.memory_gate(layer))],
            f"{prefix}.gate",
        )
        row = self.op("Gather", ["rows.float16", self.ints(layer - rows.start)], f"{prefix}.row", axis=0)
        fused = self.op("Add", [row, opened], f"{prefix}.fused")
        out = self.linear(fused, f"{prefix}.out_proj", self.weights.matrix(f"{prefix}.out_proj", 0, config.hidden))
        return self.op("Add", [x, self.norm(out, f"{prefix}.post_norm")], f"layers.{layer}.injected")

    def layer(self, x: str, layer: int, rows: range | None) -> str:
        """A whole layer; rows: as in `inject`, None without its memory."""
        a = self.attention(x, layer)
        x = self.ffn(a, layer)
        return x if rows is None else self.inject(x, a, layer, rows)

    def head(self) -> None:
        """final float32 [1, 1, hidden] -> logits float32 [1, vocab_size]."""
        normed = self.norm(self.enter("final"), "norm")
        logits = self.reshape(self.linear(normed, "head", self.weights.head()), "head.row", 1, self.config.vocab_size)
        self.op("Cast", [logits], self.output("logits", [1, self.config.vocab_size]), to=TensorProto.FLOAT)


def embedding(weights: PackageWeights, path: Path) -> None:
    """Writes the lookup of the token's embedding, token_ids int64 [1, T] -> embedding float32 [1, T, hidden], and its
    table. It runs on the CPU: it reads one row a token, of a table that an NPU would hold in memory."""
    config = weights.config
    with path.with_suffix(".bin").open("wb") as file:
        tensors = TensorFile(file, file_name(path))
        graph = GraphBuilder("meki")
        ids = graph.input("token_ids", [1, "T"], TensorProto.INT64)
        out = graph.output("embedding", [1, "T", config.hidden])
        if weights.type == "float32":
            table = to_float16(weights.vector("embed_tokens.weight"), "embed_tokens.weight")
            found = graph.op("Gather", [graph.constant(tensors.store("embed_tokens", table)), ids], "embedding.float16")
            graph.op("Cast", [found], out, to=TensorProto.FLOAT)  # to float16 it goes in the next stage all the same
        else:
            panels = graph.constant(tensors.store("embed_tokens", np.asarray(weights.panels("embed_tokens"))))
            bits = PRECISIONS[weights.type]
            graph.op("Embedding", [ids, panels], out, domain="meki", outputs=config.vocab_size, bits=bits)
    graph.save(path)


def file_name(path: Path) -> str:
    """Of the file that holds the large tensors of the graph at `path`."""
    return path.with_suffix(".bin").name
