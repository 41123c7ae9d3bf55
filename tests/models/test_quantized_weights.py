"""Packages that keep matrices as GPTQ and others have quantised them, against PyTorch on what these stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.quality.input_rounding import rounded
from meki import Engine
from meki.models.architectures.llama import Decoder
from meki.models.checkpoints import CheckpointError, open_checkpoint
from meki.models.checkpoints.checkpoint import CheckpointBlocks, checkpoint_model, checkpoint_source
from meki.models.convert import main as convert
from meki.models.qnn.stages import precisions
from meki.models.qnn.weights import PackageWeights
from meki.models.quantize import quantize_weight

from .checkpoints.quantized_folders import LAYOUTS, Codes, quantise, write_folder

MakeModel = Callable[..., Decoder]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

SHAPE: dict[str, Any] = {
    **{"memory_dim": 0, "qk_norm": False, "tied_embeddings": False},
    **{"hidden": 128, "ffn": 192, "heads": 4, "kv_heads": 2, "head_dim": 32, "layers": 2},
}
IDS = np.array([5, 17, 250, 3, 3, 99, 140, 8, 21, 60, 77, 1], np.int64)


def act_order(inputs: int, group: int, seed: int) -> Ints:
    """The group of each input, where groups are runs of inputs in another order."""
    groups = np.zeros(inputs, np.int64)
    groups[np.random.default_rng(seed).permutation(inputs)] = np.arange(inputs) // group
    return groups


def in_act_order(name: str, weight: Floats) -> Codes | None:
    """Some of the layers; what is multiplied with the same input has the same order. The head stays as it is."""
    if name == "lm_head.weight" or name == "layers.1.self_attn.o_proj.weight":
        return None
    _, layer, _, projection, _ = name.split(".")
    seed = int(layer) + (10 if projection == "o_proj" else 20 if projection == "down_proj" else 0)
    symmetric = projection not in ("k_proj", "down_proj")
    if name.startswith("layers.0.mlp"):
        return quantise(weight, 8 if projection == "up_proj" else 4, 64, symmetric)
    return quantise(weight, 4, 32, symmetric, groups=act_order(weight.shape[1], 32, seed))


def plain(symmetric: bool, bits: int = 4, group: int = 32) -> Callable[[str, Floats], Codes | None]:
    return lambda name, weight: None if name == "lm_head.weight" else quantise(weight, bits, group, symmetric)


@pytest.fixture(scope="module")
def folder(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of several types, some in act-order."""
    path = tmp_path_factory.mktemp("folder") / "m"
    write_folder(path, make_model(**SHAPE), "gptq", in_act_order, {"desc_act": True})
    return path


@pytest.fixture(scope="module")
def package(folder: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "source"
    assert convert([str(folder), "-o", str(path), "--tokenizer", str(tokenizer_file)]) == 0
    return path


def manifest_of(package: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((package / "manifest.json").read_text())
    return manifest


def logits(model: nn.Module, ids: NDArray[np.int64] = IDS) -> Floats:
    with torch.no_grad():
        values: Floats = model(torch.from_numpy(ids)[None])[0].numpy()
    return values


FLOATS_OF_FOLDERS = ("embed_tokens.weight", "lm_head.weight", "layers.1.self_attn.o_proj.weight")


def with_rounded_floats(model: Decoder, folder: Path) -> Decoder:
    """As a package has it: matrices that the folder has as floats, embedding and head among them, are int8."""
    blocks = CheckpointBlocks(open_checkpoint(folder, {}))
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "gate.weight" not in name and blocks.read(name) is None:  # not a router
            weight.data = torch.from_numpy(quantize_weight(weight.detach().numpy(), "int8", name).values())
    return model


@pytest.mark.parametrize(
    ("layout", "of", "config", "types"),
    [
        ("gptq", plain(True), {}, {"int4"}),
        ("gptq", plain(False, 8, 64), {"bits": 8, "group_size": 64}, {"int8_minimum"}),
        ("gptq_v2", plain(True, 4, -1), {"group_size": -1}, {"int4"}),
        ("awq", plain(False, 4, 64), {"group_size": 64}, {"int4_minimum"}),
        ("auto_round:auto_gptq", plain(True, 4, 128), {"group_size": 128}, {"int4"}),
        ("compressed-tensors", plain(True, 8, -1), {}, {"int8"}),
        (
            "compressed-tensors",
            plain(False),
            {"config_groups": {"a": {"weights": {"group_size": 32}}}},
            {"int4_minimum"},
        ),
        ("gptq", in_act_order, {"desc_act": True}, {"int4", "int4_minimum", "int8"}),
    ],
    ids=["gptq", "gptq8", "gptq_v2", "awq", "auto_round", "compressed8", "compressed4", "act_order"],
)
def test_the_graph_is_the_folders_model(
    make_model: MakeModel,
    reference_session: Any,
    tokenizer_file: Path,
    tmp_path: Path,
    layout: str,
    of: Callable[[str, Floats], Codes | None],
    config: dict[str, Any],
    types: set[str],
) -> None:
    """Read element by element, with inputs of matrices in float32."""
    model = write_folder(tmp_path / "m", make_model(**SHAPE), layout, of, config)
    assert convert([str(tmp_path / "m"), "-o", str(tmp_path / "p"), "--tokenizer", str(tokenizer_file)]) == 0
    expected, got = logits(with_rounded_floats(model, tmp_path / "m")), reference_session(tmp_path / "p").step(IDS)
    # Minimums are rounded to float16, by up to 2^-11 of one; else it is float32 on both sides.
    exact = not any(type.endswith("minimum") for type in types)
    assert np.sqrt(np.mean(np.square(got - expected))) < (2**-18 if exact else 2**-9) * expected.std()
    manifest = manifest_of(tmp_path / "p")
    assert manifest["weights"]["type"] == "source" and manifest["weights"]["types"].keys() == {*types, "int8"}
    # Only what was floats is rounded, of normal values, to 8 bits; that is some 0.6%, test_quantize says why.
    assert manifest["quantization_error"]["weights"]["worst_tensor"] in FLOATS_OF_FOLDERS
    assert 0.004 < manifest["quantization_error"]["weights"]["worst"] < 0.008
    assert manifest["provenance"]["quantization"] == LAYOUTS[layout][1]["quant_method"]


def test_the_engine_rounds_inputs_and_nothing_else(package: Path, folder: Path) -> None:
    checkpoint = open_checkpoint(folder, {})
    model, blocks = with_rounded_floats(checkpoint_model(checkpoint), folder), CheckpointBlocks(checkpoint)
    engine = Engine(package, kv_type="float32", threads=1)
    got = np.stack([engine.logits([token])[0] for token in IDS.tolist()])
    exact = np.stack([logits(model, IDS[[at]])[0] for at in range(len(IDS))])
    ordered = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        its = blocks.read(f"{name}.weight")
        order = torch.arange(module.in_features)
        if its is not None:
            module.weight.data = torch.from_numpy(its.values())  # with minimums that are float16
        if its is not None and its.order is not None:
            order = torch.from_numpy(its.order)
            ordered += 1
        module.register_forward_pre_hook(
            lambda _, inputs, order=order: (rounded(inputs[0][..., order])[..., order.argsort()],)
        )
    assert ordered == 10
    model.norm.register_forward_hook(lambda *its: rounded(its[2]))  # of the head, which is no module's call
    expected = np.stack([logits(model, IDS[[at]])[0] for at in range(len(IDS))])
    rounding = np.sqrt(np.mean(np.square(expected - exact)))
    assert 1e-3 < rounding / exact.std() < 0.05
    # Float32 on both sides: of most tokens no input lies so near the middle of two codes that it falls to the other
    # side, which would be a difference as large as the rounding's.
    assert np.median(np.sqrt(np.mean(np.square(got - expected), axis=1))) < 1e-3 * rounding


def test_an_npu_gets_the_same_values(package: Path, folder: Path) -> None:
    """In float16, inputs in their own order."""
    weights, blocks = PackageWeights(package, manifest_of(package)), CheckpointBlocks(open_checkpoint(folder, {}))
    products = {
        "layers.1.self_attn.qkv": ["q_proj", "k_proj", "v_proj"],
        "layers.1.mlp.down_proj": ["down_proj"],
        "layers.0.mlp.gate_up": ["gate_proj", "up_proj"],
    }
    for product, parts in products.items():
        names = [f"{product.rpartition('.')[0]}.{part}.weight" for part in parts]
        matrices = [its.values() for name in names if (its := blocks.read(name)) is not None]
        expected = np.concatenate(matrices).astype(np.float16)
        np.testing.assert_array_equal(weights.float16(product, len(expected)), expected)
    assert weights.parts("layers.1.self_attn.qkv") == [("int4", 128), ("int4_minimum", 64), ("int4", 64)]
    assert precisions(weights) == ["float16"]


@pytest.mark.parametrize("weights", ["int8", "float32"])
def test_what_else_is_asked_for(folder: Path, tokenizer_file: Path, tmp_path: Path, weights: str) -> None:
    arguments = ["--tokenizer", str(tokenizer_file), "--weights", weights]
    assert convert([str(folder), "-o", str(tmp_path / "p"), *arguments]) == 0
    assert manifest_of(tmp_path / "p")["weights"]["types"].keys() == {weights}
    got = Engine(tmp_path / "p", kv_type="float32", threads=1).logits(IDS.tolist())
    expected = logits(checkpoint_model(open_checkpoint(folder, {})))
    # 8 bits twice, of weights and of inputs; float32 sums in another order.
    bound = 0.05 if weights == "int8" else 1e-5
    assert np.sqrt(np.mean(np.square(got - expected))) < bound * expected.std()


def test_orders_that_differ(
    make_model: MakeModel, reference_session: Any, tokenizer_file: Path, tmp_path: Path
) -> None:
    """Matrices that are multiplied with the same input stay float32 then."""

    def of(name: str, weight: Floats) -> Codes:
        return quantise(weight, groups=act_order(weight.shape[1], 32, len(name)) if "k_proj" in name else None)

    model = write_folder(tmp_path / "m", make_model(**SHAPE), "gptq", of)
    assert convert([str(tmp_path / "m"), "-o", str(tmp_path / "p"), "--tokenizer", str(tokenizer_file)]) == 0
    expected, got = logits(with_rounded_floats(model, tmp_path / "m")), reference_session(tmp_path / "p").step(IDS)
    assert np.sqrt(np.mean(np.square(got - expected))) < 2**-18 * expected.std()
    types = manifest_of(tmp_path / "p")["weights"]["types"]
    assert types == {"int4": 2 * (128 + 3 * 192) * 128 + 300 * 128, "float32": 2 * 256 * 128, "int8": 300 * 128}


MIXTURE: dict[str, Any] = {**SHAPE, "qk_norm": True, "ffn_kind": "moe", "experts": 3, "experts_per_token": 2}


def test_a_mixture(make_model: MakeModel, reference_session: Any, tokenizer_file: Path, tmp_path: Path) -> None:
    model = write_folder(tmp_path / "m", make_model(**MIXTURE), "gptq", plain(True))
    assert convert([str(tmp_path / "m"), "-o", str(tmp_path / "p"), "--tokenizer", str(tokenizer_file)]) == 0
    expected, got = logits(with_rounded_floats(model, tmp_path / "m")), reference_session(tmp_path / "p").step(IDS)
    assert np.sqrt(np.mean(np.square(got - expected))) < 2**-18 * expected.std()


@pytest.mark.parametrize(("settings", "part"), [(MIXTURE, "experts.1.up_proj"), (SHAPE, "lm_head")])
def test_orders_that_are_refused(
    make_model: MakeModel,
    tokenizer_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    part: str,
) -> None:
    def of(name: str, weight: Floats) -> Codes:
        return quantise(weight, groups=act_order(weight.shape[1], 32, 1) if part in name else None)

    write_folder(tmp_path / "m", make_model(**settings), "gptq", of)
    arguments = [str(tmp_path / "m"), "-o", str(tmp_path / "p"), "--tokenizer", str(tokenizer_file)]
    assert convert(arguments) == 1
    error = capsys.readouterr().err
    assert "in an order of their own (act-order)" in error and "--weights int8" in error
    assert not (tmp_path / "p").exists()
    assert convert([*arguments, "--weights", "int8"]) == 0


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_biases(make_model: MakeModel, tmp_path: Path, qkv_bias: bool) -> None:
    """Some exporters give one to every layer."""
    model, layer = make_model(**{**SHAPE, "qkv_bias": qkv_bias}), "model.layers.1.self_attn"
    zeros = {f"{layer}.o_proj.bias": torch.zeros(128)}
    zeros |= {} if qkv_bias else {f"{layer}.q_proj.bias": torch.zeros(128)}
    write_folder(tmp_path / "m", model, "gptq", plain(True), extra=zeros)
    loaded = checkpoint_model(open_checkpoint(tmp_path / "m", {}))
    np.testing.assert_array_equal(logits(loaded), logits(model))
    write_folder(
        tmp_path / "other", model, "gptq", plain(True), extra={f"{layer}.o_proj.bias": torch.full((128,), 1e-3)}
    )
    with pytest.raises(CheckpointError, match=r"tensor model.layers.1.self_attn.o_proj.bias has no place in a decoder"):
        checkpoint_source(open_checkpoint(tmp_path / "other", {}))


def test_a_matrix_of_another_models(make_model: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write_folder(folder, make_model(**SHAPE), "gptq", plain(True))
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 160}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight has shape \[192, 128\], .* needs \[160, 128\]"):
        checkpoint_source(open_checkpoint(folder, {}))


def test_other_quantisations(
    make_model: MakeModel, tokenizer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "m", make_model(**SHAPE), "gptq", plain(True), {"quant_method": "fp8"})
    assert convert([str(tmp_path / "m"), "-o", str(tmp_path / "p"), "--tokenizer", str(tokenizer_file)]) == 1
    error = capsys.readouterr().err
    assert "config.json: quantization_config: quant_method is 'fp8'; supported are gptq, awq" in error
