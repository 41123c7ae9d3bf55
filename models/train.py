"""The recipe of meki-tiny: train from scratch on a text file of stories, on a CPU, resumable at any moment.

    python -m meki.models.train --train stories_train.txt.xz --valid stories_valid.txt.xz --out runs/tiny

Stop it with Ctrl-C and start it again with the same arguments: it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from tqdm import tqdm

from meki.package.files import replace_file

from .architectures.base import Model
from .architectures.llama import LlamaConfig
from .checkpoints.huggingface import save_pretrained
from .sizes import SIZES
from .tokenizer import END_OF_STORY, read_tokenizer, train_tokenizer

SEPARATOR = f"\n{END_OF_STORY}\n"


def read_stories(path: Path) -> list[str]:
    """The stories of a text file (.txt or .txt.xz) in which a line `<|story|>` stands between two."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [story.strip() for story in file.read().split(SEPARATOR) if story.strip()]


def tokenize(tokenizer: Tokenizer, stories: list[str]) -> np.ndarray:
    """One stream of token ids, uint16 or uint32 [n]; every story ends with the end-of-story token."""
    end = tokenizer.token_to_id(END_OF_STORY)
    encoded = tokenizer.encode_batch_fast(stories)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    return np.concatenate([np.array([*story.ids, end], dtype=dtype) for story in encoded])


def batch_at(stream: np.ndarray, step: int, batch: int, length: int, seed: int) -> torch.Tensor:
    """Batch `step`, int64 [batch, length + 1]: a function of its arguments alone, so that a resumed run sees what an
    unbroken one would. Every epoch cuts the stream at another offset and shuffles the pieces."""
    per_epoch = (len(stream) - length - 1) // length
    rows = []
    for index in range(step * batch, (step + 1) * batch):
        epoch, position = divmod(index, per_epoch)
        rng = np.random.default_rng((seed, epoch))
        offset = int(rng.integers(length))
        start = offset + int(rng.permutation(per_epoch)[position]) * length
        rows.append(stream[start : start + length + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def loss_of(model: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    """Next-token cross entropy in nats. batch: int64 [b, length + 1]."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, stream: np.ndarray, length: int, windows: int) -> float:
    """Mean nats a token over `windows` windows, evenly spread over the stream."""
    starts = np.linspace(0, len(stream) - length - 1, windows).astype(int)
    batch = torch.from_numpy(np.stack([stream[s : s + length + 1] for s in starts]).astype(np.int64))
    return float(np.mean([loss_of(model, part).item() for part in batch.split(8)]))


def make_optimizer(model: Model, rate: float) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95), weight decay 0.1 on matrices that multiply; none on tables (a token that is not in the batch
    must not lose its rows), norms and scales."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    decayed = [p for p in model.parameters() if p.dim() == 2 and id(p) not in tables]
    others = [p for p in model.parameters() if p.dim() != 2 or id(p) in tables]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


class Run:
    """A training run in one directory: tokenizer.json, streams.npz (token ids), state.pt (to resume), log.jsonl
    (losses) and model/ (the training form with its tokenizer, for meki-convert)."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out: Path = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.config = LlamaConfig.from_settings(SIZES[args.config])
        self.tokenizer, self.train_stream, self.valid_stream = self._prepare_data()
        self.model = self.config.module().initialise(args.seed)
        self.optimizer = make_optimizer(self.model, args.rate)
        self.step = 0
        self.steps = args.tokens // (args.batch * self.config.context)
        if (self.out / "state.pt").exists():
            state = torch.load(self.out / "state.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def _prepare_data(self) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
        tokenizer_path, streams_path = self.out / "tokenizer.json", self.out / "streams.npz"
        if not streams_path.exists():
            train, valid = read_stories(self.args.train), read_stories(self.args.valid)
            tokenizer = train_tokenizer(train, self.config.vocab_size)
            tokenizer.save(str(tokenizer_path))
            with replace_file(streams_path) as partial, partial.open("wb") as file:
                np.savez(file, train=tokenize(tokenizer, train), valid=tokenize(tokenizer, valid))
        with np.load(streams_path) as streams:
            return Tokenizer.from_file(str(tokenizer_path)), streams["train"], streams["valid"]

    def train(self) -> None:
        args, saved_at = self.args, time.monotonic()
        compiled = torch.compile(self.model) if args.compile else self.model
        progress = tqdm(total=self.steps, initial=self.step, unit="step", mininterval=30)
        while self.step < self.steps:
            rate = learning_rate(self.step, self.steps, args.rate, args.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(compiled, batch_at(self.train_stream, self.step, args.batch, self.config.context, args.seed))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            progress.update()
            if self.step % 50 == 0 or self.step == self.steps:
                entry = {"step": self.step, "loss": round(loss.item(), 4), "rate": rate}
                if self.step % 500 == 0 or self.step == self.steps:
                    entry["valid"] = round(held_out_loss(self.model, self.valid_stream, self.config.context, 64), 4)
                with (self.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(entry) + "\n")
                progress.set_postfix(entry)
            if time.monotonic() - saved_at > 300 or self.step == self.steps:
                self.save()
                saved_at = time.monotonic()

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        with replace_file(self.out / "state.pt") as partial:
            torch.save(state, partial)
        provenance = {
            "weights": "trained from scratch with meki.models.train",
            "data": self.args.train.name,
            "tokens": str(self.step * self.args.batch * self.config.context),
            "seed": str(self.args.seed),
        }
        # Float16 halves the file; its rounding is far below that of any quantised package.
        save_pretrained(
            self.out / "model",
            self.model,
            read_tokenizer(self.out / "tokenizer.json"),
            provenance=provenance,
            dtype=torch.float16,
            overwrite=True,
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m meki.models.train", description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="stories to learn, .txt or .txt.xz")
    parser.add_argument("--valid", type=Path, required=True, help="stories held out")
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--config", default="meki-tiny", choices=sorted(SIZES))
    parser.add_argument("--tokens", type=int, default=16_000_000, help="tokens to see in all")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps of linear warm-up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the step with torch.compile (needs g++)")
    run = Run(parser.parse_args(argv))
    try:
        run.train()
    except KeyboardInterrupt:
        run.save()
        raise SystemExit(f"stopped at step {run.step} of {run.steps}; run the same command to go on") from None


if __name__ == "__main__":
    main()
