"""What speculative decoding is worth on texts: decode speed with a draft and without one, and how often it is right.

    python -m benchmarks.speculation PACKAGE PROMPT... [--draft MODEL] [--chat] [--temperature 0.8]

Each PROMPT is a UTF-8 file that the model goes on with, or answers. --tokens are generated from it without a draft,
with prompt lookup and, if there is one, with the draft model, each in a session of its own and with the same seed, in
turns: the order is reversed every other round. The ratio is the median over the rounds of the speed with a draft over
that of the same round without one, with the interval of meki.bench.stats. Time is the engine's: steps, drafting and
sampling. The last column says whether the text is the same as without a draft.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from tqdm import tqdm

from meki import Engine
from meki.bench.markdown import head, row
from meki.bench.stats import median_interval
from meki.cli.arguments import integer, number, path
from meki.cli.errors import run_command
from meki.engine import Draft
from meki.generation import GenerationResult
from meki.options import GenerationOptions

COLUMNS = ("prompt", "draft", "tokens/s", "without", "ratio (95% interval)", "drafted", "accepted", "text")


def generate(engine: Engine, prompt: str, draft: Draft, arguments: argparse.Namespace) -> GenerationResult:
    session = engine.session(draft=draft, draft_tokens=None if draft is None else arguments.draft_tokens)
    options = GenerationOptions(
        max_new_tokens=arguments.tokens, temperature=arguments.temperature, seed=1, ignore_eos=True
    )
    if arguments.chat:
        return session.chat([{"role": "user", "content": prompt}], **options)
    return session.generate(prompt, **options)


def measure(
    engine: Engine, file: Path, drafts: dict[str, Draft], arguments: argparse.Namespace, progress: tqdm
) -> Iterator[list[str]]:
    """A line of the table for each draft."""
    prompt = file.read_text(encoding="utf-8").removesuffix("\n")
    names = ["none", *drafts]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    results: dict[str, GenerationResult] = {}
    for number_of_round in range(arguments.rounds):
        for name in reversed(names) if number_of_round % 2 else names:
            progress.set_description_str(f"{file.name}: {name}")
            results[name] = generate(engine, prompt, drafts.get(name), arguments)
            speeds[name].append(results[name].stats.decode_tokens_per_s or 0.0)
            progress.update()
    for name in drafts:
        ratios = [its / plain for its, plain in zip(speeds[name], speeds["none"], strict=True)]
        interval = median_interval(ratios)
        stats = results[name].stats
        yield [
            file.name,
            name,
            f"{median(speeds[name]):.1f}",
            f"{median(speeds['none']):.1f}",
            f"{median(ratios):.2f}" + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""),
            str(stats.drafted_tokens),
            f"{stats.accepted_tokens / stats.drafted_tokens:.0%}" if stats.drafted_tokens else "-",
            "the same" if results[name].token_ids == results["none"].token_ids else "another",
        ]


def run(arguments: argparse.Namespace) -> None:
    engine = Engine(arguments.package, threads=arguments.threads)
    drafts: dict[str, Draft] = {"lookup": "lookup"}
    if arguments.draft is not None:
        model = Engine(arguments.draft, threads=arguments.threads)
        drafts[model.name] = model
    print("\n".join(head(COLUMNS, "ll")), flush=True)
    total = len(arguments.prompts) * arguments.rounds * (1 + len(drafts))
    with tqdm(total=total, unit="text", leave=False, disable=None) as progress:
        for file in arguments.prompts:
            for line in measure(engine, file, drafts, arguments, progress):
                print(row(line), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="speculation", description="Measure speculative decoding on texts.")
    add = parser.add_argument
    add("package", metavar="PACKAGE")
    add("prompts", type=path, nargs="+", metavar="PROMPT", help="a text file that the model goes on with")
    add("--chat", action="store_true", help="a prompt is a user's message: its answer is generated")
    add("--draft", metavar="MODEL", help="measure a draft model, too")
    add("--draft-tokens", type=integer(1, 15), metavar="N", help="of a draft at most (default: the engine's)")
    add("--temperature", type=number("a temperature", 100), default=0.0, metavar="T", help="(default: %(default)s)")
    add("--tokens", type=integer(2), default=200, metavar="N", help="generated of each (default: %(default)s)")
    add("--rounds", type=integer(1), default=7, metavar="N", help="(default: %(default)s)")
    add("--threads", type=int, default=0, metavar="N", help="compute threads (default: one per available core)")
    return run_command(parser.prog, lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
