"""GGUF files written here from random models, read back, against those models; and what is refused."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFEndian, GGUFReader, GGUFWriter
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from meki import Engine
from meki.models.architectures.llama import Decoder
from meki.models.checkpoints import CheckpointError, gguf_file, open_checkpoint
from meki.models.checkpoints.checkpoint import checkpoint_source
from meki.models.checkpoints.gguf_file import GgufFile
from meki.models.package import export_package
from meki.models.tokenizer import TokenizerSpec

from .gguf_models import LLAMA, QWEN2, QWEN3, SMOLLM3, write_gguf

MakeModel = Callable[..., Decoder]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-untied": ("llama", {**LLAMA, "tied_embeddings": False}),
    "llama-one-kv-head": ("llama", {**LLAMA, "kv_heads": 1}),
    "llama-biases": ("llama", {**LLAMA, "qkv_bias": True}),
    "smollm3": ("smollm3", SMOLLM3),
    "qwen2": ("qwen2", QWEN2),
    "qwen3": ("qwen3", QWEN3),
    "qwen3-untied": ("qwen3", {**QWEN3, "tied_embeddings": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_and_configuration_return(make_model: MakeModel, tmp_path: Path, variant: str) -> None:
    architecture, overrides = VARIANTS[variant]
    model = make_model(**overrides)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model, architecture), {})
    eps = float(np.float32(model.config.norm_eps))  # as the file has it
    assert checkpoint.config == dataclasses.replace(model.config, norm_eps=eps)
    state = model.state_dict()
    assert checkpoint.parts.keys() == state.keys()
    source = checkpoint_source(checkpoint)
    for name, tensor in state.items():
        np.testing.assert_array_equal(source.weights(name), tensor.numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {**LLAMA, "tied_embeddings": False}),
        ("smollm3", SMOLLM3),
        ("qwen2", QWEN2),
        ("qwen3", {**QWEN3, "tied_embeddings": False}),
    ],
)
def test_engine_equals_the_model(
    make_model: MakeModel, tokenizer_spec: TokenizerSpec, tmp_path: Path, architecture: str, overrides: dict[str, Any]
) -> None:
    model = make_model(**overrides)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", model, architecture), {})
    options: dict[str, Any] = {"name": "m", "weights": "float32", "provenance": checkpoint.provenance}
    export_package(checkpoint_source(checkpoint), tokenizer_spec, tmp_path / "p", **options)
    ids = np.random.default_rng(5).integers(0, model.config.vocab_size, 50).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0].numpy()
    # Float32 on both sides, summed in another order: some 1e-6 of logits that reach 10.
    np.testing.assert_allclose(
        Engine(tmp_path / "p", kv_type="float32", threads=1).logits(ids), expected, rtol=0, atol=1e-4
    )


def test_configuration(make_model: MakeModel, tmp_path: Path) -> None:
    def config_of(architecture: str, overrides: dict[str, Any], **changes: Any) -> Any:
        named = {f"{architecture}.{key.replace('__', '.')}": value for key, value in changes.items()}
        return open_checkpoint(write_gguf(tmp_path / "m.gguf", make_model(**overrides), architecture, named), {}).config

    assert config_of("llama", LLAMA, rope__freq_base=None).rope_theta == 10_000
    assert config_of("llama", {**LLAMA, "kv_heads": 4}, attention__head_count_kv=None).kv_heads == 4
    assert config_of("llama", LLAMA, rope__dimension_count=None).head_dim == 16
    wide = {"attention__key_length": 32, "attention__value_length": 32}
    assert config_of("qwen3", {**QWEN3, "head_dim": 32}, **wide).head_dim == 32
    assert config_of("llama", LLAMA, attention__sliding_window=128).context == 128  # no shorter than the context
    assert config_of("llama", LLAMA, attention__head_count_kv=[2, 2, 2]).kv_heads == 2
    assert config_of("llama", LLAMA, rope__scaling__type="none", rope__scaling__factor=4.0).rope_factors == ()
    linear = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    assert config_of("llama", LLAMA, **linear).rope_factors == (4.0,) * 8


def test_rope_factors(make_model: MakeModel, tmp_path: Path) -> None:
    model, factors = make_model(**LLAMA), np.array([1, 1, 1, 1.5, 2.5, 8, 8, 8], np.float32)
    path = write_gguf(tmp_path / "m.gguf", model, "llama", extra={"rope_freqs.weight": factors})
    checkpoint = open_checkpoint(path, {})
    assert checkpoint.config.rope_factors == tuple(factors.tolist())
    checkpoint_source(checkpoint)  # the tensor is not left over
    changes = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    path = write_gguf(tmp_path / "m.gguf", model, "llama", changes, {"rope_freqs.weight": factors})
    assert open_checkpoint(path, {}).config.rope_factors == tuple((2 * factors).tolist())
    path = write_gguf(tmp_path / "m.gguf", model, "llama", extra={"rope_freqs.weight": factors[1:]})
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight has shape \(7,\), expected \(8,\)"):
        open_checkpoint(path, {})


def test_overrides_win(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(**LLAMA)
    path = write_gguf(tmp_path / "m.gguf", model, "llama", {"llama.attention.head_count": None})
    with pytest.raises(CheckpointError, match=r"m.gguf: .* heads .*--set heads=VALUE"):
        open_checkpoint(path, {"head_dim": 16})
    checkpoint = open_checkpoint(path, {"heads": 4, "context": 64, "vocab_size": 256})
    assert (checkpoint.config.head_dim, checkpoint.config.context) == (16, 64)
    weights = checkpoint_source(checkpoint).weights
    np.testing.assert_array_equal(weights("embed_tokens.weight"), model.embed_tokens.weight[:256].detach().numpy())


def test_provenance(make_model: MakeModel, tmp_path: Path) -> None:
    stated = {"general.name": "Small", "general.license": "cc0-1.0"}
    path = write_gguf(tmp_path / "m.gguf", make_model(**LLAMA), "llama", stated, types={"token_embd.weight": Type.Q8_0})
    assert open_checkpoint(path, {}).provenance == {
        "source": "m.gguf",
        "format": "gguf",
        "architecture": "llama",
        "types": "F32, Q8_0",
        "name": "Small",
        "license": "cc0-1.0",
    }


def test_a_file_without_a_tokenizer(make_model: MakeModel, tmp_path: Path) -> None:
    assert open_checkpoint(write_gguf(tmp_path / "m.gguf", make_model(**LLAMA), "llama"), {}).read_tokenizer() is None


# Types of tensors. Each reference reads the block format of the GGUF specification value by value.


def dequantize_q8_0(data: bytes) -> list[float]:
    """Blocks of a float16 scale and 32 int8."""
    values = []
    for at in range(0, len(data), 34):
        scale, *codes = struct.unpack_from("<e32b", data, at)
        values += [scale * code for code in codes]
    return values


def dequantize_q4_0(data: bytes) -> list[float]:
    """Blocks of a float16 scale and 16 bytes: low halves are the first 16 values, high halves the others; minus 8."""
    values = []
    for at in range(0, len(data), 18):
        scale, *codes = struct.unpack_from("<e16B", data, at)
        values += [scale * ((code & 15) - 8) for code in codes] + [scale * ((code >> 4) - 8) for code in codes]
    return values


def dequantize_q4_k(data: bytes) -> list[float]:
    """Blocks of 256: float16 factors of scales and minima, 8 six-bit scales and minima in 12 bytes, 128 bytes of codes
    of which each 32 hold the low halves of 32 values and then the high halves of the next 32."""
    values = []
    for at in range(0, len(data), 144):
        factor, minimum, *rest = struct.unpack_from("<ee140B", data, at)
        packed, codes = rest[:12], rest[12:]
        for group in range(8):
            if group < 4:
                scale, low = packed[group] & 63, packed[group + 4] & 63
            else:
                scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4
                low = (packed[group + 4] >> 4) | (packed[group] >> 6) << 4
            part = codes[32 * (group // 2) : 32 * (group // 2) + 32]
            values += [factor * scale * (code >> 4 * (group % 2) & 15) - minimum * low for code in part]
    return values


def dequantize_plain(dtype: torch.dtype) -> Callable[[bytes], list[float]]:
    return lambda data: torch.frombuffer(bytearray(data), dtype=dtype).double().tolist()


TYPES: dict[Type, Callable[[bytes], list[float]]] = {
    Type.F32: dequantize_plain(torch.float32),
    Type.F16: dequantize_plain(torch.float16),
    Type.BF16: dequantize_plain(torch.bfloat16),
    Type.Q8_0: dequantize_q8_0,
    Type.Q4_0: dequantize_q4_0,
    Type.Q4_K: dequantize_q4_k,
}


def stored_bytes(kind: Type, rows: int, columns: int) -> NDArray[np.uint8]:
    """Random contents of a tensor [rows, columns]."""
    generator = np.random.default_rng(int(kind))
    if kind != Type.Q4_K:
        return quantize(generator.standard_normal((rows, columns), np.float32), kind).view(np.uint8)
    # The library cannot write it, but any bytes are valid whose two float16 are finite.
    blocks = generator.integers(0, 256, (rows * columns // 256, 144), np.uint8)
    blocks[:, :4] = generator.uniform(0, 1, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.fixture
def typed_file(tmp_path: Path) -> Path:
    """One tensor [12, 512] of each type, named after it."""
    writer = GGUFWriter(tmp_path / "types.gguf", "llama")
    for kind in TYPES:
        writer.add_tensor(kind.name, stored_bytes(kind, 12, 512), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "types.gguf"


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_types_and_rows(typed_file: Path, kind: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "_AT_ONCE", 5 * 512)  # several blocks, of which the last is shorter
    file = GgufFile(typed_file)
    assert file.shapes[kind.name] == (12, 512)
    expected = np.array(TYPES[kind](stored_bytes(kind, 12, 512).tobytes())).reshape(12, 512)
    # The library multiplies in float32 what the reference multiplies in float64: three roundings.
    whole = file.read(kind.name)
    np.testing.assert_allclose(whole.numpy(), expected, rtol=3e-7, atol=3e-6)
    for rows in (slice(3, 11), slice(0, 1), slice(11, 12), slice(4, 4)):
        assert torch.equal(file.read(kind.name, rows), whole[rows])


def test_memory_is_bounded(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows cost what they take, a tensor what it takes and a block."""
    monkeypatch.setattr(gguf_file, "_AT_ONCE", 1 << 14)
    model = make_model(**LLAMA, vocab_size=20_000)
    file = GgufFile(write_gguf(tmp_path / "m.gguf", model, "llama", types={"token_embd.weight": Type.Q8_0}))

    def peak(rows: slice) -> int:
        tracemalloc.start()
        file.read("token_embd.weight", rows)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return memory

    # A block of 2^14 values takes 64 KB as float32, a few times over while it is made.
    assert peak(slice(7000, 7010)) < 100_000
    assert peak(slice(None)) < 20_000 * 64 * 4 + 500_000


# What is refused.


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("phi3", {}, "general.architecture is 'phi3'; supported are llama, smollm3, qwen2, qwen3, gemma3, gemma4"),
        ("llama", {"general.type": "adapter"}, "general.type is 'adapter'; supported is 'model'"),
        ("llama", {"llama.expert_count": 8}, "llama.expert_count is 8; supported is 0"),
        ("llama", {"llama.attention.causal": False}, "llama.attention.causal is False"),
        ("llama", {"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5"),
        ("qwen3", {"qwen3.attention.sliding_window": 64}, "qwen3.attention.sliding_window is 64, supported is atten"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'; supported are 'none' and"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type is 'longrope'"),
        ("llama", {"llama.rope.scaling.attn_factor": 1.5}, "llama.rope.scaling.attn_factor is 1.5"),
        ("llama", {"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8; supported is head_dim, 16"),
        ("llama", {"llama.attention.value_length": 8}, "llama.attention.value_length is 8; supported is head_dim, 16"),
        ("llama", {"llama.attention.head_count_kv": [2, 4, 2]}, r"head_count_kv is \[2, 4, 2\]; supported is one num"),
        ("llama", {"llama.block_count": "3"}, "llama.block_count is '3'; supported is one number"),
        ("llama", {"llama.block_count": None}, "does not say what layers is; give it with --set layers=VALUE"),
        ("llama", {"llama.attention.layer_norm_rms_epsilon": 0.0}, "must be a positive number"),
        ("llama", {"llama.block_count": 2**31}, "layers must be an integer from 1 to 65535, got 2147483648"),
        ("llama", {"llama.block_count": 4}, r"no tensor blk.3.attn_norm.weight .*layers=4"),
        ("llama", {"llama.block_count": 2}, r"tensor blk.2.attn_k.weight .*has no place"),
        ("llama", {"llama.feed_forward_length": 128}, r"ffn_gate.weight has shape \[96, 64\].*needs \[128, 64\]"),
    ],
)
def test_refused_metadata(
    make_model: MakeModel, tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    overrides = QWEN3 if architecture == "qwen3" else LLAMA
    path = write_gguf(tmp_path / "m.gguf", make_model(**overrides), architecture, changes)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint_source(open_checkpoint(path, {}))
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blk.0.attn_output.bias", "has the bias blk.0.attn_output.bias; supported are those of attn_q"),
        ("blk.1.ffn_down.bias", "has the bias blk.1.ffn_down.bias"),
        ("blk.0.attn_q_norm.weight", "blk.0.attn_q_norm.weight has no place"),
        ("rope_factors_long.weight", "rope_factors_long.weight has no place"),
    ],
)
def test_refused_tensors(make_model: MakeModel, tmp_path: Path, name: str, message: str) -> None:
    extra = {name: np.ones(64, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", make_model(**LLAMA), "llama", extra=extra)
    with pytest.raises(CheckpointError, match=message):
        checkpoint_source(open_checkpoint(path, {}))


def test_refused_type(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"token_embd.weight is stored as I32, which the gguf package does"):
        open_checkpoint(tmp_path / "m.gguf", {})


@pytest.mark.parametrize(("type", "named"), [(31, r"31 \(Q4_0_4_4\)"), (42, r"42 \(Q2_0\)"), (151, "151")])
def test_types_that_the_library_does_not_have(make_model: MakeModel, tmp_path: Path, type: int, named: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_model(**LLAMA), "llama")
    content, name = bytearray(path.read_bytes()), b"output_norm.weight"
    at = content.index(name) + len(name) + 4 + 8  # behind the number of dimensions, and the one there is
    assert content[at : at + 4] == struct.pack("<I", Type.F32)
    content[at : at + 4] = struct.pack("<I", type)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path}: tensor output_norm.weight is stored as type {named}, which"):
        open_checkpoint(path, {})


def test_a_pointer_of_git_lfs_and_a_folder(make_model: MakeModel, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a model.gguf", make_model(**LLAMA), "llama")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: the model is not here, but at {path}; give that"):
        open_checkpoint(tmp_path, {})
    checkpoint_source(open_checkpoint(path, {}))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=f"{path}: is a Git LFS pointer, .*: git lfs pull"):
        open_checkpoint(path, {})


def test_a_window_beyond_a_shorter_context(make_model: MakeModel, tmp_path: Path) -> None:
    window = {"qwen2.attention.sliding_window": 64}
    path = write_gguf(tmp_path / "m.gguf", make_model(**QWEN2), "qwen2", window)
    with pytest.raises(CheckpointError, match="give --set context=64"):
        open_checkpoint(path, {})
    assert open_checkpoint(path, {"context": 64}).config.context == 64


def test_big_endian(make_model: MakeModel, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", make_model(**LLAMA), "llama", endian=GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match="is big-endian, expected little-endian; run gguf-convert-endian"):
        open_checkpoint(path, {})


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\1\0\0\0" + bytes(16), b"PK\3\4" + bytes(100)])
def test_no_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not a complete GGUF file of version 2 or 3: .*; download or"):
        open_checkpoint(path, {})


@pytest.fixture(scope="module")
def whole_file(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"tokenizer.ggml.scores": [1.0, 2.0, 3.0], "tokenizer.ggml.tokens": ["a", "b", "c"]}
    model = make_model(**LLAMA, layers=1)
    return write_gguf(tmp_path_factory.mktemp("whole") / "m.gguf", model, "llama", changes)


def used_bytes(path: Path) -> tuple[int, int]:
    """Where the first tensor begins and the last ends; padding may follow."""
    tensors = GGUFReader(path).tensors
    return min(it.data_offset for it in tensors), max(it.data_offset + it.n_bytes for it in tensors)


@settings(deadline=None)  # the machine may be busy
@given(data=st.data())
def test_truncated(whole_file: Path, data: st.DataObject) -> None:
    content = whole_file.read_bytes()
    begin, end = used_bytes(whole_file)
    size = data.draw(st.integers(0, begin) | st.integers(begin, end - 1))
    path = whole_file.with_name("truncated.gguf")
    path.write_bytes(content[:size])
    with pytest.raises(CheckpointError, match="not a complete GGUF file"):
        open_checkpoint(path, {})


@settings(deadline=None)  # the machine may be busy
@given(data=st.data())
def test_damaged_metadata(whole_file: Path, data: st.DataObject) -> None:
    """One clear error or, where the damage still makes sense, a checkpoint; and neither takes long."""
    content = bytearray(whole_file.read_bytes())
    at = data.draw(st.integers(0, used_bytes(whole_file)[0] - 9))
    damage = data.draw(st.binary(min_size=1, max_size=8))
    content[at : at + len(damage)] = damage
    path = whole_file.with_name("damaged.gguf")
    path.write_bytes(content)
    try:
        checkpoint_source(open_checkpoint(path, {}))
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ")


def test_damaged_length(whole_file: Path) -> None:
    """An array that claims 2^60 elements: the library alone would count them."""
    content = bytearray(whole_file.read_bytes())
    at = content.index(b"tokenizer.ggml.scores") + len(b"tokenizer.ggml.scores") + 8
    assert content[at : at + 8] == struct.pack("<Q", 3)
    content[at : at + 8] = struct.pack("<Q", 1 << 60)
    path = whole_file.with_name("length.gguf")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a complete GGUF file"):
        open_checkpoint(path, {})


def test_arrays_within_arrays(tmp_path: Path) -> None:
    depth, array, uint32 = 10_000, 9, 4
    levels = struct.pack("<IQ", array, 1) * depth + struct.pack("<IQ", uint32, 0)
    path = tmp_path / "deep.gguf"
    path.write_bytes(struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"a", array) + levels)
    with pytest.raises(CheckpointError, match=r"deep.gguf: its metadata has arrays within arrays without end"):
        open_checkpoint(path, {})
