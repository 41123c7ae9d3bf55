"""Packages of the tests whose graphs are changed: nodes by their outputs, other attributes and inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, helper, numpy_helper

Change = Callable[[GraphProto], object]
Inputs = dict[int, np.ndarray | str | None]


def edit_graph(package: Path, name: str, change: Change) -> Path:
    """Changes one stage of a package and makes the manifest's size and checksum of it right."""
    path, manifest_path = package / name, package / "manifest.json"
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    onnx.save(model, path)
    data = path.read_bytes()
    manifest = json.loads(manifest_path.read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest_path.write_text(json.dumps(manifest))
    return package


# Nodes by their first output. Layer 1 has 4 query and 2 key heads of 16 elements, hidden 64, ffn 96 and 32 elements of
# memory; the vocabulary has 300 tokens.
QKV, ATTENTION = "layers.1.self_attn.qkv.out", "layers.1.self_attn.heads"
DOWN, INJECTED = "layers.1.mlp.down_proj.out", "layers.1.injected"
CONVOLVED = "layers.1.engram.conv1d.out"
EMBEDDING, MIXED = "embedding", "layers.1.mlp.out"


def stage_of(output: str) -> str:
    return "stage0.onnx" if output == EMBEDDING else "stage1.onnx"


def node(graph: GraphProto, output: str) -> NodeProto:
    (found,) = (node for node in graph.node if node.output[0] == output)
    return found


def set_attribute(output: str, name: str, value: float | None) -> Change:
    """None: removes it."""

    def change(graph: GraphProto) -> None:
        attributes = node(graph, output).attribute
        if old := [attribute for attribute in attributes if attribute.name == name]:
            attributes.remove(*old)
        if value is not None:
            attributes.append(helper.make_attribute(name, value))

    return change


def set_inputs(output: str, inputs: Inputs) -> Change:
    """Gives a node other inputs: an initialiser, or a value by its name ("" is none); None: ends the list before it."""

    def change(graph: GraphProto) -> None:
        names = node(graph, output).input
        for index, value in inputs.items():
            if value is None:
                del names[index:]
                return
            names.extend([""] * (index + 1 - len(names)))
            names[index] = value if isinstance(value, str) else f"changed.{index}"
            if not isinstance(value, str):
                graph.initializer.append(numpy_helper.from_array(value, names[index]))

    return change


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)
