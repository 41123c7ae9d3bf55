"""The graphs of Gemma in onnx's reference evaluator, against the PyTorch reference; what is in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from meki.models.architectures.gemma import GemmaDecoder
from meki.models.quantize import Int4Recipe, quantize_weight
from meki.models.tokenizer import TokenizerSpec
from tests.engine.gemma_models import export, gemma3, gemma4

IDS = np.random.default_rng(3).integers(0, 300, 40)
MODELS: dict[str, Callable[[], tuple[Any, GemmaDecoder]]] = {
    "gemma3": lambda: gemma3(window=9),
    "gemma4": lambda: gemma4(window=9),
    "gemma4-no-memory": lambda: gemma4(window=9, hidden_size_per_layer_input=0),
    "gemma4-two-own-layers": lambda: gemma4(layers=4, pattern=2, num_kv_shared_layers=2, window=9),
}


@torch.no_grad()
def reference(model: GemmaDecoder, weights: str) -> np.ndarray:
    """Logits of IDS, float32 [40, 300], of what the package's weights stand for."""
    model = copy.deepcopy(model)
    recipe = Int4Recipe(model.config.layers)
    for name, parameter in model.named_parameters():
        if weights != "float32" and parameter.dim() == 2 and name != "embed_tokens_per_layer.weight":
            type = "int8" if weights == "int8" else recipe.type(name)
            parameter.copy_(torch.from_numpy(quantize_weight(parameter.numpy(), type, name).values()))
    return model(torch.from_numpy(IDS)[None])[0].numpy()


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_reference(
    name: str, weights: str, tokenizer_spec: TokenizerSpec, tmp_path: Path, reference_session: Any
) -> None:
    _, model = MODELS[name]()
    path = export(model, tokenizer_spec, tmp_path / "package", weights)
    expected = reference(model, weights)
    # As test_graph.py's: float32 sums in another order.
    with np.errstate(over="ignore", invalid="ignore"):  # in the branch that the evaluator's Sigmoid does not take
        np.testing.assert_allclose(reference_session(path).step(IDS), expected, rtol=0, atol=1e-4)
        session = reference_session(path)
        session.step(IDS[:25], [24])  # logits of the last alone, and of two steps' last tokens
        np.testing.assert_allclose(session.step(IDS[25:], [12, 13, 14]), expected[-3:], rtol=0, atol=1e-4)


def nodes_of(path: Path, kind: str) -> list[onnx.NodeProto]:
    stages = [onnx.load(path / f"stage{stage}.onnx", load_external_data=False).graph for stage in (0, 1)]
    return [node for graph in stages for node in graph.node if node.op_type == kind]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def test_layers_are_a_few_operators_each(tokenizer_spec: TokenizerSpec, tmp_path: Path) -> None:
    """Attention, four products with their norms, gates and residuals, one injection: no other node a layer."""
    _, model = gemma4()
    path = export(model, tokenizer_spec, tmp_path / "package", "int4")
    assert len(nodes_of(path, "Attention")) == len(nodes_of(path, "Injection")) == 7
    linear = nodes_of(path, "Linear")
    assert len(linear) == 4 * 7 + 2  # the layers' contexts in one, and the head
    assert sum(len(node.input) == 6 for node in linear) == 2 * 7  # a norm behind the product, and a residual
    assert sum(attributes(node).get("geglu", 0) for node in linear) == 7
    assert not nodes_of(path, "RMSNormalization") and not nodes_of(path, "Add")
    # Shared layers: the residual stream, the rows and the contexts of the wanted tokens, once.
    assert len(nodes_of(path, "Gather")) == 3
    injections = [attributes(node) for node in nodes_of(path, "Injection")]
    assert [its["layer"] for its in injections] == [its["context_layer"] for its in injections] == list(range(7))


def test_attention_of_shared_layers(tokenizer_spec: TokenizerSpec, tmp_path: Path) -> None:
    _, model = gemma4()
    path = export(model, tokenizer_spec, tmp_path / "package")
    nodes = nodes_of(path, "Attention")
    # Of seven layers the third, the sixth and the last see all positions; the last three see what others keep.
    assert [attributes(node).get("window", 0) for node in nodes] == [24, 24, 0, 24, 24, 0, 0]
    assert [attributes(node).get("shared", 0) for node in nodes] == [0, 0, 0, 0, 1, 1, 1]
    assert [node.input[1] for node in nodes[4:]] == ["present.3", "present.2", "present.2"]
    assert all(len(node.output) == 1 for node in nodes[4:])


def test_a_cache_of_an_earlier_stage_is_an_input(tokenizer_spec: TokenizerSpec, tmp_path: Path) -> None:
    _, model = gemma4(layers=2, pattern=1, num_kv_shared_layers=1)
    path = export(model, tokenizer_spec, tmp_path / "package")
    inputs = {value.name for value in onnx.load(path / "stage1.onnx", load_external_data=False).graph.input}
    assert "shared.0" in inputs and "past.1" not in inputs
