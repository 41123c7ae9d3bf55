"""The exported graphs against the PyTorch reference: in onnx's reference evaluator, and in the engine."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from meki import Engine
from meki.models.architectures.llama import Decoder
from meki.models.config import ConfigError
from meki.models.package import check_exportable
from meki.models.quantize import quantize_weight

IDS = np.random.default_rng(3).integers(0, 300, 40)

# Three layers of float32 sums of up to 96 products in another order, then a sum of 64 products that gives logits of
# about 3: 2e-5 was seen, a forgotten norm or a wrong position gives more than 0.1.
TOLERANCE = 1e-4

EXPERTS = {"ffn_kind": "moe", "experts": 5, "experts_per_token": 2, "ffn": 32}
ALL_EXPERTS = {**EXPERTS, "experts_per_token": 5}  # rounding cannot send a token elsewhere
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
    {"qkv_bias": True},
    {"nope_layers": (0, 2)},
    EXPERTS,
    {**EXPERTS, "memory_dim": 0, "norm_topk_prob": False, "hidden": 50, "ffn": 31, "layers": 2},
    {"tied_embeddings": False, "rope_factors": (1.0, 1.0, 1.5, 2.0, 2.5, 4.0, 8.0, 8.0)},
    {"memory_experts": "static"},
    {"memory_position": "parallel_attention"},
    {"memory_position": "after_attention", "memory_experts": "dynamic", "memory_projector": "linear"},
    {"memory_position": "after_ffn", "memory_fusion": "multiply_sigmoid"},
    {"memory_position": "parallel_attention", "memory_fusion": "add_silu"},
    {"memory_position": "after_attention", "memory_fusion": "multiply_silu", "layers": 1},
    {"memory_dim": 0, "ple_dim": 32},
    {"memory_dim": 0, "ple_dim": 24, "ple_vocab_size": 100},
    {"memory_dim": 0, "engram_dim": 64, "engram_layers": (0, 2), "engram_heads": 2, "engram_rows": 50},
    {"memory_dim": 0, "engram_dim": 42, "engram_layers": (1,), "engram_heads": 7, "engram_rows": 9, "engram_kernel": 0},
]


@torch.no_grad()
def reference(model: Decoder, rows: np.ndarray | None) -> np.ndarray:
    """Logits of IDS, float32 [40, vocab_size], with the stored rows in place of the exact ones."""
    model = copy.deepcopy(model)
    memory = model.config.memory
    if rows is not None and memory and memory.kind == "engram":
        for layer, table in zip(memory.at, memory.cut(model.config, rows), strict=True):
            model.layers[layer].engram.embedding.weight.copy_(torch.from_numpy(table))
    elif rows is not None:
        for layer, table in zip(model.layers, torch.from_numpy(rows), strict=True):
            memory = layer.get_submodule(model.config.memory.kind)
            name = {"meki": "experts", "ple": "rows"}[model.config.memory.kind]
            setattr(memory, name, lambda ids, *_, table=table: table[ids.where(ids < len(table), 0)])
    return model(torch.from_numpy(IDS)[None])[0].numpy()


NOT_QUANTIZED = (
    r"meki.embeddings|word_emb_projection|ple.embed_tokens|engram.embedding|mlp\.gate\."  # folded; the router
)


INT8_WITH_INT4 = re.compile(r"(embed_tokens|lm_head|.*\.v_proj|layers\.(0|2)\..*\.down_proj)\.weight")
"""Matrices that are felt most, of three layers; `--weights int4` has them in int8."""


def with_quantized_weights(model: Decoder, weights: str) -> Decoder:
    """What a package has in blocks, every dense matrix that is left after folding, replaced by what it stands for."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not re.search(NOT_QUANTIZED, name):
                type = "int8" if INT8_WITH_INT4.fullmatch(name) else weights
                parameter.copy_(torch.from_numpy(quantize_weight(parameter.numpy(), type, name).values()))
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
    ids = torch.arange(len(words))
    with torch.no_grad():
        exact = torch.stack([layer.meki.experts(ids, words) for layer in model.layers]).numpy()
    error = np.linalg.norm(session.rows - exact) / np.linalg.norm(exact)
    # 11 bits: at most 2^-11 / sqrt(3) of a value. Steps of 1/127 or 1/7 of the largest of 32, which is some 2.4 RMS,
    # leave step / sqrt(12): 0.55% and 9.9%.
    assert error < {"float32": 1e-7, "float16": 3e-4, "int8": 7e-3, "int4": 0.11}[rows]
    assert error == pytest.approx(session.manifest["quantization_error"]["rows"], rel=1e-3, abs=1e-7)
    np.testing.assert_allclose(session.step(IDS), reference(model, session.rows), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"memory_dim": 0, "qk_norm": False},
        {"qkv_bias": True, "tied_embeddings": False},
        {"memory_position": "parallel_attention"},
        {"memory_position": "after_ffn", "memory_fusion": "multiply_silu"},
        {"memory_dim": 0, "ple_dim": 32, "ple_vocab_size": 100},
        {"memory_dim": 0, "engram_dim": 64, "engram_layers": (0, 2), "engram_heads": 2, "engram_rows": 50},
        ALL_EXPERTS,
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized(
    make_package: Callable[..., Path],
    make_model: Callable[..., Decoder],
    reference_session: Any,
    weights: str,
    variant: dict[str, Any],
) -> None:
    package = make_package(weights=weights, **variant)
    session = reference_session(package)
    model = with_quantized_weights(make_model(**variant), weights)
    expected = reference(model, session.rows)
    # With activations in float32 the graph is the dequantised model, to float32 rounding.
    np.testing.assert_allclose(session.step(IDS), expected, rtol=0, atol=TOLERANCE)
    # In the engine each product rounds its activations to 255 levels of the largest of 32: 0.5% of their RMS. Some 20
    # products that follow one another or add up make at most sqrt(20) times that, 2.4%, if no error is amplified.
    error = np.linalg.norm(Engine(package, kv_type="float32").logits(IDS) - expected) / np.linalg.norm(expected)
    assert error < 0.03


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_float32_in_the_engine(
    make_package: Callable[..., Path],
    make_model: Callable[..., Decoder],
    reference_session: Any,
    variant: dict[str, Any],
) -> None:
    package = make_package(**variant)
    expected = reference(make_model(**variant), reference_session(package).rows)
    np.testing.assert_allclose(Engine(package, kv_type="float32").logits(IDS), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("weights", ["float32", "int4"])
def test_dense_graph(
    make_package: Callable[..., Path], make_model: Callable[..., Decoder], reference_session: Any, weights: str
) -> None:
    """The backbone without its memory is the model with nothing injected."""
    model = make_model() if weights == "float32" else with_quantized_weights(make_model(), "int4")
    for layer in model.layers:
        layer.meki.inject = lambda rows, h: torch.zeros_like(h)
    session = reference_session(make_package(weights=weights), stages="dense_stages")
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS)[None])[0].numpy()
    np.testing.assert_allclose(session.step(IDS), expected, rtol=0, atol=TOLERANCE)


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
        # The head alone sees another height of its input: rounding only.
        np.testing.assert_allclose(logits, expected[index], rtol=0, atol=TOLERANCE)


def test_rewriting_the_cache(make_package: Callable[..., Path], reference_session: Any) -> None:
    """A session goes back by its length alone: what lies behind it in the cache is overwritten, not seen."""
    session = reference_session(make_package())
    expected = session.step(IDS)
    del session.ids[10:]
    np.testing.assert_allclose(session.step(IDS[10:]), expected[10:], rtol=0, atol=TOLERANCE)


def names(values: Any) -> dict[str, tuple[int, list[int | str]]]:
    return {v.name: (v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
            for v in values}  # fmt: skip


def load(package: Path, name: str) -> onnx.GraphProto:
    return onnx.load(package / f"{name}.onnx", load_external_data=False).graph


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_interface(make_package: Callable[..., Path], weights: str) -> None:
    """Names, types and shapes as docs/package-format.md has them."""
    package = make_package(weights=weights)
    first, second, dense = (load(package, name) for name in ("stage0", "stage1", "dense"))
    float32, uint8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    ids = {"token_ids": (onnx.TensorProto.INT64, [1, "T"])}
    length = {"total_sequence_length": (onnx.TensorProto.INT32, [])}
    index = {"logit_index": (onnx.TensorProto.INT64, ["K"])}
    logits = {"logits": (float32, ["K", 300])}

    def caches(kind: str, *layers: int) -> dict[str, tuple[int, list[int | str]]]:
        return {f"{kind}.{layer}": (uint8, ["blocks", 2, "block_bytes"]) for layer in layers}

    between = {name: value for name, value in names(first.output).items() if not name.startswith("present.")}
    assert len(between) == 2 and all(value == (float32, [1, "T", 64]) for value in between.values())
    assert names(first.input) == ids | length | caches("past", 0)
    assert names(first.output) == between | caches("present", 0)
    rows = {"rows": (float32, [3, "T", 32])}
    assert names(second.input) == between | length | rows | index | caches("past", 1, 2)
    assert names(second.output) == logits | caches("present", 1, 2)
    assert names(dense.input) == ids | length | index | caches("past", 0, 1, 2)
    assert names(dense.output) == logits | caches("present", 0, 1, 2)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("weights", ["float32", "int4"])
def test_operators(make_package: Callable[..., Path], weights: str, qk_norm: bool) -> None:
    """The runtime's operators as docs/package-format.md has them; everything else is standard ONNX."""
    package = make_package(weights=weights, qk_norm=qk_norm)
    for name, layers, memory in (("stage0", 1, 0), ("stage1", 2, 3), ("dense", 3, 0)):
        path = package / f"{name}.onnx"
        onnx.checker.check_model(str(path), full_check=False)
        assert {o.domain: o.version for o in onnx.load(path, load_external_data=False).opset_import} == {
            "": 23,
            "meki": 1,
        }
        graph = load(package, name)
        assert {node.domain for node in graph.node} <= {"", "meki"}
        parts = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith(".parts")}
        tensors = {t.name: (t.data_type, list(t.dims)) for t in graph.initializer}
        nodes = {kind: [n for n in graph.node if n.op_type == kind and n.domain == "meki"]
                 for kind in ("Attention", "Linear", "Embedding", "Injection")}  # fmt: skip
        assert sum(map(len, nodes.values())) == sum(node.domain == "meki" for node in graph.node)
        assert len(nodes["Attention"]) == layers
        for node in nodes["Attention"]:
            assert attributes(node) == {"heads": 4, "kv_heads": 2, "epsilon": pytest.approx(1e-6)}
            assert len(node.input) == (7 if qk_norm else 5) and len(node.output) == 2
            assert node.input[1].replace("past", "present") == node.output[1]
            assert node.input[2] == "total_sequence_length"
            assert [tensors[table] for table in node.input[3:5]] == [(onnx.TensorProto.FLOAT, [128, 8])] * 2
            assert [tensors[norm] for norm in node.input[5:]] == [(onnx.TensorProto.FLOAT, [16])] * (2 * qk_norm)
        head, embeddings = name != "stage0", name != "stage1"
        if weights == "float32":
            assert not nodes["Linear"] and not nodes["Embedding"] and not nodes["Injection"]
            continue
        assert len(nodes["Embedding"]) == embeddings
        # qkv, o, gate and up, down; the head. With a norm before, a residual behind, or SwiGLU before.
        assert len(nodes["Linear"]) == 4 * layers + head
        assert sum(attributes(node)["swiglu"] for node in nodes["Linear"]) == layers
        norms = [node.input[3] for node in nodes["Linear"] if len(node.input) > 3 and node.input[3]]
        assert len(norms) == 2 * layers + head and {tensors[norm][1][0] for norm in norms} == {64}
        assert sum(len(node.input) == 5 for node in nodes["Linear"]) == 2 * layers
        packed = []
        for node in nodes["Linear"] + nodes["Embedding"]:
            if node.op_type == "Linear":
                assert attributes(node).keys() == {"swiglu", "epsilon"}
                its = parts[node.input[2]].tolist()
            else:
                assert attributes(node).keys() == {"type", "outputs"}
                its = [[attributes(node)["type"], attributes(node)["outputs"]]]
            packed.append((node.input[1], its))
        assert len(nodes["Injection"]) == memory
        for node in nodes["Injection"]:
            assert attributes(node).keys() == {"gate_proj_type", "out_proj_type", "epsilon", "layer"}
            assert node.input[4] == "rows" and [tensors[node.input[i]][1] for i in (2, 6)] == [[64], [64]]
            gate, out = attributes(node)["gate_proj_type"], attributes(node)["out_proj_type"]
            packed += [(node.input[3], [[gate, 32]]), (node.input[5], [[out, 64]])]
        assert [attributes(node)["layer"] for node in nodes["Injection"]] == list(range(memory))
        sizes = []
        for name_of_weight, its in packed:
            data_type, (size,) = tensors[name_of_weight]
            panels = sum(-(-outputs // 16) * {1: 544, 2: 288}[code] for code, outputs in its)
            assert data_type == onnx.TensorProto.UINT8 and size % panels == 0
            sizes.append((its, 32 * (size // panels)))
        # q and k are of one type, v is of another; the first and the last layer's down projection are of 8 bits.
        ends = {"stage0": 1, "stage1": 1, "dense": 2}[name]
        matrices = [([[2, 96], [1, 32]], 64), ([[2, 64]], 64), ([[2, 192]], 64)] * layers
        matrices += [([[1, 64]], 96)] * ends + [([[2, 64]], 96)] * (layers - ends)
        matrices += [([[2, 32]], 64), ([[2, 64]], 32)] * memory + [([[1, 300]], 64)] * (head + embeddings)
        assert sorted(sizes) == sorted(matrices)


def test_one_layer_asks_for_no_length_in_its_second_stage(make_package: Callable[..., Path]) -> None:
    inputs = set(names(load(make_package(layers=1), "stage1").input))
    assert {"rows", "logit_index"} < inputs
    assert not {"total_sequence_length", "token_ids"} & inputs


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_weights_file(make_package: Callable[..., Path], weights: str) -> None:
    """Large and packed tensors are outside, page-aligned, and together are the file; every tensor is there once, and
    the graph without memory has the same."""
    package = make_package(weights=weights)
    places: dict[str, dict[str, tuple[int, int]]] = {}
    for path in package.glob("*.onnx"):
        places[path.stem] = {}
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if not entries:
                assert len(tensor.raw_data) < 4096 and tensor.data_type != onnx.TensorProto.UINT8
                continue
            assert entries["location"] == "weights.bin"
            places[path.stem][tensor.name] = int(entries["offset"]), int(entries["length"])
    staged = places["stage0"] | places["stage1"]
    backbone = {name: place for name, place in staged.items() if "meki" not in name}
    assert places["dense"] == backbone
    for name in places["stage0"].keys() & places["stage1"].keys():
        assert places["stage0"][name] == places["stage1"][name]
    assert any(name.startswith("embed_tokens") for name in places["stage0"].keys() & places["stage1"].keys())
    end = 0
    for offset, length in sorted(staged.values()):
        assert offset == -(-end // 4096) * 4096
        end = offset + length
    assert end == (package / "weights.bin").stat().st_size


@pytest.mark.parametrize(("weights", "bits", "most"), [("float32", 32, 32), ("int8", 8.5, 8.5), ("int4", 4.5, 8.5)])
@pytest.mark.parametrize("overrides", [{}, {"memory_dim": 0}, {"tied_embeddings": False}], ids=str)
def test_decode_bytes(
    make_package: Callable[..., Path], weights: str, bits: float, most: float, overrides: dict[str, Any]
) -> None:
    """Every matrix and norm once, a block of 32 with its float16 scale, the vocabulary padded to whole panels.

    With a head of its own the embedding is a table of which one row is read.
    """
    manifest = json.loads((make_package(weights=weights, **overrides) / "manifest.json").read_text())
    memory_dim = overrides.get("memory_dim", 32)
    vocab_size = 300 if weights == "float32" else 304
    sensitive = vocab_size * 64 + 3 * 32 * 64 + 2 * 64 * 96
    matrices = 3 * (96 * 64 + 64 * 64 + 192 * 64) + 64 * 96
    norms = 3 * (64 + 64 + 2 * 16) + 64
    dense = (sensitive * most + matrices * bits) // 8 + norms * 4
    with_memory = dense + 3 * (2 * memory_dim * 64 * bits // 8 + 64 * 4)
    expected = [with_memory, dense] if memory_dim else [dense, None]
    assert [manifest["weights"][key] for key in ("decode_bytes", "dense_decode_bytes")] == expected


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_a_token_goes_through_some_of_the_experts(make_package: Callable[..., Path], weights: str) -> None:
    """Two experts of 32 are an FFN of 64, which has no router."""

    def figures(**overrides: Any) -> tuple[int, int, int]:
        manifest = json.loads((make_package(weights=weights, **overrides) / "manifest.json").read_text())
        parameters = manifest["parameters"]
        return parameters["ram"], parameters.get("active", parameters["ram"]), manifest["weights"]["decode_bytes"]

    ram, active, read = figures(**EXPERTS)
    dense = figures(ffn=64)
    router, idle = 3 * 5 * 64, 3 * 3 * 3 * 32 * 64
    assert (ram - idle, active, read) == (dense[0] + router, dense[0] + router, dense[2] + 4 * router)


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
    config = make_model().config
    with pytest.raises(ConfigError, match="got 'int2', expected one of float32, int8, int4"):
        check_exportable(config, "int2")


def test_quantization_error_is_the_weights(
    make_package: Callable[..., Path], make_model: Callable[..., Decoder]
) -> None:
    manifest = json.loads((make_package(weights="int4") / "manifest.json").read_text())
    exact, quantized = make_model(), with_quantized_weights(make_model(), "int4")
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
