"""What the row cache is worth on a text: hits, and decode speed beside the dense backbone, for caches of several sizes.

    python -m benchmarks.row_cache PACKAGE TEXT [--rom-delay-ms 5] [--caches 0,1,4,16]

The first --warm-up tokens of TEXT are prefilled in a session of their own: their rows are what the cache begins with.
The next --tokens are decoded one by one, as if the model had chosen them, in a session whose KV cache has been filled
to --depth; in turns of 4 with the same package without its memory, in groups A B B A. The speed is the total time of
the one over that of the other, and its interval a bootstrap of the groups. Time is the engine's, without sampling.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from meki import Engine, _core
from meki.bench.markdown import head, row
from meki.bench.stats import percentiles
from meki.cli.arguments import integer, number, path, token_counts
from meki.cli.errors import run_command

TURN = _core.Plan.TURN
GROUP = _core.Plan.GROUP
RESAMPLES = 2000


class Contender:
    """One engine's sequence at a depth, which takes the tokens that it is given."""

    def __init__(self, engine: Engine, depth: int, tokens: int) -> None:
        self._session = _core.Session(engine._core, _core.SessionOptions(context=depth + tokens))
        self._session.fill_synthetic(depth)
        self._depth = depth

    def rewind(self) -> None:
        self._session.rewind(self._depth)
        self._session.logits(self._depth)  # what a window does not have any more is computed again: not in a step
        self._session.reset_stats()

    def step(self, token: int) -> int:
        """Nanoseconds."""
        before = self._session.stats.prefill_ns
        self._session.append([token])
        self._session.logits()
        return self._session.stats.prefill_ns - before

    @property
    def stats(self) -> _core.Stats:
        return self._session.stats


def warm_up(engine: Engine, ids: list[int]) -> None:
    if ids:
        session = _core.Session(engine._core, _core.SessionOptions(context=len(ids)))
        session.append(ids)
        session.logits(len(ids))


def take_turns(ours: Contender, dense: Contender, ids: list[int]) -> NDArray[np.float64]:
    """Nanoseconds [group, contender]. Both decode the same tokens."""
    ours.rewind()
    dense.rewind()
    times = []
    for first in tqdm(range(0, len(ids), GROUP), unit="group", leave=False, disable=None):
        turns = (ids[first : first + TURN], ids[first + TURN : first + GROUP])
        taken = [0, 0]
        for contender, turn in ((0, 0), (1, 0), (1, 1), (0, 1)):
            taken[contender] += sum(map((ours, dense)[contender].step, turns[turn]))
        times.append(taken)
    return np.array(times, dtype=np.float64)


def speed(times: NDArray[np.float64]) -> tuple[float, float, float]:
    """Ours relative to the dense one's, and its 95% interval."""
    picks = np.random.default_rng(0).integers(0, len(times), (RESAMPLES, len(times)))
    totals = times[picks].sum(axis=1)
    low, high = percentiles((totals[:, 1] / totals[:, 0]).tolist(), 2.5, 97.5)
    ours, dense = times.sum(axis=0)
    return float(dense / ours), low, high


def measure(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The cells of a line for each cache. ValueError for a model without a memory, or a text that is too short."""
    backbone = Engine(arguments.package, memory=False, threads=arguments.threads)
    if backbone.manifest["memory"] is None:
        raise ValueError(f"{backbone.name} has no memory; name a package that has one")
    known, new = read_tokens(arguments, backbone.tokenizer)
    dense = Contender(backbone, arguments.depth, len(new))
    for cache in arguments.caches:
        engine = Engine(
            arguments.package, threads=arguments.threads, row_cache=cache, rom_delay_ms=arguments.rom_delay_ms
        )
        warm_up(engine, known)
        ours = Contender(engine, arguments.depth, len(new))
        times = take_turns(ours, dense, new)
        ratio, low, high = speed(times)
        stats = ours.stats
        yield [
            str(cache),
            f"{stats.rom_hits / stats.rom_requests:.1%}",
            f"{stats.prefill_stall_ns / 1e6 / len(new):.2f}",
            f"{times[:, 0].sum() / 1e6 / len(new):.1f}",
            f"{times[:, 1].sum() / 1e6 / len(new):.1f}",
            f"{ratio:.3f} ({low:.3f} to {high:.3f})",
        ]


def read_tokens(arguments: argparse.Namespace, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Those of the warm-up, and those to decode."""
    ids = tokenizer.encode(arguments.text.read_text()).ids
    wanted = arguments.warm_up + arguments.tokens
    if arguments.tokens % GROUP or len(ids) < wanted:
        raise ValueError(
            f"{arguments.text} has {len(ids):,} tokens, {arguments.warm_up:,} to warm up and {arguments.tokens:,} to "
            f"decode are wanted, these a multiple of {GROUP}; give a longer text or fewer"
        )
    return ids[: arguments.warm_up], ids[arguments.warm_up : wanted]


def run(arguments: argparse.Namespace) -> None:
    columns = [
        "cache, MiB",
        "hits",
        "wait, ms a token",
        "with memory, ms a token",
        "dense, ms a token",
        "with memory / dense",
    ]
    print("\n".join([*head(columns, ""), *map(row, measure(arguments))]))


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="row_cache", description="Measure the row cache on a text.")
    add = parser.add_argument
    add("package", metavar="PACKAGE")
    add("text", type=path, metavar="TEXT")
    add("--depth", type=integer(1), default=10_240, metavar="N", help="tokens in the KV cache (default: %(default)s)")
    add("--warm-up", type=integer(0), default=2_000, metavar="N", help="tokens read before (default: %(default)s)")
    add("--tokens", type=integer(1), default=512, metavar="N", help="decode steps of each (default: %(default)s)")
    add("--caches", type=token_counts, default=(0, 16), metavar="MIB,...", help="sizes (default: 0,16)")
    add("--rom-delay-ms", type=number("milliseconds", 10_000), default=5.0, metavar="MS", help="(default: %(default)s)")
    add("--threads", type=int, default=0, metavar="N", help="compute threads (default: one per available core)")
    return run_command(parser.prog, lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
