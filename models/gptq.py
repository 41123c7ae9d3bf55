"""Rounds a matrix so that its products with inputs like those seen change least (GPTQ, arXiv 2210.17323).

Inputs are rounded one after the other; what rounding one of them changes, those that are still to come make up for, as
far as they are correlated with it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .blocks import BLOCK, BLOCK_TYPES, Blocks, Floats
from .quantize import fit_blocks, require_finite, round_to

_DAMPING = 0.1
"""Of the mean square of an input, added to each: what keeps the weights from fitting the text rather than its kind."""


def gptq(weight: Floats, moments: Tensor, type: str, what: str) -> Blocks:
    """weight: float32 [n, k], k a multiple of BLOCK; moments: sum or mean of x x^T over inputs x, float32 [k, k]; type:
    of 4 bits. ValueError if a weight is not finite or beyond float16; `what` names the tensor."""
    require_finite(weight, what)
    rows, inputs = weight.shape
    with_minimum = BLOCK_TYPES[type].minimum
    factor = _inverse_factor(moments)
    importance = factor.diagonal().square().reciprocal().numpy()  # what a squared error of an input costs in the end
    left = torch.from_numpy(weight.T.copy())  # [k, n]: one input's weights stand together
    codes = np.empty((inputs, rows), np.int8)
    scales = np.empty((inputs // BLOCK, rows), np.float32)
    minimums = np.zeros_like(scales)
    for group, start in enumerate(range(0, inputs, BLOCK)):
        stop = start + BLOCK
        block, errors = left[start:stop].numpy(), np.empty((BLOCK, rows), np.float32)
        scale, minimum = fit_blocks(block, importance[start:stop, None], with_minimum, what)
        scales[group], minimums[group] = scale, minimum
        among = factor[start:stop, start:stop].numpy()
        for at in range(BLOCK):
            q = codes[start + at] = round_to(block[at], scale, minimum, type)
            errors[at] = (block[at] - (q * scale + minimum)) / among[at, at]
            block[at + 1 :] -= among[at, at + 1 :, None] * errors[at]
        left[stop:].addmm_(factor[start:stop, stop:].T, torch.from_numpy(errors), alpha=-1)
    return Blocks(type, codes.T, scales.T, minimums.T if with_minimum else None)


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper triangular U with U^T U = (moments + damping)^-1."""
    damped = moments.clone()
    mean = float(damped.diagonal().mean())
    damped.diagonal().add_(_DAMPING * mean if mean > 0 else 1.0)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
