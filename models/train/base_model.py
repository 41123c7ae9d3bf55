"""An existing model that is given a memory: where its weights come from, and how they are trained, if at all."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..architectures.base import Architecture, Model
from ..architectures.llama import LlamaConfig
from ..arguments import UsageError
from ..checkpoints import open_checkpoint
from ..checkpoints.checkpoint import checkpoint_source
from ..config import ConfigError
from ..memories import MEMORIES
from ..source import Source
from ..tokenizer import TokenizerSpec, read_tokenizer, without_unknown_tokens
from .optimizer import Optimizer


@dataclass(frozen=True)
class BaseModel:
    """A pretrained decoder without a memory."""

    source: Source
    rate: float
    """Peak learning rate of its weights; 0: they are frozen."""
    provenance: Mapping[str, str]
    """Of what comes out."""

    @torch.no_grad()
    def enter(self, model: Model) -> str:
        """Puts the weights into `model`, which has a memory, and switches the memory off; returns their SHA-256 sum.

        The memory's last weights, a gain as a rule, are 0: `model` says what the base says, to the bit. The first
        gradient is that of these weights alone, everything before them is multiplied by them; from the second step on
        all is trained.
        """
        state, ours, digest = model.state_dict(), self.source.config.shapes(), hashlib.sha256()
        for name in sorted(ours):
            weight = torch.from_numpy(self.source.weights(name))
            digest.update(f"{name} {tuple(weight.shape)}\n".encode())
            digest.update(weight.numpy().data)
            state[name].copy_(weight)
        assert model.config.memory is not None
        for name, parameter in model.named_parameters():
            if name in ours:
                parameter.requires_grad_(self.rate > 0)
            elif name.endswith(model.config.memory.RESIDUAL):
                parameter.zero_()
        return digest.hexdigest()

    def set_rate(self, model: Model, optimizer: Optimizer, rate: float) -> None:
        """Has the optimizer train the base at its own rate. rate: the memory's peak, above 0."""
        if self.rate:
            ours = self.source.config.shapes()
            its = (parameter for name, parameter in model.named_parameters() if name in ours)
            optimizer.set_relative_rate(its, self.rate / rate)


def open_base(args: argparse.Namespace, settings: Mapping[str, Any]) -> tuple[BaseModel, Architecture, TokenizerSpec]:
    """The model that `--base` names, the configuration of it with the memory of `settings`, and the tokenizer.

    settings: those of a memory are of the new one, others are in place of what the checkpoint says. UsageError,
    CheckpointError, and as `read_tokenizer`.
    """
    if not args.rate:
        raise UsageError("--rate is 0, expected more: without it the memory stays switched off")
    own = {name for kind in MEMORIES.values() for name in kind.SETTINGS}
    try:
        checkpoint = open_checkpoint(args.base, {name: value for name, value in settings.items() if name not in own})
    except FileNotFoundError as error:
        raise UsageError(f"--base: {error}") from error
    if checkpoint.config.kind != LlamaConfig.kind:
        raise UsageError(
            f"--base: {args.base} is a decoder of kind {checkpoint.config.kind}; those of the Llama family can be "
            "given a memory"
        )
    if checkpoint.config.memory:
        raise UsageError(
            f"--base: {args.base} has a memory already ({checkpoint.config.memory.kind}); give a model without one"
        )
    memory = {name: value for name, value in settings.items() if name in own}
    try:
        config = type(checkpoint.config).from_settings({**checkpoint.config.settings(), **memory})
    except ConfigError as error:
        raise UsageError(f"--base: {error}") from error
    if not config.memory:
        widths = ", ".join(next(iter(kind.SETTINGS)) for kind in MEMORIES.values())
        raise UsageError(f"--base: no memory is to be added; give the width of one ({widths}): --set memory_dim=128")
    tokenizer = read_tokenizer(args.tokenizer) if args.tokenizer else checkpoint.read_tokenizer()
    if tokenizer is None:
        raise UsageError(f"--base: {args.base} has no tokenizer.json; name the model's with --tokenizer")
    how = f"rate {args.base_rate}" if args.base_rate else "frozen"
    provenance = {
        **{name: value for name, value in checkpoint.provenance.items() if name not in ("source", "format")},
        "weights": f"{config.memory.kind} memory added with meki-train",
        "base": f"{args.base.resolve().name} ({how})",
    }
    base = BaseModel(checkpoint_source(checkpoint), args.base_rate or 0.0, provenance)
    return base, config, without_unknown_tokens(tokenizer, config.vocab_size)
