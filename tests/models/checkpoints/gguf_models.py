"""Writes GGUF files of models, naively, after the GGUF specification: element loops, names spelt out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFEndian, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray

from meki.models.architectures.llama import Decoder

Floats = NDArray[np.float32]

# What makes a model of conftest's one of the architecture.
LLAMA: dict[str, Any] = {"memory_dim": 0, "qk_norm": False}
SMOLLM3: dict[str, Any] = {**LLAMA, "layers": 9, "nope_layers": (3, 7)}
QWEN2: dict[str, Any] = {**LLAMA, "qkv_bias": True}
QWEN3: dict[str, Any] = {"memory_dim": 0, "qk_norm": True}

NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def to_pairs(rows: Floats, heads: int) -> Floats:
    """llama's order of the rows of a query or key projection: element i of a half next to element i of the other."""
    out, size = np.empty_like(rows), len(rows) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = rows[head * size + i]
            out[head * size + 2 * i + 1] = rows[head * size + size // 2 + i]
    return out


def tensors_of(model: Decoder, architecture: str) -> dict[str, Floats]:
    """The weights of the model under their names in a file of this architecture."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name.startswith("layers."):
            _, layer, inner = name.split(".", 2)
            if architecture in ("llama", "smollm3") and "q_proj" in name:
                values = to_pairs(values, model.config.heads)
            if architecture in ("llama", "smollm3") and "k_proj" in name:
                values = to_pairs(values, model.config.kv_heads)
            tensors[f"blk.{layer}.{NAMES[inner]}"] = values
        else:
            outer = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
            tensors[f"{outer[name.split('.')[0]]}.weight"] = values
    return tensors


def metadata_of(model: Decoder, architecture: str) -> dict[str, Any]:
    config = model.config
    values = {
        "block_count": config.layers,
        "embedding_length": config.hidden,
        "feed_forward_length": config.ffn,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "context_length": config.context,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
    }
    return {f"{architecture}.{key}": value for key, value in values.items()}


def write_gguf(
    path: Path,
    model: Decoder,
    architecture: str,
    changes: Mapping[str, Any] | None = None,
    extra: Mapping[str, Floats] | None = None,
    types: Mapping[str, Type] | None = None,
    endian: GGUFEndian = GGUFEndian.LITTLE,
    split: int = 0,
) -> Path:
    """changes: of the metadata, None leaves a key out; types, endian, split: as `write_file` has them."""
    metadata = {**metadata_of(model, architecture), **(changes or {})}
    tensors = {**tensors_of(model, architecture), **(extra or {})}
    return write_file(path, architecture, metadata, tensors, types, endian, split)


def write_file(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Floats],
    types: Mapping[str, Type] | None = None,
    endian: GGUFEndian = GGUFEndian.LITTLE,
    split: int = 0,
) -> Path:
    """metadata: a key whose value is None is left out; types: of tensors, F32 where nothing is said; split: tensors of
    a part, whose name the gguf package makes of `path`."""
    writer = GGUFWriter(path, architecture, endianess=endian, split_max_tensors=split)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, values in tensors.items():
        kind = (types or {}).get(name, Type.F32)
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
