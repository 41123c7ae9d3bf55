"""What the runtime's own operators do beside their products: the same as standard operators around them, in the same
graph, for steps of several tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import GraphProto, helper, numpy_helper

from meki import Engine

from .edited_graphs import DOWN, INJECTED, Change, edit_graph, node, set_attribute, set_inputs

GATE_UP = "layers.1.mlp.gate_up.out"  # 192 columns
EPSILON = 1e-6
TOKENS = [1, 2, 3, 5, 8, 13]

Operand = str | np.ndarray | np.float32  # a value by its name, or an initialiser


def random(count: int, low: float, high: float) -> np.ndarray:
    return np.random.default_rng(count).uniform(low, high, count).astype(np.float32)


class Standard:
    """Adds standard operators in front of a node."""

    def __init__(self, graph: GraphProto, output: str) -> None:
        self.graph, self.place = graph, list(graph.node).index(node(graph, output))

    def __call__(self, kind: str, *inputs: Operand, outputs: int = 1, **attributes: object) -> list[str]:
        names = []
        for value in inputs:
            names.append(value if isinstance(value, str) else f"constant.{len(self.graph.initializer)}")
            if not isinstance(value, str):
                self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), names[-1]))
        made = [f"standard.{len(self.graph.node)}.{i}" for i in range(outputs)]
        self.graph.node.insert(self.place, helper.make_node(kind, names, made, **attributes))
        self.place += 1
        return made

    def behind(self, output: str) -> str:
        """Goes on behind the node: its result, by another name."""
        node(self.graph, output).output[0] = f"{output}.raw"
        self.place += 1
        return f"{output}.raw"

    def ends(self, output: str) -> None:
        """Gives the last result the name that the node's had."""
        self.graph.node[self.place - 1].output[0] = output


def both(*changes: Change) -> Change:
    return lambda graph: [change(graph) for change in changes]


POST_NORM = random(64, 0.5, 1.5)


def post_norm(graph: GraphProto) -> None:
    operator = Standard(graph, DOWN)
    residual = node(graph, DOWN).input[4]
    set_inputs(DOWN, {4: None})(graph)
    (normed,) = operator("RMSNormalization", operator.behind(DOWN), POST_NORM, axis=-1, epsilon=EPSILON)
    operator("Add", normed, residual)
    operator.ends(DOWN)


def geglu(graph: GraphProto) -> None:
    operator = Standard(graph, DOWN)
    gate, up = operator("Split", GATE_UP, outputs=2, axis=-1, num_outputs=2)
    (square,) = operator("Mul", gate, gate)
    (weighted,) = operator("Mul", square, np.float32(2 * np.sqrt(2 / np.pi) * 0.044715))
    (slope,) = operator("Add", weighted, np.float32(2 * np.sqrt(2 / np.pi)))
    (argument,) = operator("Mul", gate, slope)
    (sigmoid,) = operator("Sigmoid", argument)
    (gelu,) = operator("Mul", gate, sigmoid)
    (made,) = operator("Mul", gelu, up)
    both(set_attribute(DOWN, "swiglu", 0), set_inputs(DOWN, {0: made}))(graph)


CONTEXT_NORM = random(32, 0.5, 1.5)


def injection(row_scale: float, context_layer: int | None, scale: float) -> tuple[Change, Change]:
    """In the operator, and beside it."""
    fused: list[Change] = []
    if row_scale != 1:
        fused.append(set_attribute(INJECTED, "row_scale", row_scale))
    if context_layer is not None:
        fused.append(set_inputs(INJECTED, {7: GATE_UP, 8: CONTEXT_NORM}))
    if context_layer:
        fused.append(set_attribute(INJECTED, "context_layer", context_layer))
    if scale != 1:
        fused.append(set_inputs(INJECTED, {9: np.array([scale], np.float32)}))

    def standard(graph: GraphProto) -> None:
        operator = Standard(graph, INJECTED)
        (rows,) = operator("Gather", "rows", np.array([1], np.int64), axis=0)
        (rows,) = operator("Mul", rows, np.float32(row_scale))
        if context_layer is not None:
            context = operator("Split", GATE_UP, outputs=6, axis=-1, num_outputs=6)[context_layer]
            (normed,) = operator("RMSNormalization", context, CONTEXT_NORM, axis=-1, epsilon=EPSILON)
            (rows,) = operator("Add", rows, normed)
        both(set_inputs(INJECTED, {4: rows}), set_attribute(INJECTED, "layer", 0))(graph)
        operator("Mul", operator.behind(INJECTED), np.float32(scale))
        operator.ends(INJECTED)

    return both(*fused), standard


CASES = {
    "post-norm": (set_inputs(DOWN, {5: POST_NORM}), post_norm),
    "geglu": (both(set_attribute(DOWN, "swiglu", 0), set_attribute(DOWN, "geglu", 1)), geglu),
    "scaled-rows": injection(0.5, None, 1),
    "context": injection(1, 0, 1),
    "context-of-layer-4": injection(1, 4, 1),
    "scale": injection(1, None, 0.25),
    "all-of-an-injection": injection(0.70710678, 5, 0.75),
}


@pytest.mark.parametrize("case", CASES)
def test_operators_as_standard_ones(make_package: Callable[..., Path], tmp_path: Path, case: str) -> None:
    package = make_package(weights="int8")
    fused, standard = (
        Engine(edit_graph(Path(shutil.copytree(package, tmp_path / name)), "stage1.onnx", change)).logits(TOKENS)
        for name, change in zip(("fused", "standard"), CASES[case], strict=True)
    )
    # What is rounded to 8 bits differs in its last bits, which may bring it to a neighbouring code: 1/127 of one of
    # many inputs.
    np.testing.assert_allclose(fused, standard, rtol=0, atol=2e-3 * np.abs(standard).max())
    assert np.abs(fused - Engine(package).logits(TOKENS)).max() > 2e-2 * np.abs(fused).max()


def test_what_changes_nothing(make_package: Callable[..., Path], tmp_path: Path) -> None:
    """To the bit: values that are the defaults, and a context that weighs nothing."""
    package = make_package(weights="int8")
    change = both(
        set_attribute(DOWN, "geglu", 0),
        set_attribute(INJECTED, "row_scale", 1.0),
        set_inputs(INJECTED, {7: GATE_UP, 8: np.zeros(32, np.float32), 9: np.ones(1, np.float32)}),
    )
    changed = edit_graph(Path(shutil.copytree(package, tmp_path / "package")), "stage1.onnx", change)
    np.testing.assert_array_equal(Engine(changed).logits(TOKENS), Engine(package).logits(TOKENS))
