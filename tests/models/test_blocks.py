"""Packed matrices against docs/package-format.md, element by element."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meki.models.blocks import BLOCK_TYPES, Blocks, pack_blocks, unpack_blocks

Unpack = Callable[[np.ndarray, int, int], np.ndarray]


def random_blocks(type: str, rows: int, inputs: int, seed: int) -> Blocks:
    its, random = BLOCK_TYPES[type], np.random.default_rng(seed)
    halves = lambda: random.standard_normal((rows, inputs // its.group)).astype(np.float16).astype(np.float32)  # noqa: E731
    low, high = its.range
    codes = random.integers(low, high + 1, (rows, inputs)).astype(np.int8)
    return Blocks(type, codes, halves(), halves() if its.minimum else None)


@settings(max_examples=40, deadline=None)
@given(
    type=st.sampled_from(sorted(BLOCK_TYPES)),
    rows=st.integers(1, 40),
    inputs=st.sampled_from([32, 64, 96]),
    seed=st.integers(0, 2**32 - 1),
)
def test_packed(naive_unpack: Unpack, type: str, rows: int, inputs: int, seed: int) -> None:
    blocks, its = random_blocks(type, rows, inputs, seed), BLOCK_TYPES[type]
    packed = pack_blocks(blocks)
    assert packed.shape == (-(-rows // 16), inputs // 32, its.block_bytes) and packed.dtype == np.uint8
    np.testing.assert_array_equal(blocks.values(), naive_unpack(packed.reshape(-1), its.code, rows))
    again = unpack_blocks(packed, type, rows)
    np.testing.assert_array_equal(again.codes, blocks.codes)
    np.testing.assert_array_equal(again.scales, blocks.scales)
    if its.minimum:
        np.testing.assert_array_equal(again.minimums, blocks.minimums)
    else:
        assert again.minimums is None
    np.testing.assert_array_equal(blocks.rows(slice(1, 5)).values(), blocks.values()[1:5])


def test_bits_of_a_weight() -> None:
    bits = {type: its.bits_per_weight for type, its in BLOCK_TYPES.items()}
    assert bits == {"int8": 8.5, "int4": 4.5, "int4_minimum": 5, "int8_minimum": 9, "int8_16": 9}


@pytest.mark.parametrize("type", BLOCK_TYPES)
def test_where_every_weight_lies(type: str) -> None:
    """One weight of a matrix changes one code: docs/package-format.md, "Packed matrices"."""
    its = BLOCK_TYPES[type]
    blocks = random_blocks(type, 32, 64, 0)
    before = pack_blocks(blocks)
    for n, k in np.ndindex(32, 64):
        if k % 32 not in (0, 3, 4, 15, 16, 19, 31):
            continue
        codes = blocks.codes.copy()
        codes[n, k] ^= 1
        (panel,), (group,), (byte,) = np.nonzero(
            pack_blocks(Blocks(type, codes, blocks.scales, blocks.minimums)) != before
        )
        column = k % 32 if its.bits == 8 else k % 16
        assert (panel, group, byte) == (n // 16, k // 32, 64 * (column // 4) + 4 * (n % 16) + column % 4)
