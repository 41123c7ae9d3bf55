"""What a memory that was trained on a frozen model is worth on held-out text, beside a LoRA of equal RAM.

    python -m benchmarks.memory_and_lora RUN --base MODEL --texts TEXT... [--rate 3e-3]

RUN is a directory of `meki-train --base MODEL --freeze`. The LoRA (peft; on all matrices of attention and FFN, alpha
twice the rank) sees the same batches in the same order, with the same optimizer and schedule, from its own peak rate;
its rank is the one whose weights, not merged, come nearest to what the memory has in RAM beside its rows. Then the
model, the model with the memory, and the model with the LoRA are measured on the same windows of every text: bits a
byte, and the paired difference to the model with its 95% interval (1.96 standard errors of the windows' mean). The LoRA
is kept in RUN/lora.safetensors and not trained again. Needs `pip install '.[lora,models]'`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from meki.bench.markdown import head, row
from meki.cli.arguments import integer, number, path
from meki.cli.errors import run_command
from meki.models.architectures.base import Model
from meki.models.checkpoints import open_checkpoint
from meki.models.checkpoints.checkpoint import checkpoint_model
from meki.models.checkpoints.huggingface import load_model
from meki.models.tokenizer import parse_tokenizer, read_tokenizer
from meki.models.train.data import TokenFile, batch_at, spread_windows, write_tokens
from meki.models.train.optimizer import Optimizer, learning_rate
from meki.models.train.trainer import MODEL, STATE, Recipe, loss_of

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(model: Model, rank: int, seed: int) -> dict[str, Tensor]:
    """Freezes the model; returns the new weights by their names."""
    torch.manual_seed(seed)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS)), model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def rank_of(model: Model, weights: int) -> int:
    """The rank of a LoRA that has about so many weights."""
    matrices = [module for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    of_rank_1 = sum(sum(matrix.weight.shape) for matrix in matrices)
    return max(1, round(weights / of_rank_1))


def train(model: Model, recipe: Recipe, tokens: TokenFile, rate: float) -> None:
    """As `Trainer` does, from its first step to the last."""
    optimizer, last = Optimizer(model, rate, recipe.weight_decay), rate * recipe.last_rate / recipe.rate
    with tqdm(range(recipe.steps), unit="step", disable=None) as steps:
        for step in steps:
            batch = batch_at(tokens.ids, step, recipe.batch, recipe.length, recipe.seed)
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step(learning_rate(step, recipe.steps, rate, last, recipe.warmup), recipe.clip)
            steps.set_postfix(loss=f"{loss.item():.4f}")


@torch.no_grad()
def bits(model: Model, tokens: TokenFile, length: int, windows: int) -> NDArray[np.float64]:
    """Bits a byte of windows evenly spread over the text."""
    most = (len(tokens.ids) - 1) // length
    pieces = spread_windows(tokens.ids, min(windows, most), length)
    losses = [loss_of(model, piece[None]).item() for piece in tqdm(pieces, unit="window", leave=False, disable=None)]
    return np.array(losses) * tokens.bits_per_nat


def run(args: argparse.Namespace) -> None:
    identity: dict[str, Any] = torch.load(args.run / STATE, mmap=True, weights_only=True)["identity"]
    fields = Recipe.__dataclass_fields__
    recipe = Recipe(**{name: value for name, value in identity["recipe"].items() if name in fields})
    spec = read_tokenizer(args.run / MODEL / "tokenizer.json")
    base, (with_memory, _) = checkpoint_model(open_checkpoint(args.base, {})), load_model(args.run / MODEL)
    memory = with_memory.config.ram_parameters - base.config.ram_parameters
    rank = rank_of(base, memory)
    texts = {}
    for text in args.texts:
        file = args.run / f"measured-{text.name}.tokens"
        texts[text.name] = write_tokens(file, [text], parse_tokenizer(spec.json), spec.eos_token_ids[0])

    def measure(model: Model) -> dict[str, NDArray[np.float64]]:
        return {name: bits(model, tokens, recipe.length, args.windows) for name, tokens in texts.items()}

    found = {"base": measure(base), "with the memory": measure(with_memory)}
    lora, kept = add_lora(base, rank, recipe.seed), args.run / "lora.safetensors"
    if kept.exists():
        base.load_state_dict(load_file(kept), strict=False)
    else:
        train(base, recipe, TokenFile.open(args.run / "train.tokens"), args.rate)
        save_file(dict(lora), kept)
    added = {"with the memory": memory, "with the LoRA": sum(weight.numel() for weight in lora.values())}
    found["with the LoRA"] = measure(base)
    print(*head(["model", "RAM weights added", *(f"{name}, bits a byte" for name in texts)], "l"), sep="\n")
    for name, its in found.items():
        cells = [name, f"{added.get(name, 0):,}"]
        for text, values in its.items():
            change = values - found["base"][text]
            error = 1.96 * change.std(ddof=1) / len(change) ** 0.5
            paired = f" ({change.mean():+.4f} ± {error:.4f})" if name != "base" else ""
            cells.append(f"{values.mean():.4f}{paired}")
        print(row(cells))
    print(f"\nLoRA of rank {rank}; {recipe.steps} steps, {recipe.steps * recipe.batch * recipe.length:,} tokens")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=path, metavar="RUN", help="directory of a run that has ended")
    add("--base", type=path, required=True, metavar="MODEL", help="what the run was made of")
    add("--texts", type=path, nargs="+", required=True, metavar="TEXT", help="held-out text")
    add("--rate", type=number("a learning rate", 1), default=3e-3, help="the LoRA's peak (default: %(default)s)")
    add("--windows", type=integer(2), default=64, help="of each text, as long as the run's (default: %(default)s)")
    return run_command("memory_and_lora", lambda: run(parser.parse_args()), extras="[lora,models]")


if __name__ == "__main__":
    sys.exit(main())
