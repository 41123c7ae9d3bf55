"""The weights of a package, read back for another kind of graph: the same values, no second quantisation."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from ..architectures import read_config
from ..blocks import BLOCK, BLOCK_TYPES, PANEL, Blocks, Codes, Floats, unpack_blocks
from ..graph.npu import Halves, to_float16
from ..graph.primitives import Vector
from ..graph.tensors import read_tensor

_TYPES = {its.code: type for type, its in BLOCK_TYPES.items()}


class PackageWeights:
    """The weights that the graphs of a package refer to, by their names there (graph/cpu.py). Large ones are mapped."""

    def __init__(self, package: Path, manifest: dict[str, Any]) -> None:
        self.config = read_config(manifest)
        self.type: str = manifest["weights"]["type"]
        self.parameters: int = manifest["parameters"]["ram"]
        self._package = package
        self._tensors: dict[str, TensorProto] = {}
        self._parts: dict[str, list[tuple[str, int]]] = {}
        for stage in manifest["stages"]:
            graph = onnx.load(package / stage["file"], load_external_data=False).graph
            self._tensors |= {tensor.name: tensor for tensor in graph.initializer}
            for node in graph.node:
                self._parts |= self._parts_of(node)

    def _parts_of(self, node: NodeProto) -> dict[str, list[tuple[str, int]]]:
        """By name of a packed tensor of the node, type and rows of each matrix in it."""
        its = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        match node.op_type:
            case "Linear":
                parts = self._array(node.input[2]).tolist()
                return {node.input[1]: [(_TYPES[code], rows) for code, rows in parts]}
            case "Embedding":
                return {node.input[1]: [(_TYPES[its["type"]], its["outputs"])]}
            case "Injection":
                assert self.config.memory is not None
                gate, out = _TYPES[its["gate_proj_type"]], _TYPES[its["out_proj_type"]]
                return {node.input[3]: [(gate, self.config.memory.dim)], node.input[5]: [(out, self.config.hidden)]}
        return {}

    def layer_bytes(self, precision: str) -> int:
        """Of the weights of the layer that has most: in float16, or of the packed matrices."""
        if precision == "float16":
            tables = self.config.memory.tables(self.config) if self.config.memory else {}
            shapes = self.config.shapes(folded=True)
            sizes = {name: 2 * math.prod(shapes[name]) for name in shapes.keys() - tables.keys()}
        else:
            sizes = {name: self._tensors[name].dims[0] for name in self._parts}
        layers: Counter[str] = Counter()
        for name, size in sizes.items():
            if name.startswith("layers."):
                layers[name.split(".")[1]] += size
        return max(layers.values())

    def vector(self, its: Vector) -> Floats:
        """A norm's weight, a bias or a table, float32. The package may have the product with the factor alone."""
        if its.tensor in self._tensors:
            return np.asarray(self._array(its.tensor), np.float32)
        return np.asarray(self._array(its.name), np.float32) * np.float32(its.factor)

    def panels(self, name: str) -> Codes:
        """A packed matrix as the runtime's operators take it."""
        return self._array(f"{name}.panels")

    def float16(self, name: str, rows: int) -> Halves:
        """A matrix of so many rows. name: as `Primitives.linear` has it."""
        if not self.parts(name):
            transposed = self._tensors.get(name)
            values = self._array(f"{name}.weight") if transposed is None else self._array(name).T
            return to_float16(np.asarray(values), name)
        blocks = self.blocks(name)
        halves = np.empty((rows, blocks[0].codes.shape[1]), np.float16)
        start = 0
        for its in blocks:
            for first in range(
                0, len(its.codes), 4096
            ):  # a block of rows at a time: float32 copies of a head are large
                values = its.rows(slice(first, first + 4096)).values()
                halves[start : start + len(values)] = to_float16(values, name)
                start += len(values)
        assert start == rows, name
        return halves

    def parts(self, name: str) -> list[tuple[str, int]]:
        """Type and rows of packed matrices, one below the other; none, if they are float32."""
        return self._parts.get(f"{name}.panels", [])

    def inputs(self, name: str) -> int:
        """Columns of packed matrices."""
        a_block = sum(-(-rows // PANEL) * BLOCK_TYPES[type].block_bytes for type, rows in self.parts(name))
        return self._tensors[f"{name}.panels"].dims[0] // a_block * BLOCK

    def blocks(self, name: str) -> list[Blocks]:
        """Of packed matrices, one below the other."""
        panels, start, blocks = self.panels(name), 0, []
        order = self._array(f"{name}.order") if f"{name}.order" in self._tensors else None
        for type, rows in self.parts(name):
            shape = (-(-rows // PANEL), self.inputs(name) // BLOCK, BLOCK_TYPES[type].block_bytes)
            end = start + math.prod(shape)
            matrix = unpack_blocks(np.asarray(panels[start:end]).reshape(shape), type, rows)
            blocks.append(replace(matrix, order=order))
            start = end
        return blocks

    def _array(self, name: str) -> np.ndarray:
        return read_tensor(self._tensors[name], self._package)
