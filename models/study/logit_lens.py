"""LogitLens: what a decoder would say after each of its layers, beside what it says in the end."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..architectures.base import Model


@torch.no_grad()
def divergences(model: Model, ids: Tensor) -> list[float]:
    """KL(last || layer) in nats, of each layer, averaged over tokens: of what the model says of the residual stream
    behind it and in the end. ids: int64 [b, t + 1]; the last column is not read. The last layer's is 0.

    Source: "interpreting GPT: the logit lens" (nostalgebraist, 2020); section 5 of the MeKi paper has it by layer.
    """
    streams: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: streams.append(out)) for layer in model.layers]
    sums = torch.zeros(len(model.layers), dtype=torch.float64)
    try:
        for row in ids:
            streams.clear()
            last = F.log_softmax(model(row[None, :-1]).float(), dim=-1)
            for layer, stream in enumerate(streams):
                logits = F.log_softmax(model.logits(stream).float(), dim=-1)
                sums[layer] += F.kl_div(logits, last, reduction="sum", log_target=True).item()
    finally:
        for hook in hooks:
            hook.remove()
    return (sums / (len(ids) * (ids.shape[1] - 1))).tolist()
