"""Adam for tables of which a step reads few rows: a row is moved when it is read, by all steps since the last time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SPENT = 1e-9
"""A move that is so small beside the one before its row was left alone is none in float32."""


class DeferredAdam:
    """Computes what Adam does without weight decay, but for rounding and for epsilon while a row is left alone, at the
    cost of the rows that are read: a table of 150,000 would otherwise cost a pass over gradient, weights and moments.

    A row without a gradient still moves, ever less, as its moments fade. j steps after the row's last gradient, step s
    moves it by f_s r^j m / sqrt(v), where f_s = rate_s sqrt(1 - beta2^s) / (1 - beta1^s) and r = beta1 / sqrt(beta2).
    The sums of f_s r^j are the same for all rows that had their last gradient at the same step.
    """

    def __init__(self, tables: list[nn.Embedding], betas: tuple[float, float], eps: float = 1e-8) -> None:
        self.tables, self.betas, self.eps = tables, betas, eps
        self.steps = 0
        self._sums = torch.zeros(1024, device=tables[0].weight.device)  # by the step of the last gradient
        self._first = [torch.zeros_like(table.weight, requires_grad=False) for table in tables]
        self._second = [torch.zeros_like(table.weight, requires_grad=False) for table in tables]
        self._moved = [
            torch.zeros(len(table.weight), dtype=torch.int32, device=table.weight.device) for table in tables
        ]
        for table in tables:
            table.sparse = True

    @torch.no_grad()
    def read(self, index: int, rows: Tensor) -> None:
        """Before rows of a table are read: int64, of any shape."""
        rows = rows.unique()
        rows = rows[self._moved[index][rows] < self.steps]
        weight, first, second, moved = self._of(index)
        missed = (self.steps - moved[rows])[:, None]
        weight[rows] = self._current(index, rows)
        first[rows] *= self.betas[0] ** missed
        second[rows] *= self.betas[1] ** missed
        moved[rows] = self.steps

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Moves the rows that have a gradient, a sparse one."""
        (beta1, beta2), step = self.betas, self.steps + 1
        for index, table in enumerate(self.tables):
            if table.weight.grad is None:
                continue
            gradient = table.weight.grad.coalesce()
            rows, values = gradient.indices()[0], gradient.values()
            self.read(index, rows)
            weight, first, second, moved = self._of(index)
            first[rows] = m = beta1 * first[rows] + (1 - beta1) * values
            second[rows] = v = beta2 * second[rows] + (1 - beta2) * values**2
            weight[rows] -= rate / (1 - beta1**step) * m / ((v / (1 - beta2**step)).sqrt() + self.eps)
            moved[rows] = step
            table.weight.grad = None
        self._fade(step, rate)
        self.steps = step

    def _fade(self, step: int, rate: float) -> None:
        """What this step adds to the sums of earlier ones."""
        beta1, beta2 = self.betas
        if step >= len(self._sums):
            self._sums = torch.cat([self._sums, torch.zeros_like(self._sums)])
        ratio, factor, back = beta1 / beta2**0.5, rate * (1 - beta2**step) ** 0.5 / (1 - beta1**step), 1
        powers = []
        while back <= step and (power := ratio**back) > _SPENT:
            powers.append(factor * power)
            back += 1
        self._sums[step - len(powers) : step] += self._sums.new_tensor(powers[::-1])

    def _of(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.tables[index].weight, self._first[index], self._second[index], self._moved[index]

    def _current(self, index: int, rows: Tensor | slice) -> Tensor:
        """Rows as they are now."""
        weight, first, second, moved = self._of(index)
        sums = self._sums[moved[rows].long()][:, None]
        return weight[rows] - sums * first[rows] / (second[rows].sqrt() + self.eps)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """In the block the tables are as they are now, every row. Afterwards as they were, to the bit: that they were
        looked at changes nothing."""
        kept = [table.weight.detach().clone() for table in self.tables]
        try:
            with torch.no_grad():
                for index, table in enumerate(self.tables):
                    table.weight.copy_(self._current(index, slice(None)))
            yield
        finally:
            with torch.no_grad():
                for table, weight in zip(self.tables, kept, strict=True):
                    table.weight.copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        parts = {"first": self._first, "second": self._second, "moved": self._moved}
        return {"steps": self.steps, "sums": self._sums, **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, device = state["steps"], self._sums.device
        self._sums = state["sums"].to(device)
        for ours, theirs in ((self._first, "first"), (self._second, "second"), (self._moved, "moved")):
            for tensor, values in zip(ours, state[theirs], strict=True):
                tensor.copy_(values)
