"""Symmetric quantisation of dense weights and of memory rows. Pure NumPy; every function returns codes and scales.

A block of values that share one scale becomes integers q with value = scale * q, scale >= 0. The scale of 8 bits maps
the largest magnitude to 127. 4 bits have too few levels for that: the scale is the one, out of a few, that leaves the
least squared error, because clipping the largest value a little can buy precision for all the others.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .blocks import BLOCK, BLOCK_TYPES, Blocks, Codes, Floats

SOURCE = "source"
WEIGHT_TYPES = ("float32", "int8", "int4", SOURCE)
"""Of a package: all matrices float32 or int8, by `Int4Recipe`, or as the checkpoint has them."""
PRECISIONS = ("float16", "int8", "int4")
"""Of matrices on an NPU: all float16, or as a package with weights of that type has them."""
ROW_TYPES = {"float16": 1, "int8": 2, "int4": 3, "float32": 4}
"""Row types and their codes in a ROM's header."""
ROW_GROUP = 32
"""Values that share one scale, of an int4 row and where int8 rows have more than one."""

# The divisors of the largest magnitude that int4 tries as scale: 7 clips nothing, 8 uses the level -8.
_INT4_DIVISORS = (7.0, 6.0, 6.4, 6.8, 7.2, 7.6, 8.0, 8.5, 9.0)
_LEAST_FLOAT16 = np.float32(2**-24)
_INT4_PARTS = (1.0, 0.95, 1.05, 0.9, 0.85, 0.8)
"""Of the range of a block that its codes are spread over, with a minimum."""


def require_finite(values: Floats, what: str) -> None:
    """ValueError if a value is infinite or not a number."""
    if not np.isfinite(values).all():
        raise ValueError(f"{what}: has values that are infinite or not a number; expected finite weights")


def _float16_up(scales: Floats) -> Floats:
    """The least float16 values not below `scales` >= 0, so that no value divided by its scale leaves the range."""
    with np.errstate(over="ignore"):
        rounded = scales.astype(np.float16)
    # The next bit pattern of a positive float is the next greater float.
    bits = rounded.view(np.uint16) + (rounded < scales)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def _quantize(blocks: Floats, bits: int, what: str) -> tuple[NDArray[np.int8], Floats]:
    """blocks: [.., n] -> q int8 [.., n], scale [..] whose values float16 holds exactly.

    ValueError if a value is not finite or needs a scale beyond float16; `what` names the values in it.
    """
    require_finite(blocks, what)
    # [n, blocks], so that every pass below runs along contiguous blocks: the search is the cost of an export.
    columns = np.ascontiguousarray(blocks.reshape(-1, blocks.shape[-1]).T)
    largest = np.abs(columns).max(axis=0)
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    units, q = np.empty_like(columns), np.empty_like(columns)

    def round_to(scale: Floats) -> None:
        np.divide(columns, np.where(scale > 0, scale, 1), out=units)
        np.rint(units, out=q)
        np.clip(q, low, high, out=q)

    best_scale = np.zeros_like(largest)
    best_error = np.full_like(largest, np.inf)
    for divisor in (127.0,) if bits == 8 else _INT4_DIVISORS:
        scale = _float16_up(largest / np.float32(divisor))
        if np.isinf(scale).any():
            raise ValueError(f"{what}: largest magnitude {largest.max():g} needs a scale beyond float16's 65504")
        round_to(scale)
        np.square(np.subtract(units, q, out=units), out=units)
        error = units.sum(axis=0) * np.square(scale)
        better = error < best_error
        np.copyto(best_scale, scale, where=better)
        np.copyto(best_error, error, where=better)
    round_to(best_scale)
    codes = np.ascontiguousarray(q.astype(np.int8).T)
    return codes.reshape(blocks.shape), best_scale.reshape(blocks.shape[:-1])


def fit_blocks(columns: Floats, importance: Floats, minimum: bool, what: str) -> tuple[Floats, Floats]:
    """Scales and minimums, float16 values, of m blocks of 4 bits: those that leave about the least squared error.

    columns: float32 [n, m], finite, a block each; importance: of a value's squared error, > 0, [n, 1]; minimum: codes
    are 0 to 15 above a minimum, else -8 to 7 and the minimum is 0. -> [m] each, no scale is 0. Several ranges are
    tried, and for the codes of each the scale and the minimum that suit them best. ValueError for values beyond
    float16.
    """
    low, high = BLOCK_TYPES["int4_minimum" if minimum else "int4"].range
    largest = np.abs(columns).max()
    if largest > (65504 if minimum else 65504 * 8):
        raise ValueError(f"{what}: largest magnitude {largest:g} needs a scale beyond float16's 65504")
    weights = importance / importance.mean()
    best = np.full(columns.shape[1], np.inf, np.float32)
    best_scale, best_minimum = np.full_like(best, _LEAST_FLOAT16), np.zeros_like(best)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is not the best
        for scale, offset in _ranges(columns, minimum):
            for last in (False, False, True):
                scale, offset = _float16(scale), _float16(offset)
                scale = np.where(scale == 0, _LEAST_FLOAT16, scale)
                q = np.clip(np.rint((columns - offset) / scale), low, high)
                error = (weights * np.square(columns - (q * scale + offset))).sum(axis=0)
                better = error < best
                for kept, new in ((best, error), (best_scale, scale), (best_minimum, offset)):
                    np.copyto(kept, new, where=better)
                if not last:
                    scale, offset = _least_squares(columns, q, weights, minimum)
    return best_scale, best_minimum


def _ranges(columns: Floats, minimum: bool) -> Iterator[tuple[Floats, Floats]]:
    """Scales and minimums to begin with."""
    least, most = columns.min(axis=0), columns.max(axis=0)
    if minimum:
        for part in _INT4_PARTS:
            yield (most - least) * np.float32(part / 15), (most + least - (most - least) * np.float32(part)) / 2
        return
    zero = np.zeros_like(least)
    extreme = np.where(-least > most, least, most)  # a negative scale has 8 levels above zero
    for divisor in _INT4_DIVISORS:
        yield extreme / np.float32(divisor), zero
        yield extreme / np.float32(-divisor), zero


def _least_squares(columns: Floats, q: Floats, weights: Floats, minimum: bool) -> tuple[Floats, Floats]:
    """The scale and the minimum with which the codes `q` [n, m] come closest. weights: [n, 1]."""
    weighted = weights * q
    qq, qx = (weighted * q).sum(axis=0), (weighted * columns).sum(axis=0)
    if not minimum:
        return qx / np.where(qq > 0, qq, np.float32(1)), np.zeros_like(qq)
    w, sq, x = weights.sum(), weighted.sum(axis=0), (weights * columns).sum(axis=0)
    determinant = w * qq - sq * sq
    determinant = np.where(determinant > 0, determinant, np.float32(np.inf))  # with one code there is no line
    return (w * qx - sq * x) / determinant, (qq * x - sq * qx) / determinant


def _float16(values: Floats) -> Floats:
    return values.astype(np.float16).astype(np.float32)


def pack_nibbles(q: NDArray[np.int8]) -> Codes:
    """q in -8 .. 7, int8 [.., n] -> nibbles q + 8, uint8 [.., ceil(n / 2)], even elements low; a missing one is 8."""
    nibbles = (q + 8).astype(np.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = np.concatenate((nibbles, np.full((*nibbles.shape[:-1], 1), 8, np.uint8)), axis=-1)
    packed: Codes = np.bitwise_or(nibbles[..., ::2], nibbles[..., 1::2] << 4)
    return packed


def quantize_weight(weight: Floats, type: str, what: str) -> Blocks:
    """A matrix float32 [n, k], k inputs, in blocks; all inputs are equally important.

    type: int8, int4 or int4_minimum. ValueError if k is not a multiple of 32 or a weight is not finite or beyond
    float16; `what` names the tensor.
    """
    rows, inputs = weight.shape
    if inputs % BLOCK:
        raise ValueError(f"{what}: input dimension {inputs} is not a multiple of the quantisation block {BLOCK}")
    if type == "int8":
        q, scales = _quantize(weight.reshape(rows, -1, BLOCK), 8, what)
        return Blocks(type, q.reshape(rows, inputs), scales)
    require_finite(weight, what)
    columns, minimum = np.ascontiguousarray(weight.reshape(-1, BLOCK).T), BLOCK_TYPES[type].minimum
    scale, offset = fit_blocks(columns, np.ones((BLOCK, 1), np.float32), minimum, what)
    codes = round_to(columns, scale, offset, type).T.reshape(rows, inputs)
    return Blocks(type, codes, scale.reshape(rows, -1), offset.reshape(rows, -1) if minimum else None)


def round_to(columns: Floats, scale: Floats, minimum: Floats, type: str) -> NDArray[np.int8]:
    """The codes [.., m] of values [.., m] in blocks [m]."""
    return np.clip(np.rint((columns - minimum) / scale), *BLOCK_TYPES[type].range).astype(np.int8)


_SENSITIVE = ("v_proj", "per_layer_input_gate", "per_layer_projection")


class Int4Recipe:
    """What `--weights int4` makes of matrices, by name: int8 where 4 bits are felt most, else int4.

    In int8 are the embedding and the head, the value projections, the small matrices of a per-layer embedding, and of
    the first and the last eighth of the layers what leads out of the FFN (docs/quality.md has what each bought).
    """

    def __init__(self, layers: int) -> None:
        ends = -(-layers // 8)
        self._inner = range(ends, layers - ends)

    def type(self, name: str) -> str:
        if not name.startswith("layers."):
            return "int8"
        layer, matrix = name.split(".")[1], name.split(".")[-2]
        sensitive = matrix in _SENSITIVE or (matrix == "down_proj" and int(layer) not in self._inner)
        return "int8" if sensitive else "int4"

    def order(self, name: str) -> None:
        """Its own."""

    def read(self, name: str) -> Blocks | None:
        """None: each is rounded for itself."""
        return None


def row_group(row_type: str, row_dim: int) -> int:
    """Values of a row that share one scale, as `quantize_rows` has it; 0: there are no scales."""
    return {"float16": 0, "float32": 0, "int8": row_dim, "int4": ROW_GROUP}[row_type]


def row_bytes(row_type: str, row_dim: int) -> int:
    """Bytes of one layer's row, without scales."""
    return {"float16": 2 * row_dim, "float32": 4 * row_dim, "int8": row_dim, "int4": -(-row_dim // 2)}[row_type]


def quantize_rows(rows: Floats, row_type: str, what: str) -> tuple[Codes, NDArray[np.float16], Floats]:
    """Memory rows as docs/rom-format.md stores them.

    rows: float32 [.., row_dim] -> codes uint8 [.., row_bytes], scales float16 [.., groups] (0 groups for float rows),
    and the float32 values [.., row_dim] that a reader gets back. Quantised against the scale as float16 has it.
    ValueError if a value is not finite, or if it or its scale is beyond float16; `what` names the rows in it.
    """
    lead, row_dim = rows.shape[:-1], rows.shape[-1]
    no_scales = np.empty((*lead, 0), np.float16)
    if row_type == "float32":
        require_finite(rows, what)
        return np.ascontiguousarray(rows, "<f4").view(np.uint8), no_scales, rows
    if row_type == "float16":
        require_finite(rows, what)
        with np.errstate(over="ignore"):
            halves = rows.astype("<f2")
        if np.isinf(halves).any():
            raise ValueError(f"{what}: largest magnitude {np.abs(rows).max():g} is beyond float16's 65504")
        return halves.view(np.uint8), no_scales, halves.astype(np.float32)
    group = row_group(row_type, row_dim)
    groups = -(-row_dim // group)
    padded = np.zeros((*lead, groups * group), np.float32)
    padded[..., :row_dim] = rows
    blocks = padded.reshape(*lead, groups, group)
    q, scales = _quantize(blocks, 8 if row_type == "int8" else 4, what)
    values = (q * scales[..., None]).reshape(*lead, -1)[..., :row_dim]
    q = q.reshape(*lead, -1)[..., :row_dim]
    codes = q.view(np.uint8) if row_type == "int8" else pack_nibbles(q)
    return np.ascontiguousarray(codes), scales.astype(np.float16), values
