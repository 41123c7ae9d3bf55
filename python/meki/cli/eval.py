"""meki-eval: how good a model is, by tasks of the lm-evaluation-harness or the perplexity of a text."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..bench.output import check_writable
from ..engine import Engine
from ..evaluation.perplexity import HeldOut, engine_score, measure, read_text
from ..package import find_model
from ..package.files import write_file
from .arguments import Parser, add_engine_options, engine_options, integer, path
from .errors import note, report, run_command
from .output import RANDOM_WEIGHTS

_BOOTSTRAP = 1000
"""Resamples for the standard error of a metric that has no formula for it."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted, 141 output closed."""
    parser = _parser()
    return run_command(parser.prog, lambda: _run(parser.parse_args(argv), parser.prog), extras="[eval]")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "meki-eval",
        description="Evaluate a package: tasks of the lm-evaluation-harness, or the perplexity of a text.",
        epilog="Reference: docs/evaluation.md",
    )
    parser.add_argument("model", metavar="MODEL", help="name or package directory")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", type=_names, metavar="NAME,...", help="tasks of the harness, as in arc_easy,piqa")
    what.add_argument("--perplexity", type=path, metavar="FILE", help="a UTF-8 text, which may be .xz or .gz")
    add = parser.add_argument_group("tasks").add_argument
    add(
        "--task-data",
        type=path,
        metavar="DIR",
        help="has the tasks' data as NAME.jsonl (default: load it from the hub)",
    )
    add("--limit", type=integer(1), metavar="N", help="only the first N questions of each task")
    add("--num-fewshot", type=integer(0), metavar="N", help="examples before a question (default: the task's own)")
    add = add_engine_options(parser)
    add(
        "--context", type=integer(0), default=0, metavar="N", help="tokens at most (default: the model's, at most 4096)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("-o", "--output", type=path, metavar="FILE", help="write everything as JSON")
    return parser


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError(f"expected names with commas between them, as in arc_easy,piqa; got {text!r}")
    return names


def _run(arguments: argparse.Namespace, program: str) -> None:
    for option in ("task_data", "limit", "num_fewshot"):
        if arguments.perplexity is not None and getattr(arguments, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} is about tasks; omit it with --perplexity")
    if arguments.output is not None:
        check_writable(arguments.output)
    find_model(arguments.model)  # who names none is told before data is loaded
    results = _perplexity(arguments) if arguments.tasks is None else _evaluate(arguments, program)
    if arguments.output is not None:
        write_file(arguments.output, (json.dumps(results, indent=2, default=str) + "\n").encode())


def _open(arguments: argparse.Namespace) -> Engine:
    engine = Engine(arguments.model, **engine_options(arguments))
    if engine.random_weights:
        note(RANDOM_WEIGHTS)
    return engine


def _evaluate(arguments: argparse.Namespace, program: str) -> dict[str, Any]:
    """Prints the harness's table; what else it says goes to stderr."""
    os.environ["DISABLE_MULTIPROC"] = "1"  # resamples would fork a process that has threads
    import lm_eval
    from jinja2 import TemplateError
    from lm_eval.utils import make_table

    from ..evaluation.harness import MekiLM
    from ..evaluation.tasks import load_tasks

    for library in ("lm_eval", "huggingface_hub"):  # they warn of defaults and of every try
        logging.getLogger(library).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            tasks = load_tasks(arguments.tasks, num_fewshot=arguments.num_fewshot, directory=arguments.task_data)
            engine = _open(arguments)
            model = MekiLM(engine, context=arguments.context, note=lambda text: report(program, "note", text))
            found = lm_eval.evaluate(model, tasks, limit=arguments.limit, bootstrap_iters=_BOOTSTRAP, log_samples=False)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TemplateError) as error:
            # Of the templates and functions of a task, on data that is not as they want it.
            raise RuntimeError(f"{', '.join(arguments.tasks)}: the harness fails on its data: {error!r}") from error
    first = "" if arguments.limit is None else f", the first {arguments.limit:,} questions of each task"
    print(f"{engine.name}: {engine.kv_type} KV cache, at most {model.max_length:,} tokens{first}\n")
    results: dict[str, Any] = {**model.get_model_info(), "limit": arguments.limit, **found}
    for kind in ("results", "groups"):
        if results.get(kind):
            print(make_table(results, kind))
    return results


def _perplexity(arguments: argparse.Namespace) -> dict[str, Any]:
    text = read_text(arguments.perplexity)
    engine = _open(arguments)
    size = engine.session(context=arguments.context).context
    held_out = HeldOut.of_text(engine, text, size)
    found = measure(engine_score(engine, size), held_out)
    print(f"{arguments.perplexity}: {found.tokens:,} tokens, {found.bytes:,} bytes, windows of at most {size:,} tokens")
    print(
        f"perplexity {found.per_token:.4f} ({found.nats_per_token:.4f} nats a token), "
        f"{found.bits_per_byte:.4f} bits a byte"
    )
    return {
        "model_name": engine.name,
        "random_weights": engine.random_weights,
        "file": str(arguments.perplexity),
        "context": size,
        "kv_type": engine.kv_type,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "nats_per_token": found.nats_per_token,
        "perplexity": found.per_token,
        "bits_per_byte": found.bits_per_byte,
    }


if __name__ == "__main__":
    sys.exit(main())
