"""The optimizer of training: its rate, what decays, and rows that are moved when they are read."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from meki.models.architectures.llama import Decoder, LlamaConfig
from meki.models.memories.base import MemoryLayer
from meki.models.train.deferred import DeferredAdam
from meki.models.train.optimizer import BETAS, Optimizer, learning_rate

from .small import KINDS, SMALL


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    rates = [learning_rate(step, 1000, 2e-3, 2e-4, 100) for step in range(1001)]
    assert rates[0] == pytest.approx(2e-5)
    assert rates[99] == pytest.approx(2e-3)
    assert max(rates) == pytest.approx(2e-3)
    assert rates[1000] == pytest.approx(2e-4)
    assert rates[550] == pytest.approx(2e-4 + 1.8e-3 * (1 + math.cos(math.pi / 2)) / 2)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_norms_and_scales_do_not_decay(kind: str, deferred: bool) -> None:
    model = Decoder(LlamaConfig.from_settings({**SMALL, **KINDS[kind]}))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for layer in model.modules() if deferred else ():
        if isinstance(layer, MemoryLayer):
            layer.table.weight.grad = layer.table.weight.grad.to_sparse(1)
    Optimizer(model, 1.0, 0.1, deferred=deferred).step(0.5, 1.0)
    for name, parameter in model.named_parameters():
        decays = parameter.dim() == 2 and "embed" not in name
        torch.testing.assert_close(parameter, before[name] * (1 - 0.5 * 0.1) if decays else before[name])


# Deferred Adam.


class Pair:
    """Two tables, moved by deferred Adam, and their twins, moved by PyTorch's Adam."""

    def __init__(self, rows: int = 300) -> None:
        self.tables = [nn.Embedding(rows, 5) for _ in range(2)]
        self.twins = [nn.Parameter(table.weight.detach().clone()) for table in self.tables]
        self.deferred = DeferredAdam(self.tables, BETAS)
        self.adam = torch.optim.Adam(self.twins, betas=BETAS)

    def step(self, index: int, random: np.random.Generator, rows: int = 3) -> None:
        for number, (table, twin) in enumerate(zip(self.tables, self.twins, strict=True)):
            ids = torch.from_numpy(random.integers(0, table.num_embeddings, (1, rows)))
            targets = torch.from_numpy(random.normal(size=(1, rows, 5)).astype(np.float32))
            self.deferred.read(number, ids)
            ((table(ids) - targets) ** 2).sum().backward()
            ((twin[ids] - targets) ** 2).sum().backward()
        rate = learning_rate(index, 600, 1e-2, 1e-3, 20)
        self.adam.param_groups[0]["lr"] = rate
        self.deferred.step(rate)
        self.adam.step()
        self.adam.zero_grad(set_to_none=False)

    def check(self) -> None:
        with self.deferred.current():
            for table, twin in zip(self.tables, self.twins, strict=True):
                # Both round once a step; epsilon, 1e-8, is nothing beside gradients of about 1.
                torch.testing.assert_close(table.weight, twin, rtol=0, atol=2e-5)


def test_rows_move_as_with_adam_however_long_they_are_not_read() -> None:
    torch.manual_seed(0)
    random, pair = np.random.default_rng(0), Pair()
    for index in range(600):  # a row is left alone for 100 steps on average
        pair.step(index, random)
        if index in (0, 7, 100, 599):
            pair.check()
    before = [table.weight.detach().clone() for table in pair.tables]
    with pair.deferred.current():
        assert any((table.weight != kept).any() for table, kept in zip(pair.tables, before, strict=True))
    for table, kept in zip(pair.tables, before, strict=True):
        assert torch.equal(table.weight, kept)  # looking changes nothing


def test_reading_without_learning_changes_nothing_but_rounding() -> None:
    random, pair = np.random.default_rng(1), Pair(rows=20)
    for index in range(100):
        pair.step(index, random)
        pair.deferred.read(0, torch.arange(20)[None])
    pair.check()


def test_a_table_that_a_step_does_not_read_at_all() -> None:
    random, pair = np.random.default_rng(2), Pair(rows=20)
    for index in range(30):
        pair.step(index, random)
    for _ in range(5):
        pair.deferred.step(1e-2)
        for group in pair.adam.param_groups:
            group["lr"] = 1e-2
        pair.adam.step()  # with gradients of 0
    pair.check()


def test_deferred_adam_goes_on_from_its_state() -> None:
    runs = []
    for stop in (None, 17):
        torch.manual_seed(0)
        random, pair = np.random.default_rng(3), Pair(rows=50)
        for index in range(40):
            if index == stop:
                state = pair.deferred.state_dict()
                pair.deferred = DeferredAdam(pair.tables, BETAS)
                pair.deferred.load_state_dict(state)
            pair.step(index, random)
        runs.append(pair)
    for one, other in zip(runs[0].tables, runs[1].tables, strict=True):
        assert torch.equal(one.weight, other.weight)
