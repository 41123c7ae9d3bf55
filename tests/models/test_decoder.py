"""The PyTorch reference with its memory. (checkpoints/test_huggingface.py has the backbone, against transformers.)"""

from __future__ import annotations

from collections.abc import Callable

import torch

from meki.models.architectures.llama import Decoder


@torch.no_grad()
def test_a_token_sees_no_later_one(make_model: Callable[..., Decoder]) -> None:
    model = make_model()
    ids = torch.arange(20)[None]
    changed = ids.clone()
    changed[0, 12:] += 100
    before, after = model(ids)[0], model(changed)[0]
    torch.testing.assert_close(before[:12], after[:12], rtol=0, atol=1e-5)
    assert (before[12] - after[12]).abs().max() > 0.1
