"""GGUF's quantised types as Blocks: what a file holds, rearranged.

A block of a file is a run of inputs of one row; where its fields lie is what the `gguf` package reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from ..blocks import BLOCK, BLOCK_TYPES, Blocks, Codes, Floats

_Parts = tuple[Codes, Floats] | tuple[Codes, Floats, Floats]
"""Codes [blocks, inputs], in two's complement; scales and, of a type that has them, minimums [blocks, groups]."""


def empty_blocks(type: GGMLQuantizationType, rows: int, inputs: int) -> Blocks | None:
    """Blocks of any contents for what `unpack` makes of such a matrix; None for a type that no block type holds."""
    if type.name not in _TYPES:
        return None
    kind, _ = _TYPES[type.name]
    factors = (rows, inputs // BLOCK_TYPES[kind].group)
    minimums = np.empty(factors, np.float32) if BLOCK_TYPES[kind].minimum else None
    return Blocks(kind, np.empty((rows, inputs), np.int8), np.empty(factors, np.float32), minimums)


def unpack(raw: Codes, type: GGMLQuantizationType) -> Blocks | None:
    """Rows of a matrix as a file holds them. raw: [rows, bytes of a row].

    None for a type that no block type holds, and for MXFP4 with a scale that float16 does not hold. Scales have the
    file's sign, often a negative one. Codes are the file's own, and so are scales and minimums that it stores as such.
    Q3_K, Q4_K, Q5_K, Q6_K and IQ4_XS have them as products, which are rounded to float16: by at most 2^-11 of one, or
    2^-25 where it is less than 2^-14. Of the weights of SmolLM2-135M that is 0.07 % (RMS) in Q4_K and 0.02 % in Q6_K,
    which themselves are 3.5 % and 2.0 % off. ValueError for one that float16 does not hold: above 65504, or no number.
    """
    if type.name not in _TYPES:
        return None
    kind, parts_of = _TYPES[type.name]
    inputs, size = GGML_QUANT_SIZES[type]
    rows, width, group = len(raw), raw.shape[1] // size * inputs, BLOCK_TYPES[kind].group
    with np.errstate(over="ignore", invalid="ignore"):  # which _finite finds
        parts = parts_of(raw.reshape(-1, size))
        if parts is None:
            return None
        codes, *factors = parts
        halves = [values.astype(np.float16).reshape(rows, width // group) for values in factors]
    return Blocks(kind, codes.view(np.int8).reshape(rows, width), *map(_finite, halves))


def _finite(values: NDArray[np.float16]) -> Floats:
    if not np.isfinite(values).all():
        raise ValueError("a scale or minimum is beyond 65504 or no number, expected what float16 holds")
    return values.astype(np.float32)


def _cut(blocks: Codes, *ends: int) -> list[Codes]:
    """The fields of blocks, of which each but the last ends where `ends` says."""
    return np.split(blocks, ends, axis=1)


def _floats(field: Codes) -> Floats:
    return field.view("<f2").astype(np.float32)


def _bits(packed: Codes, bits: int, run: int) -> Codes:
    """The codes in bytes: of each `run` of them first the lowest `bits` of all, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    codes = packed.reshape(len(packed), packed.shape[1] // run, 1, run) >> shifts & np.uint8((1 << bits) - 1)
    return codes.reshape(len(packed), packed.shape[1] * 8 // bits)


def _join(low: Codes, high: Codes, shift: int) -> Codes:
    return low | high << np.uint8(shift)


def _q4_0(blocks: Codes) -> _Parts:
    scale, low = _cut(blocks, 2)
    return _bits(low, 4, 16) - np.uint8(8), _floats(scale)


def _q4_1(blocks: Codes) -> _Parts:
    scale, minimum, low = _cut(blocks, 2, 4)
    return _bits(low, 4, 16), _floats(scale), _floats(minimum)


def _q5_0(blocks: Codes) -> _Parts:
    scale, high, low = _cut(blocks, 2, 6)
    return _join(_bits(low, 4, 16), _bits(high, 1, 1), 4) - np.uint8(16), _floats(scale)


def _q5_1(blocks: Codes) -> _Parts:
    scale, minimum, high, low = _cut(blocks, 2, 4, 8)
    return _join(_bits(low, 4, 16), _bits(high, 1, 1), 4), _floats(scale), _floats(minimum)


def _q8_0(blocks: Codes) -> _Parts:
    scale, codes = _cut(blocks, 2)
    return codes, _floats(scale)


def _q3_k(blocks: Codes) -> _Parts:
    high, low, factors, scale = _cut(blocks, 32, 96, 108)
    factors_low, factors_high = _cut(factors, 8)
    factor = _join(_bits(factors_low, 4, 8), _bits(factors_high, 2, 4), 4) - np.uint8(32)
    codes = _join(_bits(low, 2, 32), _bits(high, 1, 32), 2) - np.uint8(4)
    return codes, _floats(scale) * factor.view(np.int8)


def _k_factors(blocks: Codes) -> tuple[Floats, Floats]:
    """Scales and minimums of Q4_K and Q5_K: a float16 of each, and for every group of 32 inputs 6 bits to multiply."""
    scale, minimum, a, b, c = _cut(blocks, 2, 4, 8, 12)
    factors = np.hstack([a & 63, c & 15 | a >> 6 << 4])
    minimum_factors = np.hstack([b & 63, c >> 4 | b >> 6 << 4])
    return _floats(scale) * factors, _floats(minimum) * -minimum_factors.astype(np.float32)


def _q4_k(blocks: Codes) -> _Parts:
    factors, low = _cut(blocks, 16)
    return _bits(low, 4, 32), *_k_factors(factors)


def _q5_k(blocks: Codes) -> _Parts:
    factors, high, low = _cut(blocks, 16, 48)
    return _join(_bits(low, 4, 32), _bits(high, 1, 32), 4), *_k_factors(factors)


def _q6_k(blocks: Codes) -> _Parts:
    low, high, factors, scale = _cut(blocks, 128, 192, 208)
    codes = _join(_bits(low, 4, 64), _bits(high, 2, 32), 4) - np.uint8(32)
    return codes, _floats(scale) * factors.view(np.int8)


def _iq4_nl(blocks: Codes) -> _Parts:
    scale, low = _cut(blocks, 2)
    return _look_up(quants.IQ4_NL.kvalues, _bits(low, 4, 16)), _floats(scale)


def _iq4_xs(blocks: Codes) -> _Parts:
    scale, factors_high, factors_low, low = _cut(blocks, 2, 4, 8)
    factor = _join(_bits(factors_low, 4, 1), _bits(factors_high, 2, 1), 4) - np.uint8(32)
    return _look_up(quants.IQ4_NL.kvalues, _bits(low, 4, 16)), _floats(scale) * factor.view(np.int8)


def _mxfp4(blocks: Codes) -> _Parts | None:
    exponent, low = _cut(blocks, 1)
    scale = np.ldexp(np.float32(1), exponent.astype(np.int32) - 128)  # the codes are twice the values
    if ((scale < 2.0**-24) | (scale > 2.0**15)).any():  # powers of two that float16 holds
        return None
    return _look_up(quants.MXFP4.kvalues, _bits(low, 4, 16)), scale


def _tq1_0(blocks: Codes) -> _Parts:
    first, second, third, scale = _cut(blocks, 32, 48, 52)
    codes = np.hstack([_digits(first, 5), _digits(second, 5), _digits(third, 4)])
    return codes - np.uint8(1), _repeated(scale)


def _tq2_0(blocks: Codes) -> _Parts:
    codes, scale = _cut(blocks, 64)
    return _bits(codes, 2, 32) - np.uint8(1), _repeated(scale)


def _digits(packed: Codes, count: int) -> Codes:
    """The codes in bytes, `count` digits to the base of three: the first of all bytes, then the next. A byte is a
    fraction of 256: three times it is a digit, and what is beyond the point has the others."""
    fractions = packed[:, None] * np.array([[3**i] for i in range(count)], np.uint8)
    return (fractions.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(packed), count * packed.shape[1])


def _repeated(scale: Codes) -> Floats:
    """Of a block of 256."""
    return np.repeat(_floats(scale), 256 // BLOCK, axis=1)


def _look_up(values: tuple[int, ...], codes: Codes) -> Codes:
    return np.array(values, np.int8).view(np.uint8)[codes]


_TYPES: dict[str, tuple[str, Callable[[Codes], _Parts | None]]] = {
    "Q4_0": ("int4", _q4_0),
    "Q4_1": ("int4_minimum", _q4_1),
    "Q5_0": ("int8", _q5_0),
    "Q5_1": ("int8_minimum", _q5_1),
    "Q8_0": ("int8", _q8_0),
    "Q3_K": ("int8_16", _q3_k),
    "Q4_K": ("int4_minimum", _q4_k),
    "Q5_K": ("int8_minimum", _q5_k),
    "Q6_K": ("int8_16", _q6_k),
    "IQ4_NL": ("int8", _iq4_nl),
    "IQ4_XS": ("int8", _iq4_xs),
    "MXFP4": ("int8", _mxfp4),
    "TQ1_0": ("int4", _tq1_0),
    "TQ2_0": ("int4", _tq2_0),
}
"""By name, as not every version of the gguf package has all: what holds a type, and what unpacks its blocks."""
