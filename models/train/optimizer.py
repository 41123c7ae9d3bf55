"""AdamW as the paper has it, and its learning rate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..architectures.base import Model
from ..memories.base import MemoryLayer
from .deferred import DeferredAdam
from .distributed import ALONE, World

BETAS = (0.9, 0.95)


def learning_rate(step: int, steps: int, peak: float, last: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine to `last`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return last + (peak - last) * (1 + math.cos(math.pi * progress)) / 2


def _of_all(norm: Tensor) -> Tensor:
    """Of a gradient that is spread over processes, the norm of all its parts."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class Optimizer:
    """AdamW. Of the memory's tables it touches only the rows that steps read, if `deferred`: `DeferredAdam`."""

    def __init__(
        self, model: Model, rate: float, weight_decay: float, *, deferred: bool = True, world: World = ALONE
    ) -> None:
        """Weight decay on matrices that multiply; none on tables (a token that is not in the batch must not lose its
        rows), norms, scales and convolutions. world: whose gradients of `tables` are averaged."""
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        layers = [layer for layer in model.modules() if isinstance(layer, MemoryLayer)]
        tables = {layer: table for layer in layers if (table := layer.table) is not None}
        undecayed = {id(table.weight) for table in (*tables.values(), model.embed_tokens)}
        self._layers = [*tables] if deferred else []
        self._deferred = DeferredAdam([*tables.values()], BETAS) if self._layers else None
        self._world = world
        self.tables = [table.weight for table in tables.values()] if deferred else []
        """Which have sparse gradients."""
        left = {id(table) for table in self.tables}
        dense = [parameter for parameter in self.parameters if id(parameter) not in left]
        decayed = [p for p in dense if p.dim() == 2 and id(p) not in undecayed]
        others = [p for p in dense if p.dim() and (p.dim() != 2 or id(p) in undecayed)]
        scalars = [p for p in dense if p.dim() == 0]  # apart, because AdamW takes no list of spread and whole tensors
        self._whole = scalars if any(isinstance(p, DTensor) for p in dense) else []
        groups = [{"params": decayed, "weight_decay": weight_decay}]
        groups += [{"params": its, "weight_decay": 0.0} for its in (others, scalars)]
        self.dense = torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=True)

    def before(self, ids: Tensor) -> None:
        """Before the model reads ids, int64 [b, t]."""
        for index, layer in enumerate(self._layers):
            assert self._deferred is not None
            self._deferred.read(index, layer.indices(ids))

    def set_relative_rate(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        """From now on the rate of these, of which none is a memory's table, is `factor` times that of a step."""
        its, optimizer = {id(parameter) for parameter in parameters}, self.dense
        for group in list(optimizer.param_groups):
            moved = [parameter for parameter in group["params"] if id(parameter) in its]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in its]
            optimizer.add_param_group({**group, "params": moved, "relative_rate": factor})

    def step(self, rate: float, clip: float) -> None:
        """One step at this learning rate; gradients whose norm is above `clip` are scaled down to it. Then they are
        gone."""
        self._clip(clip)
        for group in self.dense.param_groups:
            group["lr"] = rate * group.get("relative_rate", 1.0)
        self.dense.step()
        if self._deferred is not None:
            self._deferred.step(rate)
        for parameter in self.parameters:
            parameter.grad = None

    def _clip(self, most: float) -> None:
        for table in self.tables:
            if table.grad is not None:
                table.grad = self._world.mean_rows(table.grad.coalesce())
        for scalar in self._whole:
            if scalar.grad is not None:
                scalar.grad = self._world.mean(scalar.grad)
        gradients = [gradient for parameter in self.parameters if (gradient := parameter.grad) is not None]
        # Of a table, those of the rows that were read: torch.nn.utils.clip_grad_norm_ takes no sparse ones.
        values = [gradient.values() if gradient.is_sparse else gradient for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack([_of_all(torch.linalg.vector_norm(its)) for its in values]))
        if (scale := most / (norm.item() + 1e-6)) < 1:
            for its in values:
                its.mul_(scale)

    def current(self) -> contextlib.AbstractContextManager[None]:
        """In the block, all weights are as they are now, rows that no step read lately included."""
        return contextlib.nullcontext() if self._deferred is None else self._deferred.current()

    def state_dict(self) -> dict[str, Any]:
        tables = None if self._deferred is None else self._deferred.state_dict()
        return {"dense": self.dense.state_dict(), "tables": tables}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dense.load_state_dict(state["dense"])
        if self._deferred is not None:
            self._deferred.load_state_dict(state["tables"])
