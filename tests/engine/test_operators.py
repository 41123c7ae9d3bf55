"""Graphs that give the runtime's own operators what they do not take: a PackageError that names the operator and what
is wrong, when the package is opened or at the step that goes wrong; never a crash, never another model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from meki import Engine, PackageError, _core

from .edited_graphs import (
    ATTENTION,
    CONVOLVED,
    DOWN,
    EMBEDDING,
    INJECTED,
    MIXED,
    QKV,
    Change,
    Inputs,
    edit_graph,
    floats,
    set_attribute,
    set_inputs,
    stage_of,
)


@pytest.fixture
def package(make_package: Callable[..., Path], tmp_path: Path) -> Path:
    """A package of the test's own, with all operators but Experts: to be spoilt."""
    return Path(shutil.copytree(make_package(weights="int8"), tmp_path / "package"))


@pytest.fixture
def mixture(make_package: Callable[..., Path], tmp_path: Path) -> Path:
    """The same with 2 of 5 experts, of 32, in place of the FFN."""
    experts = {"ffn_kind": "moe", "experts": 5, "experts_per_token": 2, "ffn": 32}
    return Path(shutil.copytree(make_package(weights="int8", **experts), tmp_path / "mixture"))


def packed(outputs: int, inputs: int, bits: int = 8) -> np.ndarray:
    return np.zeros(-(-outputs // 16) * (inputs // 32) * (64 * bits + 32), np.uint8)


def parts(*its: tuple[int, int]) -> np.ndarray:
    return np.array(its, np.int64)


def cache(blocks: int = 8, heads: int = 2, block_bytes: int = 2 * 64 * (16 + 4)) -> np.ndarray:
    return np.zeros((blocks, heads, block_bytes), np.uint8)


NOT_POSITIVE = "an attribute is not a positive integer"
NOT_QKV = r"qkv is not \[1, tokens, \(heads \+ 2 \* kv_heads\) \* head_dim\]"
OTHER_WEIGHT = "a packed weight has another shape"
NOT_PACKED = "a packed weight has no packed type"
OTHER_PROJECTIONS = "gate_proj and out_proj have different widths"
UNKNOWN_TYPE = "a weight has a type that is not known"
NOT_PARTS = r"parts are not \[1 to 64, 2\]"
OTHER_WIDTH = "x and the weight have different widths"
OTHER_RESIDUAL = "the residual has another shape than the output"
OTHER_NORM = "a vector of weights has another length"
NOT_CONSTANT = "a weight or table is not a constant"
OTHER_CACHE = "the KV cache has other heads or another head_dim"
OTHER_MEMORY = "past and present are not the same memory"
NOT_TABLES = "the rotary tables are not two of"
SHORT_TABLES = "the sequence is longer than the rotary tables"
FULL_CACHE = "the sequence is longer than the KV cache"
SHORT = "the sequence is shorter than this step"
HALF_A_CONTEXT = "context and context_norm_weight come together or not at all"
NOT_CONTEXT = r"context is not \[1, tokens, memory_dim of more layers than `context_layer`\]"
NOT_X, NOT_H, NOT_ROWS = "x is not", "h has another shape than x", "rows are not"

ATTRIBUTES = [
    (QKV, "swiglu", 2, "an attribute is neither 0 nor 1"),
    (QKV, "swiglu", 1, "both a norm and swiglu or geglu"),
    (QKV, "geglu", 1, "both a norm and swiglu or geglu"),
    (QKV, "geglu", 2, "an attribute is not one of its choices"),
    (QKV, "geglu", 1.0, "type"),
    (DOWN, "geglu", 1, "both swiglu and geglu"),
    (DOWN, "swiglu", 0, OTHER_WIDTH),
    (EMBEDDING, "outputs", 320, OTHER_WEIGHT),
    (EMBEDDING, "outputs", 0, NOT_POSITIVE),
    (EMBEDDING, "outputs", -300, NOT_POSITIVE),
    (EMBEDDING, "outputs", 2**40, NOT_POSITIVE),
    (EMBEDDING, "outputs", 300.0, "type"),
    (EMBEDDING, "type", 2, OTHER_WEIGHT),
    (EMBEDDING, "type", 0, NOT_PACKED),
    (EMBEDDING, "type", 6, UNKNOWN_TYPE),
    (EMBEDDING, "type", -1, UNKNOWN_TYPE),
    (INJECTED, "gate_proj_type", 6, UNKNOWN_TYPE),
    (INJECTED, "gate_proj_type", 2, OTHER_WEIGHT),
    (INJECTED, "out_proj_type", 0, NOT_PACKED),
    (INJECTED, "layer", 3, NOT_ROWS),
    (INJECTED, "layer", 2**31 - 1, NOT_ROWS),
    (INJECTED, "layer", -1, "an attribute is negative"),
    (INJECTED, "activation", 3, "an attribute is not one of its choices"),
    (INJECTED, "activation", -1, "an attribute is not one of its choices"),
    (INJECTED, "activation", 1.0, "type"),
    (INJECTED, "multiply", 2, "an attribute is not one of its choices"),
    (INJECTED, "row_scale", 2, "type"),
    (INJECTED, "context_layer", 1, "context_layer is given without a context"),
    (INJECTED, "context_layer", -1, "an attribute is not one of its choices"),
    (ATTENTION, "heads", 3, "heads is not a multiple of kv_heads"),
    (ATTENTION, "kv_heads", 3, "heads is not a multiple of kv_heads"),
    (ATTENTION, "kv_heads", 0, NOT_POSITIVE),
    (ATTENTION, "heads", 2**31 - 2, NOT_QKV),
    (ATTENTION, "kv_heads", 4, NOT_QKV),
    (ATTENTION, "shared", 1, "the cache is an output unless it is shared"),
    (ATTENTION, "head_dim", 32, "head_dim is another than that of the rotary tables"),
    (ATTENTION, "shared", 2, "an attribute is not one of its choices"),
    (ATTENTION, "value_norm", -1, "an attribute is not one of its choices"),
    (ATTENTION, "window", -1, "an attribute is not one of its choices"),
    (ATTENTION, "window", 2**31, "an attribute is not one of its choices"),
    (ATTENTION, "scale", 1, "type"),
    *[(EMBEDDING, name, None, name) for name in ("outputs", "type")],
    *[(QKV, name, None, name) for name in ("swiglu", "epsilon")],
    *[(ATTENTION, name, None, name) for name in ("heads", "kv_heads", "epsilon")],
    *[(INJECTED, name, None, name) for name in ("gate_proj_type", "out_proj_type", "epsilon", "layer")],
]


def kind_of(output: str) -> str:
    return {ATTENTION: "Attention", INJECTED: "Injection", EMBEDDING: "Embedding", MIXED: "Experts"}.get(
        output, "Linear"
    )


@pytest.mark.parametrize(("output", "name", "value", "message"), ATTRIBUTES)
def test_attributes(package: Path, output: str, name: str, value: float | None, message: str) -> None:
    edit_graph(package, stage_of(output), set_attribute(output, name, value))
    with pytest.raises(PackageError, match=rf"{stage_of(output)}: .*meki\.{kind_of(output)}: .*{message}"):
        Engine(package)


INPUTS: dict[str, tuple[str, Inputs, str]] = {
    "x-narrower": (QKV, {0: floats(1, 1, 32)}, OTHER_WIDTH),
    "x-wider": (QKV, {0: floats(1, 1, 65)}, OTHER_WIDTH),
    "x-of-odd-width-for-swiglu": (DOWN, {0: floats(1, 1, 191)}, OTHER_WIDTH),
    "x-of-five-axes": (QKV, {0: floats(1, 1, 1, 1, 64)}, "more than 4 dimensions"),
    "x-scalar": (QKV, {0: floats()}, "x is a scalar"),
    "weight-of-fewer-panels": (QKV, {1: packed(112, 64)}, OTHER_WEIGHT),
    "weight-wider": (QKV, {1: packed(128, 96), 3: ""}, OTHER_WIDTH),
    "weight-of-4-bits": (QKV, {1: packed(128, 64, 4)}, OTHER_WEIGHT),
    "weight-of-two-axes": (QKV, {1: packed(128, 64).reshape(8, -1)}, OTHER_WEIGHT),
    "weight-empty": (QKV, {1: packed(0, 64)}, OTHER_WEIGHT),
    "parts-of-more-outputs": (QKV, {2: parts((1, 144))}, OTHER_WEIGHT),
    "parts-of-another-type": (QKV, {2: parts((2, 128))}, OTHER_WEIGHT),
    "parts-of-half-another-type": (QKV, {2: parts((1, 64), (2, 64))}, OTHER_WEIGHT),
    "parts-of-floats": (QKV, {2: parts((0, 128))}, "a part has no packed type"),
    "parts-of-an-unknown-type": (QKV, {2: parts((6, 128))}, "a part has no packed type"),
    "parts-without-outputs": (QKV, {2: parts((1, 128), (1, 0))}, "a part has no outputs"),
    "parts-of-negative-outputs": (QKV, {2: parts((1, -128))}, "a part has no outputs"),
    "parts-of-enormous-outputs": (QKV, {2: parts(*[(1, 2**31 - 1)] * 64)}, OTHER_WEIGHT),
    "parts-of-nothing": (QKV, {2: np.zeros((0, 2), np.int64)}, NOT_PARTS),
    "parts-of-65": (QKV, {2: parts(*[(1, 2)] * 65)}, NOT_PARTS),
    "parts-of-rank-1": (QKV, {2: np.array([1, 128], np.int64)}, NOT_PARTS),
    "parts-that-are-computed": (QKV, {2: "logit_index"}, NOT_CONSTANT),
    "weight-that-is-computed": (QKV, {1: "past.1"}, NOT_CONSTANT),
    "norm-longer": (QKV, {3: floats(65)}, OTHER_NORM),
    "norm-scalar": (QKV, {3: floats()}, OTHER_NORM),
    "norm-of-rank-2": (QKV, {3: floats(1, 64)}, OTHER_NORM),
    "norm-that-is-computed": (QKV, {3: "layers.0.injected"}, NOT_CONSTANT),
    "norm-with-swiglu": (DOWN, {3: floats(96)}, "both a norm and swiglu"),
    "residual-wider": (DOWN, {4: floats(1, 1, 65)}, OTHER_RESIDUAL),
    "residual-of-more-tokens": (DOWN, {4: floats(1, 2, 64)}, OTHER_RESIDUAL),
    "residual-of-no-tokens": (DOWN, {4: floats(1, 0, 64)}, OTHER_RESIDUAL),
    "residual-of-rank-2": (DOWN, {4: floats(1, 64)}, OTHER_RESIDUAL),
    "residual-scalar": (DOWN, {4: floats()}, OTHER_RESIDUAL),
    "post-norm-behind-a-product-longer": (DOWN, {5: floats(65)}, OTHER_NORM),
    "post-norm-behind-a-product-of-rank-2": (DOWN, {5: floats(1, 64)}, OTHER_NORM),
    "post-norm-behind-a-product-that-is-computed": (DOWN, {5: "layers.0.injected"}, NOT_CONSTANT),
    "ids-of-rank-1": (EMBEDDING, {0: np.zeros(1, np.int64)}, "ids are not"),
    "id-beyond-the-vocabulary": (EMBEDDING, {0: np.full((1, 1), 300, np.int64)}, "out of the vocabulary"),
    "id-negative": (EMBEDDING, {0: np.full((1, 1), -1, np.int64)}, "out of the vocabulary"),
    "embedding-of-fewer-rows": (EMBEDDING, {1: packed(272, 64)}, OTHER_WEIGHT),
    "qkv-of-rank-2": (ATTENTION, {0: floats(1, 128)}, NOT_QKV),
    "qkv-of-a-batch": (ATTENTION, {0: floats(2, 1, 128)}, NOT_QKV),
    "qkv-of-no-tokens": (ATTENTION, {0: floats(1, 0, 128)}, NOT_QKV),
    "qkv-of-more-tokens": (ATTENTION, {0: floats(1, 2, 128)}, SHORT),
    "qkv-of-another-head-dim": (ATTENTION, {0: floats(1, 1, 256)}, NOT_QKV),
    "past-that-is-not-the-session's": (ATTENTION, {1: cache()}, OTHER_MEMORY),
    "past-of-another-layer": (ATTENTION, {1: "past.2"}, OTHER_MEMORY),
    "past-of-3-heads": (ATTENTION, {1: cache(heads=3)}, OTHER_CACHE),
    "past-of-other-bytes": (ATTENTION, {1: cache(block_bytes=2561)}, OTHER_CACHE),
    "past-of-rank-2": (ATTENTION, {1: cache()[0]}, OTHER_CACHE),
    "past-of-no-blocks": (ATTENTION, {1: cache(0)}, "the computed output shape"),
    "length-0": (ATTENTION, {2: np.array(0, np.int32)}, SHORT),
    "length-negative": (ATTENTION, {2: np.array(-5, np.int32)}, SHORT),
    "length-enormous": (ATTENTION, {2: np.array(2**31 - 1, np.int32)}, FULL_CACHE),
    "tables-without-lines": (ATTENTION, {3: floats(0, 8), 4: floats(0, 8)}, SHORT_TABLES),
    "tables-of-head-dim-8": (ATTENTION, {3: floats(9, 4), 4: floats(9, 4)}, "head_dim is 8.*multiple of 16"),
    "tables-of-head-dim-0": (ATTENTION, {3: floats(9, 0), 4: floats(9, 0)}, "head_dim is 0.*multiple of 16"),
    "tables-of-head-dim-32": (ATTENTION, {3: floats(9, 16), 4: floats(9, 16), 5: None}, NOT_QKV),
    "sin-shorter-than-cos": (ATTENTION, {4: floats(7, 8)}, NOT_TABLES),
    "tables-of-rank-3": (ATTENTION, {3: floats(9, 8, 1), 4: floats(9, 8, 1)}, NOT_TABLES),
    "q-norm-longer": (ATTENTION, {5: floats(17)}, OTHER_NORM),
    "k-norm-shorter": (ATTENTION, {6: floats(15)}, OTHER_NORM),
    "q-norm-alone": (ATTENTION, {6: None}, ""),
    "k-norm-alone": (ATTENTION, {5: ""}, ""),
    "frequencies-with-tables": (ATTENTION, {8: np.ones(8)}, "give cos and sin, or frequencies"),
    "neither-tables-nor-frequencies": (ATTENTION, {3: "", 4: ""}, "give cos and sin, or frequencies"),
    "cos-without-sin": (ATTENTION, {4: ""}, "give cos and sin, or frequencies"),
    "frequencies-without-a-head-dim": (ATTENTION, {3: "", 4: "", 8: np.ones(8)}, "head_dim"),
    "key-offsets-with-norms": (ATTENTION, {7: floats(32)}, "key_offsets do not go with QK-norm"),
    "key-offsets-shorter": (ATTENTION, {5: "", 6: "", 7: floats(31)}, OTHER_NORM),
    "key-offsets-of-rank-2": (ATTENTION, {5: "", 6: "", 7: floats(2, 16)}, OTHER_NORM),
    "key-offsets-that-are-computed": (ATTENTION, {5: "", 6: "", 7: "layers.0.injected"}, NOT_CONSTANT),
    "injection-into-another-width": (INJECTED, {0: floats(1, 1, 65)}, NOT_X),
    "injection-into-a-batch": (INJECTED, {0: floats(2, 1, 64)}, NOT_X),
    "h-narrower": (INJECTED, {1: floats(1, 1, 63)}, NOT_H),
    "h-of-more-tokens": (INJECTED, {1: floats(1, 2, 64)}, NOT_H),
    "h-of-rank-2": (INJECTED, {1: floats(1, 64)}, NOT_H),
    "norm-before-the-gate-longer": (INJECTED, {2: floats(65)}, OTHER_NORM),
    "norm-before-the-gate-of-rank-2": (INJECTED, {2: floats(1, 64)}, OTHER_NORM),
    "gate-proj-of-more-rows": (INJECTED, {3: packed(48, 64)}, OTHER_PROJECTIONS),
    "gate-proj-narrower": (INJECTED, {3: packed(32, 32)}, OTHER_PROJECTIONS),
    "memory-rows-wider": (INJECTED, {4: floats(3, 1, 33)}, NOT_ROWS),
    "memory-rows-of-more-tokens": (INJECTED, {4: floats(3, 2, 32)}, NOT_ROWS),
    "memory-rows-of-fewer-layers": (INJECTED, {4: floats(1, 1, 32)}, NOT_ROWS),
    "memory-rows-of-rank-2": (INJECTED, {4: floats(3, 32)}, NOT_ROWS),
    "projections-of-other-memory": (INJECTED, {3: packed(64, 64), 5: packed(64, 64)}, NOT_ROWS),
    "out-proj-of-fewer-rows": (INJECTED, {5: packed(48, 32)}, OTHER_WEIGHT),
    "norms-longer": (INJECTED, {2: floats(65), 6: floats(65)}, OTHER_WEIGHT),
    "post-norm-of-rank-2": (INJECTED, {6: floats(1, 64)}, OTHER_NORM),
    "context-without-a-norm": (INJECTED, {7: floats(1, 1, 32)}, HALF_A_CONTEXT),
    "norm-without-a-context": (INJECTED, {8: floats(32)}, HALF_A_CONTEXT),
    "norm-of-the-context-longer": (INJECTED, {7: floats(1, 1, 32), 8: floats(33)}, OTHER_NORM),
    "norm-of-the-context-that-is-computed": (INJECTED, {7: floats(1, 1, 32), 8: "rows"}, NOT_CONSTANT),
    "context-narrower": (INJECTED, {7: floats(1, 1, 31), 8: floats(32)}, NOT_CONTEXT),
    "context-of-more-tokens": (INJECTED, {7: floats(1, 2, 32), 8: floats(32)}, NOT_CONTEXT),
    "context-of-a-batch": (INJECTED, {7: floats(2, 1, 32), 8: floats(32)}, NOT_CONTEXT),
    "context-of-rank-2": (INJECTED, {7: floats(1, 32), 8: floats(32)}, NOT_CONTEXT),
    "scale-of-two": (INJECTED, {9: floats(2)}, OTHER_NORM),
    "scale-of-rank-0": (INJECTED, {9: floats()}, OTHER_NORM),
    "scale-that-is-computed": (INJECTED, {9: "rows"}, NOT_CONSTANT),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs(package: Path, case: str) -> None:
    output, inputs, message = INPUTS[case]
    edit_graph(package, stage_of(output), set_inputs(output, inputs))
    with pytest.raises(PackageError, match=rf"{stage_of(output)}: .*meki\.{kind_of(output)}: .*{message}"):
        Engine(package)


@pytest.mark.parametrize("layer", [3, 2**31 - 2])
def test_contexts_without_the_layer(package: Path, layer: int) -> None:
    """The last columns are of half a layer."""
    edit_graph(package, "stage1.onnx", set_inputs(INJECTED, {7: floats(1, 1, 3 * 32 + 16), 8: floats(32)}))
    edit_graph(package, "stage1.onnx", set_attribute(INJECTED, "context_layer", layer))
    with pytest.raises(PackageError, match=rf"stage1\.onnx: .*meki\.Injection: {NOT_CONTEXT}"):
        Engine(package)


OTHER_EXPERTS = "the matrices of the experts have another shape"
OTHER_TYPE = "the type of the experts is another than said"
NOT_ROUTER = r"the router is not \[experts, hidden\]"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("experts", 0, NOT_POSITIVE),
        ("experts", -5, NOT_POSITIVE),
        ("experts", 2**31, NOT_POSITIVE),
        ("experts", 4, NOT_ROUTER),
        ("experts", 2**31 - 1, NOT_ROUTER),
        ("experts", 1, "experts_per_token is more than experts"),
        ("experts_per_token", 0, NOT_POSITIVE),
        ("experts_per_token", -1, NOT_POSITIVE),
        ("experts_per_token", 6, "experts_per_token is more than experts"),
        ("experts_per_token", 2**40, NOT_POSITIVE),
        ("norm_topk_prob", 2, "an attribute is neither 0 nor 1"),
        ("gate_up_type", 2, OTHER_WEIGHT),
        ("down_type", 2, OTHER_WEIGHT),
        ("gate_up_type", 6, UNKNOWN_TYPE),
        ("down_type", 0, OTHER_TYPE),
        *[
            (name, None, name)
            for name in ("experts", "experts_per_token", "norm_topk_prob", "gate_up_type", "down_type", "epsilon")
        ],
    ],
)
def test_attributes_of_experts(mixture: Path, name: str, value: int | None, message: str) -> None:
    edit_graph(mixture, "stage1.onnx", set_attribute(MIXED, name, value))
    with pytest.raises(PackageError, match=rf"stage1.onnx: .*meki\.Experts: .*{message}"):
        Engine(mixture)


EXPERTS_INPUTS: dict[str, tuple[Inputs, str]] = {
    "x-narrower": ({0: floats(1, 1, 32)}, NOT_X),
    "x-of-rank-2": ({0: floats(1, 64)}, NOT_X),
    "x-of-a-batch": ({0: floats(2, 1, 64)}, NOT_X),
    "norm-longer": ({1: floats(65)}, NOT_ROUTER),
    "norm-of-rank-2": ({1: floats(1, 64)}, OTHER_NORM),
    "router-of-more-experts": ({2: floats(6, 64)}, NOT_ROUTER),
    "router-narrower": ({2: floats(5, 32)}, NOT_ROUTER),
    "router-flat": ({2: floats(320)}, NOT_ROUTER),
    "router-that-is-computed": ({2: "layers.0.injected"}, NOT_CONSTANT),
    "gate-and-up-of-4-experts": ({3: packed(256, 64)}, OTHER_WEIGHT),
    "gate-and-up-of-a-panel-more": ({3: packed(336, 64)}, OTHER_WEIGHT),
    "gate-and-up-wider": ({3: packed(320, 96)}, "gate_up and down have different widths"),
    "gate-and-up-of-4-bits": ({3: packed(320, 64, 4)}, OTHER_WEIGHT),
    "gate-and-up-of-two-axes": ({3: packed(320, 64).reshape(20, -1)}, OTHER_WEIGHT),
    "gate-and-up-of-floats": ({3: floats(320, 64)}, OTHER_TYPE),
    "gate-and-up-of-integers": ({3: np.zeros((320, 64), np.int64)}, OTHER_TYPE),
    "gate-and-up-that-are-computed": ({3: "past.1"}, NOT_CONSTANT),
    "down-of-4-experts": ({4: packed(256, 32)}, OTHER_WEIGHT),
    "down-wider": ({4: packed(320, 64)}, "gate_up and down have different widths"),
    "down-without-columns": ({4: packed(320, 0)}, OTHER_WEIGHT),
    "nothing-of-experts": ({3: packed(0, 64), 4: packed(0, 32)}, OTHER_WEIGHT),
    "hidden-of-nothing": ({0: floats(1, 1, 0), 1: floats(0), 2: floats(5, 0)}, NOT_ROUTER),
    "residual-wider": ({5: floats(1, 1, 65)}, OTHER_RESIDUAL),
    "residual-of-more-tokens": ({5: floats(1, 2, 64)}, OTHER_RESIDUAL),
}


@pytest.mark.parametrize("case", EXPERTS_INPUTS)
def test_inputs_of_experts(mixture: Path, case: str) -> None:
    inputs, message = EXPERTS_INPUTS[case]
    edit_graph(mixture, "stage1.onnx", set_inputs(MIXED, inputs))
    with pytest.raises(PackageError, match=rf"stage1.onnx: .*meki\.Experts: .*{message}"):
        Engine(mixture)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({3: floats(319, 64)}, OTHER_EXPERTS),
        ({3: floats(320, 32)}, "gate_up and down have different widths"),
        ({3: floats(20, 2, 544)}, OTHER_EXPERTS),
        ({3: floats(320)}, OTHER_EXPERTS),
        ({4: floats(320, 0)}, OTHER_EXPERTS),
        ({4: floats(320, 33)}, OTHER_EXPERTS),
        ({4: packed(320, 32)}, OTHER_TYPE),
    ],
)
def test_experts_of_floats(make_package: Callable[..., Path], tmp_path: Path, inputs: Inputs, message: str) -> None:
    package = make_package(ffn_kind="moe", experts=5, experts_per_token=2, ffn=32)
    edit_graph(Path(shutil.copytree(package, tmp_path / "p")), "stage1.onnx", set_inputs(MIXED, inputs))
    with pytest.raises(PackageError, match=rf"stage1.onnx: .*meki\.Experts: .*{message}"):
        Engine(tmp_path / "p")


NOT_WEIGHT = r"the weight is not \[kernel, channels\]"
OTHER_POSITIONS = r"the cache is not \[positions, bytes of the channels\]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_attribute(CONVOLVED, "dilation", 0), NOT_POSITIVE),
        (set_attribute(CONVOLVED, "dilation", 2**31 - 1), "the convolution reaches too far back"),
        (set_attribute(CONVOLVED, "dilation", None), "dilation"),
        (set_attribute(CONVOLVED, "epsilon", None), "epsilon"),
        (set_inputs(CONVOLVED, {0: floats(1, 1, 63)}), NOT_X),
        (set_inputs(CONVOLVED, {0: floats(1, 64)}), NOT_X),
        (set_inputs(CONVOLVED, {1: np.zeros((128, 64), np.uint8)}), OTHER_POSITIONS),
        (set_inputs(CONVOLVED, {1: np.zeros((1, 128, 128), np.uint8)}), OTHER_POSITIONS),
        (set_inputs(CONVOLVED, {1: np.zeros((8, 128), np.uint8)}), OTHER_MEMORY),
        (set_inputs(CONVOLVED, {1: np.zeros((0, 128), np.uint8)}), "the computed output shape"),
        (set_inputs(CONVOLVED, {2: np.zeros(2, np.int32)}), "total_sequence_length is not one integer"),
        (set_inputs(CONVOLVED, {2: np.zeros(1, np.int32)}), SHORT),
        (set_inputs(CONVOLVED, {3: floats(65)}), NOT_WEIGHT),
        (set_inputs(CONVOLVED, {3: floats(1, 64)}), OTHER_NORM),
        (set_inputs(CONVOLVED, {3: floats(0), 4: floats(4, 0)}), NOT_WEIGHT),
        (set_inputs(CONVOLVED, {4: floats(0, 64)}), NOT_WEIGHT),
        (set_inputs(CONVOLVED, {4: floats(64)}), NOT_WEIGHT),
        (set_inputs(CONVOLVED, {4: "layers.1.engram.gated"}), NOT_CONSTANT),
    ],
)
def test_convolutions(make_package: Callable[..., Path], tmp_path: Path, change: Change, message: str) -> None:
    engram = {"memory_dim": 0, "engram_dim": 64, "engram_layers": (1,), "engram_heads": 1, "engram_rows": 9}
    package = make_package(**engram)
    edit_graph(Path(shutil.copytree(package, tmp_path / "p")), "stage1.onnx", change)
    with pytest.raises(PackageError, match=rf"stage1.onnx: .*meki\.ShortConvolution: .*{message}"):
        Engine(tmp_path / "p")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_routers_that_send_tokens_nowhere(mixture: Path, value: float) -> None:
    """The result is NaN, which is an error of the step."""
    edit_graph(mixture, "stage1.onnx", set_inputs(MIXED, {2: np.full((5, 64), value, np.float32)}))
    with pytest.raises(PackageError, match="NaN"):
        Engine(mixture).generate("a", max_new_tokens=4)


@pytest.mark.parametrize(
    ("output", "inputs"),
    [
        (QKV, {1: floats(8 * 2 * 544)}),
        (QKV, {1: None}),
        (QKV, {1: ""}),
        (ATTENTION, {2: np.array(1, np.int64)}),
        (ATTENTION, {4: None}),
        *[(INJECTED, {index: ""}) for index in range(7) if index != 2],
        (INJECTED, {6: None}),
        (EMBEDDING, {0: np.zeros((1, 1), np.int32)}),
    ],
    ids=[
        "weight-of-floats",
        "no-weight",
        "weight-left-out",
        "length-of-8-bytes",
        "no-sin",
        *(f"injection-without-{name}" for name in ("x", "h", "gate", "rows", "out", "norm")),
        "no-norm",
        "ids-of-4-bytes",
    ],
)
def test_types_and_numbers_of_inputs(package: Path, output: str, inputs: Inputs) -> None:
    edit_graph(package, stage_of(output), set_inputs(output, inputs))
    with pytest.raises(PackageError, match=rf"{stage_of(output)}: .*{kind_of(output)}"):
        Engine(package)


def test_a_trailing_empty_name_is_no_input(package: Path) -> None:
    """ONNX says so: [x, weight, parts, norm, ""] has no residual."""
    expected = Engine(package).logits([1, 2, 3])
    edit_graph(package, stage_of(QKV), set_inputs(QKV, {4: ""}))
    np.testing.assert_array_equal(Engine(package).logits([1, 2, 3]), expected)


OPEN = """
import sys, meki
try:
    meki.Engine(sys.argv[1], threads=1)
    print("opened")
except meki.PackageError as error:
    print("PackageError", error)
"""

NOTHING = np.zeros(0, np.uint8)


@pytest.mark.parametrize(
    ("output", "inputs"),
    [
        (QKV, {0: floats(1, 1, 0), 1: NOTHING, 3: ""}),
        (QKV, {1: NOTHING, 3: ""}),
        (ATTENTION, {2: np.zeros(0, np.int32)}),
        (ATTENTION, {4: floats(128, 8, 0)}),
        (INJECTED, {1: floats(0, 1, 64)}),
        (INJECTED, {3: packed(0, 64), 4: floats(3, 1, 0), 5: NOTHING}),
        (
            INJECTED,
            {0: floats(1, 1, 0), 1: floats(1, 1, 0), 2: floats(0), 3: NOTHING, 5: packed(0, 32), 6: floats(0)},
        ),
    ],
    ids=["x-and-weight", "weight", "length", "sin", "h", "memory", "hidden"],
)
def test_tensors_without_elements(package: Path, output: str, inputs: Inputs) -> None:
    """Read without a look at their size they are a crash, so that this is a process of its own."""
    edit_graph(package, stage_of(output), set_inputs(output, inputs))
    run = subprocess.run([sys.executable, "-c", OPEN, str(package)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, f"{run.returncode}: {run.stderr}"
    assert run.stdout.startswith("PackageError")
    assert "meki." in run.stdout  # this operator, or the next one, to which it gave nothing


def test_what_only_a_longer_step_shows(package: Path) -> None:
    """Right for the one token that opening computes: an error of the step, after which others go on."""
    edit_graph(package, stage_of(DOWN), set_inputs(DOWN, {4: floats(1, 1, 64)}))
    engine = Engine(package)
    session = _core.Session(engine._core, _core.SessionOptions())
    session.append([1, 2, 3])
    with pytest.raises(PackageError, match=rf"stage1\.onnx: .*meki\.Linear: {OTHER_RESIDUAL}"):
        session.logits()
    assert session.tokens == [1, 2, 3]
    session.rewind(1)
    assert np.isfinite(session.logits()).all()


def test_what_only_a_longer_sequence_shows(package: Path) -> None:
    edit_graph(package, stage_of(ATTENTION), set_inputs(ATTENTION, {3: floats(8, 8), 4: floats(8, 8)}))
    engine = Engine(package)
    assert np.isfinite(engine.logits([1] * 8)).all()
    with pytest.raises(PackageError, match=rf"stage1\.onnx: .*meki\.Attention: {SHORT_TABLES}"):
        engine.logits([1] * 9)
