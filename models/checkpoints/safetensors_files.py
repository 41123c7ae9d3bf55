"""The tensors of safetensors files."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..memories.base import ALL
from .checkpoint import CheckpointError, check_fetched

_REOPEN_BYTES = 1 << 30  # mapped pages that were read stay resident until the file is closed


class SafetensorsFiles:
    """The tensors of one or several safetensors files."""

    def __init__(self, paths: list[Path]) -> None:
        """CheckpointError for a file that is missing or damaged, and for a tensor that is in two of them."""
        self.paths: dict[str, Path] = {}
        """The file of each tensor."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        """As safetensors calls them: F32, I32, .."""
        self._open_path: Path | None = None
        self._bytes = 0
        if missing := [path for path in paths if not path.is_file()]:
            raise CheckpointError(
                f"{missing[0]}: no such file, of the {len(paths)} with weights {len(missing)} are missing; the "
                "download is incomplete, download the model again"
            )
        for path in paths:
            check_fetched(path)
            self._open(path)
            for name in self._handle.keys():  # noqa: SIM118 (not a mapping)
                if name in self.paths:
                    raise CheckpointError(f"{path}: tensor {name} is also in {self.paths[name].name}; expected it once")
                self.paths[name] = path
                stored = self._handle.get_slice(name)
                self.shapes[name], self.types[name] = tuple(stored.get_shape()), stored.get_dtype()

    def read(self, name: str, rows: slice = ALL) -> Tensor:
        stored = self._mapped(name, (rows,))
        return torch.empty(stored.shape, dtype=torch.float32).copy_(stored)  # never a view of the mapping

    def stored(self, name: str, *index: slice) -> Tensor:
        """Of the type that it is stored as; those rows, columns, .."""
        return self._mapped(name, index).clone()

    def _mapped(self, name: str, index: tuple[slice, ...]) -> Tensor:
        path = self.paths[name]
        if path != self._open_path or self._bytes > _REOPEN_BYTES:
            self._open(path)
        whole = all(part == ALL for part in index)
        values: Tensor = self._handle.get_tensor(name) if whole else self._handle.get_slice(name)[index]
        self._bytes += values.nbytes
        return values

    def _open(self, path: Path) -> None:
        try:
            self._handle = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a complete safetensors file: {error}; download it again") from error
        self._open_path, self._bytes = path, 0
