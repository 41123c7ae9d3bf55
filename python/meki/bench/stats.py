"""The statistics of a measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95


def percentiles(samples: Sequence[float], *ranks: float) -> tuple[float, ...]:
    """Percentiles with linear interpolation between neighbours. `samples` is not empty."""
    return tuple(np.percentile(np.asarray(samples, dtype=np.float64), ranks).tolist())


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """A confidence interval of the median of the distribution that the independent `samples` come from, whatever that
    distribution is. None if there are too few samples for `CONFIDENCE`: fewer than 6.

    From the k-th smallest to the k-th greatest sample. Each sample lies below the median with probability 1/2, so the
    interval misses it with probability 2 P(Binomial(n, 1/2) < k); k is the greatest with at most 1 - CONFIDENCE
    (the sign test, inverted: Conover, Practical Nonparametric Statistics).
    """
    ordered = sorted(samples)
    n = len(ordered)
    k, miss = 0, 2.0 * math.comb(n, 0) / 2**n
    while miss <= 1 - CONFIDENCE:
        k += 1
        miss += 2.0 * math.comb(n, k) / 2**n
    return (ordered[k - 1], ordered[n - k]) if k else None
