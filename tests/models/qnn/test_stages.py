"""The static stages, as ONNX: cut where they should be, and in a naive loop equal to the PyTorch reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from meki.models.architectures.llama import Decoder
from meki.models.config import CompileError, ConfigError
from meki.models.graph.primitives import Vector
from meki.models.qnn import stages as stages_module
from meki.models.qnn.stages import Options, plan, write_stage
from meki.models.quantize import Int4Recipe, quantize_weight
from meki.models.source import model_source

from .conftest import open_weights, write_stages

CHUNK, CONTEXT = 6, 24
NGRAMS = {
    **{"memory_dim": 0, "engram_dim": 32, "engram_layers": (0, 1, 2), "engram_heads": 2, "engram_rows": 50},
    **{"engram_kernel": 0, "engram_reset": (7,)},
}


def options(precision: str = "float16", **changes: Any) -> Options:
    return Options(**{"context": CONTEXT, "chunk": CHUNK, "precision": precision, "dense": False, **changes})


def of_the_package(model: Decoder, weights: str) -> Decoder:
    """The model with the values that its quantised matrices stand for."""
    recipe, exported = Int4Recipe(model.config.layers), model.config.shapes(True)
    for name, values in model.named_parameters():
        if values.ndim == 2 and weights != "float32" and name in exported:  # the memory's tables become rows
            type = recipe.type(name) if weights == "int4" else weights
            values.data = torch.from_numpy(quantize_weight(values.detach().numpy(), type, name).values())
    return model


def folded_rows(model: Decoder, ids: list[int]) -> np.ndarray:
    """float32 [layers, T, row_dim]."""
    if model.config.memory.kind == "engram":
        memories = [model.layers[layer].engram for layer in model.config.memory.at]
        tokens = torch.tensor([ids])
        return np.stack([its.embedding(its.indices(tokens))[0].flatten(-2).detach().numpy() for its in memories])
    table = np.concatenate(list(model_source(model).row_blocks()), axis=1)
    return table[:, [token if token < table.shape[1] else 0 for token in ids]]


@pytest.mark.parametrize(
    ("precision", "weights", "overrides"),
    [
        ("float16", "float32", {}),
        ("float16", "float32", {"memory_dim": 0, "qkv_bias": True, "qk_norm": False, "tied_embeddings": False}),
        ("float16", "float32", {"layers": 1}),
        ("float16", "float32", {"nope_layers": (0, 2)}),
        ("float16", "float32", {"kv_heads": 1, "rope_factors": (1.0, 2.0, 2.0, 4.0, 4.0, 4.0, 8.0, 8.0)}),
        ("float16", "float32", {"memory_position": "parallel_attention"}),
        ("float16", "float32", {"memory_position": "after_attention", "memory_fusion": "multiply_silu"}),
        ("float16", "float32", {"memory_dim": 0, "ple_dim": 32, "ple_vocab_size": 100}),
        ("float16", "float32", NGRAMS),
        ("int8", "int8", {"memory_experts": "static", "tied_embeddings": False}),
        ("int4", "int4", {"memory_experts": "static", "qkv_bias": True, "qk_norm": False}),
        ("float16", "int4", {"memory_experts": "static"}),
    ],
)
def test_decode_and_prefill_equal_pytorch(
    precision: str,
    weights: str,
    overrides: dict[str, Any],
    make_model: Callable[..., Decoder],
    make_package: Callable[..., Path],
    naive_stages: Any,
    tmp_path: Path,
) -> None:
    model = of_the_package(make_model(**overrides), weights)
    package = make_package(weights, "float32", **overrides)
    write_stages(package, options(precision), tmp_path)
    plans = plan(open_weights(package), options(precision))
    paths = {name: [tmp_path / f"{stage.name}.onnx" for stage in stages] for name, stages in plans.items()}
    ids = [5, 17, 17, 250, 3, 99, 8, 1, 2, 120, 77, 4, 4, 260, 18, 19, 20, 7, 7, 31, 64, 0, 199, 45]
    assert len(ids) == CONTEXT
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0].numpy()
    embedded = model.embed_tokens.weight.detach().numpy()[ids]
    rows = folded_rows(model, ids) if model.config.memory else None

    naive = naive_stages(model.config, CONTEXT)
    got = []

    def prefill(start: int, kept: int) -> None:
        index = [min(start + t, start + kept - 1) for t in range(CHUNK)]
        chunk_rows = None if rows is None else rows[:, index]
        got.append(naive.step(paths["prefill"], paths["head"][0], embedded[index], chunk_rows, kept))

    # A full chunk, one with padding, some tokens one by one, and a chunk whose padding exceeds the context.
    prefill(0, CHUNK)
    prefill(CHUNK, 2)
    for t in range(CHUNK + 2, CONTEXT - 3):
        token_rows = None if rows is None else rows[:, [t]]
        got.append(naive.step(paths["decode"], paths["head"][0], embedded[[t]], token_rows, 1))
    prefill(CONTEXT - 3, 3)
    # Values are rounded to 11 bits after every operator, some 60 of them in a row here: errors of 2^-12 that add up as
    # a random walk are 8 * 2^-12 = 0.002 of the logits' own size.
    scale = np.sqrt(np.mean(np.square(expected)))
    # The largest of 3,300 logits deviates by four of these; by eight where a memory multiplies two small factors, whose
    # product a norm makes 1 again. A forgotten factor gives more than 0.1.
    assert np.abs(np.concatenate(got) - expected).max() < 0.02 * scale
    assert naive.length == len(ids)


def test_what_lies_behind_the_sequence_is_never_seen(
    make_model: Callable[..., Decoder], make_package: Callable[..., Path], naive_stages: Any, tmp_path: Path
) -> None:
    model, package = make_model(), make_package("float32", "float32")
    write_stages(package, options(), tmp_path)
    stages = sorted(tmp_path.glob("decode.*.onnx"))
    ids = [5, 6, 7, 8]
    embedded, rows = model.embed_tokens.weight.detach().numpy()[ids], folded_rows(model, ids)

    def run(garbage: float) -> np.ndarray:
        naive = naive_stages(model.config, CONTEXT)
        for cache in naive.cache.values():
            cache[:] = garbage
        steps = [naive.step(stages, tmp_path / "head.onnx", embedded[[t]], rows[:, [t]], 1) for t in range(len(ids))]
        return np.concatenate(steps)

    np.testing.assert_array_equal(run(0), run(300))


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_embedding_has_the_packages_table(weights: str, make_package: Callable[..., Path], tmp_path: Path) -> None:
    source = open_weights(make_package(weights))
    plan(source, options())["head"][0].graph(source).save_embedding(tmp_path / "embed.onnx")
    graph = onnx.load(tmp_path / "embed.onnx").graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["token_ids", "embedding"]
    table = onnx.numpy_helper.to_array(graph.initializer[0])
    if weights == "float32":
        np.testing.assert_array_equal(table, source.vector(Vector("embed_tokens.weight")).astype(np.float16))
    else:  # packed, byte for byte
        np.testing.assert_array_equal(table, source.panels("embed_tokens"))


def dequantised(node: onnx.NodeProto, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """What a MatMulNBits multiplies with, as it is specified, float32 [N, K]."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    codes, scales = tensors[node.input[1]], tensors[node.input[2]]
    rows, columns, bits = attributes["N"], attributes["K"], attributes["bits"]
    assert codes.shape == (rows, columns // 32, 4 * bits)
    values = np.zeros((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            block, place = divmod(column, 32)
            code = codes[row, block, place] if bits == 8 else codes[row, block, place // 2] >> 4 * (place % 2) & 15
            values[row, column] = (int(code) - 2 ** (bits - 1)) * np.float32(scales[row * (columns // 32) + block])
    return values


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights_keep_their_codes(weights: str, make_package: Callable[..., Path], tmp_path: Path) -> None:
    """Every product of the stages, dequantised, is the package's matrices, bit for bit, in as many bits."""
    package = make_package(weights)
    write_stages(package, options(weights), tmp_path)
    bits = {"embed_tokens": [8]}  # the head
    for layer in range(3):  # of which the first and the last are the outer ones
        own = {"self_attn.qkv": [4, 8], "mlp.down_proj": [4] if layer == 1 else [8]}
        others = ("self_attn.o_proj", "mlp.gate_up", "meki.gate_proj", "meki.out_proj")
        bits |= {f"layers.{layer}.{name}": its for name, its in {**own, **{key: [4] for key in others}}.items()}
    source, makers, tensors = open_weights(package), dict[str, onnx.NodeProto](), dict[str, np.ndarray]()
    for stage in ("decode.0", "decode.1", "head"):
        graph = onnx.load(tmp_path / f"{stage}.onnx").graph
        tensors |= {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        makers |= {node.output[0]: node for node in graph.node}
    products = []
    for name, expected in bits.items():
        nodes = [makers[f"{name}.out"]]
        if len(expected) > 1 and weights == "int4":
            assert (nodes[0].op_type, nodes[0].attribute[0].i) == ("Concat", -1)
            nodes = [makers[part] for part in nodes[0].input]
        its = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "bits"]
        assert its == (expected if weights == "int4" else [8]), name
        values = np.concatenate([dequantised(node, tensors) for node in nodes])
        np.testing.assert_array_equal(values, np.concatenate([its.values() for its in source.blocks(name)]))
        products += [node.name for node in nodes]
    assert sorted(products) == sorted(node.name for node in makers.values() if node.op_type == "MatMulNBits")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_shards_of_quantised_weights_have_their_size(
    weights: str, make_package: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(weights, layers=9, memory_dim=0)  # the first two and the last two are larger, in int4

    def written(limit: float) -> list[int]:
        """Bytes of the matrices in each stage."""
        monkeypatch.setattr(stages_module, "SHARD_BYTES", limit)
        source = open_weights(package)
        stages = plan(source, options(weights))["decode"]
        graphs = [onnx.load(write_stage(source, stage, tmp_path)).graph for stage in stages]
        packed = [
            {name for node in its.node if node.op_type == "MatMulNBits" for name in node.input[1:]} for its in graphs
        ]
        return [
            sum(len(tensor.raw_data) for tensor in graph.initializer if tensor.name in names)
            for graph, names in zip(graphs, packed, strict=True)
        ]

    layers = written(1)
    assert len(layers) == 9 and (max(layers) > min(layers)) == (weights == "int4")
    assert written(3 * max(layers)) == [sum(layers[first : first + 3]) for first in (0, 3, 6)]
    assert len(written(3 * max(layers) - 1)) == 5


def test_layer_0_stands_alone_and_rows_go_to_the_stages_that_inject_them(
    make_package: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = open_weights(make_package("float32"))  # 3 layers

    def cut(name: str) -> list[tuple[tuple[int, ...], range | None]]:
        stages = plan(weights, options(dense=True))[name]
        assert [stage.name for stage in stages] == [f"{name}.{index}" for index in range(len(stages))]
        return [(stage.layers, stage.rows) for stage in stages]

    for name in ("decode", "prefill"):
        assert cut(name) == [((0,), None), ((1, 2), range(0, 3))]
        assert cut(f"dense_{name}") == [((0, 1, 2), None)]
    config = weights.config
    layer_bytes = 2 * (config.ram_parameters - config.vocab_size * config.hidden) / config.layers
    monkeypatch.setattr(stages_module, "SHARD_BYTES", 1.5 * layer_bytes)
    assert cut("decode") == [((0,), None), ((1,), range(0, 2)), ((2,), range(2, 3))]
    assert cut("dense_decode") == [((0,), None), ((1,), None), ((2,), None)]


def test_shards_equal_the_whole(
    make_model: Callable[..., Decoder],
    make_package: Callable[..., Path],
    naive_stages: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, package = make_model(), make_package("float32", "float32")
    embedded, rows = model.embed_tokens.weight.detach().numpy()[[9]], folded_rows(model, [9])
    logits = []
    for limit in (stages_module.SHARD_BYTES, 1):
        directory = tmp_path / str(limit)
        directory.mkdir()
        monkeypatch.setattr(stages_module, "SHARD_BYTES", limit)
        write_stages(package, options(), directory)
        stages = sorted(directory.glob("decode.*.onnx"))
        naive = naive_stages(model.config, CONTEXT)
        logits.append(naive.step(stages, directory / "head.onnx", embedded, rows, 1))
    assert len(stages) == 3
    # Between stages stands float16 as float32; but the CPU provider keeps some values in float32 within a stage.
    np.testing.assert_allclose(*logits, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 1}, "context is 1, this model's can be 2 to 128 tokens"),
        ({"context": 129}, "context is 129"),
        ({"chunk": 1}, "chunk is 1, expected 2 to the context of 24 tokens"),
        ({"chunk": 25}, "chunk is 25"),
        ({"precision": "int4"}, "the package has float32 weights, which can be compiled as float16"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], message: str, make_package: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**changes).check(open_weights(make_package("float32")))


def test_dense_models_have_no_dense_variant(make_package: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="no memory and is dense as it is"):
        options(dense=True).check(open_weights(make_package("float32", memory_dim=0)))


def test_a_convolution_is_refused(make_package: Callable[..., Path]) -> None:
    weights = open_weights(make_package("float32", **(NGRAMS | {"engram_kernel": 4})))
    remedy = "run the model on the CPU, or convert a model that was trained without one"
    with pytest.raises(CompileError, match=f"layers.0.engram.conv1d: .* {remedy}"):
        plan(weights, options())


def test_a_mixture_of_experts_is_refused(make_package: Callable[..., Path]) -> None:
    weights = open_weights(make_package("float32", ffn_kind="moe", experts=5, experts_per_token=2))
    with pytest.raises(
        CompileError, match=r"layers.0.mlp: a mixture of 5 experts, which an NPU's static graph would all"
    ):
        plan(weights, options())
