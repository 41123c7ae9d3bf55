"""Writes memory.rom (docs/rom-format.md): folded rows, bundle by bundle, in bounded memory."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from meki.package.files import replace_file

from .blocks import BLOCK_TYPES, Codes, Floats
from .quantize import ROW_GROUP, ROW_TYPES, pack_nibbles, quantize_rows, row_bytes, row_group

MAGIC = b"MEKIROM\n"
VERSION = 1
BYTE_ORDER_MARK = 0x01020304
DATA_OFFSET = 4096
ALIGNMENT = 4096
BUNDLE_ALIGNMENT = 64
SMALL_BUNDLE = 256
SMALL_BUNDLE_ALIGNMENT = 4


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class RomLayout:
    """What a ROM's header says. ValueError for a shape that the format cannot hold."""

    entries: int
    layers: int
    row_dim: int
    row_type: str
    grouped: bool = False
    """int8 rows have a scale for every 32 values, as int4 rows have, in place of one a row."""

    def __post_init__(self) -> None:
        if self.row_type not in ROW_TYPES:
            raise ValueError(f"row type: got {self.row_type!r}, expected one of {', '.join(ROW_TYPES)}")
        if self.grouped and self.row_type not in ("int8", "int4"):
            raise ValueError(f"row type: got {self.row_type!r} with scales, which only int8 and int4 rows have")
        for field, limit in (("entries", 2**31 - 1), ("layers", 65_535), ("row_dim", 1_048_576)):
            if not 1 <= getattr(self, field) <= limit:
                raise ValueError(f"ROM {field}: got {getattr(self, field)}, expected 1 to {limit}")

    @property
    def group(self) -> int:
        return ROW_GROUP if self.grouped else row_group(self.row_type, self.row_dim)

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return -(-self.row_dim // self.group) if self.group else 0

    @property
    def bundle_bytes(self) -> int:
        return self.layers * (2 * self.groups + row_bytes(self.row_type, self.row_dim)) + 4

    @property
    def bundle_stride(self) -> int:
        # Of single rows, padding to whole cache lines would be a good part of the file.
        small = self.bundle_bytes < SMALL_BUNDLE
        return _round_up(self.bundle_bytes, SMALL_BUNDLE_ALIGNMENT if small else BUNDLE_ALIGNMENT)

    @property
    def file_bytes(self) -> int:
        return _round_up(DATA_OFFSET + self.entries * self.bundle_stride, ALIGNMENT)

    def header(self, content_id: bytes) -> bytes:
        """The first 4096 bytes."""
        fields = struct.pack(
            "<8sIIQIIIIQQQQ16s",
            *(MAGIC, VERSION, BYTE_ORDER_MARK),
            *(self.entries, self.layers, self.row_dim, ROW_TYPES[self.row_type], self.group),
            *(self.bundle_bytes, self.bundle_stride, DATA_OFFSET, self.file_bytes, content_id),
        )
        padded = fields.ljust(DATA_OFFSET - 4, b"\0")
        return padded + struct.pack("<I", crc32c(padded))

    def bundles(self, codes: Codes, scales: np.ndarray) -> Codes:
        """Bundles as they stand in the file, uint8 [n, bundle_stride].

        codes: uint8 [n, layers, row_bytes]; scales: float16 [n, layers, groups].
        """
        count = len(codes)
        payload = np.concatenate(
            (scales.astype("<f2").reshape(count, -1).view(np.uint8), codes.reshape(count, -1)), axis=1
        )
        sums = np.array([crc32c(bundle) for bundle in payload], dtype="<u4")
        bundles = np.zeros((count, self.bundle_stride), np.uint8)
        bundles[:, : self.bundle_bytes - 4] = payload
        bundles[:, self.bundle_bytes - 4 : self.bundle_bytes] = sums[:, None].view(np.uint8)
        return bundles


@dataclass(frozen=True)
class StoredRows:
    """Rows of n bundles that are codes and scales already, of either sign: a value is scale * code."""

    codes: NDArray[np.int8]
    """[layers, n, row_dim]"""
    scales: NDArray[np.float16]
    """[layers, n, groups]"""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape


@dataclass(frozen=True)
class RomSummary:
    content_id: str
    """32 hexadecimal digits."""
    relative_error: float
    """Root of the mean squared error of the stored values, divided by the root mean square of the exact ones."""


def _pack_stored(rows: StoredRows, layout: RomLayout, where: str) -> tuple[Codes, NDArray[np.float16]]:
    """What `RomLayout.bundles` takes. ValueError as of `write_rom`."""
    if layout.groups == 0 or rows.scales.shape != (*rows.shape[:2], layout.groups):
        raise ValueError(f"{where}: codes {rows.shape} with scales {rows.scales.shape} do not fit {layout}")
    if not np.isfinite(rows.scales).all():
        raise ValueError(f"{where}: has scales that are infinite or not a number; expected finite ones")
    low, high = BLOCK_TYPES[layout.row_type].range
    if rows.codes.min() < low or rows.codes.max() > high:
        raise ValueError(f"{where}: codes are {rows.codes.min()} to {rows.codes.max()}, expected {low} to {high}")
    codes = np.ascontiguousarray(rows.codes.transpose(1, 0, 2))
    packed = codes.view(np.uint8) if layout.row_type == "int8" else pack_nibbles(codes)
    return packed, np.ascontiguousarray(rows.scales.transpose(1, 0, 2))


def write_rom(
    path: Path,
    layout: RomLayout,
    blocks: Iterable[Floats | StoredRows],
    progress: Callable[[int, int], object] | None = None,
) -> RomSummary:
    """Writes a ROM under a temporary name and renames it when it is complete.

    blocks: float32 [layers, n, row_dim] each, the rows of the next n bundles, or what they are stored as, which is
    written as it is; together all bundles in order. Only one block is in memory. progress: called with (bundles
    written, bundles in all). ValueError if the blocks do not fit the layout, or if a value or a scale is not finite or
    a value or a code beyond the row type's range.
    """
    digest = hashlib.sha256()
    first, squared_error, squared_sum = 0, 0.0, 0.0
    with replace_file(path) as partial, partial.open("wb") as file:
        file.write(bytes(DATA_OFFSET))
        for block in blocks:
            last = first + block.shape[1]
            if block.shape[0] != layout.layers or block.shape[2] != layout.row_dim or last > layout.entries:
                raise ValueError(f"{path}: rows {block.shape} of bundles {first} to {last - 1} do not fit {layout}")
            where = f"memory rows of bundles {first} to {last - 1}"
            if isinstance(block, StoredRows):
                codes, scales = _pack_stored(block, layout, where)
            elif layout.group != row_group(layout.row_type, layout.row_dim):
                raise ValueError(f"{where}: float32 values do not fit {layout}, expected codes and scales")
            else:
                rows = np.ascontiguousarray(block.transpose(1, 0, 2), dtype=np.float32)
                codes, scales, values = quantize_rows(rows, layout.row_type, where)
                squared_error += float(np.square(rows - values, dtype=np.float64).sum())
                squared_sum += float(np.square(rows, dtype=np.float64).sum())
            bundles = layout.bundles(codes, scales)
            digest.update(bundles.data)
            file.write(bundles.data)
            first = last
            if progress:
                progress(first, layout.entries)
        if first != layout.entries:
            raise ValueError(f"{path}: got rows of {first} bundles, expected {layout.entries}")
        tail = bytes(layout.file_bytes - file.tell())
        digest.update(tail)
        file.write(tail)
        content_id = digest.digest()[:16]
        file.seek(0)
        file.write(layout.header(content_id))
    return RomSummary(content_id.hex(), (squared_error / squared_sum) ** 0.5 if squared_sum else 0.0)
