"""Trains the models of a plan on the same text in the same order, and writes what they have come to."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from meki.cli.arguments import Parser, path
from meki.cli.errors import report as say
from meki.cli.errors import run_command
from meki.package.files import locked, read_object, write_file

from ..arguments import UsageError

if TYPE_CHECKING:  # importing these loads PyTorch
    from .plan import Plan
    from .runs import Runs

PROGRAM = "meki-study"
RESULTS = "results.json"


def study(args: argparse.Namespace, command: str) -> None:
    if missing := [name for name in ("matplotlib", "scipy", "yaml") if find_spec(name) is None]:
        raise UsageError(f"needs {', '.join(missing)}, not installed; run pip install 'meki[study]'")
    from ..config import ConfigError
    from ..train.command import Interrupt, check_device, make_directory
    from ..train.prepare import check_texts
    from .plan import Plan
    from .runs import Runs, Text

    if args.output.suffix != ".md":
        raise UsageError(f"-o is {args.output}, expected a .md: its plots go into a directory of that name without it")
    plan = Plan.read(args.plan)
    check_texts([*args.data, *args.valid])
    check_device(args.device)
    for directory in (args.runs, args.output.parent):
        make_directory(directory)
    try:
        text = Text.prepare(plan, args.data, args.valid, args.runs)
        earlier = _earlier(args.output).get("results", [])
        runs = Runs(plan, text, args.runs, earlier, device=args.device, compile=args.compile)
        with Interrupt() as interrupt:
            others = runs.train(lambda: interrupt.came, lambda its: say(PROGRAM, "note", its))
    except ConfigError as error:
        raise UsageError(error) from error
    for name, seed in others:
        say(PROGRAM, "note", f"{name}, seed {seed}: another process is at it")
    with locked(args.output, wait=True):
        write_report(plan, runs, args.output, command)
    if interrupt.came:
        say(PROGRAM, "note", f"stopped with {len(runs.results)} of {len(plan.runs)} runs; the same command goes on")
        raise KeyboardInterrupt
    print(f"{args.output}: {len(runs.results)} of {len(plan.runs)} runs")


def _earlier(out: Path) -> dict[str, Any]:
    """What the directory of an earlier report says."""
    kept = out.with_suffix("") / RESULTS
    return read_object(kept) if kept.exists() else {}


def write_report(plan: Plan, runs: Runs, out: Path, command: str) -> None:
    """The report, with plots and results in a directory beside it. Decode is measured once all runs are done."""
    from .plots import plots
    from .report import Outcomes, markdown

    runs.collect()
    results = [runs.results[run] for run in plan.runs if run in runs.results]
    earlier = _earlier(out)
    speeds = earlier["speeds"] if earlier.get("results") == results else None
    if speeds is None and len(results) == len(plan.runs):
        speeds = _speeds(plan, runs)
    outcomes = Outcomes(plan, runs.results, speeds)
    beside = out.with_suffix("")
    beside.mkdir(exist_ok=True)
    write_file(beside / RESULTS, json.dumps({"results": results, "speeds": speeds}, indent=1).encode())
    drawn = plots(outcomes)
    for name, (_, image) in drawn.items():
        write_file(beside / f"{name}.svg", image)
    names = {title: f"{beside.name}/{name}.svg" for name, (title, _) in drawn.items()}
    write_file(out, markdown(outcomes, command, names).encode())


def _speeds(plan: Plan, runs: Runs) -> dict[str, Any]:
    """Of any seed that is here; of a model whose runs were all trained elsewhere, with random weights."""
    from ..train.trainer import MODEL
    from .speed import measure_speeds

    here = {run: runs.directory(*run) / MODEL for run in plan.runs}
    checkpoints = {name: checkpoint for (name, _), checkpoint in here.items() if checkpoint.is_dir()}
    with tqdm(unit="run", leave=False, disable=None) as progress:

        def advance(text: str) -> None:
            progress.set_description_str(text)
            progress.update()

        out = runs.out / "packages"
        return measure_speeds(plan.models, checkpoints, runs.text.tokenizer, plan.baseline, out, advance)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted."""
    parser = Parser(PROGRAM, description=__doc__, epilog="Reference: docs/cli.md")
    add = parser.add_argument
    add("plan", type=path, metavar="PLAN", help="YAML file: models, recipe, seeds, and what is shown")
    add("--data", type=path, nargs="+", required=True, metavar="TEXT", help="what to learn, as of meki-train")
    add("--valid", type=path, nargs="+", required=True, metavar="TEXT", help="held-out text")
    add("-o", "--output", type=path, required=True, metavar="FILE", help="the report, a .md; plots go beside it")
    add("--runs", type=path, required=True, metavar="DIR", help="directory of the runs; those that are there go on")
    add("--device", default="cpu", help="cpu or cuda; bfloat16 on the latter (default: %(default)s)")
    add("--compile", action="store_true", help="compile the step with torch.compile (on a CPU this needs g++)")
    command = shlex.join([PROGRAM, *(sys.argv[1:] if argv is None else argv)])
    return run_command(PROGRAM, lambda: study(parser.parse_args(argv), command), extras="[models]")
