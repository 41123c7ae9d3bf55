"""AdamW as the paper has it, and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

BETAS = (0.9, 0.95)


def learning_rate(step: int, steps: int, peak: float, last: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine to `last`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return last + (peak - last) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: nn.Module, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Weight decay on matrices that multiply; none on tables (a token that is not in the batch must not lose its rows),
    norms, scales and convolutions."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed = [p for p in model.parameters() if p.dim() == 2 and id(p) not in tables]
    others = [p for p in model.parameters() if p.dim() != 2 or id(p) in tables]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)
