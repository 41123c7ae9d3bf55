"""What a step of training costs with tables whose rows are moved when they are read, beside AdamW on whole tables.

    python -m benchmarks.deferred_tables [--vocab 151680] [--layers 4] [--memory-dim 128] [--tokens 1024] [--steps 6]

A small decoder with a MeKi memory, tokens as frequent as Zipf's law has it, the two in turn; one thread's CPU time, so
that other work beside it matters little. Printed are medians: the whole step, and the optimizer's part.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from meki.bench.markdown import head, row
from meki.cli.arguments import integer
from meki.cli.errors import run_command
from meki.models.architectures.llama import LlamaConfig
from meki.models.train.optimizer import Optimizer
from meki.models.train.trainer import loss_of

ROUNDS = 2


def measure(config: LlamaConfig, batches: Sequence[Tensor], deferred: bool) -> list[tuple[float, float]]:
    """Seconds of each step, and of the optimizer in it."""
    model = config.module().initialise(1)
    optimizer = Optimizer(model, 1e-3, 0.1, deferred=deferred)
    seconds = []
    for batch in batches:
        begun = time.process_time()
        optimizer.before(batch[:, :-1])
        loss_of(model, batch).backward()
        computed = time.process_time()
        optimizer.step(1e-3, 1.0)
        end = time.process_time()
        seconds.append((end - begun, end - computed))
    return seconds[1:]  # the first one makes the moments


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    width = {"hidden": 64, "ffn": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "context": arguments.tokens}
    size = {"vocab_size": arguments.vocab, "layers": arguments.layers, "memory_dim": arguments.memory_dim}
    config = LlamaConfig.from_settings({**width, **size})
    frequencies = 1 / torch.arange(1, arguments.vocab + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    count = (arguments.steps + 1, arguments.tokens + 1)
    batches = torch.multinomial(frequencies, count[0] * count[1], True, generator=generator).view(*count)[:, None]
    seconds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for deferred, its in seconds.items():
            its += measure(config, [*batches], deferred)
    rows = median(len(batch.unique()) for batch in batches)
    tables = f"{arguments.layers} tables of {arguments.vocab:,} x {arguments.memory_dim}"
    print(f"{tables}, of which a step reads {rows:g} rows")
    print("\n".join(head(("tables", "step, s", "optimizer, s"), "l")))
    for deferred, its in seconds.items():
        wholes, parts = zip(*its, strict=True)
        print(row(["deferred" if deferred else "AdamW", f"{median(wholes):.3f}", f"{median(parts):.3f}"]))


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="deferred_tables", description="Training steps with large memory tables.")
    add = parser.add_argument
    add("--vocab", type=integer(1), default=151_680, metavar="N", help="rows of a table (default: %(default)s)")
    add("--layers", type=integer(1), default=4, metavar="N", help="tables (default: %(default)s)")
    add("--memory-dim", type=integer(1), default=128, metavar="N", help="width of a row (default: %(default)s)")
    add("--tokens", type=integer(1), default=1024, metavar="N", help="of a step (default: %(default)s)")
    add("--steps", type=integer(1), default=6, metavar="N", help="of each in a round (default: %(default)s)")
    return run_command(parser.prog, lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
