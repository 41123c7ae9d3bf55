"""GPTQ against its definition, a column at a time with explicit inverses; and the search for ranges of 4 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meki.models.gptq import gptq
from meki.models.quantize import fit_blocks, quantize_weight

TYPES = ["int4", "int4_minimum"]


def correlated(tokens: int, inputs: int, seed: int) -> torch.Tensor:
    """Inputs of which the second half says mostly what the first does, of unequal sizes. float32 [tokens, inputs]."""
    generator = np.random.default_rng(seed)
    first = generator.standard_normal((tokens, inputs // 2))
    second = first @ np.random.default_rng(0).standard_normal((inputs // 2, inputs // 2)) / (inputs // 2) ** 0.5
    sizes = np.exp(np.random.default_rng(1).standard_normal(inputs))
    return torch.from_numpy(np.hstack((first, second + 0.1 * generator.standard_normal(second.shape))) * sizes).float()


def by_definition(weight: np.ndarray, moments: np.ndarray, type: str) -> np.ndarray:
    """The values, float64 [n, k]: round one input, let those that are left make up for it, and leave it out of the
    problem (Gaussian elimination of the inverse)."""
    left, inputs = weight.astype(np.float64), weight.shape[1]
    inverse = np.linalg.inv(moments.astype(np.float64) + 0.1 * moments.diagonal().mean() * np.eye(inputs))
    low, high = (0, 15) if type == "int4_minimum" else (-8, 7)
    values = np.zeros_like(left)
    costs, rest = np.zeros(inputs), inverse.copy()
    for j in range(inputs):
        costs[j] = 1 / rest[j, j]
        rest -= np.outer(rest[:, j], rest[j]) / rest[j, j]
    for j in range(inputs):
        if j % 32 == 0:
            block, cost = left[:, j : j + 32].T.astype(np.float32), costs[j : j + 32, None].astype(np.float32)
            scale, minimum = fit_blocks(np.ascontiguousarray(block), cost, type == "int4_minimum", "w")
        q = np.clip(np.rint((left[:, j] - minimum) / scale), low, high)
        values[:, j] = q * scale + minimum
        left[:, j + 1 :] -= np.outer((left[:, j] - values[:, j]) / inverse[j, j], inverse[j, j + 1 :])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return values


@pytest.mark.parametrize("type", TYPES)
def test_by_definition(type: str) -> None:
    weight = np.random.default_rng(2).standard_normal((24, 96), dtype=np.float32)
    x = correlated(400, 96, 3)
    moments = x.T @ x
    expected, got = by_definition(weight, moments.numpy(), type), gptq(weight, moments, type, "w").values()
    # float32 against float64: what lies at the edge of two codes may fall to the other side, and moves what follows. A
    # forgotten term moves most of them.
    assert np.isclose(got, expected, rtol=1e-3, atol=1e-5).mean() > 0.95
    losses = [np.square(x.numpy() @ (values - weight).T).sum() for values in (got, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("type", TYPES)
def test_inputs_that_have_nothing_to_do_with_each_other(type: str) -> None:
    """Nothing makes up for anything: each block is rounded for itself."""
    weight = np.random.default_rng(4).standard_normal((40, 128), dtype=np.float32)
    alone = quantize_weight(weight, type, "w")
    got = gptq(weight, 3 * torch.eye(128), type, "w")
    np.testing.assert_array_equal(got.codes, alone.codes)
    np.testing.assert_array_equal(got.values(), alone.values())


@pytest.mark.parametrize("type", TYPES)
def test_it_loses_less_of_other_inputs_of_the_kind(type: str) -> None:
    weight = np.random.default_rng(5).standard_normal((64, 128), dtype=np.float32)
    seen, other = correlated(2000, 128, 6), correlated(500, 128, 7).numpy()
    its, alone = gptq(weight, seen.T @ seen, type, "w").values(), quantize_weight(weight, type, "w").values()
    lost, before = (np.square(other @ (values - weight).T).sum() for values in (its, alone))
    # With inputs of unequal sizes, half of which follow from the others, it is about a third.
    assert lost < 0.5 * before


def test_inputs_that_never_came() -> None:
    weight = np.random.default_rng(8).standard_normal((16, 64), dtype=np.float32)
    for moments in (torch.zeros(64, 64), torch.diag(torch.tensor([0.0] * 32 + [1.0] * 32))):
        values = gptq(weight, moments, "int4", "w").values()
        assert np.linalg.norm(values - weight) < 0.1 * np.linalg.norm(weight)


@pytest.mark.parametrize(("bad", "match"), [(np.nan, "not a number"), (1e6, "beyond float16's 65504")])
def test_weights_that_cannot_be(bad: float, match: str) -> None:
    weight = np.ones((2, 32), np.float32)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match=rf"layer\.w: .*{match}"):
        gptq(weight, torch.eye(32), "int4", "layer.w")


@settings(max_examples=60, deadline=None)
@given(
    codes=hnp.arrays(np.int8, (5, 64), elements=st.integers(0, 15)),
    scale=st.floats(2**-10, 100, width=16),
    minimum=st.floats(-500, 500, width=16),
    type=st.sampled_from(TYPES),
)
def test_what_has_16_levels_keeps_them(codes: np.ndarray, scale: float, minimum: float, type: str) -> None:
    codes[:, ::32], codes[:, 1::32] = 0, 15  # the whole range is in use
    if type == "int4":
        weight = np.float32(scale) * (codes - np.float32(8))
    else:
        weight = np.float32(scale) * codes + np.float32(minimum)
    values = quantize_weight(weight.astype(np.float32), type, "w").values()
    # The scale is found from the extremes, in float32 and then float16: exactly, unless the sum of a large minimum and
    # a small step has lost the step's last bits.
    bound = 0 if type == "int4" else 2.0**-11 * (15 * scale + abs(minimum))
    assert np.abs(values - weight).max() <= bound


@settings(max_examples=60, deadline=None)
@given(
    columns=hnp.arrays(np.float32, (32, 7), elements=st.floats(-100, 100, width=32)),
    importance=hnp.arrays(np.float32, (32, 1), elements=st.floats(0.0625, 16, width=32)),
    minimum=st.booleans(),
)
def test_no_worse_than_the_plain_range(columns: np.ndarray, importance: np.ndarray, minimum: bool) -> None:
    def loss(scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
        q = np.clip(np.rint((columns - offset) / scale), *((0, 15) if minimum else (-8, 7)))
        return (importance * np.square(columns - (q * scale + offset), dtype=np.float64)).sum(axis=0)

    scale, offset = fit_blocks(columns, importance, minimum, "w")
    assert (scale == scale.astype(np.float16)).all() and (offset == offset.astype(np.float16)).all() and scale.all()
    assert minimum or not offset.any()
    if minimum:
        plain = (columns.max(axis=0) - columns.min(axis=0)) / 15, columns.min(axis=0)
    else:
        plain = np.abs(columns).max(axis=0) / 7, np.zeros(7)
    halves = [np.asarray(part, np.float16).astype(np.float32) for part in plain]
    halves[0] = np.where(halves[0] == 0, np.float32(2**-24), halves[0])
    # Losses are compared in float32 there.
    assert (loss(scale, offset) <= loss(*halves) * (1 + 1e-4) + 1e-9).all()
