"""Models with random weights of a package's shapes for llama.cpp. Needs the Python package `gguf`."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from meki.models.architectures.gemma4 import Gemma4Config
from meki.models.architectures.llama import LlamaConfig
from meki.models.checkpoints.gguf_gemma import ROPE_FACTORS
from meki.models.checkpoints.gguf_names import stored_name
from meki.package.files import replace_file

PeerConfig = LlamaConfig | Gemma4Config

BLOCK, BLOCK_BYTES = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_0]
RECIPE = 2
"""Counts changes of `write_gguf`, so that a file made by an older version is not taken for a new one."""
PIECE = 1 << 24
"""Weights that are made at a time."""
NO_TURN = 1e30
"""A rotary frequency divided by it is none."""


def tensor_shapes(config: PeerConfig) -> dict[str, tuple[int, ...]]:
    """GGUF tensors by name, in file order: matrices [outputs, inputs], vectors [width].

    llama.cpp uses token_embd.weight as the head when there is no output.weight, and of a Gemma 4 wants what divides the
    rotary frequencies of full layers. ValueError for what it has no place for.
    """
    if isinstance(config, Gemma4Config):
        if config.memory and config.memory.entries(config) != config.vocab_size:
            raise ValueError(
                f"the per-layer embedding has {config.memory.entries(config):,} rows, expected one for each of the "
                f"{config.vocab_size:,} tokens; compare a model with as many"
            )
        shapes = {stored_name(name, gemma=True): shape for name, shape in config.shapes().items()}
        return {**shapes, ROPE_FACTORS: (config.full_head_dim // 2,)} if config.full_layers else shapes
    if config.qkv_bias:
        raise ValueError("the model has biases of query, key and value; compare one without")
    if config.feed_forward.kind != "swiglu":
        raise ValueError(f"the model's FFN is {config.feed_forward.kind}; compare one with swiglu")
    return {stored_name(name, gemma=False): shape for name, shape in config.shapes().items()}


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


def tensor_pieces(
    config: PeerConfig, rng: np.random.Generator, name: str, shape: tuple[int, ...]
) -> Iterator[NDArray[np.uint8] | NDArray[np.float32]]:
    """The tensor's values as they are stored, rows after rows. Matrices are Q4_0, vectors float32."""
    if len(shape) == 2:
        rows, columns = shape
        for first in range(0, rows, step := max(1, PIECE // columns)):
            yield random_q4_0(rng, min(step, rows - first), columns)
    elif name == ROPE_FACTORS:
        assert isinstance(config, Gemma4Config)
        turning = int(config.rotary_part * shape[0])
        yield np.array([1.0] * turning + [NO_TURN] * (shape[0] - turning), np.float32)
    else:
        yield np.ones(shape, np.float32)


def add_keys(writer: gguf.GGUFWriter, config: PeerConfig) -> None:
    writer.add_name(f"random weights, {config.layers} layers, hidden {config.hidden}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(config.layers)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("no_vocab")
    if isinstance(config, Gemma4Config):
        head_dim = config.full_head_dim
        add_gemma_keys(writer, config)
    else:
        head_dim = config.head_dim
        writer.add_feed_forward_length(config.ffn)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)


def add_gemma_keys(writer: gguf.GGUFWriter, config: Gemma4Config) -> None:
    """Beside those that a Llama has; `key_length` without `swa` is that of full layers."""
    writer.add_feed_forward_length([config.width(layer) for layer in range(config.layers)])
    writer.add_key_length_swa(config.head_dim)
    writer.add_value_length_swa(config.head_dim)
    writer.add_rope_dimension_count_swa(config.head_dim)
    writer.add_rope_freq_base_swa(config.local_rope_theta)
    writer.add_sliding_window(config.window)
    writer.add_sliding_window_pattern([not config.is_full(layer) for layer in range(config.layers)])
    writer.add_shared_kv_layers(config.shared_layers)
    writer.add_embedding_length_per_layer_input(config.memory.dim if config.memory else 0)
    if config.logit_softcap:
        writer.add_final_logit_softcapping(config.logit_softcap)


def write_gguf(config: PeerConfig, path: Path) -> None:
    """Writes a GGUF model with random weights of `config`, without a tokenizer. Of a Llama without its memory, which
    llama.cpp does not have.

    Every matrix is Q4_0 (4.5 bits a weight), the embeddings too; every norm's weight is 1. They are written a piece at
    a time, of PIECE weights or a row. `path` appears when it is complete.
    """
    config = peer_of(config)
    shapes = tensor_shapes(config)
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[1] % BLOCK:
            raise ValueError(f"{name}: {shape[1]} inputs, expected a multiple of {BLOCK} for Q4_0; change the model")
    architecture = "gemma4" if isinstance(config, Gemma4Config) else "qwen3" if config.qk_norm else "llama"
    writer = gguf.GGUFWriter(None, architecture)
    add_keys(writer, config)
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
        assert writer.fout is not None
        (file,) = writer.fout  # the writer itself takes whole tensors only
        for name, shape in tqdm(shapes.items(), desc=path.name, disable=None):
            writer.write_padding(file, file.tell())
            for piece in tensor_pieces(config, rng, name, shape):
                piece.tofile(file)
        writer.write_padding(file, file.tell())


def peer_of(config: PeerConfig) -> PeerConfig:
    """What llama.cpp has of it: a Gemma 4 with its per-layer embedding, a Llama without a memory."""
    return config if isinstance(config, Gemma4Config) else config.without_memory()


def cached_gguf(config: PeerConfig, directory: Path) -> Path:
    """The path of a model of `peer_of(config)` in `directory`; writes it if it is not there yet."""
    peer = peer_of(config)
    digest = hashlib.sha256(f"{RECIPE} {json.dumps(peer.settings())}".encode()).hexdigest()[:12]
    path = directory / f"random-L{peer.layers}-d{peer.hidden}-q4_0-{digest}.gguf"
    if not path.is_file():
        write_gguf(peer, path)
    return path
