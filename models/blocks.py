"""Matrices in blocks: codes with a scale, and a minimum, for every few inputs; and how a package packs them.

A value is scale * code, plus minimum where the type has one. Scales and minimums are float16 values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

BLOCK = 32
"""Inputs that a packed block has."""
PANEL = 16
"""Rows of a matrix that are packed together."""


@dataclass(frozen=True)
class BlockType:
    code: int
    """In a package's graphs (docs/package-format.md)."""
    bits: int
    minimum: bool = False
    group: int = BLOCK
    """Inputs that share a scale."""

    @property
    def zero(self) -> int:
        """What a code of 0 is stored as: codes are unsigned in a package."""
        return 128 if self.bits == 8 else -self.range[0]

    @property
    def range(self) -> tuple[int, int]:
        """Least and greatest code."""
        if self.bits == 4:
            return (0, 15) if self.minimum else (-8, 7)
        return (-128, 127)

    @property
    def block_bytes(self) -> int:
        """Of a block of BLOCK inputs of PANEL rows."""
        return PANEL * (BLOCK * self.bits // 8 + 2 * (BLOCK // self.group + self.minimum))

    @property
    def bits_per_weight(self) -> float:
        return self.block_bytes * 8 / (PANEL * BLOCK)


BLOCK_TYPES: Mapping[str, BlockType] = {
    "int8": BlockType(1, 8),
    "int4": BlockType(2, 4),
    "int4_minimum": BlockType(3, 4, minimum=True),
    "int8_minimum": BlockType(4, 8, minimum=True),
    "int8_16": BlockType(5, 8, group=16),
}


@dataclass(frozen=True)
class Blocks:
    """A matrix [n, k], k a multiple of BLOCK."""

    type: str
    """Of BLOCK_TYPES."""
    codes: NDArray[np.int8]
    """[n, k]"""
    scales: Floats
    """[n, k / group]"""
    minimums: Floats | None = None
    """[n, k / group], of a type that has them."""
    order: NDArray[np.int64] | None = field(default=None, kw_only=True)
    """[k]: which input each column of codes is for; None: that of its own number."""

    def values(self) -> Floats:
        """What they stand for, float32 [n, k], inputs in their own order."""
        group = BLOCK_TYPES[self.type].group
        grouped = self.codes.reshape(*self.scales.shape, group) * self.scales[..., None]
        if self.minimums is not None:
            grouped += self.minimums[..., None]
        values = grouped.reshape(self.codes.shape)
        return values if self.order is None else values[:, np.argsort(self.order)]

    def rows(self, rows: slice) -> Blocks:
        """Some of the matrix."""
        minimums = None if self.minimums is None else self.minimums[rows]
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], minimums=minimums)


def pack_blocks(blocks: Blocks) -> Codes:
    """Panels as docs/package-format.md has them, uint8 [ceil(n / 16), k / 32, bytes of a block], without the order of
    the columns. What fills the last panel is zero."""
    its, missing = BLOCK_TYPES[blocks.type], -len(blocks.codes) % PANEL
    codes = np.pad(blocks.codes, ((0, missing), (0, 0)))
    panels, groups = len(codes) // PANEL, codes.shape[1] // BLOCK
    # Four inputs of a row stand together, the unit of a dot product instruction; 4 bits pair two halves of a block.
    fours = codes.reshape(panels, PANEL, groups, BLOCK // 4, 4).transpose(0, 2, 3, 1, 4)
    stored = fours.view(np.uint8) + np.uint8(its.zero)  # modulo 256
    if its.bits == 4:
        stored = np.bitwise_or(stored[:, :, :4], stored[:, :, 4:] << 4)
    parts = [stored.reshape(panels, groups, -1)]
    for halves in (blocks.scales, blocks.minimums):
        if halves is not None:
            padded = np.pad(halves.astype("<f2"), ((0, missing), (0, 0))).reshape(panels, PANEL, groups, -1)
            parts.append(np.ascontiguousarray(padded.transpose(0, 2, 3, 1)).view(np.uint8).reshape(panels, groups, -1))
    return np.concatenate(parts, axis=-1)


def unpack_blocks(packed: Codes, type: str, rows: int) -> Blocks:
    """The inverse, for the first `rows` rows."""
    its, (panels, groups, _) = BLOCK_TYPES[type], packed.shape
    codes, halves = np.split(packed, [PANEL * BLOCK * its.bits // 8], axis=-1)
    if its.bits == 4:
        codes = np.concatenate((codes & 15, codes >> 4), axis=-1)
    fours = codes.reshape(panels, groups, BLOCK // 4, PANEL, 4).transpose(0, 3, 1, 2, 4)
    whole = (fours - np.uint8(its.zero)).view(np.int8).reshape(panels * PANEL, groups * BLOCK)
    floats = np.ascontiguousarray(halves).view("<f2").astype(np.float32).reshape(panels, groups, -1, PANEL)
    by_row = floats.transpose(0, 3, 1, 2).reshape(panels * PANEL, groups, -1)
    scales = by_row[:rows, :, : BLOCK // its.group].reshape(rows, -1)
    return Blocks(type, whole[:rows], scales, by_row[:rows, :, -1] if its.minimum else None)
