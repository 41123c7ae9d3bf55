"""Blocks of GGUF files of every type against the gguf package's own reading of the same bytes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from meki.models.architectures.llama import Decoder
from meki.models.blocks import BLOCK_TYPES, Blocks
from meki.models.checkpoints import CheckpointError, gguf_file, open_checkpoint
from meki.models.checkpoints.checkpoint import CheckpointBlocks, checkpoint_source
from meki.models.checkpoints.gguf_blocks import empty_blocks, unpack
from meki.models.checkpoints.gguf_file import GgufFile

from .gguf_models import LLAMA, QWEN3, SMOLLM3, write_gguf

Raw = NDArray[np.uint8]
MakeModel = Callable[..., Decoder]

EXACT = {
    Type.Q4_0: "int4",
    Type.Q4_1: "int4_minimum",
    Type.Q5_0: "int8",
    Type.Q5_1: "int8_minimum",
    Type.Q8_0: "int8",
    Type.IQ4_NL: "int8",
    Type.MXFP4: "int8",
    Type.TQ1_0: "int4",
    Type.TQ2_0: "int4",
}
"""Types that store scales and minimums as they are, and what holds them."""
PRODUCTS = {
    Type.Q3_K: "int8_16",
    Type.Q4_K: "int4_minimum",
    Type.Q5_K: "int8_minimum",
    Type.Q6_K: "int8_16",
    Type.IQ4_XS: "int8",
}
"""Types that store them as products of a float16 and an integer."""
KINDS = EXACT | PRODUCTS
FLOATS = {
    Type.Q4_1: (0, 2),
    Type.Q5_1: (0, 2),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q3_K: (108,),
    Type.Q6_K: (208,),
    Type.TQ1_0: (52,),
    Type.TQ2_0: (64,),
    Type.MXFP4: (),
}
"""Where a block has its float16: at 0 unless it is said here."""


def random_rows(type: Type, rows: int, width: int, seed: int, largest: float = 100.0) -> Raw:
    """Any bits, but the float16 of a block, of either sign, of up to `largest` and as small as they come."""
    generator = np.random.default_rng(seed)
    inputs, size = GGML_QUANT_SIZES[type]
    blocks = generator.integers(0, 256, (rows * width // inputs, size), np.uint8)
    for at in FLOATS.get(type, (0,)):
        magnitudes = largest * 2.0 ** generator.uniform(-30, 0, len(blocks))
        floats = (magnitudes * generator.choice([-1, 1], len(blocks))).astype("<f2")
        blocks[:, at : at + 2] = floats.view(np.uint8).reshape(-1, 2)
    if type == Type.MXFP4:
        blocks[:, 0] = generator.integers(104, 144, len(blocks))
    return blocks.reshape(rows, -1)


def allowed(blocks: Blocks) -> NDArray[np.float64]:
    """What rounding a scale, times the code, and a minimum to float16 moves a value by: half a unit in the last of 11
    bits, no less than 2^-25. Then two roundings of a float32 sum on either side."""

    def half_unit(values: NDArray[np.float32]) -> NDArray[np.float64]:
        halves = np.repeat(values, blocks.codes.shape[1] // values.shape[1], axis=1).astype(np.float16)
        return np.spacing(np.abs(halves)).astype(np.float64) / 2

    error = half_unit(blocks.scales) * np.abs(blocks.codes.astype(float)) + 2.0**-22 * np.abs(blocks.values())
    return error if blocks.minimums is None else error + half_unit(blocks.minimums)


def unpacked(raw: Raw, type: Type) -> Blocks:
    blocks = unpack(raw, type)
    assert blocks is not None
    return blocks


def assert_well_formed(blocks: Blocks, kind: str, shape: tuple[int, int]) -> None:
    form = BLOCK_TYPES[kind]
    assert (blocks.type, blocks.codes.shape, blocks.codes.dtype) == (kind, shape, np.int8)
    assert blocks.codes.min() >= form.range[0] and blocks.codes.max() <= form.range[1]
    factors = [blocks.scales] if blocks.minimums is None else [blocks.scales, blocks.minimums]
    assert len(factors) == 1 + form.minimum
    for values in factors:
        assert (values.shape, values.dtype) == ((shape[0], shape[1] // form.group), np.float32)
        np.testing.assert_array_equal(values, values.astype(np.float16))


@pytest.mark.parametrize("type", KINDS, ids=lambda type: type.name)
@settings(deadline=None, max_examples=20)  # the machine may be busy
@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_any_bits(type: Type, rows: int, blocks: int, seed: int) -> None:
    width = 256 * blocks
    raw = random_rows(type, rows, width, seed)
    got = unpacked(raw, type)
    assert_well_formed(got, KINDS[type], (rows, width))
    expected = dequantize(raw, type)
    if type in EXACT:
        np.testing.assert_array_equal(got.values(), expected)
    else:
        assert (np.abs(got.values() - expected.astype(float)) <= allowed(got)).all()


@pytest.mark.parametrize("type", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.TQ1_0, Type.TQ2_0])
def test_what_the_library_quantises(type: Type) -> None:
    raw = quantize(np.random.default_rng(3).standard_normal((7, 512), np.float32), type)
    np.testing.assert_array_equal(unpacked(raw, type).values(), dequantize(raw, type))


def test_scales_keep_their_sign() -> None:
    """A scale of Q4_0 is negative where the value of the largest magnitude is positive: that one has the code -8."""
    values = np.array([[*range(-15, 17)], [*range(15, -17, -1)]], np.float32)
    blocks = unpacked(quantize(values, Type.Q4_0), Type.Q4_0)
    assert blocks.scales.tolist() == [[-2.0], [2.0]]
    assert blocks.codes[0, 31] == blocks.codes[1, 31] == -8


@pytest.mark.parametrize("type", sorted(set(Type) - set(KINDS)), ids=lambda type: type.name)
def test_other_types_have_no_blocks(type: Type) -> None:
    assert empty_blocks(type, 2, 256) is None
    assert unpack(np.zeros((2, GGML_QUANT_SIZES[type][1]), np.uint8), type) is None


@pytest.mark.parametrize("exponent", [103, 144, 0, 255])
def test_powers_of_two_that_float16_does_not_hold(exponent: int) -> None:
    raw = random_rows(Type.MXFP4, 3, 64, seed=1)
    assert unpack(raw, Type.MXFP4) is not None
    raw[1, 17] = exponent
    assert unpack(raw, Type.MXFP4) is None


@pytest.mark.parametrize("type", KINDS.keys() - {Type.MXFP4}, ids=lambda type: type.name)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_no_number(type: Type, value: float) -> None:
    raw = random_rows(type, 2, 256, seed=2)
    at = FLOATS.get(type, (0,))[-1]
    raw[1, at : at + 2] = np.array([value], "<f2").view(np.uint8)
    with pytest.raises(ValueError, match="a scale or minimum is beyond 65504 or no number"):
        unpack(raw, type)


def write_rows(path: Path, tensors: Mapping[str, tuple[Raw, Type]]) -> GgufFile:
    writer = GGUFWriter(path, "llama")
    for name, (raw, type) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


def test_a_product_beyond_float16(tmp_path: Path) -> None:
    raw = random_rows(Type.Q6_K, 2, 256, seed=4)
    raw[1, 192:208], raw[1, 208:] = 66, np.array([1000], "<f2").view(np.uint8)
    file = write_rows(tmp_path / "m.gguf", {"a": (raw, Type.Q6_K)})
    with pytest.raises(CheckpointError, match=r"m.gguf: tensor a, stored as Q6_K: a scale .*; choose another quantis"):
        file.blocks("a")
    assert file.blocks("a", slice(1)) is not None
    raw[1, 192:208] = 64
    assert (unpacked(raw, Type.Q6_K).scales[1] == 64_000).all()


@pytest.mark.parametrize("type", KINDS, ids=lambda type: type.name)
def test_rows_of_a_file(tmp_path: Path, type: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "_AT_ONCE", 5 * 512)  # several pieces, of which the last is shorter
    raw = random_rows(type, 12, 512, seed=5)
    file = write_rows(tmp_path / "m.gguf", {"before": (raw[:1], type), "a": (raw, type)})
    for rows in (slice(None), slice(3, 11), slice(0, 1), slice(11, 12), slice(4, 4)):
        got, expected = file.blocks("a", rows), unpacked(raw[rows], type)
        assert got is not None
        for name, values in vars(expected).items():
            np.testing.assert_array_equal(getattr(got, name), values)


def test_tensors_without_blocks(tmp_path: Path) -> None:
    floats, mxfp4 = np.ones((2, 64), np.float32), random_rows(Type.MXFP4, 12, 64, seed=6)
    mxfp4[11, 0] = 255
    tensors = {
        "F32": (floats, Type.F32),
        "F16": (floats.astype(np.float16), Type.F16),
        "BF16": (quantize(floats, Type.BF16), Type.BF16),
        "Q2_K": (np.zeros((2, 84), np.uint8), Type.Q2_K),
        "vector": (quantize(floats[0], Type.Q8_0), Type.Q8_0),
        "mxfp4": (mxfp4, Type.MXFP4),
    }
    file = write_rows(tmp_path / "m.gguf", tensors)
    assert [file.blocks(name) for name in tensors] == [None] * len(tensors)
    assert [name for name in tensors if file.is_rounded(name)] == ["Q2_K"]  # to int8, as MXFP4 is by its type
    assert file.blocks("mxfp4", slice(11)) is not None


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows cost what they take, a tensor what it takes and a piece."""
    monkeypatch.setattr(gguf_file, "_AT_ONCE", 1 << 14)
    file = write_rows(tmp_path / "m.gguf", {"a": (random_rows(Type.Q4_1, 20_000, 64, seed=7), Type.Q4_1)})

    def peak(rows: slice) -> int:
        tracemalloc.start()
        file.blocks("a", rows)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return memory

    # Of 64 values a row takes 64 bytes of codes, two scales and two minimums; a piece of 2^14 a few times 16 KB.
    peak(slice(1))
    assert peak(slice(7000, 7010)) < 50_000
    assert peak(slice(None)) < 20_000 * 80 + 200_000


QUANTISED = {
    "token_embd": Type.Q8_0,
    "attn_q": Type.Q4_1,
    "attn_k": Type.Q4_0,
    "attn_v": Type.Q5_1,
    "attn_output": Type.Q5_0,
    "ffn_down": Type.Q8_0,
}


@pytest.mark.parametrize(
    ("architecture", "overrides"), [("llama", {**LLAMA, "qkv_bias": True}), ("smollm3", SMOLLM3), ("qwen3", QWEN3)]
)
def test_weights_of_a_checkpoint(
    make_model: MakeModel, tmp_path: Path, architecture: str, overrides: dict[str, Any]
) -> None:
    """In the decoder's order of rows, of its shape: what is dequantised has passed the same way as floats."""
    model = make_model(**overrides)
    layers = {
        f"blk.{layer}.{name}.weight": type for layer in range(model.config.layers) for name, type in QUANTISED.items()
    }
    path = write_gguf(tmp_path / "m.gguf", model, architecture, types=layers | {"token_embd.weight": Type.Q8_0})
    checkpoint = open_checkpoint(path, {"vocab_size": model.config.vocab_size - 7})
    source = checkpoint_source(checkpoint)
    held = set()
    for name, part in checkpoint.parts.items():
        blocks = CheckpointBlocks(checkpoint).read(name)
        stored = QUANTISED.get(part.name.removesuffix(".weight").rpartition(".")[2])
        assert (blocks is None) == (stored is None or name.endswith(".bias"))
        if blocks is not None:
            held.add(blocks.type)
            np.testing.assert_array_equal(blocks.values(), source.weights(name), err_msg=name)
            assert source.blocks is not None and source.blocks.type(name) == blocks.type
            given = source.blocks.read(name)
            assert given is not None
            np.testing.assert_array_equal(given.codes, blocks.codes)
    assert held == {"int4", "int4_minimum", "int8", "int8_minimum"}


def test_other_checkpoints_have_no_blocks(make_model: MakeModel, tmp_path: Path) -> None:
    from meki.models.checkpoints.huggingface import save_pretrained
    from meki.models.source import model_source

    model = make_model(**LLAMA)
    save_pretrained(tmp_path / "m", model, provenance={})
    assert checkpoint_source(open_checkpoint(tmp_path / "m", {})).blocks is None
    assert model_source(model).blocks is None
