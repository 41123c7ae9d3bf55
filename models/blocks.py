"""Matrices in blocks: codes with a scale, and a minimum, for every few inputs; and how a package packs them.

A value is scale * code, plus minimum where the type has one. Scales and minimums are float16 values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

    def values(self) -> Floats:
        """What they stand for, float32 [n, k]."""
        rows, inputs = self.codes.shape
        grouped = self.codes.reshape(rows, self.scales.shape[1], -1) * self.scales[..., None]
        if self.minimums is not None:
            grouped += self.minimums[..., None]
        return grouped.reshape(rows, inputs)
