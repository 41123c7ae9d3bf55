"""What generations cost each other: tokens/s of all, and the time from token to token of each, by how many there are.

    python -m benchmarks.concurrency PACKAGE [--concurrency 1 2 4 8 16] [--tokens 64] [--threads N]

As many prompts of a few tokens, each another one, are submitted to a scheduler at once, and --tokens greedy tokens are
generated of each, whatever the model says. Times are those at which the scheduler delivers pieces of text, so Python's
share, the detokeniser's and the sampler's are in them. A piece is a token (of a character that takes several, these).
tokens/s are those of all generations, from the moment at which the last of them has its first piece to the one at which
the first has its last. The numbers of generations take turns, in the reverse order every other round; each cell is the
median over the rounds, that of the last column of ratios to the first number in the same round.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from queue import SimpleQueue
from statistics import median

from tqdm import tqdm

from meki import Engine
from meki.bench.markdown import head, row
from meki.cli.arguments import integer
from meki.cli.errors import run_command
from meki.scheduler import Event, Piece, Scheduler

COLUMNS = ("at once", "tokens/s", "ms a token, p50", "p95", "tokens/s, ratio")


@dataclass(frozen=True)
class Speed:
    """Of one round."""

    tokens_per_s: float
    """Of all generations together."""
    p50_ms: float
    """From token to token of one generation."""
    p95_ms: float


def speed(times: Sequence[Sequence[float]]) -> Speed:
    """times: of each generation the seconds at which its pieces came, at least two each."""
    begin, end = max(its[0] for its in times), min(its[-1] for its in times)
    count = sum(begin < moment <= end for its in times for moment in its)
    gaps = sorted(1000 * (after - before) for its in times for before, after in pairwise(its))
    tokens_per_s = count / (end - begin) if count else 0.0
    return Speed(tokens_per_s, median(gaps), gaps[min(len(gaps) - 1, int(0.95 * len(gaps)))])


def lines(rounds: Mapping[int, Sequence[Speed]]) -> Iterator[list[str]]:
    """The table, of the rounds of each number of generations."""
    first = next(iter(rounds.values()))
    for count, speeds in rounds.items():
        ratio = median(its.tokens_per_s / one.tokens_per_s for its, one in zip(speeds, first, strict=True))
        yield [
            str(count),
            f"{median(its.tokens_per_s for its in speeds):.0f}",
            f"{median(its.p50_ms for its in speeds):.1f}",
            f"{median(its.p95_ms for its in speeds):.1f}",
            f"{ratio:.2f}",
        ]


def generate(engine: Engine, scheduler: Scheduler, count: int, tokens: int) -> Speed:
    """One round of `count` generations."""
    ends: SimpleQueue[int | Exception] = SimpleQueue()
    times: list[list[float]] = [[] for _ in range(count)]

    def deliver(index: int, event: Event) -> None:
        if isinstance(event, Piece):
            times[index].append(time.perf_counter())
        else:
            ends.put(event if isinstance(event, Exception) else index)

    for index in range(count):
        request = engine.requests.text(
            f"Story {index}:", first=True, whole=True, max_new_tokens=tokens, temperature=0, ignore_eos=True
        )
        scheduler.submit(request, partial(deliver, index))
    for _ in range(count):
        if isinstance(end := ends.get(), Exception):
            raise end
    return speed(times)


def run(arguments: argparse.Namespace) -> None:
    engine = Engine(arguments.package, threads=arguments.threads)
    counts = list(dict.fromkeys(arguments.concurrency))
    rounds: dict[int, list[Speed]] = {count: [] for count in counts}
    most = max(counts)
    scheduler = Scheduler(
        lambda: engine.session(context=arguments.tokens + 32), engine.prefix_cache, parallel=most, waiting=most
    )
    try:
        with tqdm(total=len(counts) * (1 + arguments.rounds), unit="run", leave=False, disable=None) as progress:
            for number in range(1 + arguments.rounds):
                for count in reversed(counts) if number % 2 else counts:
                    result = generate(engine, scheduler, count, arguments.tokens)
                    if number > 0:  # the first has made the sessions
                        rounds[count].append(result)
                    progress.update()
    finally:
        scheduler.close()
    print("\n".join([*head(COLUMNS, ""), *(row(line) for line in lines(rounds))]))


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="concurrency", description="Measure generations at once.")
    add = parser.add_argument
    add("package", metavar="PACKAGE")
    counts = [1, 2, 4, 8, 16]
    add("--concurrency", type=integer(1), nargs="+", default=counts, metavar="N", help="at once (default: 1 2 4 8 16)")
    add("--tokens", type=integer(8), default=64, metavar="N", help="generated of each (default: %(default)s)")
    add("--rounds", type=integer(1), default=5, metavar="N", help="(default: %(default)s)")
    add("--threads", type=int, default=0, metavar="N", help="compute threads (default: one per available core)")
    return run_command(parser.prog, lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
