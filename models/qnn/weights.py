"""The weights of a package, read back for another kind of graph: the same values, no second quantisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from ..architectures import read_config
from ..graph.npu import StoredMatrix
from ..graph.tensors import read_tensor
from ..quantize import WEIGHT_BITS, Codes, Floats, unpack_weight


class PackageWeights:
    """The weights that the graphs of a package refer to, by their names there (graph/cpu.py). Large ones are mapped."""

    def __init__(self, package: Path, manifest: dict[str, Any]) -> None:
        self.config = read_config(manifest)
        self.type: str = manifest["weights"]["type"]
        self.parameters: int = manifest["parameters"]["ram"]
        self._package = package
        self._tensors: dict[str, TensorProto] = {}
        for stage in manifest["stages"]:
            graph = onnx.load(package / stage["file"], load_external_data=False).graph
            self._tensors |= {tensor.name: tensor for tensor in graph.initializer}

    def vector(self, name: str) -> Floats:
        """A norm's weight, a bias or a table as it is, float32."""
        return np.asarray(self._array(name), np.float32)

    def panels(self, name: str) -> Codes:
        """A packed matrix as the runtime's operators take it."""
        return self._array(f"{name}.panels")

    def matrix(self, name: str, rows: int) -> StoredMatrix:
        """A matrix of so many rows. name: as `Primitives.linear` has it."""
        if self.type == "float32":
            transposed = self._tensors.get(name)
            values = self._array(f"{name}.weight") if transposed is None else self._array(name).T
            return StoredMatrix(np.ascontiguousarray(values))
        return StoredMatrix(None, *unpack_weight(np.asarray(self.panels(name)), WEIGHT_BITS[self.type], rows))

    def _array(self, name: str) -> np.ndarray:
        return read_tensor(self._tensors[name], self._package)
