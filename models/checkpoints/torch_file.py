"""Files of torch.save: loaded without running what they hold, and their tensors read without keeping them in memory."""

from __future__ import annotations

import argparse
import contextlib
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..memories.base import ALL
from .checkpoint import CheckpointError, check_fetched

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Inert:
    """Stands in for a class or function that a checkpoint names: takes any arguments and any state, does nothing."""

    def __new__(cls, *args: object) -> Inert:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def is_torch_zip(path: Path) -> bool:
    """Whether `path` begins as torch.save's files do: a zip whose first member is NAME/data.pkl."""
    with path.open("rb") as file:
        header = file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            return False
        (length,) = struct.unpack_from("<H", header, 26)
        return file.read(length).endswith(b"/data.pkl")


def load_torch_file(path: Path, stand_ins: frozenset[str]) -> object:
    """What torch.save wrote to `path`; its tensors are fakes that know their shapes and places alone.

    stand_ins: qualified names that the file may use beside tensors and argparse.Namespace; each is an `Inert`.
    CheckpointError for a file that names anything else, before anything is unpickled, and for a damaged one.
    """
    check_fetched(path)
    _records(path)  # is a complete zip, in this machine's byte order, which torch.load relies on
    allowed = [(Inert, name) for name in sorted(stand_ins)]
    with _damage_reported(path), torch.serialization.safe_globals([argparse.Namespace, *allowed]):
        unknown = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        if not unknown:
            # No storage is read or mapped; the optimizer's state is some times the size of the model.
            with FakeTensorMode():
                return torch.load(path, weights_only=True, map_location="cpu")
    wanted = ", ".join(map(repr, unknown[:5])) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
    raise CheckpointError(
        f"{path}: refused, its pickle wants {wanted}; expected tensors, plain values and what Megatron-LM "
        "0.12 stores. If you trust it, load it where it was trained and save only its model and args, as the "
        "documentation of Megatron checkpoints shows"
    )


@contextlib.contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        # The line between torch.load's advice to trust the file and its reference to the documentation.
        reason = str(error).partition("\n\nCheck the documentation")[0].splitlines()[-1]
        raise CheckpointError(f"{path}: refused, its pickle does what weights do not need: {reason}") from error
    except Exception as error:  # what a damaged pickle or zip raises is anything
        reason = str(error).partition("\n")[0] or repr(error)
        raise CheckpointError(f"{path}: not a complete file of torch.save: {reason}; copy it again") from error


def _records(path: Path) -> dict[int, int]:
    """Where the uncompressed members of a zip begin, and their sizes in bytes. CheckpointError."""
    records = {}
    with path.open("rb") as file, _damage_reported(path), zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.filename.endswith("/byteorder") and archive.read(info) != b"little":
                raise ValueError("written on a big-endian machine")
            if info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                records[info.header_offset + 30 + name + extra] = info.file_size
    return records


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0


class TorchFile:
    """Tensors of a file of torch.save, read from it piece by piece: nothing is mapped, nothing stays resident."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """tensors: of `load_torch_file(path)`. CheckpointError for one that is no float tensor or not in the file."""
        self._path = path
        self._places: dict[str, tuple[FakeTensor, int]] = {}
        """Each tensor, and where its first element is, in bytes from the beginning of the file."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        records = _records(path)
        for name, tensor in tensors.items():
            if not isinstance(tensor, FakeTensor) or tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
                raise CheckpointError(
                    f"{path}: tensor {name} is a {type(tensor).__name__} of {tensor.dtype}, {tensor.layout}; "
                    f"expected a dense one of {', '.join(map(str, _DTYPES))}"
                )
            shape, stride, first = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
            begin = tensor.untyped_storage()._checkpoint_offset or 0  # FakeTensorMode says where it is in the file
            extent = _extent(shape, stride)
            needed, there = (first + extent) * tensor.itemsize if extent else 0, records.get(begin, 0)
            if needed > there:
                raise CheckpointError(
                    f"{path}: tensor {name} of shape {list(shape)} needs {needed} bytes, its member of the zip has "
                    f"{there}; the file is damaged, copy it again"
                )
            self._places[name] = tensor, begin + first * tensor.itemsize
            self.shapes[name] = shape

    def read(self, name: str, rows: slice = ALL) -> Tensor:
        """float32 on the CPU; those rows of dimension 0."""
        (tensor, offset), shape = self._places[name], self.shapes[name]
        stride = tensor.stride()
        if shape:
            start, stop, _ = rows.indices(shape[0])
            shape, offset = (max(0, stop - start), *shape[1:]), offset + start * stride[0] * tensor.itemsize
        stored = torch.empty(_extent(shape, stride), dtype=tensor.dtype)
        with self._path.open("rb") as file:
            file.seek(offset)
            if file.readinto(stored.view(torch.uint8).numpy().data) != stored.nbytes:
                raise CheckpointError(f"{self._path}: tensor {name} is cut off; the file changed while it was read")
        return stored.as_strided(shape, stride).float()
