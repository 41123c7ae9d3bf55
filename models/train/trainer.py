"""The training loop: a run lives in a directory, can be stopped at any moment, and goes on from there to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from meki.package.files import replace_file

from ..architectures.base import Architecture
from ..checkpoints.huggingface import save_pretrained
from ..config import ConfigError
from ..memories.base import MemoryLayer
from ..tokenizer import TokenizerSpec, canonical_ids, parse_tokenizer
from .base_model import BaseModel
from .data import TokenFile, batch_at
from .optimizer import Optimizer, learning_rate

STATE, LOG, MODEL = "state.pt", "log.jsonl", "model"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides a run, beside the model and the data."""

    tokens: int
    """To see in all."""
    batch: int
    """Sequences of a step."""
    micro_batch: int
    """Of these, computed at a time."""
    length: int
    """Tokens of a sequence."""
    rate: float
    """Peak learning rate."""
    last_rate: float
    """At the end."""
    warmup: int
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    clip: float = 1.0
    """Largest norm of a step's gradients."""
    seed: int = 1

    def __post_init__(self) -> None:
        if self.batch % self.micro_batch:
            raise ConfigError(f"--micro-batch is {self.micro_batch}, expected a divisor of --batch {self.batch}")
        if self.steps < 1:
            raise ConfigError(
                f"--tokens is {self.tokens}, one step has {self.batch * self.length}: {self.batch} sequences of "
                f"{self.length}; give more"
            )

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.length)


def loss_of(model: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """Next-token cross entropy in nats. batch: int64 [b, length + 1]."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


class Trainer:
    """A run in one directory: `state.pt` (to resume), `log.jsonl` (losses), and `model/`, the training form with its
    tokenizer, for meki-convert."""

    EVALUATED = 64
    """Windows that the held-out loss is the mean of."""

    def __init__(
        self,
        config: Architecture,
        recipe: Recipe,
        train: TokenFile,
        valid: TokenFile | None,
        out: Path,
        *,
        tokenizer: TokenizerSpec,
        provenance: dict[str, str],
        base: BaseModel | None = None,
        device: str = "cpu",
        compile: bool = False,
    ) -> None:
        """base: the model that `config` adds a memory to; None: all is trained from scratch. ConfigError if the
        directory has a run of another model or recipe, or if there are too few tokens."""
        # An epoch begins anywhere in the first sequence; the target of a sequence's last token is the one behind it.
        for name, file, least in (("training", train, 2 * recipe.length + 1), ("held-out", valid, recipe.length + 1)):
            if file is not None and len(file.ids) < least:
                raise ConfigError(
                    f"the {name} text has {len(file.ids)} tokens, expected at least {least} for sequences of "
                    f"{recipe.length}; give more text, or a smaller --length"
                )
        self.config, self.recipe, self.train_file, self.valid_file, self.out = config, recipe, train, valid, out
        self.tokenizer, self.provenance, self.device = tokenizer, provenance, torch.device(device)
        self.model, self.base = config.module().initialise(recipe.seed), base
        self._base_weights = base.enter(self.model) if base else None
        canonical = functools.cache(lambda: canonical_ids(parse_tokenizer(tokenizer.json)))
        for module in self.model.modules():
            if isinstance(module, MemoryLayer):
                module.see_tokens(canonical)
        self.model.to(self.device)
        # A compiled step has no sparse gradients.
        self.optimizer = Optimizer(self.model, recipe.rate, recipe.weight_decay, deferred=not compile)
        if base:
            base.set_rate(self.model, self.optimizer, recipe.rate)
        self.step = 0
        self._computed: nn.Module | Callable[[Tensor], Tensor] = torch.compile(self.model) if compile else self.model
        self._resume()

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        data = {"tokens": len(self.train_file.ids), "bytes": self.train_file.bytes}
        base = {"base": self._base_weights, "base_rate": self.base and self.base.rate}
        recipe = {**dataclasses.asdict(self.recipe), **base}
        return {"config": self.config.settings(), "recipe": recipe, "data": data}

    def _trained(self) -> dict[str, Tensor]:
        """The model's state but for what is frozen, which its base has."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}

    def _resume(self) -> None:
        path = self.out / STATE
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            identity = state["identity"]
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: cannot be read as the state of a run; if it is damaged, remove it, and the run begins anew"
            ) from error
        ours = json.loads(json.dumps(self.identity))
        for part, values in ours.items():
            for name, value in values.items():
                if (theirs := identity[part].get(name)) != value:
                    raise ConfigError(
                        f"{path}: the run there has {part} {name} = {theirs!r}, not {value!r}; give the same to go on "
                        "with it, or another directory"
                    )
        self.model.load_state_dict({**self.model.state_dict(), **state["model"]})
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def train(
        self,
        stop: Callable[[], bool] = lambda: False,
        save_every: float = 300.0,
        log_every: int = 50,
        evaluate_every: int = 500,
    ) -> None:
        """To the end, or to the first step after which `stop` says so; saves then, and every so many seconds."""
        recipe, saved_at = self.recipe, time.monotonic()
        with tqdm(total=recipe.steps, initial=self.step, unit="step", disable=None) as progress:
            begun, since = time.monotonic(), self.step
            while self.step < recipe.steps:
                loss = self._step()
                self.step += 1
                progress.update()
                done = self.step == recipe.steps
                if self.step % log_every == 0 or done:
                    speed = (self.step - since) * recipe.batch * recipe.length / (time.monotonic() - begun)
                    entry = {"step": self.step, "loss": loss, "rate": self._rate(self.step - 1), "tokens_per_s": speed}
                    if self.valid_file is not None and (self.step % evaluate_every == 0 or done):
                        entry["held_out_loss"] = self.held_out_loss()
                    with (self.out / LOG).open("a") as log:
                        log.write(json.dumps(entry) + "\n")
                    progress.set_postfix(loss=f"{loss:.4f}")
                    begun, since = time.monotonic(), self.step
                stopped = stop()
                if done or stopped or time.monotonic() - saved_at > save_every:
                    self.save()
                    saved_at = time.monotonic()
                if stopped:
                    return

    def _rate(self, step: int) -> float:
        recipe = self.recipe
        return learning_rate(step, recipe.steps, recipe.rate, recipe.last_rate, recipe.warmup)

    def _step(self) -> float:
        """One step of the optimizer; its loss in nats a token."""
        recipe, total = self.recipe, 0.0
        batch = batch_at(self.train_file.ids, self.step, recipe.batch, recipe.length, recipe.seed)
        for part in batch.split(recipe.micro_batch):
            part = part.to(self.device)
            self.optimizer.before(part[:, :-1])
            with self._precision():
                loss = loss_of(self._computed, part) * (len(part) / len(batch))
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise RuntimeError(f"step {self.step}: the loss is {total}; take a lower --rate or a longer --warmup")
        self.optimizer.step(self._rate(self.step), recipe.clip)
        return total

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        """float32 on a CPU; bfloat16 where the matrices are multiplied on a GPU."""
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @torch.no_grad()
    def held_out_loss(self, windows: int = EVALUATED) -> float:
        """Mean nats a token over windows evenly spread over the held-out text."""
        total = 0.0
        with self.optimizer.current(), self._precision():
            for part in self.held_out_windows(windows).split(self.recipe.micro_batch):
                total += loss_of(self.model, part).item() * len(part)
        return total / windows

    def held_out_windows(self, count: int) -> Tensor:
        """int64 [count, length + 1], evenly spread over the held-out text."""
        assert self.valid_file is not None
        ids, length = self.valid_file.ids, self.recipe.length
        starts = np.linspace(0, len(ids) - length - 1, count).astype(int)
        windows = np.stack([ids[start : start + length + 1] for start in starts]).astype(np.int64)
        return torch.from_numpy(windows).to(self.device)

    def save(self) -> None:
        """The model, then the state: either is whole, or as it was, and a run whose state is the last has its model."""
        seen = {"tokens": str(self.step * self.recipe.batch * self.recipe.length), "seed": str(self.recipe.seed)}
        known = self.base.provenance if self.base else {"weights": "trained from scratch with meki-train"}
        # Float16 halves the file; its rounding is far below that of any quantised package. A base stays as it is.
        with self.optimizer.current():
            save_pretrained(
                self.out / MODEL,
                self.model,
                self.tokenizer,
                provenance={**known, **self.provenance, **seen},
                dtype=torch.float32 if self.base else torch.float16,
                overwrite=True,
            )
        state = {
            "identity": json.loads(json.dumps(self.identity)),
            "model": self._trained(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        with replace_file(self.out / STATE) as partial:
            torch.save(state, partial)
