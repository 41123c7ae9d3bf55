"""Quantisation of weights and rows against its definition, element by element."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meki.models.quantize import quantize_rows, quantize_weight, row_bytes

FLOATS = st.floats(-1e4, 1e4, width=32)
SHAPES = st.tuples(st.integers(1, 40), st.sampled_from([32, 64, 96]))


@settings(max_examples=40, deadline=None)
@given(
    weight=SHAPES.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=FLOATS)),
    type=st.sampled_from(["int4", "int8"]),
)
def test_weights(weight: np.ndarray, type: str) -> None:
    values = quantize_weight(weight, type, "w").values()
    blocks, errors = weight.reshape(-1, 32), (values - weight).reshape(-1, 32)
    largest = np.abs(blocks).max(axis=1).astype(np.float64)
    # Half a step of the scale that clips nothing, which float16 rounds up by at most 2^-10 of it, or 2^-24. 4 bits may
    # clip, but only to make the block's squared error less.
    step = largest / (127 if type == "int8" else 7) * (1 + 2**-10) + 2**-24
    slack = 1e-6 * largest + 1e-40  # float32 rounding of quotient and product; the quotient of a denormal is zero
    if type == "int8":
        assert (np.abs(errors).max(axis=1) <= step / 2 + slack).all()
    assert (np.sqrt(np.mean(np.square(errors, dtype=np.float64), axis=1)) <= step / 2 + slack).all()


def test_four_bits_beat_the_plain_scale() -> None:
    weight = np.random.default_rng(0).standard_normal((200, 256), dtype=np.float32)
    blocks = weight.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 7
    half = scale.astype(np.float16)
    scale = np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half).astype(np.float32)
    plain = np.square(np.rint(blocks / scale) * scale - blocks).sum(axis=1)
    values = quantize_weight(weight, "int4", "w").values()
    searched = np.square(values - weight).reshape(-1, 32).sum(axis=1)
    assert (searched <= plain * (1 + 1e-5)).all()
    # Plain scales leave 9.7%. A step of 2.1 / 7.5 standard deviations, which rounding noise of step^2 / 12 suggests for
    # a good scale, leaves 8%; clipping adds its share.
    assert np.sqrt(searched.sum() / np.square(weight).sum()) < 0.09


@settings(max_examples=60, deadline=None)
@given(
    rows=st.tuples(st.integers(1, 4), st.integers(1, 70)).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=FLOATS)
    ),
    row_type=st.sampled_from(["float32", "float16", "int8", "int4"]),
)
def test_rows(rows: np.ndarray, row_type: str) -> None:
    row_dim = rows.shape[1]
    codes, scales, values = quantize_rows(rows, row_type, "rows")
    assert codes.shape == (len(rows), row_bytes(row_type, row_dim)) and codes.dtype == np.uint8
    assert scales.dtype == np.float16 and (scales >= 0).all() and np.isfinite(scales).all()
    if row_type in ("float32", "float16"):
        np.testing.assert_array_equal(values, rows.astype(row_type).astype(np.float32))
        return
    group = row_dim if row_type == "int8" else 32
    assert scales.shape == (len(rows), -(-row_dim // group))
    for row, value, scale in zip(rows, values, scales.astype(np.float32), strict=True):
        for first in range(0, row_dim, group):
            step, exact = scale[first // group], row[first : first + group].astype(np.float64)
            errors = value[first : first + group] - exact
            if row_type == "int8":  # the scale is rounded up to float16, so nothing is clipped
                # 1e-40: the quotient of a denormal number is zero, and so is its scale.
                assert np.abs(errors).max() <= step / 2 * (1 + 1e-5) + 1e-40
            # Never worse than the scale that clips nothing, which float16 rounds up by at most 2^-10 or 2^-24.
            bound = (np.abs(exact).max() / (127 if row_type == "int8" else 7) * (1 + 2**-10) + 2**-24) / 2
            assert np.sqrt(np.mean(errors**2)) <= bound * (1 + 1e-5)


def test_zeros_stay_zeros() -> None:
    zeros = np.zeros((2, 64), np.float32)
    for type in ("int4", "int8"):
        assert not quantize_weight(zeros, type, "w").values().any()
    for row_type in ("float32", "float16", "int8", "int4"):
        assert not quantize_rows(zeros, row_type, "rows")[2].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    values = np.ones((1, 32), np.float32)
    values[0, 5] = bad
    for type in ("int4", "int8"):
        with pytest.raises(ValueError, match=r"layer\.w: .*not a number"):
            quantize_weight(values, type, "layer.w")
    for row_type in ("float32", "float16", "int8", "int4"):
        with pytest.raises(ValueError, match=r"rows of token 3: .*not a number"):
            quantize_rows(values, row_type, "rows of token 3")


@pytest.mark.parametrize(("row_type", "value"), [("float16", 66_000.0), ("int8", 1e7), ("int4", 1e6)])
def test_rows_beyond_float16(row_type: str, value: float) -> None:
    with pytest.raises(ValueError, match="beyond float16's 65504"):
        quantize_rows(np.full((1, 32), value, np.float32), row_type, "rows")


@pytest.mark.parametrize(("type", "value"), [("int8", 1e7), ("int4", 1e6)])
def test_weights_beyond_float16(type: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"layer\.w: .*beyond float16's 65504"):
        quantize_weight(np.full((1, 32), value, np.float32), type, "layer.w")


def test_input_dimension_must_be_whole_blocks() -> None:
    with pytest.raises(ValueError, match="input dimension 40 is not a multiple"):
        quantize_weight(np.ones((2, 40), np.float32), "int8", "w")
