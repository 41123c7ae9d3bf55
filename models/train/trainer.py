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
from . import distributed
from .base_model import BaseModel
from .data import TokenFile, batch_at, spread_windows
from .distributed import ALONE, World
from .log import Log
from .optimizer import Optimizer, learning_rate

STATE, MODEL = "state.pt", "model"


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
        world: World = ALONE,
        shard: bool = False,
    ) -> None:
        """base: the model that `config` adds a memory to; None: all is trained from scratch. world: processes that
        each compute their share of a step, `micro_batch` sequences at a time; shard: weights and moments are spread
        over them. ConfigError if the directory has a run of another model or recipe, or if there are too few tokens."""
        if recipe.batch % world.size:
            raise ConfigError(f"--batch is {recipe.batch}, expected a multiple of the {world.size} processes")
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
        self._world, self._how = world, {"compile": compile, "shard": shard}
        if shard:
            distributed.shard(self.model, world)
        # A compiled step and sharded tables have no sparse gradients.
        deferred = not (compile or shard)
        self.optimizer = Optimizer(self.model, recipe.rate, recipe.weight_decay, deferred=deferred, world=world)
        if base:
            base.set_rate(self.model, self.optimizer, recipe.rate)
        self.step = 0
        self._parallel: nn.Module = self.model
        if world.size > 1 and not shard:
            self._parallel = distributed.replicate(self.model, self.optimizer.tables)
        self._computed = torch.compile(self._parallel) if compile else self._parallel
        self._resume()

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        data = {"tokens": len(self.train_file.ids), "bytes": self.train_file.bytes}
        base = {"base": self._base_weights, "base_rate": self.base and self.base.rate}
        recipe = {**dataclasses.asdict(self.recipe), **base, **self._how}
        return {"config": self.config.settings(), "recipe": recipe, "data": data}

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Whole weights and moments, in the first process; all have to ask if they are spread."""
        if self._how["shard"]:
            return distributed.whole_state(self.model, self.optimizer.dense)
        return self.model.state_dict(), self.optimizer.state_dict()

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
        if self._how["shard"]:
            distributed.load_whole_state(self.model, self.optimizer.dense, state["model"], state["optimizer"])
        else:
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
        shown = None if self._world.rank == 0 else True
        with (
            tqdm(total=recipe.steps, initial=self.step, unit="step", disable=shown) as progress,
            Log(self.out, self.step) if self._world.rank == 0 else contextlib.nullcontext() as log,
        ):
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
                    if log:
                        log.write(entry)
                    progress.set_postfix(loss=f"{loss:.4f}")
                    begun, since = time.monotonic(), self.step
                overdue = time.monotonic() - saved_at > save_every
                stopped, overdue = map(bool, self._world.sums([stop(), overdue], self.device))  # all, or none
                if done or stopped or overdue:
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
        whole = batch_at(self.train_file.ids, self.step, recipe.batch, recipe.length, recipe.seed)
        batch = self._world.share(whole)
        parts = batch.split(recipe.micro_batch)
        for number, part in enumerate(parts, 1):
            part = part.to(self.device)
            self.optimizer.before(part[:, :-1])
            with distributed.accumulating(self._parallel, last=number == len(parts)):
                with self._precision():
                    loss = loss_of(self._computed, part) * (len(part) / len(batch))
                loss.backward()
            total += loss.item()
        total = self._world.sums([total], self.device)[0] / self._world.size
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
        return spread_windows(self.valid_file.ids, count, self.recipe.length).to(self.device)

    def save(self) -> None:
        """The model, then the state: either is whole, or as it was, and a run whose state is the last has its model."""
        weights, moments = self._state()
        with self._world.first_alone():
            if self._world.rank == 0:
                self._write(weights, moments)

    def _write(self, weights: dict[str, Any], moments: dict[str, Any]) -> None:
        recipe, model = self.recipe, self.model
        known = self.base.provenance if self.base else {"weights": "trained from scratch with meki-train"}
        seen = {"tokens": str(self.step * recipe.batch * recipe.length), "seed": str(recipe.seed)}
        if self._how["shard"]:
            with torch.device("meta"):
                model = self.config.module()
            model.load_state_dict(weights, assign=True)
        # Float16 halves the file; its rounding is far below that of any quantised package. A base stays as it is.
        with self.optimizer.current():
            save_pretrained(
                self.out / MODEL,
                model,
                self.tokenizer,
                provenance={**known, **self.provenance, **seen},
                dtype=torch.float32 if self.base else torch.float16,
                overwrite=True,
            )
        # What is frozen, its base has.
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        state = {
            "identity": json.loads(json.dumps(self.identity)),
            "model": {name: tensor for name, tensor in weights.items() if name not in frozen},
            "optimizer": moments,
            "step": self.step,
        }
        with replace_file(self.out / STATE) as partial:
            torch.save(state, partial)
