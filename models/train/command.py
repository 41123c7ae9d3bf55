"""Trains a model on text, from scratch or a memory for an existing one, and resumes where it was stopped."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from meki.cli.arguments import Parser, integer, number, path
from meki.cli.errors import report, run_command
from meki.package.files import locked

from ..arguments import UsageError, reported_warnings, setting
from ..sizes import SIZES

if TYPE_CHECKING:  # importing these loads PyTorch
    from ..architectures.base import Architecture
    from ..tokenizer import TokenizerSpec
    from .base_model import BaseModel
    from .distributed import World
    from .trainer import Trainer

PROGRAM = "meki-train"


def read_config(args: argparse.Namespace) -> Architecture:
    """The configuration that the command line names: a size, or a JSON file of settings, and --set."""
    from ..architectures.llama import LlamaConfig
    from ..config import ConfigError

    settings: dict[str, Any] = dict(SIZES.get(args.config, {}))
    if not settings:
        file = Path(args.config)
        if not file.is_file():
            raise UsageError(f"{args.config}: neither a size ({', '.join(SIZES)}) nor a file of settings")
        try:
            settings = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{file}: not valid JSON: {error}; give an object of settings") from error
        if not isinstance(settings, dict):
            raise UsageError(f"{file}: {settings!r} is no object of settings")
    try:
        return LlamaConfig.from_settings({**settings, **dict(map(setting, args.set))})
    except ConfigError as error:
        raise UsageError(f"{args.config}: {error}") from error


def open_model(args: argparse.Namespace) -> tuple[Architecture, BaseModel | None, TokenizerSpec | None]:
    """The configuration, and for `--base` what it begins with and its tokenizer."""
    if args.base is None:
        if args.freeze or args.base_rate is not None:
            raise UsageError("--freeze and --base-rate are for the model of --base; name one, or omit them")
        return read_config(args), None, None
    if not args.freeze and args.base_rate is None:
        raise UsageError("--base: are its weights to change? give --freeze, or --base-rate R")
    from .base_model import open_base

    with reported_warnings(PROGRAM):
        base, config, tokenizer = open_base(args, dict(map(setting, args.set)))
    return config, base, tokenizer


def check_device(device: str) -> None:
    """UsageError unless it is one that is here."""
    import torch

    gpus = torch.cuda.device_count()
    here = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if device not in here:
        raise UsageError(f"--device is {device!r}, expected one that PyTorch finds here: {', '.join(here)}")


class Interrupt:
    """Whether Ctrl-C came: a step is done or not, never half. A second one interrupts as usual."""

    def __enter__(self) -> Self:
        self.came = False
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self.came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{path}: is no directory, nor can be one; choose another path") from error


def show_held_out(trainer: Trainer, before: str, world: World) -> None:
    if trainer.valid_file is not None:
        loss = trainer.held_out_loss()  # of which every process computes its part, if weights are spread
        bits = loss * trainer.valid_file.bits_per_nat
        if world.rank == 0:
            print(f"{before} held-out loss {loss:.4f} nats a token, {bits:.4f} bits a byte")


def make_trainer(args: argparse.Namespace, world: World) -> Trainer:
    """What the command line asks for. UsageError; RuntimeError for bad files that it names."""
    from ..config import ConfigError
    from ..package import check_tokenizer
    from .prepare import prepare_tokenizer, prepare_tokens
    from .trainer import Recipe, Trainer

    try:
        config, base, tokenizer = open_model(args)
        recipe = Recipe(
            tokens=args.tokens,
            batch=args.batch,
            micro_batch=args.micro_batch or args.batch,
            length=args.length or config.context,
            rate=args.rate,
            last_rate=args.rate / 10 if args.last_rate is None else args.last_rate,
            warmup=args.warmup,
            seed=args.seed,
        )
        with world.first_alone():
            tokenizer = tokenizer or prepare_tokenizer(args.tokenizer, args.data, config.vocab_size, args.output)
            if not tokenizer.eos_token_ids:
                raise ValueError(
                    "tokenizer: has no end token, which stands between two texts; name one as its eos_token"
                )
            check_tokenizer(tokenizer, config.vocab_size)
            tokens = prepare_tokens("train", args.data, tokenizer, args.output)
            held_out = prepare_tokens("valid", args.valid, tokenizer, args.output) if args.valid else None
        return Trainer(
            config,
            recipe,
            tokens,
            held_out,
            args.output,
            tokenizer=tokenizer,
            provenance={"data": ", ".join(source.name for source in args.data)},
            base=base,
            device=world.device(args.device),
            compile=args.compile,
            world=world,
            shard=args.shard,
        )
    except ConfigError as error:
        raise UsageError(error) from error
    except UsageError:
        raise
    except ValueError as error:  # of the files that the arguments name
        raise RuntimeError(error) from error


def train(args: argparse.Namespace) -> None:
    from .distributed import World
    from .prepare import check_texts

    check_texts([*args.data, *args.valid])
    if args.tokenizer is not None and not args.tokenizer.is_file():
        raise UsageError(f"{args.tokenizer}: no such tokenizer; give a tokenizer.json")
    check_device(args.device)
    with World.join(args.device) as world, contextlib.ExitStack() as stack:
        if args.shard and world.size == 1:
            raise UsageError("--shard spreads weights over several processes, this is one; start them with torchrun")
        make_directory(args.output)
        if world.rank == 0:
            stack.enter_context(locked(args.output))
        run(args, make_trainer(args, world), world)


def run(args: argparse.Namespace, trainer: Trainer, world: World) -> None:
    recipe = trainer.recipe
    if args.base and not trainer.step:
        show_held_out(trainer, f"{args.base}:", world)
    with Interrupt() as interrupt:
        trainer.train(lambda: interrupt.came)
    if trainer.step < recipe.steps:
        if world.rank == 0:
            report(PROGRAM, "note", f"stopped at step {trainer.step} of {recipe.steps}; the same command goes on")
        raise KeyboardInterrupt
    if world.rank == 0:
        print(f"{args.output}: {recipe.steps} steps, {recipe.steps * recipe.batch * recipe.length:,} tokens")
    show_held_out(trainer, " ", world)
    if world.rank == 0:
        print(f"  meki-convert {args.output / 'model'} -o PACKAGE")


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted."""
    parser = Parser(PROGRAM, description=__doc__, epilog="Reference: docs/cli.md")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("config", metavar="CONFIG", nargs="?", help=f"a size ({', '.join(SIZES)}), or a JSON file of settings")
    add("--base", type=path, metavar="MODEL", help="add a memory to this model: what meki-convert reads, without one")
    rate = number("a learning rate", 1)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--freeze", action="store_true", help="train the memory alone, not the model of --base")
    add("--base-rate", type=rate, metavar="R", help="peak learning rate of the model of --base")
    add = parser.add_argument
    add(
        "--data",
        type=path,
        nargs="+",
        required=True,
        metavar="TEXT",
        help="what to learn: .txt or .jsonl, also .xz, .gz",
    )
    add("--valid", type=path, nargs="+", default=[], metavar="TEXT", help="held-out text")
    add(
        "-o",
        "--output",
        type=path,
        required=True,
        metavar="DIR",
        help="directory of the run; one that is there goes on",
    )
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the configuration")
    add(
        "--tokenizer",
        type=path,
        metavar="FILE",
        help="tokenizer.json (default: the base's own, or one that is trained on the text)",
    )
    add("--tokens", type=integer(1, 10**18), required=True, metavar="N", help="tokens to see in all")
    add("--batch", type=integer(1), default=4, metavar="N", help="sequences of a step (default: %(default)s)")
    add("--micro-batch", type=integer(1), metavar="N", help="sequences computed at a time by a process (default: all)")
    add("--length", type=integer(1), metavar="N", help="tokens of a sequence (default: the model's context)")
    add("--rate", type=rate, default=4e-4, metavar="R", help="peak learning rate (default: %(default)s)")
    add("--last-rate", type=rate, metavar="R", help="learning rate at the end (default: a tenth of the peak)")
    add("--warmup", type=integer(0), default=200, metavar="N", help="steps of warm-up (default: %(default)s)")
    add("--seed", type=integer(0), default=1, metavar="N", help="of weights and order (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda; bfloat16 on the latter (default: %(default)s)")
    add("--shard", action="store_true", help="spread weights and moments over the processes of torchrun (FSDP2)")
    add("--compile", action="store_true", help="compile the step with torch.compile (on a CPU this needs g++)")
    return run_command(PROGRAM, lambda: train(parser.parse_args(argv)), extras="[models]")
