"""The weights of a package, read back for another kind of graph: the same values, no second quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from ..config import ModelConfig
from ..quantize import WEIGHT_BITS, Codes, Floats, unpack_weight
from ..tensors import read_tensor
from . import CompileError

Halves = NDArray[np.float16]


@dataclass(frozen=True)
class Matrix:
    """n rows and k columns: either values, float32 [n, k], or codes, int8 [n, k / 32, 32], with a scale each block."""

    values: Floats | None
    codes: NDArray[np.int8] | None = None
    scales: Floats | None = None
    """float32 [n, k / 32], of values that float16 holds."""

    def float16(self, what: str) -> Halves:
        """The values, [n, k]. CompileError, naming `what`, if float16 does not hold them."""
        if self.values is not None:
            return to_float16(self.values, what)
        assert self.codes is not None and self.scales is not None
        halves = np.empty((len(self.codes), self.codes[0].size), np.float16)
        for start in range(0, len(halves), 4096):  # a block of rows at a time: float32 copies of a head are large
            rows = slice(start, start + 4096)
            values = self.codes[rows] * self.scales[rows, :, None]
            halves[rows] = to_float16(values.reshape(len(values), -1), what)
        return halves


def to_float16(values: NDArray[np.floating], what: str) -> Halves:
    """CompileError, naming `what`, for values beyond float16."""
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise CompileError(f"{what}: largest magnitude {np.abs(values).max():g} is beyond float16's 65504")
    return halves


class PackageWeights:
    """The weights that the graphs of a package refer to, by their names in models/graph.py. Large ones are mapped."""

    def __init__(self, package: Path, manifest: dict[str, Any]) -> None:
        self.config = ModelConfig.from_dict(manifest["architecture"])
        self.type: str = manifest["weights"]["type"]
        self._package = package
        self._tensors: dict[str, TensorProto] = {}
        for stage in manifest["stages"]:
            graph = onnx.load(package / stage["file"], load_external_data=False).graph
            self._tensors |= {tensor.name: tensor for tensor in graph.initializer}

    def vector(self, name: str) -> Floats:
        """A gain, a bias or a table as it is, float32."""
        return np.asarray(self._array(name), np.float32)

    def panels(self, name: str) -> Codes:
        """A packed matrix as the runtime's operators take it."""
        return self._array(f"{name}.panels")

    def matrix(self, name: str, first: int, last: int) -> Matrix:
        """Rows first .. last - 1 of the matrix of a linear layer. name: as `Stage.linear` has it."""
        if self.type == "float32":
            transposed = self._tensors.get(name)
            values = self._array(f"{name}.weight") if transposed is None else self._array(name).T
            return Matrix(np.ascontiguousarray(values[first:last]))
        codes, scales = unpack_weight(np.asarray(self.panels(name)), WEIGHT_BITS[self.type], last)
        return Matrix(None, codes[first:], scales[first:])

    def memory_gate(self, layer: int) -> Matrix:
        """W_gate, [memory_dim, hidden]. A packed one stands below the FFN's, but for layer 0's."""
        name, width = f"layers.{layer}", self.config.memory_dim
        if self.type == "float32" or layer == 0:
            return self.matrix(f"{name}.meki.gate_proj", 0, width)
        above = 2 * self.config.ffn
        return self.matrix(f"{name}.mlp.gate_up", above, above + width)

    def head(self) -> Matrix:
        """What gives the logits, [vocab_size, hidden]."""
        name = "embed_tokens" if self.config.tied_embeddings else "lm_head"
        return self.matrix(name, 0, self.config.vocab_size)

    def _array(self, name: str) -> np.ndarray:
        return read_tensor(self._tensors[name], self._package)
