"""Initialisers of ONNX graphs, and the file in which the large ones lie (ONNX external data)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from onnx import TensorProto, external_data_helper, helper, numpy_helper

_PAGE = 4096  # mmap wants offsets that are multiples of it; smaller tensors stay inside the graph


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of an initialiser's values, in the graph or outside."""
    return math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def read_tensor(tensor: TensorProto, directory: Path) -> np.ndarray:
    """The values of an initialiser of a graph in `directory`; a large one is mapped, not read."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    data_type = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    path, shape = directory / entries["location"], tuple(tensor.dims)
    return np.memmap(path, data_type, mode="r", offset=int(entries["offset"]), shape=shape)


@dataclass
class TensorFile:
    """Where the values of large initialisers are written, each from a page of its own, so that they can be mapped."""

    file: BinaryIO
    """In the directory of the graphs that use it."""

    def store(self, name: str, array: np.ndarray) -> TensorProto:
        """An initialiser: inside the graph if it is smaller than a page, else in the file. array: C-contiguous."""
        if array.nbytes < _PAGE:
            return numpy_helper.from_array(array, name)
        offset = self.align()
        self.file.write(array.data)
        return self.external(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, offset)

    def align(self) -> int:
        """Where the next tensor begins."""
        self.file.write(bytes(-self.file.tell() % _PAGE))
        return self.file.tell()

    def external(self, name: str, data_type: int, shape: Sequence[int], offset: int) -> TensorProto:
        """The tensor that lies in the file from `offset`."""
        # set_external_data insists on raw_data, of which an external tensor has none.
        tensor = TensorProto(name=name, dims=shape, data_type=data_type, raw_data=b"")
        external_data_helper.set_external_data(tensor, Path(self.file.name).name, offset, tensor_bytes(tensor))
        tensor.ClearField("raw_data")
        return tensor
