"""Models with random weights of a package's shapes for llama.cpp. Needs the Python package `gguf`."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from meki.models.architectures.llama import LlamaConfig
from meki.package.files import replace_file

BLOCK, BLOCK_BYTES = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_0]
RECIPE = 1
"""Counts changes of `write_gguf`, so that a file made by an older version is not taken for a new one."""


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """GGUF tensors of the dense backbone by name, in file order: matrices [outputs, inputs], vectors [width].

    llama.cpp uses token_embd.weight as the head when there is no output.weight. ValueError for biases and experts.
    """
    if config.qkv_bias:
        raise ValueError("the model has biases of query, key and value; compare one without")
    if config.feed_forward.kind != "swiglu":
        raise ValueError(f"the model's FFN is {config.feed_forward.kind}; compare one with swiglu")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.layers)  # which has all that a Llama has
    shapes = config.without_memory().shapes()
    return {f"{names[name.removesuffix('.weight')]}.weight": shape for name, shape in shapes.items()}


def random_q4_0(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.uint8]:
    """Random Q4_0 rows, uint8 [rows, columns / 32 * 18], of values with mean 0 and variance about 1 / columns.

    A block is a float16 scale d and 32 codes q of 4 bits; a value is d * (q - 8). Uniform codes have a mean of -0.5,
    which the random sign of d takes out, and a mean square of 21.5.
    """
    blocks = np.empty((rows * columns // BLOCK, BLOCK_BYTES), np.uint8)
    scales = rng.choice([-1.0, 1.0], len(blocks)) * rng.uniform(0.8, 1.2, len(blocks)) / np.sqrt(21.5 * columns)
    blocks[:, :2] = scales.astype("<f2")[:, None].view(np.uint8)
    blocks[:, 2:] = rng.integers(0, 256, (len(blocks), BLOCK_BYTES - 2), dtype=np.uint8)
    return blocks.reshape(rows, -1)


def write_gguf(config: LlamaConfig, path: Path) -> None:
    """Writes a GGUF model with random weights of `config`'s backbone, without a memory and without a tokenizer.

    Every matrix is Q4_0 (4.5 bits a weight), the embedding too; every norm's weight is 1. The tensors are written
    one by one: the largest, the embedding, is all that is in memory. `path` appears when it is complete.
    """
    shapes = tensor_shapes(config)
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[1] % BLOCK:
            raise ValueError(f"{name}: {shape[1]} inputs, expected a multiple of {BLOCK} for Q4_0; change the model")
    writer = gguf.GGUFWriter(None, "qwen3" if config.qk_norm else "llama")
    writer.add_name(f"random weights, {config.layers} layers, hidden {config.hidden}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("no_vocab")
    for name, shape in shapes.items():
        if len(shape) == 2:
            packed = (shape[0], shape[1] // BLOCK * BLOCK_BYTES)
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor_info(name, packed, np.dtype(np.uint8), packed[0] * packed[1], raw_dtype=kind)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])

    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with replace_file(path) as partial, contextlib.closing(writer):
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for shape in tqdm(shapes.values(), desc=path.name, disable=None):
            writer.write_tensor_data(random_q4_0(rng, *shape) if len(shape) == 2 else np.ones(shape, np.float32))


def cached_gguf(config: LlamaConfig, directory: Path) -> Path:
    """The path of a model with `config`'s backbone in `directory`; writes it if it is not there yet."""
    backbone = config.without_memory()
    digest = hashlib.sha256(f"{RECIPE} {json.dumps(backbone.settings())}".encode()).hexdigest()[:12]
    path = directory / f"random-L{config.layers}-d{config.hidden}-q4_0-{digest}.gguf"
    if not path.is_file():
        write_gguf(config, path)
    return path
