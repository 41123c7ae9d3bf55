"""Builds the dense graph of a package: ONNX stages whose weights lie in one file (docs/package-format.md).

Built from the configuration and named weights with onnx's helpers, not traced, so that every node, name and byte is
decided here. Matrices are float32 or, through com.microsoft operators, symmetric blocks of 8 or 4 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, ValueInfoProto, helper

from .config import ConfigError, ModelConfig
from .decoder import rope_tables
from .quantize import WEIGHT_BITS, WEIGHT_BLOCK
from .weights import WEIGHT_TYPES, WEIGHTS_FILE, Progress, WeightErrors, Weights, WeightStore

_OPSETS = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]  # 23: the first with RMSNormalization
_IR_VERSION = 11  # came with that opset


_ROTARY_HEAD_DIM = 16  # GroupQueryAttention rotates heads of a multiple of this size only


def check_exportable(config: ModelConfig, weight_type: str) -> None:
    """ConfigError if ONNX Runtime could not run a graph of this configuration with such weights."""
    if weight_type not in WEIGHT_TYPES:
        raise ConfigError(f"weight type: got {weight_type!r}, expected one of {', '.join(WEIGHT_TYPES)}")
    if config.head_dim % _ROTARY_HEAD_DIM:
        raise ConfigError(
            f"head_dim is {config.head_dim}: ONNX Runtime's attention needs a multiple of {_ROTARY_HEAD_DIM}; "
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


class Stage:
    """One ONNX graph under construction. Methods add nodes; values go by name and are float32 [1, T, ..]."""

    def __init__(self, config: ModelConfig, store: WeightStore) -> None:
        self.config = config
        self.store = store
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.inputs: dict[str, ValueInfoProto] = {}
        self.outputs: dict[str, ValueInfoProto] = {}

    def op(
        self, kind: str, inputs: Sequence[str], outputs: str | Sequence[str], domain: str = "", **attributes: Any
    ) -> str:
        """Adds a node and returns its first output."""
        outputs = [outputs] if isinstance(outputs, str) else list(outputs)
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def input(self, name: str, shape: Sequence[int | str], data_type: int = TensorProto.FLOAT) -> str:
        self.inputs[name] = helper.make_tensor_value_info(name, data_type, shape)
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> str:
        self.outputs[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        return name

    def constant(self, tensor: TensorProto) -> str:
        self.initializers[tensor.name] = tensor
        return tensor.name

    def shape(self, *sizes: int) -> str:
        """A shape for Reshape and the like, int64 [n]."""
        name = "shape." + "x".join(map(str, sizes))
        return self.constant(self.store.constant(name, lambda: np.array(sizes, np.int64)))

    def linear(self, x: str, name: str, parts: Sequence[str] = (), out: str = "") -> str:
        """x [.., k] times the transposed weights `parts`, each [n, k], one below the other -> `out` [.., sum of n].

        Without `parts` the weight is `name`.weight.
        """
        parts, out = parts or [f"{name}.weight"], out or f"{name}.out"
        if self.store.weight_type == "float32":
            return self.op("MatMul", [x, self.constant(self.store.transposed(name, parts))], out)
        codes, scales = self.store.quantized(name, parts)
        outputs, groups = scales.dims
        blocks = TensorProto()
        blocks.CopyFrom(codes)
        blocks.name = f"{name}.blocks"
        blocks.dims[:] = [outputs, groups, codes.dims[1] // groups]
        return self.op(
            "MatMulNBits",
            [x, self.constant(blocks), self.constant(scales)],
            out,
            domain="com.microsoft",
            K=groups * WEIGHT_BLOCK,
            N=outputs,
            bits=WEIGHT_BITS[self.store.weight_type],
            block_size=WEIGHT_BLOCK,
            accuracy_level=4,  # activations in blocks of int8 as well
        )

    def norm(self, x: str, gain: str) -> str:
        """RMSNorm over the last axis: x / sqrt(mean(x^2) + eps) * gain."""
        gain_name = self.constant(self.store.weight(f"{gain}.weight"))
        return self.op("RMSNormalization", [x, gain_name], f"{gain}.out", axis=-1, epsilon=self.config.norm_eps)

    def embed(self) -> str:
        """token_ids int64 [1, T] -> [1, T, hidden]."""
        ids = self.input("token_ids", [1, "T"], TensorProto.INT64)
        if self.store.weight_type == "float32":
            return self.op("Gather", [self.constant(self.store.weight("embed_tokens.weight")), ids], "embedding")
        codes, scales = self.store.quantized("embed_tokens", ["embed_tokens.weight"])
        return self.op(
            "GatherBlockQuantized",
            [self.constant(codes), ids, self.constant(scales)],
            "embedding",
            domain="com.microsoft",
            gather_axis=0,
            quantize_axis=1,
            block_size=WEIGHT_BLOCK,
            bits=WEIGHT_BITS[self.store.weight_type],
        )

    def heads_norm(self, x: str, heads: int, gain: str) -> str:
        """RMSNorm of every head by itself. x: [1, T, heads * head_dim]."""
        split = self.op("Reshape", [x, self.shape(0, 0, heads, self.config.head_dim)], f"{x}.heads")
        return self.op(
            "Reshape", [self.norm(split, gain), self.shape(0, 0, heads * self.config.head_dim)], f"{gain}.flat"
        )

    def attention(self, x: str, layer: int) -> str:
        """x: normed, [1, T, hidden] -> [1, T, hidden]. Appends to layer `layer`'s cache in place."""
        config, prefix = self.config, f"layers.{layer}.self_attn"
        q, k, v = (f"{prefix}.{name}" for name in "qkv")
        sizes = [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
        qkv = self.linear(x, f"{prefix}.qkv", [f"{name}_proj.weight" for name in (q, k, v)])
        self.op("Split", [qkv, self.shape(*sizes)], [q, k, v], axis=-1)
        if config.qk_norm:
            q = self.heads_norm(q, config.heads, f"{prefix}.q_norm")
            k = self.heads_norm(k, config.kv_heads, f"{prefix}.k_norm")
        cache: list[int | str] = [1, config.kv_heads, "S", config.head_dim]
        past = [self.input(f"past.{layer}.{part}", cache) for part in ("key", "value")]
        present = [self.output(f"present.{layer}.{part}", cache) for part in ("key", "value")]
        lengths = [
            self.input("seqlens_k", [1], TensorProto.INT32),
            self.input("total_sequence_length", [], TensorProto.INT32),
        ]
        cos = self.store.constant("rope.cos", lambda: rope_tables(config, config.context)[0].numpy())
        sin = self.store.constant("rope.sin", lambda: rope_tables(config, config.context)[1].numpy())
        self.op(
            "GroupQueryAttention",
            [q, k, v, *past, *lengths, self.constant(cos), self.constant(sin)],
            [f"{prefix}.heads", *present],
            domain="com.microsoft",
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            do_rotary=1,
        )
        return self.linear(f"{prefix}.heads", f"{prefix}.o_proj")

    def ffn(self, h: str, layer: int) -> str:
        """SwiGLU: down(SiLU(gate(h)) * up(h)). h: [1, T, hidden] -> [1, T, hidden]."""
        prefix = f"layers.{layer}.mlp"
        gate, up = f"{prefix}.gate", f"{prefix}.up"
        both = self.linear(h, f"{prefix}.gate_up", [f"{gate}_proj.weight", f"{up}_proj.weight"])
        self.op("Split", [both], [gate, up], axis=-1, num_outputs=2)
        silu = self.op("Mul", [gate, self.op("Sigmoid", [gate], f"{gate}.sigmoid")], f"{gate}.silu")
        return self.linear(self.op("Mul", [silu, up], f"{prefix}.product"), f"{prefix}.down_proj")

    def layer(self, x: str, layer: int) -> tuple[str, str]:
        """A layer without its memory: x -> (A + FFN(h), h), where A = x + Attention(norm(x)) and h = norm(A)."""
        prefix = f"layers.{layer}"
        attention = self.attention(self.norm(x, f"{prefix}.input_layernorm"), layer)
        a = self.op("Add", [x, attention], f"{prefix}.attended")
        h = self.norm(a, f"{prefix}.post_attention_layernorm")
        return self.op("Add", [a, self.ffn(h, layer)], f"{prefix}.residual"), h

    def inject(self, x: str, h: str, rows: str, layer: int) -> str:
        """x + RMSNorm_d(W_out (rows + sigmoid(W_gate h))): MeKi's folded form. rows: [1, T, memory_dim]."""
        prefix = f"layers.{layer}.meki"
        gate = self.op("Sigmoid", [self.linear(h, f"{prefix}.gate_proj")], f"{prefix}.gate")
        fused = self.op("Add", [rows, gate], f"{prefix}.fused")
        y = self.norm(self.linear(fused, f"{prefix}.out_proj"), f"{prefix}.post_norm")
        return self.op("Add", [x, y], f"layers.{layer}.injected")

    def head(self, x: str) -> None:
        """x [1, T, hidden] -> logits [K, vocab_size] of the positions in logit_index. The head is the embedding."""
        index = self.input("logit_index", ["K"], TensorProto.INT64)
        logits = self.output("logits", ["K", self.config.vocab_size])
        tokens = self.op("Squeeze", [x, self.shape(0)], "final.tokens")
        h = self.norm(self.op("Gather", [tokens, index], "final.selected"), "norm")
        if self.store.weight_type == "float32":
            # Gemm takes the table as the embedding has it; MatMul would want a transposed copy.
            self.op("Gemm", [h, self.constant(self.store.weight("embed_tokens.weight"))], logits, transB=1)
        else:
            self.linear(h, "embed_tokens", out=logits)

    def save(self, path: Path) -> None:
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            list(self.inputs.values()),
            list(self.outputs.values()),
            list(self.initializers.values()),
        )
        onnx.save(helper.make_model(graph, opset_imports=_OPSETS, ir_version=_IR_VERSION, producer_name="meki"), path)


def write_stages(
    config: ModelConfig, weights: Weights, weight_type: str, directory: Path, progress: Progress | None = None
) -> tuple[list[dict[str, Any]], WeightErrors]:
    """Writes the stages and their weights file into `directory`.

    Returns the manifest's `stages` and the quantisation errors. A dense model is one stage. With a memory, stage 0 goes
    up to layer 0's FFN, which needs no rows, and stage 1 from layer 0's injection to the logits. ConfigError if the
    shapes do not suit the weight type; ValueError for weights that are not finite.
    """
    check_exportable(config, weight_type)
    with (directory / WEIGHTS_FILE).open("wb") as file:
        store = WeightStore(weights, weight_type, file, config.ram_parameters, progress)
        stage = Stage(config, store)
        stages: list[dict[str, Any]] = [{"file": "stage0.onnx", "rows": None}]
        x, h = stage.layer(stage.embed(), 0)
        if config.memory_dim:
            for name in (x, h):
                stage.output(name, [1, "T", config.hidden])
            stage.save(directory / "stage0.onnx")
            stages.append({"file": "stage1.onnx", "rows": [0, config.layers]})
            stage = Stage(config, store)
            for name in (x, h):
                stage.input(name, [1, "T", config.hidden])
            rows = [f"rows.{layer}" for layer in range(config.layers)]
            all_rows = stage.input("rows", [config.layers, "T", config.memory_dim])
            stage.op("Split", [all_rows], rows, axis=0, num_outputs=config.layers)
            x = stage.inject(x, h, rows[0], 0)
        for layer in range(1, config.layers):
            x, h = stage.layer(x, layer)
            if config.memory_dim:
                x = stage.inject(x, h, rows[layer], layer)
        stage.head(x)
        stage.save(directory / stages[-1]["file"])
    return stages, store.errors
