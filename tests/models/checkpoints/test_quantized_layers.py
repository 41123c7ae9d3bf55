"""Layers that others have quantised, against what was packed, code by code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from meki.models.blocks import Blocks
from meki.models.checkpoints import CheckpointError
from meki.models.checkpoints.quantized_files import QuantizedFiles, quantized_files
from meki.models.checkpoints.safetensors_files import SafetensorsFiles

from .quantized_folders import LAYOUTS, Codes, Tensors, quantise


def opened(path: Path, tensors: Tensors, config: dict[str, Any]) -> QuantizedFiles:
    file = path / "model.safetensors"
    save_file({f"x.{field}": tensor for field, tensor in tensors.items()}, file)
    return quantized_files(path / "config.json", config, SafetensorsFiles([file]))


def read(path: Path, its: Codes, layout: str, **config: Any) -> tuple[np.ndarray, Blocks | None]:
    pack, quantization = LAYOUTS[layout]
    files = opened(path, pack(its), {**quantization, **config})
    assert files.shapes == {"x.weight": its.codes.shape}
    return files.read("x.weight").numpy(), files.blocks("x.weight")


def made(seed: int, outputs: int, inputs: int, bits: int, groups: np.ndarray, symmetric: bool, dtype: Any) -> Codes:
    """Any codes and zeros."""
    generator, count = np.random.default_rng(seed), int(groups.max()) + 1
    codes = generator.integers(0, 2**bits, (outputs, inputs))
    zeros = generator.integers(0, 2**bits, (outputs, count))
    scales = torch.from_numpy(generator.uniform(-0.02, 0.02, (outputs, count))).to(dtype)
    return Codes(bits, codes, np.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros, scales, groups)


def bits_of(layout: str) -> st.SearchStrategy[int]:
    return st.just(4) if "awq" in layout else st.sampled_from((4, 8))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_values_and_blocks(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    bits, symmetric = data.draw(bits_of(layout)), data.draw(st.booleans())
    group = data.draw(st.sampled_from((32, 64, 128, -1)))
    inputs = data.draw(st.integers(1, 2)) * (96 if group == -1 else group)
    outputs = 8 * data.draw(st.integers(1, 4))
    groups = np.arange(inputs) // (inputs if group == -1 else group)
    if data.draw(st.booleans()) and layout in ("gptq", "gptq_v2", "compressed-tensors"):
        groups = groups[np.random.default_rng(data.draw(st.integers(0, 9))).permutation(inputs)]
    dtype = data.draw(st.sampled_from((torch.float16, torch.bfloat16)))
    its = made(data.draw(st.integers(0, 99)), outputs, inputs, bits, groups, symmetric, dtype)
    values, blocks = read(tmp_path_factory.mktemp("x"), its, layout, group_size=group)
    np.testing.assert_array_equal(values, its.values())
    assert blocks is not None
    assert blocks.type == f"int{bits}" + ("" if symmetric else "_minimum")
    assert (blocks.order is None) == (np.diff(groups) >= 0).all()
    if symmetric:
        # float16 holds the scales: of bfloat16 those from 2^-17 on.
        tiny = (its.scales.float().abs() < 2**-17).numpy()[:, groups]
        np.testing.assert_array_equal(blocks.values()[~tiny], values[~tiny])
    # Scales below 2^-14 are rounded to a multiple of 2^-24, and so are minimums; larger ones by 2^-11 of themselves.
    offset = np.abs(its.scales.float().numpy() * (its.zeros - (128 if bits == 8 else 0)))[:, groups]
    bound = 2**-25 * (2 * 2**bits + 1) + (0 if symmetric else 2**-11 * offset)
    assert (np.abs(blocks.values() - values) <= bound).all()


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("rows", [slice(0), slice(3, 21), slice(8, 16), slice(20, None), slice(0, 99)])
def test_some_rows(tmp_path: Path, layout: str, rows: slice) -> None:
    its = made(3, 24, 64, 4, np.arange(64) // 32, False, torch.float16)
    files = opened(tmp_path, LAYOUTS[layout][0](its), LAYOUTS[layout][1])
    np.testing.assert_array_equal(files.read("x.weight", rows).numpy(), its.values()[rows])
    whole, some = files.blocks("x.weight"), files.blocks("x.weight", rows)
    assert whole is not None and some is not None and some.type == "int4_minimum"
    np.testing.assert_array_equal(some.codes, its.codes[rows])
    np.testing.assert_array_equal(some.values(), whole.values()[rows])


def test_the_two_versions_of_gptq(tmp_path: Path) -> None:
    """A zero of 0 borrows from its neighbour in the first one."""
    its = made(5, 8, 32, 4, np.zeros(32, np.int64), False, torch.float16)
    its.zeros[:, 0] = [1, 0, 0, 15, 8, 0, 2, 0]
    first, second = LAYOUTS["gptq"][0](its)["qzeros"], LAYOUTS["gptq_v2"][0](its)["qzeros"]
    assert int(second) == 0x0208F001 and int(first) % 2**32 == 0x0208F001 - 0x11111111 + 2**32
    for layout in ("gptq", "gptq_v2"):
        (tmp_path / layout).mkdir()
        np.testing.assert_array_equal(read(tmp_path / layout, its, layout)[0], its.values())


def test_rounded_minimums_are_far_below_the_steps(tmp_path: Path) -> None:
    """Of weights like a layer's, 4 bits and groups of 128."""
    weight = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32) / 32
    its = quantise(weight, 4, 128, symmetric=False)
    values, blocks = read(tmp_path, its, "awq", group_size=128)
    assert blocks is not None
    errors = (blocks.values() - values, values - weight)
    rounding, steps = (np.linalg.norm(error) / np.linalg.norm(weight) for error in errors)
    assert rounding < 5e-4 and steps > 0.05


@pytest.mark.parametrize(
    ("layout", "group", "inputs"),
    [("gptq", 64, 96), ("auto_round", 64, 160), ("auto_round:auto_gptq", 128, 160)],
)
def test_a_last_group_may_be_shorter(tmp_path: Path, layout: str, group: int, inputs: int) -> None:
    its = made(2, 8, inputs, 4, np.arange(inputs) // group, False, torch.float16)
    values, blocks = read(tmp_path, its, layout, group_size=group)
    np.testing.assert_array_equal(values, its.values())
    assert blocks is not None and blocks.order is None


@pytest.mark.parametrize(
    "groups",
    [np.arange(64) // 16, np.arange(48) // 24, np.random.default_rng(1).integers(0, 2, 64)],
    ids=["16", "24", "uneven"],
)
def test_groups_that_no_block_has(tmp_path: Path, groups: np.ndarray) -> None:
    """Such layers are floats."""
    its = made(2, 8, len(groups), 4, groups, True, torch.float16)
    values, blocks = read(tmp_path, its, "gptq", group_size=16)
    np.testing.assert_array_equal(values, its.values())
    assert blocks is None


def test_layers_of_several_kinds(tmp_path: Path) -> None:
    """Bits and groups are those of the shapes, whatever the configuration says of most layers."""
    its = {
        "a": made(1, 8, 64, 4, np.arange(64) // 32, True, torch.float16),
        "b": made(2, 8, 64, 8, np.zeros(64, np.int64), True, torch.float16),
    }
    pack, config = LAYOUTS["auto_round:auto_gptq"]
    tensors = {f"{name}.{field}": tensor for name, one in its.items() for field, tensor in pack(one).items()}
    save_file(tensors | {"c.weight": torch.ones(2, 3)}, tmp_path / "m.safetensors")
    files = quantized_files(tmp_path, {**config, "bits": 4}, SafetensorsFiles([tmp_path / "m.safetensors"]))
    assert files.shapes == {"a.weight": (8, 64), "b.weight": (8, 64), "c.weight": (2, 3)}
    for name, one in its.items():
        np.testing.assert_array_equal(files.read(f"{name}.weight").numpy(), one.values())
    assert files.read("c.weight").sum() == 6 and files.blocks("c.weight") is None
    blocks = [files.blocks(f"{name}.weight") for name in its]
    assert [one and one.type for one in blocks] == ["int4", "int8"]


def test_a_layer_in_two_files(tmp_path: Path) -> None:
    its = made(4, 8, 64, 4, np.arange(64) // 32, False, torch.float16)
    pack, config = LAYOUTS["gptq"]
    tensors = {f"x.{field}": tensor for field, tensor in pack(its).items()}
    save_file({"x.qweight": tensors.pop("x.qweight")}, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors")
    both = SafetensorsFiles([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    files = quantized_files(tmp_path, config, both)
    np.testing.assert_array_equal(files.read("x.weight").numpy(), its.values())


def test_a_float32_scale_is_rounded(tmp_path: Path) -> None:
    its = made(2, 8, 64, 8, np.arange(64) // 32, True, torch.float32)
    values, blocks = read(tmp_path, its, "compressed-tensors")
    np.testing.assert_array_equal(values, its.values())
    assert blocks is not None
    assert (np.abs(blocks.values() - values) <= 2**-11 * np.abs(values) + 128 * 2**-25).all()


@pytest.mark.parametrize("scale", [7e4, np.inf, np.nan])
def test_scales_beyond_float16(tmp_path: Path, scale: float) -> None:
    its = made(2, 8, 64, 4, np.arange(64) // 32, True, torch.bfloat16)
    its.scales[3, 1] = scale
    files = opened(tmp_path, LAYOUTS["gptq"][0](its), LAYOUTS["gptq"][1])
    with pytest.raises(CheckpointError, match=r"layer x: a scale.* beyond 65504 or no number.*--weights int8"):
        files.blocks("x.weight")


def changed(layout: str, bits: int = 4, **changes: Any) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a good layer of 16 outputs, 64 inputs and 2 groups with some replaced, None: missing."""
    pack, config = LAYOUTS[layout]
    its = made(2, 16, 64, bits, np.arange(64) // 32, False, torch.float16)
    tensors = {name: tensor for name, tensor in {**pack(its), **changes}.items() if tensor is not None}
    return tensors, config


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (changed("gptq", qzeros=None), "it has no qzeros, expected qweight, scales, qzeros; download"),
        (changed("awq", scales=None), "it has no scales"),
        (changed("compressed-tensors", weight_shape=None), "it has no weight_shape"),
        (changed("gptq", qzeros=ints(2, 1)), "qzeros beside qweight has 2 bits a weight; supported are 4 and 8"),
        (changed("gptq", qweight=ints(6, 32), scales=torch.zeros(2, 32), qzeros=ints(2, 3)), "has 3 bits a weight"),
        (changed("awq", qweight=ints(64, 4), qzeros=ints(2, 4)), "qweight has 8 bits a weight; supported are 4 of AWQ"),
        (changed("compressed-tensors", weight_packed=ints(16, 6)), "weight_packed has 3 bits a weight"),
        (changed("gptq", scales=torch.zeros(2, 15)), r"scales has shape \[2, 15\], expected \[2, 16\] beside"),
        (changed("gptq", qzeros=ints(3, 2)), r"qzeros has shape \[3, 2\], expected \[2, 2\] beside"),
        (changed("gptq", qweight=ints(8)), r"qweight has shape \[8\], expected two dimensions"),
        (changed("gptq", qweight=ints(0, 16)), r"qweight has shape \[0, 16\], expected two dimensions"),
        (changed("gptq", g_idx=ints(63)), r"g_idx has shape \[63\], expected \[64\]"),
        (changed("awq", qzeros=ints(2, 3)), r"qzeros has shape \[2, 3\], expected \[2, 2\]"),
        (
            changed("compressed-tensors", weight_shape=torch.tensor([17, 64])),
            r"is \[17, 64\], .*\[16, 8\]",
        ),
        (changed("compressed-tensors", weight_shape=torch.tensor([16, 0])), r"weight_shape is \[16, 0\]"),
        (
            changed("compressed-tensors", weight_shape=torch.tensor([16])),
            r"weight_shape has shape \[1\], exp",
        ),
        (changed("compressed-tensors", weight_scale=torch.zeros(1, 2)), r"weight_scale has shape \[1, 2\]"),
        (changed("compressed-tensors", weight_scale=torch.zeros(1)), r"weight_scale has shape \[1\], expected two"),
        (changed("compressed-tensors", weight_zero_point=ints(16, 2)), r"weight_zero_point has .*expected \[2, 2\]"),
        (
            changed("gptq", qweight=torch.zeros(8, 16)),
            "qweight is stored as F32, expected I32; it is of an",
        ),
        (
            changed("gptq", scales=torch.zeros(2, 16, dtype=torch.float64)),
            "scales is stored as F64, expected F16",
        ),
        (changed("gptq", g_idx=torch.zeros(64)), "g_idx is stored as F32, expected I32 or I64"),
        (changed("awq", qzeros=torch.zeros(2, 2)), "qzeros is stored as F32"),
        (changed("compressed-tensors", weight_shape=torch.zeros(2)), "weight_shape is stored as F32"),
        (changed("compressed-tensors", weight_zero_point=torch.zeros(2, 2)), "weight_zero_point is stored as F32"),
    ],
)
def test_layers_that_are_refused(tmp_path: Path, layer: tuple[Tensors, dict[str, Any]], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"model.safetensors: quantised layer x: .*{message}"):
        opened(tmp_path, *layer)


@pytest.mark.parametrize(("group", "shown"), [(2, "from 0 to 2"), (-1, "from -1 to 1")])
def test_groups_that_are_not_there(tmp_path: Path, group: int, shown: str) -> None:
    tensors, config = changed("gptq")
    tensors["g_idx"][5] = group
    files = opened(tmp_path, tensors, config)
    for use in (files.read, files.blocks):
        with pytest.raises(CheckpointError, match=f"layer x: g_idx has groups {shown}, expected 0 to 1; the file is"):
            use("x.weight")


def test_groups_of_another_length(tmp_path: Path) -> None:
    files = opened(tmp_path, *changed("awq", scales=torch.zeros(5, 16, dtype=torch.float16), qzeros=ints(5, 2)))
    with pytest.raises(CheckpointError, match=r"scales is of 5 groups, .* 64 inputs .*runs of 32 \(group_size"):
        files.blocks("x.weight")


@pytest.mark.parametrize(
    ("layout", "changes", "needed"),
    [
        ("gptq", {"desc_act": True}, "g_idx"),
        ("compressed-tensors", {"symmetric": False}, "weight_zero_point"),
        ("compressed-tensors", {"actorder": "group", "symmetric": True}, "weight_g_idx"),
    ],
)
def test_tensors_that_the_configuration_speaks_of(
    tmp_path: Path, layout: str, changes: dict[str, Any], needed: str
) -> None:
    """Without them the weights would be others."""
    tensors, config = changed(layout, **{needed: None})
    config = (
        {**config, **changes} if layout == "gptq" else {**config, "config_groups": {"a": {"num_bits": 4, **changes}}}
    )
    with pytest.raises(CheckpointError, match=f"layer x: it has no {needed}, expected .*, {needed}; download"):
        opened(tmp_path, tensors, config)


@pytest.mark.parametrize(
    ("stored", "layout", "shown"), [("gptq_v2", "gptq", 9), ("gptq", "gptq_v2", 7), ("gptq", "auto_round", 7)]
)
def test_zeros_of_the_other_version(tmp_path: Path, stored: str, layout: str, shown: int) -> None:
    """Files of which config.json says the wrong one are known."""
    its = made(2, 8, 64, 4, np.arange(64) // 32, True, torch.float16)
    files = opened(tmp_path, LAYOUTS[stored][0](its), {**LAYOUTS[layout][1], "sym": True})
    for use in (files.read, files.blocks):
        with pytest.raises(CheckpointError, match=f"qzeros are all {shown}, expected 8 of symmetric .* packing_format"):
            use("x.weight")


FINE = {"quant_method": "gptq"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("gptq", "is 'gptq', expected an object"),
        ({}, "quant_method is None; supported are gptq, awq, auto-round, .* compressed-tensors .*; take the original"),
        ({"quant_method": "fp8"}, "quant_method is 'fp8'; supported are gptq"),
        ({"quant_method": ["gptq"]}, r"quant_method is \['gptq'\]"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes'"),
        ({**FINE, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; supported is 'gptq' or 'gptq_v2'"),
        ({**FINE, "is_marlin_format": True}, "checkpoint_format is 'marlin'"),
        ({**FINE, "format": "gptq_p"}, "checkpoint_format is 'gptq_p'"),
        ({**FINE, "rotation": "hadamard"}, "rotation is 'hadamard'; supported is None"),
        ({**FINE, "group_size": 0}, "group_size is 0, expected a number of inputs or -1"),
        ({**FINE, "group_size": [32]}, r"group_size is \[32\]"),
        ({"quant_method": "awq", "version": "gemv"}, "version is 'gemv'; supported is 'gemm'"),
        ({"quant_method": "awq", "version": "GEMM", "backend": "llm-awq"}, "version is 'llm-awq'"),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"},
            "packing_format is 'auto_round:llm_compressor'; supported is 'auto_round:auto_gptq' or ",
        ),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "format is 'float-quantized'; supported"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "transform_config": {"a": 1}}, "transform"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_configurations_that_are_refused(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: quantization_config.*{message}"):
        opened(tmp_path, changed("gptq")[0], config)
