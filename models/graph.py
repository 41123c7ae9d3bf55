"""Builds the dense graph of a package: ONNX stages whose weights lie in one file (docs/package-format.md).

Built from the configuration and named weights with onnx's helpers, not traced, so that every node, name and byte is
decided here. Matrices are float32 or packed in symmetric blocks of 8 or 4 bits. Attention and the packed matrices are
operators of the domain "meki", which the runtime itself executes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from .builder import GraphBuilder
from .config import ConfigError, ModelConfig
from .decoder import rope_tables
from .quantize import WEIGHT_BITS, WEIGHT_BLOCK
from .tensors import TensorFile, tensor_bytes
from .weights import WEIGHT_TYPES, WEIGHTS_FILE, Progress, WeightErrors, Weights, WeightStore

_DOMAIN = "meki"
_ROPE_TABLES = ("rope.cos", "rope.sin")
_HEAD_DIM_MULTIPLE = 16  # of heads that Attention takes


def check_exportable(config: ModelConfig, weight_type: str) -> None:
    """ConfigError if the runtime could not run a graph of this configuration with such weights."""
    if weight_type not in WEIGHT_TYPES:
        raise ConfigError(f"weight type: got {weight_type!r}, expected one of {', '.join(WEIGHT_TYPES)}")
    if config.head_dim % _HEAD_DIM_MULTIPLE:
        raise ConfigError(
            f"head_dim is {config.head_dim}: the runtime's attention needs a multiple of {_HEAD_DIM_MULTIPLE}; "
            "such a model cannot be exported"
        )
    if weight_type == "float32":
        return
    inputs = {"hidden": config.hidden, "ffn": config.ffn, "heads * head_dim": config.heads * config.head_dim}
    for name, size in {**inputs, "memory_dim": config.memory_dim}.items():
        if size % WEIGHT_BLOCK:
            raise ConfigError(
                f"{name} is {size}: {weight_type} weights need a multiple of {WEIGHT_BLOCK}; use float32 weights"
            )


def _ffn_norm(layer: int) -> str:
    return f"layers.{layer}.post_attention_layernorm"


class Stage(GraphBuilder):
    """One stage under construction; values are float32 [1, T, ..]."""

    def __init__(self, config: ModelConfig, store: WeightStore) -> None:
        super().__init__(_DOMAIN)
        self.config = config
        self.store = store

    def linear(
        self,
        x: str,
        name: str,
        parts: Sequence[str] = (),
        *,
        norm: str = "",
        swiglu: bool = False,
        residual: str = "",
        rows: int | None = None,
        out: str = "",
    ) -> str:
        """f(x) times the transposed weights `parts`, each [n, k], one below the other, plus `residual`.

        x: [.., k], or [.., 2k] with `swiglu`; the output, `out`: [.., sum of n]. f is RMSNorm with the gain
        `norm`.weight, SwiGLU (SiLU of the first k columns times the next k), or the identity. Without `parts` the
        weight is `name`.weight; `rows`: only the first so many of a packed one.
        """
        parts, out = parts or [f"{name}.weight"], out or f"{name}.out"
        if self.store.weight_type != "float32":
            gain = self.gain(norm) if norm else ""
            weight, attributes = self.packed(name, parts, rows)
            inputs = [x, weight, gain, residual]
            while not inputs[-1]:
                inputs.pop()
            return self.op(
                "Linear",
                inputs,
                out,
                domain=_DOMAIN,
                swiglu=int(swiglu),
                epsilon=self.config.norm_eps,
                **attributes,
            )
        if norm:
            x = self.norm(x, norm)
        if swiglu:
            gate, up = f"{name}.gate", f"{name}.up"
            self.op("Split", [x], [gate, up], axis=-1, num_outputs=2)
            silu = self.op("Mul", [gate, self.op("Sigmoid", [gate], f"{gate}.sigmoid")], f"{gate}.silu")
            x = self.op("Mul", [silu, up], f"{name}.product")
        product = f"{name}.product_sum" if residual else out
        self.op("MatMul", [x, self.constant(self.store.transposed(name, parts))], product)
        return self.op("Add", [residual, product], out) if residual else product

    def packed(self, name: str, parts: Sequence[str] = (), rows: int | None = None) -> tuple[str, dict[str, int]]:
        """The packed weights `parts`, one below the other, and the attributes of an operator that reads them.

        `rows`: only the first so many.
        """
        weight, outputs = self.store.packed(f"{name}.panels", parts or [f"{name}.weight"], rows)
        return self.constant(weight), {"outputs": outputs, "bits": WEIGHT_BITS[self.store.weight_type]}

    def gain(self, norm: str) -> str:
        return self.constant(self.store.weight(f"{norm}.weight"))

    def norm(self, x: str, gain: str) -> str:
        """RMSNorm over the last axis: x / sqrt(mean(x^2) + eps) * gain."""
        return self.op("RMSNormalization", [x, self.gain(gain)], f"{gain}.out", axis=-1, epsilon=self.config.norm_eps)

    def embed(self) -> str:
        """token_ids int64 [1, T] -> [1, T, hidden]."""
        ids = self.input("token_ids", [1, "T"], TensorProto.INT64)
        if self.store.weight_type == "float32":
            return self.op("Gather", [self.constant(self.store.weight("embed_tokens.weight")), ids], "embedding")
        weight, attributes = self.packed("embed_tokens")
        return self.op("Embedding", [ids, weight], "embedding", domain=_DOMAIN, **attributes)

    def attention(self, x: str, layer: int) -> str:
        """x + Attention(norm(x)), [1, T, hidden]. Appends to layer `layer`'s cache in place."""
        config, prefix = self.config, f"layers.{layer}.self_attn"
        norm, parts = f"layers.{layer}.input_layernorm", [f"{prefix}.{name}_proj.weight" for name in "qkv"]
        qkv = self.linear(x, f"{prefix}.qkv", parts, norm=norm)
        if config.qkv_bias:
            biases = [f"{prefix}.{name}_proj.bias" for name in "qkv"]
            bias = self.constant(self.store.joined(f"{prefix}.qkv.bias", biases))
            qkv = self.op("Add", [qkv, bias], f"{prefix}.qkv.biased")
        cache: list[int | str] = ["blocks", config.kv_heads, "block_bytes"]
        past = self.input(f"past.{layer}", cache, TensorProto.UINT8)
        present = self.output(f"present.{layer}", cache, TensorProto.UINT8)
        length = self.input("total_sequence_length", [], TensorProto.INT32)
        cos = self.store.constant(_ROPE_TABLES[0], lambda: rope_tables(config, config.context)[0].numpy())
        sin = self.store.constant(_ROPE_TABLES[1], lambda: rope_tables(config, config.context)[1].numpy())
        gains = [self.store.weight(f"{prefix}.{name}_norm.weight") for name in "qk"] if config.qk_norm else []
        self.op(
            "Attention",
            [qkv, past, length, *map(self.constant, (cos, sin, *gains))],
            [f"{prefix}.heads", present],
            domain=_DOMAIN,
            heads=config.heads,
            kv_heads=config.kv_heads,
            epsilon=config.norm_eps,
        )
        return self.linear(f"{prefix}.heads", f"{prefix}.o_proj", residual=x)

    def ffn(self, a: str, layer: int, opens_memory: bool) -> tuple[str, str]:
        """a + down(SiLU(gate(h)) * up(h)), h = norm(a), and the projections of h. a: [1, T, hidden] -> [1, T, hidden].

        With `opens_memory` the last memory_dim columns of the projections are the gate of the layer's memory: its rows
        stand below the FFN's in one packed matrix. (Only in a packed one, and not in layer 0, whose FFN runs before
        anything of its memory.)
        """
        prefix, config = f"layers.{layer}.mlp", self.config
        parts = [f"{prefix}.{name}_proj.weight" for name in ("gate", "up")]
        if config.memory_dim and layer > 0 and self.store.weight_type != "float32":
            parts.append(f"layers.{layer}.meki.gate_proj.weight")
        rows = None if opens_memory else 2 * config.ffn
        both = self.linear(a, f"{prefix}.gate_up", parts, norm=_ffn_norm(layer), rows=rows)
        return self.linear(both, f"{prefix}.down_proj", swiglu=True, residual=a), both

    def layer(self, x: str, layer: int, opens_memory: bool = False) -> tuple[str, str, str]:
        """A layer without its memory: x -> (A + FFN(norm(A)), A, projections), where A = x + Attention(norm(x))."""
        a = self.attention(x, layer)
        residual, projected = self.ffn(a, layer, opens_memory)
        return residual, a, projected

    def inject(self, x: str, a: str, projected: str, rows: str, layer: int) -> str:
        """x + RMSNorm_d(W_out (rows + sigmoid(W_gate norm(a)))): MeKi's folded form.

        rows: [layers, T, memory_dim]. projected: has W_gate norm(a) in its last columns; empty: it is computed here.
        """
        prefix, out = f"layers.{layer}.meki", f"layers.{layer}.injected"
        gate, out_proj, post_norm = f"{prefix}.gate_proj", f"{prefix}.out_proj", f"{prefix}.post_norm"
        if self.store.weight_type != "float32":
            projected = projected or self.linear(a, gate, norm=_ffn_norm(layer))
            weight, attributes = self.packed(out_proj)
            return self.op(
                "Injection",
                [x, projected, rows, weight, self.gain(post_norm)],
                out,
                domain=_DOMAIN,
                bits=attributes["bits"],
                epsilon=self.config.norm_eps,
                layer=layer,
            )
        h = f"{_ffn_norm(layer)}.out"
        if h not in self.made:  # the FFN is in an earlier stage
            self.norm(a, _ffn_norm(layer))
        opened = self.op("Sigmoid", [self.linear(h, gate)], f"{prefix}.gate")
        index = self.constant(self.store.constant(f"layer.{layer}", lambda: np.array(layer, np.int64)))
        fused = self.op("Add", [self.op("Gather", [rows, index], f"{prefix}.rows"), opened], f"{prefix}.fused")
        return self.op("Add", [x, self.norm(self.linear(fused, out_proj), post_norm)], out)

    def head(self, x: str) -> None:
        """x [1, T, hidden] -> logits [K, vocab_size] of the positions in logit_index."""
        head = "embed_tokens" if self.config.tied_embeddings else "lm_head"
        index = self.input("logit_index", ["K"], TensorProto.INT64)
        logits = self.output("logits", ["K", self.config.vocab_size])
        batch_axis = self.store.constant("batch_axis", lambda: np.zeros(1, np.int64))
        tokens = self.op("Squeeze", [x, self.constant(batch_axis)], "final.tokens")
        selected = self.op("Gather", [tokens, index], "final.selected")
        if self.store.weight_type == "float32":
            # Gemm takes the table as the embedding has it; MatMul would want a transposed copy.
            table = self.constant(self.store.weight(f"{head}.weight"))
            self.op("Gemm", [self.norm(selected, "norm"), table], logits, transB=1)
        else:
            self.linear(selected, head, norm="norm", out=logits)


def _dense(config: ModelConfig, store: WeightStore) -> Stage:
    """The backbone without its memory."""
    stage = Stage(config, store)
    x = stage.embed()
    for layer in range(config.layers):
        x, _, _ = stage.layer(x, layer)
    stage.head(x)
    return stage


def _with_memory(config: ModelConfig, store: WeightStore) -> tuple[Stage, Stage]:
    """What needs no rows, up to layer 0's FFN; and the rest, from layer 0's injection to the logits."""
    first, second = Stage(config, store), Stage(config, store)
    x, a, _ = first.layer(first.embed(), 0)
    for name in (x, a):
        first.output(name, [1, "T", config.hidden])
        second.input(name, [1, "T", config.hidden])
    rows = second.input("rows", [config.layers, "T", config.memory_dim])
    x = second.inject(x, a, "", rows, 0)
    for layer in range(1, config.layers):
        x, a, projected = second.layer(x, layer, opens_memory=True)
        x = second.inject(x, a, projected, rows, layer)
    second.head(x)
    return first, second


def _decode_bytes(stages: Sequence[Stage]) -> int:
    """Bytes of weights that one decode step reads; not the tables of which it reads one line.

    These are the rotary tables and the embedding, unless it is the head, too.
    """
    tied = stages[0].config.tied_embeddings
    tables = _ROPE_TABLES if tied else (*_ROPE_TABLES, "embed_tokens.weight", "embed_tokens.panels")
    tensors = {name: tensor for stage in stages for name, tensor in stage.initializers.items()}
    weights = [tensors[name] for name in tensors.keys() - set(tables)]
    return sum(tensor_bytes(tensor) for tensor in weights if tensor.data_type != TensorProto.INT64)  # those are indices


@dataclass(frozen=True)
class Graphs:
    """What the manifest says about the graphs and their weights."""

    stages: list[dict[str, Any]]
    dense_stages: list[dict[str, Any]] | None
    """The backbone without its memory, for comparison; None for a model without a memory."""
    decode_bytes: int
    dense_decode_bytes: int | None
    errors: WeightErrors


def write_graphs(
    config: ModelConfig, weights: Weights, weight_type: str, directory: Path, progress: Progress | None = None
) -> Graphs:
    """Writes the stages and their weights file into `directory`.

    A dense model is one stage; one with a memory is two, cut where the first row is needed, and a third graph without
    the memory that shares their weights. ConfigError if the shapes do not suit the weight type; ValueError for weights
    that are not finite.
    """
    check_exportable(config, weight_type)
    with (directory / WEIGHTS_FILE).open("wb") as file:
        store = WeightStore(weights, weight_type, TensorFile(file, WEIGHTS_FILE), config.ram_parameters, progress)
        if not config.memory_dim:
            stage = _dense(config, store)
            stage.save(directory / "stage0.onnx")
            stages = [{"file": "stage0.onnx", "rows": None}]
            return Graphs(stages, None, _decode_bytes([stage]), None, store.errors)
        first, second = _with_memory(config, store)
        dense = _dense(config, store)
        first.save(directory / "stage0.onnx")
        second.save(directory / "stage1.onnx")
        dense.save(directory / "dense.onnx")
        return Graphs(
            [{"file": "stage0.onnx", "rows": None}, {"file": "stage1.onnx", "rows": [0, config.layers]}],
            [{"file": "dense.onnx"}],
            _decode_bytes([first, second]),
            _decode_bytes([dense]),
            store.errors,
        )
