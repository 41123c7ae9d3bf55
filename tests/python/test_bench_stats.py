from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meki.bench.stats import CONFIDENCE, median_interval, percentiles
from meki.generation import _percentile

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


def naive_percentile(samples: list[float], rank: float) -> float:
    """Linear interpolation between the two samples beside position (n - 1) * rank / 100."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * rank / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@given(numbers)
def test_percentiles(samples: list[float]) -> None:
    # The same formula in another order of operations: some roundings of 2^-53 of the greatest number.
    expected = [naive_percentile(samples, rank) for rank in (50, 10, 90)]
    assert percentiles(samples, 50, 10, 90) == pytest.approx(expected, rel=1e-12, abs=1e-8)
    # A generation has its own, as numpy would take longer to load than to compute.
    its = [_percentile(sorted(samples), rank) for rank in (0.5, 0.1, 0.9)]
    assert its == pytest.approx(expected, rel=1e-12, abs=1e-8)


def test_one_sample_is_its_own_percentiles() -> None:
    assert percentiles([3.5], 50, 10, 90) == (3.5, 3.5, 3.5)


def naive_interval(samples: list[float]) -> tuple[float, float] | None:
    """The narrowest symmetric pair of order statistics that misses the median rarely enough, by counting all 2^n ways
    in which samples can lie below it."""
    n = len(samples)
    ordered = sorted(samples)
    best = None
    for k in range(1, n // 2 + 1):
        misses = 0
        for below in itertools.product((0, 1), repeat=n):
            # The k-th smallest lies above the median if fewer than k samples lie below it; and so at the other end.
            misses += sum(below) < k or n - sum(below) < k
        if misses / 2**n <= 1 - CONFIDENCE:
            best = (ordered[k - 1], ordered[n - k])
    return best


@pytest.mark.parametrize("n", range(1, 14))
def test_interval_is_the_narrowest_that_is_sure_enough(n: int) -> None:
    samples = random.Random(n).sample(range(1000), n)
    interval = median_interval(samples)
    assert interval == naive_interval(samples)
    assert (interval is None) == (n < 6)


def test_interval_covers_the_median_of_a_skewed_distribution() -> None:
    generator = random.Random(3)
    trials, covered = 2000, 0
    for _ in range(trials):
        low, high = median_interval([generator.expovariate(1.0) for _ in range(20)])
        covered += low <= math.log(2) <= high
    # At least 0.95 by construction (0.959 for n = 20); the standard deviation of 2000 trials is 0.0045: four of them.
    assert 0.941 <= covered / trials <= 0.977
