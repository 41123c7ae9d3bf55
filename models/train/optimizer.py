"""AdamW as the paper has it, its learning rate, and tables of which a step moves only the rows that it read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.base import Model

BETAS = (0.9, 0.95)


def learning_rate(step: int, steps: int, peak: float, last: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine to `last`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return last + (peak - last) * (1 + math.cos(math.pi * progress)) / 2


def memory_tables(model: Model) -> list[nn.Embedding]:
    """The tables of the memory: all but the word embedding, whose gradient is dense where it is the head too."""
    return [module for module in model.modules() if isinstance(module, nn.Embedding) and module != model.embed_tokens]


class Optimizer:
    """AdamW; of the memory's tables Adam on the rows that a step read alone, as torch.optim.SparseAdam has it.

    A table of 150,000 rows, of which a step reads some thousand, would cost AdamW a pass over gradient, weights and
    both moments. Rows that a step did not read keep their weights and moments.
    """

    def __init__(self, model: Model, rate: float, weight_decay: float) -> None:
        """Weight decay on matrices that multiply; none on tables (a token that is not in the batch must not lose its
        rows), norms, scales and convolutions."""
        tables = [table.weight for table in memory_tables(model)]
        for table in memory_tables(model):
            table.sparse = True
        sparse = {id(table) for table in tables}
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        dense = [parameter for parameter in self.parameters if id(parameter) not in sparse]
        decayed = [p for p in dense if p.dim() == 2 and p is not model.embed_tokens.weight]
        others = [p for p in dense if p.dim() != 2 or p is model.embed_tokens.weight]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)]
        if tables:
            self._optimizers.append(torch.optim.SparseAdam(tables, lr=rate, betas=BETAS))

    def step(self, rate: float, clip: float) -> None:
        """One step at this learning rate; gradients whose norm is above `clip` are scaled down to it, and all are
        gone then."""
        self._clip(clip)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _clip(self, most: float) -> None:
        gradients = list(self._gradients())
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
        scale = (most / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(scale)

    def _gradients(self) -> Iterator[Tensor]:
        """Of a table, those of the rows that were read."""
        for parameter in self.parameters:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
                yield parameter.grad.values()
            else:
                yield parameter.grad

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)
