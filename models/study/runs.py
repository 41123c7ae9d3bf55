"""A study's runs: each is trained once, by whichever process comes first, and leaves what it came to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meki.package.files import locked, write_file

from ..tokenizer import TokenizerSpec
from ..train.data import TokenFile
from ..train.log import read_log
from ..train.prepare import prepare_tokenizer, prepare_tokens
from ..train.trainer import Trainer
from .logit_lens import divergences
from .plan import Plan

POINTS = 20
"""Held-out losses of a run, along its way."""
LENS_WINDOWS = 16
"""Held-out sequences that LogitLens looks at."""
RESULT = "result.json"
Result = dict[str, Any]


@dataclass(frozen=True)
class Text:
    """What all runs of a study learn, and are asked."""

    tokenizer: TokenizerSpec
    train: TokenFile
    valid: TokenFile

    @classmethod
    def prepare(cls, plan: Plan, data: Sequence[Path], valid: Sequence[Path], out: Path) -> Text:
        """Made once, by the first process; others wait for it."""
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / "text", wait=True):
            vocab_size = plan.models[plan.baseline].vocab_size
            tokenizer = prepare_tokenizer(None, data, vocab_size, out)
            return cls(
                tokenizer,
                prepare_tokens("train", data, tokenizer, out),
                prepare_tokens("valid", valid, tokenizer, out),
            )


class Runs:
    """Runs of a plan in a directory, one below it each. What has been measured is in `results`, too: (model, seed)."""

    def __init__(self, plan: Plan, text: Text, out: Path, results: Sequence[Result], **how: Any) -> None:
        """results: of earlier; those of other settings, recipes or texts do not count. how: `device`, `compile`."""
        self.plan, self.text, self.out, self._how = plan, text, out, how
        its = {(result["model"], result["seed"]): result for result in results}
        self.results = {run: its[run] for run in plan.runs if run in its and its[run]["of"] == self._of(*run)}
        self.collect()

    def collect(self) -> None:
        """Takes in what other processes have done by now."""
        for name, seed in self.plan.runs:
            with contextlib.suppress(FileNotFoundError):
                result = json.loads((self.directory(name, seed) / RESULT).read_bytes())
                if result["of"] == self._of(name, seed):
                    self.results.setdefault((name, seed), result)

    def directory(self, name: str, seed: int) -> Path:
        return self.out / f"{name}-{seed}"

    def _of(self, name: str, seed: int) -> dict[str, Any]:
        """What a result is of, as JSON has it."""
        of = {
            "settings": self.plan.models[name].settings(),
            "recipe": dataclasses.asdict(self.plan.recipe_of(seed)),
            "tokens": [len(self.text.train.ids), len(self.text.valid.ids)],
            "tokenizer": self.text.train.tokenizer,
        }
        return json.loads(json.dumps(of))

    def train(self, stop: Callable[[], bool], say: Callable[[str], None]) -> list[tuple[str, int]]:
        """Trains what is left and no other process is at; gives the runs that others have. `stop`: after this step?"""
        others = []
        for name, seed in self.plan.runs:
            if stop():
                break
            if (name, seed) in self.results:
                continue
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(locked(self.directory(name, seed)))
                except RuntimeError:
                    others.append((name, seed))
                    continue
                self.collect()
                if (name, seed) not in self.results:
                    say(f"{name}, seed {seed}")
                    self._train(name, seed, stop)
        self.collect()
        return [run for run in others if run not in self.results]

    def _train(self, name: str, seed: int, stop: Callable[[], bool]) -> None:
        config, recipe, directory = self.plan.models[name], self.plan.recipe_of(seed), self.directory(name, seed)
        directory.mkdir(exist_ok=True)
        trainer = Trainer(
            config,
            recipe,
            self.text.train,
            self.text.valid,
            directory,
            tokenizer=self.text.tokenizer,
            provenance={"study": self.plan.title},
            **self._how,
        )
        every = max(1, recipe.steps // POINTS)
        trainer.train(stop, log_every=every, evaluate_every=every)
        if trainer.step < recipe.steps:
            return
        log = read_log(directory)
        with trainer.optimizer.current():
            logit_lens = divergences(trainer.model, trainer.held_out_windows(LENS_WINDOWS))
        loss = trainer.held_out_loss(len(self.text.valid.ids) // recipe.length)
        result = {
            "model": name,
            "seed": seed,
            "of": self._of(name, seed),
            "ram_weights": config.ram_parameters,
            "active_weights": config.active_parameters,
            "rom_weights": config.rom_parameters,
            "loss": loss,
            "bits_per_byte": loss * self.text.valid.bits_per_nat,
            "curve": [[entry["step"], round(entry["held_out_loss"], 4)] for entry in log if "held_out_loss" in entry],
            "logit_lens": logit_lens,
            "minutes": sum(_seconds(log, recipe.batch * recipe.length)) / 60,
            "threads": torch.get_num_threads(),
            "device": _device(trainer.device),
            "torch": torch.__version__,
        }
        write_file(directory / RESULT, json.dumps(result).encode())
        self.results[name, seed] = result


def _device(device: torch.device) -> str:
    """What trained, and in which numbers matrices were multiplied."""
    return "CPU, float32" if device.type == "cpu" else f"{torch.cuda.get_device_name(device)}, bfloat16"


def _seconds(log: Sequence[dict[str, Any]], tokens_of_a_step: int) -> list[float]:
    """Of training, between two lines."""
    steps = [0, *(entry["step"] for entry in log)]
    return [
        (step - before) * tokens_of_a_step / entry["tokens_per_s"]
        for before, step, entry in zip(steps, steps[1:], log, strict=False)
    ]
