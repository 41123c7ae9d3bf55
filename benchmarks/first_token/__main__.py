"""The time of a fresh process to a model's first token, by part.

    python -m benchmarks.first_token MODEL [--repetitions 10] [--threads 0] [--prompt TEXT]

Each repetition is a process of its own that does what `meki-run --prompt` does; one before them is not counted, so that
all files are in the page cache. Prints a table of medians, with the 10th and the 90th percentile. As many processes
more run with ONNX Runtime's profiler, which slows them: from these is what says "profiled". The engine's own time ends
when it has the interpreter again, which the tokenizer may hold longer. Python's modules are those that it has compiled
before: with PYTHONDONTWRITEBYTECODE set, `python -m compileall` them first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from meki.bench.markdown import head, row
from meki.bench.stats import percentiles
from meki.cli.arguments import integer
from meki.cli.errors import run_command

CHILD = Path(__file__).with_name("child.py")
PARTS = {
    "interpreter": "Python starts",
    "imports": "imports",
    "manifest and checksums": "the model is found, its manifest read, files that are parsed checked",
    "opening": "engine and tokenizer, beside each other",
    "engine": "- the engine: files mapped and checked, graph, a step to warm up",
    "sessions": "- - of it ONNX Runtime's sessions, profiled",
    "warm-up": "- - of it the warm-up step, profiled",
    "tokenizer": "- tokenizer and chat template",
    "first token": "session, prompt, first token",
    "prefill": "- of it the prompt's step",
    "rest": "everything else",
    "total": "from the start of the process to the first token",
}
"""What the table calls them."""


def run_child(arguments: argparse.Namespace, trace: str = "") -> dict[str, float]:
    """Seconds by part."""
    model = [arguments.model, str(arguments.threads), arguments.prompt, trace]
    done = subprocess.run(
        [sys.executable, str(CHILD), repr(time.monotonic()), *model], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the process for {arguments.model} failed: {done.stderr.strip().splitlines()[-1:]}")
    parts: dict[str, float] = json.loads(done.stdout)
    inner = {"total", "prefill", "engine", "tokenizer"}
    return {**parts, "rest": parts["total"] - sum(parts[part] for part in parts.keys() - inner)}


def profiled(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of ONNX Runtime's sessions, and of the first step."""
    seconds = {"sessions": 0.0, "warm-up": 0.0}
    with TemporaryDirectory() as directory:
        run_child(arguments, f"{directory}/trace")
        for trace in Path(directory).iterdir():
            events = json.loads(trace.read_bytes())
            runs = [event for event in events if event.get("name") == "model_run"]
            seconds["warm-up"] += runs[0]["dur"] / 1e6
            loads = ("model_loading", "session_initialization")
            seconds["sessions"] += (
                sum(event["dur"] for event in events if event.get("name", "").startswith(loads)) / 1e6
            )
    return seconds


def measure(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Of each repetition: seconds by part."""
    run_child(arguments)
    rounds = tqdm(range(arguments.repetitions), unit="process", leave=False, disable=None)
    return [run_child(arguments) | profiled(arguments) for _ in rounds]


def table(samples: Sequence[dict[str, float]]) -> str:
    """samples: seconds by part of each repetition. Markdown, in milliseconds."""
    lines = [*head(["part", "ms", "p10", "p90"], "l")]
    for part, title in PARTS.items():
        times = percentiles([sample[part] * 1000 for sample in samples], 50, 10, 90)
        lines.append(row([title, *(f"{time:,.1f}" for time in times)]))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="first_token", description="Time to the first token of a process, by part.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="name or package directory")
    add("--repetitions", type=integer(1), default=10, metavar="N", help="processes (default: %(default)s)")
    add("--threads", type=int, default=0, metavar="N", help="compute threads (default: one per available core)")
    add("--prompt", default="Once upon a time", metavar="TEXT", help="(default: %(default)s)")
    return run_command(parser.prog, lambda: print(table(measure(parser.parse_args(argv)))))


if __name__ == "__main__":
    sys.exit(main())
