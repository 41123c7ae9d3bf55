"""The weights of a package, read back for another kind of graph: the same values, no second quantisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from ..architectures import read_config
from ..graph.npu import Halves, to_float16
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

    def float16(self, name: str, rows: int) -> Halves:
        """A matrix of so many rows. name: as `Primitives.linear` has it."""
        if self.type == "float32":
            transposed = self._tensors.get(name)
            values = self._array(f"{name}.weight") if transposed is None else self._array(name).T
            return to_float16(np.asarray(values), name)
        codes, scales = self.codes(name, rows)
        halves = np.empty((rows, codes[0].size), np.float16)
        for start in range(0, rows, 4096):  # a block of rows at a time: float32 copies of a head are large
            block = slice(start, start + 4096)
            values = codes[block] * scales[block, :, None]
            halves[block] = to_float16(values.reshape(len(values), -1), name)
        return halves

    def codes(self, name: str, rows: int) -> tuple[NDArray[np.int8], Floats]:
        """The codes and scales of a packed matrix of so many rows."""
        return unpack_weight(np.asarray(self.panels(name)), WEIGHT_BITS[self.type], rows)

    def _array(self, name: str) -> np.ndarray:
        return read_tensor(self._tensors[name], self._package)
