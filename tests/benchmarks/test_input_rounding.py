from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.quality.input_rounding import KINDS, losses, rounded, table
from meki.models.architectures.llama import Decoder


def test_rounded() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    got = rounded(x)
    for row, values in zip(x.reshape(-1, 32), got.reshape(-1, 32), strict=True):
        step = row.abs().max() / 127
        assert (values - row).abs().max() <= step / 2 * (1 + 1e-5)
        assert torch.allclose(values / step, (values / step).round(), atol=1e-4)
    assert not rounded(torch.zeros(2, 32)).any()


def test_every_kind_of_layer_changes_something(make_model: Callable[..., Decoder]) -> None:
    model = make_model(memory_dim=0)
    ids = torch.randint(0, 300, (50,), generator=torch.Generator().manual_seed(1))
    exact = losses(model, ids, ())
    changes = {kind: (losses(model, ids, [kind]) - exact).abs().max().item() for kind in KINDS}
    assert all(0 < change < 0.5 for change in changes.values()), changes
    assert torch.equal(losses(model, ids, ()), exact)  # no hook stays


def test_table() -> None:
    lines = table(lambda kinds: torch.tensor([0.0, 0.02]) * len(kinds))
    assert lines[2:4] == ["| all | +5.13% | 5.00% |", "| q, k, v | +1.01% | 1.00% |"]
