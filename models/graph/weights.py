"""The dense weights on their way into a package: fetched by name, quantised, written once each, measured."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from ..quantize import PANEL, WEIGHT_BITS, Codes, Floats, quantize_weight, require_finite
from .tensors import TensorFile

WEIGHTS_FILE = "weights.bin"
_WEIGHTS_AT_ONCE = 1 << 17  # weights that a thread quantises together: what a core's cache holds a few copies of

Weights = Callable[[str], Floats]
"""Gives a weight by its name in the PyTorch model, float32."""
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


def _quantize_rows(weight: Floats, bits: int, name: str, rows: slice) -> tuple[Codes, float, float]:
    """The panels of some rows, their squared error and their squared sum."""
    exact = weight[rows]
    packed, values = quantize_weight(exact, bits, name)
    # Sums in float64 of squares in float32: the error is of interest to a few digits.
    squared_error = float(np.square(exact - values).sum(dtype=np.float64))
    return packed, squared_error, float(np.square(exact).sum(dtype=np.float64))


@dataclass
class WeightStore:
    """Initialisers for the graphs of one model.

    Packed matrices, and other tensors of a page or more, go to the file of `tensors`; smaller ones go into the graphs.
    A tensor that several stages use is stored once. No tensor is in memory longer than it takes to write it.
    """

    weights: Weights
    weight_type: str
    tensors: TensorFile
    parameters: int
    """Of the whole model, for `progress`."""
    progress: Progress | None = None
    errors: WeightErrors = field(default_factory=WeightErrors)
    _tensors: dict[str, TensorProto] = field(default_factory=dict)
    _done: int = 0

    def constant(self, name: str, make: Callable[[], np.ndarray]) -> TensorProto:
        """The tensor `name`; `make` is called the first time only."""
        if name not in self._tensors:
            self._tensors[name] = self.tensors.store(name, np.ascontiguousarray(make()))
        return self._tensors[name]

    def joined(self, parts: Sequence[str]) -> Floats:
        """Weights [n, ..] one below the other: float32 [sum of n, ..]. ValueError for values that are not finite."""
        arrays = [self._fetch(part) for part in parts]
        for part, array in zip(parts, arrays, strict=True):
            require_finite(array, part)
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def packed(self, name: str, parts: Sequence[str]) -> TensorProto:
        """Weights [n, k] one below the other in the panels of `quantize_weight`.

        Every n but the last must be a multiple of a panel's 16 rows.
        """
        if name in self._tensors:
            return self._tensors[name]
        bits, offset, outputs, shape = WEIGHT_BITS[self.weight_type], self.tensors.align(), 0, (0, 0)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for part in parts:
                assert outputs % PANEL == 0, part
                weight = self._fetch(part)
                outputs += len(weight)
                squared_error = squared_sum = 0.0
                step = max(1, _WEIGHTS_AT_ONCE // (PANEL * weight.shape[1])) * PANEL
                slices = [slice(start, start + step) for start in range(0, len(weight), step)]
                for packed, *squares in pool.map(functools.partial(_quantize_rows, weight, bits, part), slices):
                    self.tensors.file.write(packed.data)
                    squared_error += squares[0]
                    squared_sum += squares[1]
                    shape = packed.shape[1:]
                self.errors.add(part, squared_error, squared_sum)
        tensor = self.tensors.external(name, TensorProto.UINT8, (-(-outputs // PANEL), *shape), offset)
        self._tensors[name] = tensor
        return tensor

    def _fetch(self, name: str) -> Floats:
        array = self.weights(name)
        self._done += array.size
        if self.progress:
            self.progress(self._done, self.parameters)
        return array
