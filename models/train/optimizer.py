"""AdamW as the paper has it, and its learning rate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.base import Model
from ..memories.base import MemoryLayer
from .deferred import DeferredAdam

BETAS = (0.9, 0.95)


def learning_rate(step: int, steps: int, peak: float, last: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine to `last`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return last + (peak - last) * (1 + math.cos(math.pi * progress)) / 2


class Optimizer:
    """AdamW. Of the memory's tables it touches only the rows that steps read, if `deferred`: `DeferredAdam`."""

    def __init__(self, model: Model, rate: float, weight_decay: float, *, deferred: bool = True) -> None:
        """Weight decay on matrices that multiply; none on tables (a token that is not in the batch must not lose its
        rows), norms, scales and convolutions."""
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        layers = [layer for layer in model.modules() if isinstance(layer, MemoryLayer)]
        tables = {layer: table for layer in layers if (table := layer.table) is not None}
        undecayed = {id(table.weight) for table in (*tables.values(), model.embed_tokens)}
        self._layers = [*tables] if deferred else []
        self._deferred = DeferredAdam([*tables.values()], BETAS) if self._layers else None
        left = {id(table.weight) for table in tables.values()} if deferred else set()
        dense = [parameter for parameter in self.parameters if id(parameter) not in left]
        decayed = [p for p in dense if p.dim() == 2 and id(p) not in undecayed]
        others = [p for p in dense if p.dim() != 2 or id(p) in undecayed]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._dense = torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)

    def before(self, ids: Tensor) -> None:
        """Before the model reads ids, int64 [b, t]."""
        for index, layer in enumerate(self._layers):
            assert self._deferred is not None
            self._deferred.read(index, layer.indices(ids))

    def set_relative_rate(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        """From now on the rate of these, of which none is a memory's table, is `factor` times that of a step."""
        its, optimizer = {id(parameter) for parameter in parameters}, self._dense
        for group in list(optimizer.param_groups):
            moved = [parameter for parameter in group["params"] if id(parameter) in its]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in its]
            optimizer.add_param_group({**group, "params": moved, "relative_rate": factor})

    def step(self, rate: float, clip: float) -> None:
        """One step at this learning rate; gradients whose norm is above `clip` are scaled down to it. Then they are
        gone."""
        self._clip(clip)
        for group in self._dense.param_groups:
            group["lr"] = rate * group.get("relative_rate", 1.0)
        self._dense.step()
        if self._deferred is not None:
            self._deferred.step(rate)
        for parameter in self.parameters:
            parameter.grad = None

    def _clip(self, most: float) -> None:
        gradients = list(self._gradients())
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
        scale = (most / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_, which takes no sparse ones
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

    def current(self) -> contextlib.AbstractContextManager[None]:
        """In the block, all weights are as they are now, rows that no step read lately included."""
        return contextlib.nullcontext() if self._deferred is None else self._deferred.current()

    def state_dict(self) -> dict[str, Any]:
        tables = None if self._deferred is None else self._deferred.state_dict()
        return {"dense": self._dense.state_dict(), "tables": tables}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._dense.load_state_dict(state["dense"])
        if self._deferred is not None:
            self._deferred.load_state_dict(state["tables"])
