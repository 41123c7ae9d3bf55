"""The dense weights on their way into a package: fetched by name, quantised, written once each, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from .quantize import WEIGHT_BITS, Floats, dequantize_weight, quantize_weight, require_finite

WEIGHT_TYPES = ("float32", *WEIGHT_BITS)
WEIGHTS_FILE = "weights.bin"
_PAGE = 4096  # mmap wants offsets that are multiples of it; smaller tensors stay inside the graph
_ROWS_AT_ONCE = 4096  # rows of a matrix that are quantised together: bounds the memory

Weights = Callable[[str], Floats]
"""Gives a weight by its name in `Decoder.state_dict()`, float32."""
Progress = Callable[[int, int], object]
"""Called with (done, in all)."""


@dataclass
class WeightErrors:
    """Relative RMS errors of the quantised matrices, ||W - W'|| / ||W||."""

    worst: float = 0.0
    worst_tensor: str | None = None
    _squared_error: float = 0.0
    _squared_sum: float = 0.0

    @property
    def overall(self) -> float:
        return (self._squared_error / self._squared_sum) ** 0.5 if self._squared_sum else 0.0

    def add(self, name: str, squared_error: float, squared_sum: float) -> None:
        self._squared_error += squared_error
        self._squared_sum += squared_sum
        error = (squared_error / squared_sum) ** 0.5 if squared_sum else 0.0
        if error >= self.worst:
            self.worst, self.worst_tensor = error, name


@dataclass
class WeightStore:
    """Initialisers for the stages of one model.

    A tensor of a page or more goes to `file`, page-aligned so that it can be mapped, a smaller one into the graph. A
    tensor that two stages use is stored once.
    """

    weights: Weights
    weight_type: str
    file: BinaryIO
    parameters: int
    """Of the whole model, for `progress`."""
    progress: Progress | None = None
    errors: WeightErrors = field(default_factory=WeightErrors)
    _tensors: dict[str, TensorProto] = field(default_factory=dict)
    _done: int = 0

    def constant(self, name: str, make: Callable[[], np.ndarray]) -> TensorProto:
        """The tensor `name`; `make` is called the first time only."""
        if name not in self._tensors:
            self._tensors[name] = self._store(name, np.ascontiguousarray(make()))
        return self._tensors[name]

    def weight(self, name: str) -> TensorProto:
        """A weight as it is."""
        return self.constant(name, lambda: self._fetch(name))

    def transposed(self, name: str, parts: Sequence[str]) -> TensorProto:
        """Weights [n, k] one below the other, transposed to what MatMul takes: float32 [k, sum of n]."""
        return self.constant(name, lambda: np.concatenate([self._fetch(part) for part in parts]).T)

    def quantized(self, name: str, parts: Sequence[str]) -> tuple[TensorProto, TensorProto]:
        """Weights [n, k] one below the other, as codes uint8 [sum of n, k * bits / 8] and scales [sum of n, k / 32]."""
        codes, scales = f"{name}.codes", f"{name}.scales"
        if codes not in self._tensors:
            blocks = [block for part in parts for block in self._quantize(part)]
            self._tensors[codes] = self._store(codes, np.concatenate([block[0] for block in blocks]))
            self._tensors[scales] = self._store(scales, np.concatenate([block[1] for block in blocks]))
        return self._tensors[codes], self._tensors[scales]

    def _quantize(self, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
        weight, bits = self._fetch(name), WEIGHT_BITS[self.weight_type]
        blocks, squared_error, squared_sum = [], 0.0, 0.0
        for start in range(0, len(weight), _ROWS_AT_ONCE):
            exact = weight[start : start + _ROWS_AT_ONCE]
            codes, scales = quantize_weight(exact, bits, name)
            squared_error += float(np.square(exact - dequantize_weight(codes, scales, bits), dtype=np.float64).sum())
            squared_sum += float(np.square(exact, dtype=np.float64).sum())
            blocks.append((codes, scales))
        self.errors.add(name, squared_error, squared_sum)
        return blocks

    def _fetch(self, name: str) -> Floats:
        array = self.weights(name)
        require_finite(array, name)
        self._done += array.size
        if self.progress:
            self.progress(self._done, self.parameters)
        return array

    def _store(self, name: str, array: np.ndarray) -> TensorProto:
        if array.nbytes < _PAGE:
            return numpy_helper.from_array(array, name)
        self.file.write(bytes(-self.file.tell() % _PAGE))
        # set_external_data insists on raw_data, of which an external tensor has none.
        data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, dims=array.shape, data_type=data_type, raw_data=b"")
        external_data_helper.set_external_data(tensor, WEIGHTS_FILE, self.file.tell(), array.nbytes)
        tensor.ClearField("raw_data")
        self.file.write(array.data)
        return tensor
