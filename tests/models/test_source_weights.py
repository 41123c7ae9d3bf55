"""Packages that keep a GGUF file's own matrices, against PyTorch on what the file's types stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize
from numpy.typing import NDArray
from torch import nn

from benchmarks.quality.input_rounding import rounded
from meki import Engine
from meki.models.architectures.llama import Decoder
from meki.models.checkpoints import open_checkpoint
from meki.models.checkpoints.checkpoint import CheckpointBlocks, checkpoint_model
from meki.models.convert import main as convert
from meki.models.package import export_package
from meki.models.qnn.stages import precisions
from meki.models.qnn.weights import PackageWeights
from meki.models.quantize import quantize_weight
from meki.models.tokenizer import TokenizerSpec

from .checkpoints.gguf_models import LLAMA, metadata_of, tensors_of

WIDE: dict[str, Any] = {**LLAMA, "hidden": 256, "ffn": 256, "heads": 4, "kv_heads": 4, "head_dim": 64, "layers": 3}
TYPES = {
    "attn_q": (Type.Q4_0, Type.Q6_K, Type.Q4_0),
    "attn_k": (Type.Q4_1, Type.Q3_K, Type.Q4_0),
    "attn_v": (Type.Q5_0, Type.IQ4_NL, Type.BF16),  # of floats: the three stay float32, because they are one product
    "attn_output": (Type.Q5_1, Type.F16, Type.Q8_0),
    "ffn_gate": (Type.Q4_K, Type.Q4_K, Type.Q5_K),
    "ffn_up": (Type.Q4_K, Type.Q5_K, Type.Q6_K),
    "ffn_down": (Type.Q6_K, Type.Q4_1, Type.IQ4_XS),
}
SCALES = {
    Type.Q2_K: (1e-3, 80, 82),
    Type.Q3_K: (1e-3, 108),
    Type.Q4_K: (2e-4, 0, 2),
    Type.Q5_K: (1e-4, 0, 2),
    Type.Q6_K: (4e-5, 208),
    Type.IQ4_NL: (1e-3, 0),
    Type.IQ4_XS: (4e-5, 0),
}
"""Of a type that the gguf package does not write: a magnitude for the float16 of a block, and where they are."""
IDS = np.array([5, 17, 250, 3, 3, 99, 140, 8, 21, 60, 77, 1], np.int64)


def stored(values: NDArray[np.float32], type: Type, seed: int) -> NDArray[Any]:
    """Values as a file holds them; of a type that the library does not write any bits of about their magnitude."""
    if type not in SCALES:
        return quantize(values, type)
    generator, (inputs, size) = np.random.default_rng(seed), GGML_QUANT_SIZES[type]
    blocks = generator.integers(0, 256, (values.size // inputs, size), np.uint8)
    magnitude, *places = SCALES[type]
    for at in map(int, places):
        scale = generator.uniform(0.5, 1, len(blocks)) * magnitude
        blocks[:, at : at + 2] = scale.astype("<f2").view(np.uint8).reshape(-1, 2)
    return blocks.reshape(len(values), -1)


def write_model(path: Path, model: Decoder, type_of: Callable[[str], Type]) -> Path:
    """type_of: of a tensor, by its name in the file."""
    writer = GGUFWriter(path, "llama")
    for key, value in metadata_of(model, "llama").items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for seed, (name, values) in enumerate(tensors_of(model, "llama").items()):
        type = type_of(name)
        writer.add_tensor(name, stored(values, type, seed), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf(make_model: Callable[..., Decoder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    def type_of(name: str) -> Type:
        _, layer, part, *_ = [*name.split("."), "", ""]
        return TYPES[part][int(layer)] if part in TYPES else Type.Q6_K if name == "token_embd.weight" else Type.F32

    return write_model(tmp_path_factory.mktemp("gguf") / "m.gguf", make_model(**WIDE), type_of)


@pytest.fixture(scope="module")
def package(gguf: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "source"
    assert convert([str(gguf), "-o", str(path), "--tokenizer", str(tokenizer_file)]) == 0
    return path


@pytest.fixture(scope="module")
def dequantised(gguf: Path) -> Decoder:
    model = checkpoint_model(open_checkpoint(gguf, {}))
    assert isinstance(model, Decoder)
    return model


def logits(model: nn.Module, ids: NDArray[np.int64] = IDS) -> NDArray[np.float32]:
    with torch.no_grad():
        values: NDArray[np.float32] = model(torch.from_numpy(ids)[None])[0].numpy()
    return values


def test_the_graph_is_the_files_model(package: Path, dequantised: Decoder, reference_session: Any) -> None:
    """Read element by element, with inputs of matrices in float32."""
    expected = logits(dequantised)
    got = reference_session(package).step(IDS)
    # Scales and minimums that are products are rounded to float16, by up to 2^-11 of one.
    assert np.sqrt(np.mean(np.square(got - expected))) < 2**-11 * expected.std()


def test_the_engine_rounds_inputs_and_nothing_else(package: Path, gguf: Path) -> None:
    checkpoint = open_checkpoint(gguf, {})
    dequantised, blocks = checkpoint_model(checkpoint), CheckpointBlocks(checkpoint)
    for name, parameter in dequantised.named_parameters():  # with scales that are float16
        if (its := blocks.read(name)) is not None:
            parameter.data = torch.from_numpy(its.values())
    engine = Engine(package, kv_type="float32", threads=1)
    got = np.stack([engine.logits([token])[0] for token in IDS.tolist()])
    exact = np.stack([logits(dequantised, IDS[[at]])[0] for at in range(len(IDS))])
    floats = {"layers.1.self_attn.o_proj", *(f"layers.2.self_attn.{name}_proj" for name in "qkv")}
    dequantised.norm.register_forward_hook(lambda *its: rounded(its[2]))  # the tied head's input
    for name, module in dequantised.named_modules():
        if isinstance(module, nn.Linear) and name not in floats:
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    expected = np.stack([logits(dequantised, IDS[[at]])[0] for at in range(len(IDS))])
    rounding = np.sqrt(np.mean(np.square(expected - exact)))
    assert 1e-3 < rounding / exact.std() < 0.05
    # Float32 on both sides: of most tokens no input lies so near the middle of two codes that it falls to the other
    # side, which would be a difference as large as the rounding's.
    assert np.median(np.sqrt(np.mean(np.square(got - expected), axis=1))) < 1e-3 * rounding


def test_an_npu_gets_the_same_values(package: Path, gguf: Path) -> None:
    """In float16, of a product whose matrices have two types."""
    weights = PackageWeights(package, json.loads((package / "manifest.json").read_text()))
    blocks = CheckpointBlocks(open_checkpoint(gguf, {}))
    names = [f"layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    matrices = [its for name in names if (its := blocks.read(name)) is not None]
    assert weights.parts("layers.1.self_attn.qkv") == [("int8_16", 512), ("int8", 256)]  # Q6_K and Q3_K, IQ4_NL
    expected = np.concatenate([its.values() for its in matrices]).astype(np.float16)
    np.testing.assert_array_equal(weights.float16("layers.1.self_attn.qkv", 768), expected)
    assert weights.inputs("layers.1.self_attn.qkv") == 256
    assert precisions(weights) == ["float16"]


def test_the_manifest_counts_types(package: Path, gguf: Path) -> None:
    manifest = json.loads((package / "manifest.json").read_text())
    weights, matrix = manifest["weights"], 256 * 256
    assert weights["type"] == "source" and weights["block"] == 32
    assert weights["types"] == {
        "int4": matrix,  # Q4_0
        "int4_minimum": 5 * matrix,  # Q4_1 and Q4_K
        "int8": 4 * matrix,  # Q5_0, Q8_0, IQ4_NL, IQ4_XS
        "int8_minimum": 3 * matrix,  # Q5_1, Q5_K
        "int8_16": 4 * matrix + 300 * 256,  # Q3_K, Q6_K
        "float32": 4 * matrix,
    }
    assert manifest["quantization_error"]["weights"]["worst"] < 2**-11


@pytest.mark.parametrize(("weights", "default"), [(None, "source"), ("int8", "int8"), ("float32", "float32")])
def test_what_is_asked_for(gguf: Path, tokenizer_file: Path, tmp_path: Path, weights: str | None, default: str) -> None:
    asked = [] if weights is None else ["--weights", weights]
    assert convert([str(gguf), "-o", str(tmp_path / "p"), "--tokenizer", str(tokenizer_file), *asked]) == 0
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert manifest["weights"]["type"] == default
    if weights == "int8":
        assert manifest["weights"]["types"].keys() == {"int8"}


def test_types_that_no_block_type_holds_become_int8(
    make_model: Callable[..., Decoder], tokenizer_file: Path, tmp_path: Path
) -> None:
    """By default, too, of a file that has no others: rounded from the values that they stand for."""
    model = make_model(**{**WIDE, "layers": 1})
    path = write_model(tmp_path / "m.gguf", model, lambda name: Type.F32 if "norm" in name else Type.Q2_K)
    assert convert([str(path), "-o", str(tmp_path / "p"), "--tokenizer", str(tokenizer_file)]) == 0
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert manifest["weights"]["type"] == "source"
    assert manifest["weights"]["types"] == {"int8": 7 * 256 * 256 + 300 * 256}
    # Q2_K has 4 values in 16 inputs: what is rounded to 1/127 of a block's largest is off by less than a percent.
    assert 1e-4 < manifest["quantization_error"]["weights"]["worst"] < 0.01
    exact, weights = checkpoint_model(open_checkpoint(path, {})), PackageWeights(tmp_path / "p", manifest)
    for name, parts in {"embed_tokens": ("",), "layers.0.self_attn.qkv": ("q_proj", "k_proj", "v_proj")}.items():
        stem = name.removesuffix("qkv")
        matrices = [exact.get_parameter(f"{stem}{part}.weight").detach().numpy() for part in parts]
        expected = [quantize_weight(matrix, "int8", name).values() for matrix in matrices]
        got = [its.values() for its in weights.blocks(name)]
        np.testing.assert_array_equal(np.concatenate(got), np.concatenate(expected))


def test_a_checkpoint_of_floats_has_no_source_type(
    make_model: Callable[..., Decoder], tokenizer_spec: TokenizerSpec, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="'source' keeps the quantised matrices of a checkpoint"):
        export_package(make_model(), tokenizer_spec, tmp_path / "p", name="p", weights="source", provenance={})
    assert not (tmp_path / "p").exists()
