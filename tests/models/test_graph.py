"""The exported stages in plain ONNX Runtime against the PyTorch reference."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from meki.models.config import ConfigError, ModelConfig
from meki.models.decoder import Decoder
from meki.models.graph import check_exportable
from meki.models.quantize import dequantize_weight, quantize_weight

IDS = np.random.default_rng(3).integers(0, 300, 40)

# Three layers of float32 sums of up to 96 products in another order, then a sum of 64 products that gives logits of
# about 3: 2e-5 was seen, a forgotten gain or a wrong position gives more than 0.1.
TOLERANCE = 1e-4

VARIANTS: list[dict[str, Any]] = [
    {},
    {"qk_norm": False},
    {"projector_norm": True},
    {"memory_dim": 0},
    {"memory_dim": 0, "qk_norm": False},
    {"layers": 1},
    {"layers": 1, "memory_dim": 0},
    {"kv_heads": 4},
    {"kv_heads": 1, "heads": 3, "head_dim": 32},
    {"memory_dim": 13, "hidden": 50, "ffn": 71, "vocab_size": 333},
]


@torch.no_grad()
def reference(model: Decoder, rows: np.ndarray | None) -> np.ndarray:
    """Logits of IDS, float32 [40, vocab_size], with the stored rows in place of the exact ones."""
    model = copy.deepcopy(model)
    if rows is not None:
        for layer, table in zip(model.layers, torch.from_numpy(rows), strict=True):
            layer.meki.experts = lambda ids, words, table=table: table[ids]
    return model(torch.from_numpy(IDS)[None])[0].numpy()


def with_quantized_weights(model: Decoder, bits: int) -> Decoder:
    """What a package has in blocks, every dense matrix that is left after folding, replaced by what it stands for."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "meki.embeddings" not in name and "word_emb_projection" not in name:
                parameter.copy_(
                    torch.from_numpy(dequantize_weight(*quantize_weight(parameter.numpy(), bits, name), bits))
                )
    return model


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_float32(
    make_package: Callable[..., Path],
    make_model: Callable[..., Decoder],
    reference_session: Any,
    variant: dict[str, Any],
) -> None:
    session = reference_session(make_package(**variant))
    expected = reference(make_model(**variant), session.rows)
    np.testing.assert_allclose(session.step(IDS), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rows", ["float32", "float16", "int8", "int4"])
def test_row_types(
    make_package: Callable[..., Path], make_model: Callable[..., Decoder], reference_session: Any, rows: str
) -> None:
    """The rows that the ROM holds are those of the model, in the order in which the graph takes them."""
    session = reference_session(make_package(rows=rows))
    model = make_model()
    words = model.embed_tokens.weight.detach()
    exact = torch.stack([layer.meki.fold(words) for layer in model.layers]).numpy()
    error = np.linalg.norm(session.rows - exact) / np.linalg.norm(exact)
    # 11 bits: at most 2^-11 / sqrt(3) of a value. Steps of 1/127 or 1/7 of the largest of 32, which is some 2.4 RMS,
    # leave step / sqrt(12): 0.55% and 9.9%.
    assert error < {"float32": 1e-7, "float16": 3e-4, "int8": 7e-3, "int4": 0.11}[rows]
    assert error == pytest.approx(session.manifest["quantization_error"]["rows"], rel=1e-3, abs=1e-7)
    np.testing.assert_allclose(session.step(IDS), reference(model, session.rows), rtol=0, atol=TOLERANCE)


def set_accuracy_level(package: Path, copy_to: Path, level: int) -> Path:
    """A copy of a package whose MatMulNBits have another accuracy level: 1 keeps activations in float32."""
    shutil.copytree(package, copy_to)
    for path in copy_to.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        levels = [a for node in model.graph.node for a in node.attribute if a.name == "accuracy_level"]
        assert levels
        for attribute in levels:
            attribute.i = level
        onnx.save(model, path)
    return copy_to


@pytest.mark.parametrize("variant", [{}, {"memory_dim": 0, "qk_norm": False}], ids=str)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized(
    make_package: Callable[..., Path],
    make_model: Callable[..., Decoder],
    reference_session: Any,
    tmp_path: Path,
    weights: str,
    variant: dict[str, Any],
) -> None:
    package = make_package(weights=weights, **variant)
    session = reference_session(package)
    model = with_quantized_weights(make_model(**variant), {"int8": 8, "int4": 4}[weights])
    expected = reference(model, session.rows)
    # With activations in float32 the graph is the dequantised model, to float32 rounding.
    exact_activations = reference_session(set_accuracy_level(package, tmp_path / "level1", 1))
    np.testing.assert_allclose(exact_activations.step(IDS), expected, rtol=0, atol=TOLERANCE)
    # As exported, each product rounds its activations to 255 levels of the largest of 32: 0.5% of their RMS. Some 20
    # products that follow one another or add up make at most sqrt(20) times that, 2.4%, if no error is amplified.
    error = np.linalg.norm(session.step(IDS) - expected) / np.linalg.norm(expected)
    assert error < 0.03


@pytest.mark.parametrize("variant", [{}, {"memory_dim": 0}, {"qk_norm": False}], ids=str)
def test_chunks_are_one_shot(
    make_package: Callable[..., Path], reference_session: Any, variant: dict[str, Any]
) -> None:
    package = make_package(**variant)
    expected = reference_session(package).step(IDS)
    for sizes in ([1] * 40, [7, 1, 1, 20, 11], [39, 1]):
        session = reference_session(package)
        chunks = [session.step(chunk) for chunk in np.split(IDS, np.cumsum(sizes)[:-1])]
        np.testing.assert_allclose(np.concatenate(chunks), expected, rtol=0, atol=TOLERANCE)


def test_cache_capacity_does_not_matter(make_package: Callable[..., Path], reference_session: Any) -> None:
    expected = reference_session(make_package()).step(IDS)
    for capacity in (40, 1000):  # just enough; beyond the rotary tables
        np.testing.assert_allclose(reference_session(make_package(), capacity).step(IDS), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_logits_where_asked(make_package: Callable[..., Path], reference_session: Any, weights: str) -> None:
    package = make_package(weights=weights)
    expected = reference_session(package).step(IDS)
    for index in ([39], [], [5, 0, 38, 5]):
        logits = reference_session(package).step(IDS, index)
        assert logits.shape == (len(index), 300)
        # The head alone sees another height of its input, and each row is computed by itself: rounding only. With int8
        # the rounding of the activations is the same too.
        np.testing.assert_allclose(logits, expected[index], rtol=0, atol=TOLERANCE)


def test_rewriting_the_cache(make_package: Callable[..., Path], reference_session: Any) -> None:
    """A session goes back by its length alone: what lies behind it in the cache is overwritten, not seen."""
    session = reference_session(make_package())
    expected = session.step(IDS)
    session.length = 10
    np.testing.assert_allclose(session.step(IDS[10:]), expected[10:], rtol=0, atol=TOLERANCE)


def names(values: Any) -> dict[str, tuple[int, list[int | str]]]:
    return {v.name: (v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
            for v in values}  # fmt: skip


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_interface(make_package: Callable[..., Path], weights: str) -> None:
    """Names, types and shapes as docs/package-format.md has them."""
    package = make_package(weights=weights)
    stages = [onnx.load(package / f"stage{i}.onnx", load_external_data=False).graph for i in (0, 1)]
    float32, int32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.INT64
    lengths = {"seqlens_k": (int32, [1]), "total_sequence_length": (int32, [])}
    cache = (float32, [1, 2, "S", 16])
    first_in, first_out = names(stages[0].input), names(stages[0].output)
    between = {name: value for name, value in first_out.items() if not name.startswith("present.")}
    assert len(between) == 2 and all(value == (float32, [1, "T", 64]) for value in between.values())
    assert first_in == {"token_ids": (int64, [1, "T"]), **lengths, "past.0.key": cache, "past.0.value": cache}
    assert first_out == {**between, "present.0.key": cache, "present.0.value": cache}
    parts = [f"{layer}.{part}" for layer in (1, 2) for part in ("key", "value")]
    assert names(stages[1].input) == {
        **between,
        **lengths,
        "rows": (float32, [3, "T", 32]),
        "logit_index": (int64, ["K"]),
        **{f"past.{part}": cache for part in parts},
    }
    assert names(stages[1].output) == {"logits": (float32, ["K", 300]), **{f"present.{part}": cache for part in parts}}


def test_one_layer_asks_for_no_lengths_in_its_second_stage(make_package: Callable[..., Path]) -> None:
    graph = onnx.load(make_package(layers=1) / "stage1.onnx", load_external_data=False).graph
    assert {"rows", "logit_index"} < set(names(graph.input))
    assert not {"seqlens_k", "total_sequence_length", "token_ids"} & set(names(graph.input))


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_weights_file(make_package: Callable[..., Path], weights: str) -> None:
    """Large tensors are outside, page-aligned, and together are the file; the embedding is there once."""
    package = make_package(weights=weights)
    ranges: dict[int, int] = {}
    users = 0
    for path in package.glob("*.onnx"):
        onnx.checker.check_model(str(path))
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if not entries:
                assert len(tensor.raw_data) < 4096
                continue
            assert entries["location"] == "weights.bin"
            offset, length = int(entries["offset"]), int(entries["length"])
            assert offset % 4096 == 0 and length >= 4096
            assert ranges.setdefault(offset, length) == length
            users += tensor.name.startswith("embed_tokens") and offset == 0
    assert users == 2  # embedding and head
    end = 0
    for offset, length in sorted(ranges.items()):
        assert offset == -(-end // 4096) * 4096
        end = offset + length
    assert end == (package / "weights.bin").stat().st_size


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ({"hidden": 80}, "hidden"),
        ({"ffn": 100}, "ffn"),
        ({"head_dim": 16, "heads": 3, "kv_heads": 1}, "heads"),
        ({"memory_dim": 40}, "memory_dim"),
    ],
)
def test_shapes_that_blocks_do_not_divide(
    make_model: Callable[..., Decoder], override: dict[str, int], field: str
) -> None:
    config = make_model(**override).config
    check_exportable(config, "float32")
    for weights in ("int8", "int4"):
        with pytest.raises(ConfigError, match=rf"^{field}.*multiple of 32; use float32 weights"):
            check_exportable(config, weights)


def test_heads_that_cannot_be_rotated(make_model: Callable[..., Decoder]) -> None:
    with pytest.raises(ConfigError, match=r"head_dim is 24: .* multiple of 16"):
        check_exportable(make_model(head_dim=24).config, "float32")


def test_unknown_weight_type(make_model: Callable[..., Decoder]) -> None:
    config: ModelConfig = make_model().config
    with pytest.raises(ConfigError, match="got 'int2', expected one of float32, int8, int4"):
        check_exportable(config, "int2")


def test_quantization_error_is_the_weights(
    make_package: Callable[..., Path], make_model: Callable[..., Decoder]
) -> None:
    manifest = json.loads((make_package(weights="int4") / "manifest.json").read_text())
    exact, quantized = make_model(), with_quantized_weights(make_model(), 4)
    errors, sums = {}, {}
    for (name, w), (_, q) in zip(exact.named_parameters(), quantized.named_parameters(), strict=True):
        if not torch.equal(w, q):
            errors[name], sums[name] = (w - q).double().square().sum().item(), w.double().square().sum().item()
    assert len(errors) == 1 + 3 * 9  # embedding; q, k, v, o, gate, up, down, and the memory's gate and out
    reported = manifest["quantization_error"]["weights"]
    relative = {name: (errors[name] / sums[name]) ** 0.5 for name in errors}
    worst = max(relative, key=lambda name: relative[name])
    assert reported["worst_tensor"] == worst
    assert reported["worst"] == pytest.approx(relative[worst], rel=1e-6)
    assert reported["overall"] == pytest.approx((sum(errors.values()) / sum(sums.values())) ** 0.5, rel=1e-6)
