"""The dense weights on their way into a package: fetched by name, quantised, written once each, measured."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from ..blocks import PANEL, Blocks, Codes, Floats, pack_blocks
from ..quantize import quantize_weight, require_finite
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


def _pack_rows(exact: Floats, blocks: Callable[[slice], Blocks], rows: slice) -> tuple[Codes, float, float]:
    """The panels of some rows, their squared error and their squared sum."""
    its, values = blocks(rows), exact[rows]
    # Sums in float64 of squares in float32: the error is of interest to a few digits.
    squared_error = float(np.square(values - its.values()).sum(dtype=np.float64))
    return pack_blocks(its), squared_error, float(np.square(values).sum(dtype=np.float64))


def _quantized(weight: Floats, type: str, name: str, rows: slice) -> Blocks:
    return quantize_weight(weight[rows], type, name)


class MatrixBlocks(Protocol):
    """What matrices become, by their names in the PyTorch model: as a source has them, or by a recipe."""

    def type(self, name: str) -> str | None:
        """Of BLOCK_TYPES; None: the matrix stays float32."""

    def order(self, name: str) -> NDArray[np.int64] | None:
        """Of a matrix that has a type: which input each column is for; None: that of its own number."""

    def read(self, name: str) -> Blocks | None:
        """Of a matrix that has a type; None: it is to be rounded to that."""


@dataclass
class WeightStore:
    """Initialisers for the graphs of one model.

    Packed matrices, and other tensors of a page or more, go to the file of `tensors`; smaller ones go into the graphs.
    A tensor that several stages use is stored once. No tensor is in memory longer than it takes to write it.
    """

    weights: Weights
    tensors: TensorFile
    parameters: int
    """Of the whole model, for `progress`."""
    progress: Progress | None = None
    blocks: MatrixBlocks | None = None
    """None: all matrices are rounded to int8."""
    errors: WeightErrors = field(default_factory=WeightErrors)
    parts: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    """By name of a packed tensor, the type and the rows of each matrix in it; those of one type are one."""
    types: dict[str, int] = field(default_factory=dict)
    """Weights of matrices, by the type that they have now."""
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
            if array.ndim == 2:
                self._count("float32", array)
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def is_packed(self, parts: Sequence[str]) -> bool:
        """Whether matrices that belong together are packed; else they stay as they are, float32."""
        orders = [self.order([part]) for part in parts]
        alike = len({None if order is None else order.tobytes() for order in orders}) == 1
        return alike and None not in map(self._type, parts)

    def order(self, parts: Sequence[str]) -> NDArray[np.int64] | None:
        """Of packed matrices that belong together: which input each column is for; None: that of its own number."""
        return None if self.blocks is None else self.blocks.order(parts[0])

    def packed(self, name: str, parts: Sequence[str], alike: bool = False) -> TensorProto:
        """Weights [n, k] one below the other in panels, uint8 [bytes]; what each is, `parts` has.

        alike: all are to have one type, int8 if they come with several; every n but the last must be a multiple of a
        panel's 16 rows then. What is float32 where it can be, and must be packed here, becomes int8.
        """
        if name in self._tensors:
            return self._tensors[name]
        offset, its = self.tensors.align(), list[tuple[str, int]]()
        types, blocks = [self._type(part) or "int8" for part in parts], self.blocks
        if not self.is_packed(parts) or (alike and len(set(types)) > 1):
            types, blocks = ["int8"] * len(parts), None
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for part, type in zip(parts, types, strict=True):
                weight = self._fetch(part)
                known = blocks.read(part) if blocks else None
                of_rows = known.rows if known else functools.partial(_quantized, weight, type, part)
                self._write(pool, part, weight, of_rows)
                self._count(type, weight)
                if its and its[-1][0] == type and its[-1][1] % PANEL == 0:
                    its[-1] = (type, its[-1][1] + len(weight))
                else:
                    its.append((type, len(weight)))
        assert not alike or len(its) == 1, name
        self.parts[name] = its
        size = self.tensors.file.tell() - offset
        self._tensors[name] = tensor = self.tensors.external(name, TensorProto.UINT8, (size,), offset)
        return tensor

    def _count(self, type: str, weight: Floats) -> None:
        self.types[type] = self.types.get(type, 0) + weight.size

    def _type(self, part: str) -> str | None:
        return "int8" if self.blocks is None else self.blocks.type(part)

    def _write(self, pool: ThreadPoolExecutor, name: str, weight: Floats, of_rows: Callable[[slice], Blocks]) -> None:
        step = max(1, _WEIGHTS_AT_ONCE // (PANEL * weight.shape[1])) * PANEL
        slices = [slice(start, start + step) for start in range(0, len(weight), step)]
        squared_error = squared_sum = 0.0
        for packed, *squares in pool.map(functools.partial(_pack_rows, weight, of_rows), slices):
            self.tensors.file.write(packed.data)
            squared_error += squares[0]
            squared_sum += squares[1]
        self.errors.add(name, squared_error, squared_sum)

    def _fetch(self, name: str) -> Floats:
        array = self.weights(name)
        self._done += array.size
        if self.progress:
            self.progress(self._done, self.parameters)
        return array
