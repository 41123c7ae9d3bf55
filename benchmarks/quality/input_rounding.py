"""What it costs that packed layers round their inputs to 8 bits in blocks of 32, by kind of layer; emulated in PyTorch.

    python -m benchmarks.quality.input_rounding CHECKPOINT TEXT [--tokens 4096]

Weights stay as the checkpoint has them. Each line is the change of the perplexity of the text's first tokens, with the
standard error of a mean over tokens.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meki.bench.markdown import head, row
from meki.models.checkpoints import open_checkpoint
from meki.models.checkpoints.checkpoint import checkpoint_model
from meki.models.tokenizer import parse_tokenizer

KINDS = {
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "head": ("norm",),
}
"""Modules whose input is rounded; of the head, which may be the embedding's matrix, the output of the norm before."""


def rounded(x: Tensor) -> Tensor:
    blocks = x.reshape(-1, 32)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    return (torch.where(scales > 0, blocks / scales, 0).round() * scales).reshape(x.shape)


@torch.no_grad()
def losses(model: nn.Module, ids: Tensor, kinds: Collection[str]) -> Tensor:
    """Nats of each token but the first, float64 [n - 1], with the inputs of these kinds of layers rounded."""
    wanted = {part for kind in kinds for part in KINDS[kind]}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted:
            hooks.append(module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),)))
        elif name == "norm" and name in wanted:
            hooks.append(module.register_forward_hook(lambda *its: rounded(its[2])))
    try:
        logits = model(ids[None])[0, :-1]
    finally:
        for hook in hooks:
            hook.remove()
    return F.cross_entropy(logits, ids[1:], reduction="none").double()


def table(change: Callable[[Collection[str]], Tensor]) -> list[str]:
    """change(kinds): of the loss, a token each."""
    lines = [*head(("inputs of", "perplexity", "standard error"), "lrr")]
    for name, kinds in {"all": [*KINDS], **{kind: [kind] for kind in KINDS}}.items():
        its = change(kinds)
        error = its.std().item() / math.sqrt(len(its))
        lines.append(row((name, f"{math.expm1(its.mean().item()):+.2%}", f"{error:.2%}")))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="what meki-convert reads")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="of the text (default: %(default)s)")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.checkpoint, {})
    tokenizer = checkpoint.read_tokenizer()
    assert tokenizer is not None, "the checkpoint has no tokenizer"
    encoded = parse_tokenizer(tokenizer.json).encode(args.text.read_text(encoding="utf-8")).ids
    ids, model = torch.tensor(encoded[: args.tokens]), checkpoint_model(checkpoint)
    exact = losses(model, ids, ())
    print(f"{len(ids):,} tokens, perplexity {exact.mean().exp().item():.4f} with inputs as they are\n")
    print("\n".join(table(lambda kinds: losses(model, ids, kinds) - exact)))


if __name__ == "__main__":
    main()
