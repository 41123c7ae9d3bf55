"""The mixture of experts in PyTorch; tests/models/checkpoints/test_huggingface.py has it against transformers."""

from __future__ import annotations

import pytest
import torch

from meki.models.ffns.moe import MoEConfig


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_a_token_at_a_time(norm_topk_prob: bool) -> None:
    torch.manual_seed(3)
    mixture = MoEConfig(experts=5, experts_per_token=2, norm_topk_prob=norm_topk_prob).module(16, 24, 8)
    x = torch.randn(2, 7, 16)
    expected = torch.zeros(2, 7, 8)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(7)).tolist():
        token = x[*place]
        shares = torch.softmax(mixture.gate.weight @ token, 0)
        first, second = sorted(range(5), key=lambda expert, its=shares: -its[expert])[:2]
        for expert in (first, second):
            share = shares[expert] / (shares[first] + shares[second] if norm_topk_prob else 1)
            expected[*place] += share * mixture.experts[expert](token)
    torch.testing.assert_close(mixture(x), expected, rtol=0, atol=1e-6)  # a few roundings of values below 1


def test_of_equal_shares_the_first_experts() -> None:
    mixture = MoEConfig(experts=4, experts_per_token=2).module(16, 24, 16)
    with torch.no_grad():
        mixture.gate.weight.zero_()
        for expert in mixture.experts[2:]:
            expert.down_proj.weight.fill_(torch.nan)
    x = torch.randn(3, 16)
    expected = (mixture.experts[0](x) + mixture.experts[1](x)) / 2
    torch.testing.assert_close(mixture(x), expected, rtol=0, atol=1e-6)
