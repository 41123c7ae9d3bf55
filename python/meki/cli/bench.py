"""meki-bench: how fast a package is, and where its time goes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from .. import _core
from ..bench import output, plot
from ..bench.contender import Package
from ..bench.environment import describe
from ..bench.parts import measure_parts
from ..bench.report import Report, make_report
from ..package import find_model
from ..package.files import write_file
from .arguments import Parser, add_engine_options, engine_options, integer, number, path, token_counts
from .errors import run_command

_DEPTHS = (0, 1024, 10240)
_PREFILL = 512
_BANDWIDTH_BYTES = 1 << 30
"""Read in one pass to measure the bandwidth: far more than any cache holds."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted, 141 output closed."""
    parser = _parser()
    return run_command(parser.prog, lambda: _run(parser.parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "meki-bench",
        description="Measure prefill and decode of a package; markdown on standard output.",
        epilog="Reference: docs/benchmark.md",
    )
    add = parser.add_argument
    add("model", nargs="?", default="meki-tiny", metavar="MODEL", help="name or package directory (%(default)s)")
    add = parser.add_argument_group("what is measured").add_argument
    add(
        "--depths",
        type=token_counts,
        metavar="N,...",
        help="tokens in the cache when decode begins (default: 0,1024,10240, as far as the model's context reaches)",
    )
    add(
        "--prefill",
        type=integer(0),
        metavar="N",
        help="tokens to prefill; 0: no prefill (default: 512, or what the context holds)",
    )
    add("--tokens", type=integer(1), default=32, metavar="N", help="decode steps of a test (default: %(default)s)")
    add("--repetitions", type=integer(1), default=5, metavar="N", help="rounds of all tests (default: %(default)s)")
    add("--synthetic-depth", action="store_true", help="fill the cache instead of computing it; every output says so")
    add(
        "--compare",
        choices=("dense", "ram"),
        help="take turns with the same package, its memory switched off, or all its rows in RAM (as much as the ROM)",
    )
    add("--parts", action="store_true", help="time by part of a decode step, in a profiled run of its own")
    add = add_engine_options(parser, row_cache=0, several_threads=True)  # all rounds decode the same tokens
    add(
        "--rom",
        choices=("warm", "cold"),
        default="warm",
        help="cold: drop the ROM from the page cache before every step (default: %(default)s)",
    )
    add(
        "--rom-delay-ms",
        type=number("milliseconds", 10_000),
        default=0.0,
        metavar="MS",
        help="artificial delay added to every read of the ROM",
    )
    add = parser.add_argument_group("output").add_argument
    add("--json", type=path, metavar="FILE", help="write everything, with all samples")
    add("--csv", type=path, metavar="FILE", help="write a line for every result")
    add("--plot", type=path, metavar="DIR", help="write speed.png, with --parts also parts.png (needs matplotlib)")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    if arguments.plot is not None:
        plot.check_matplotlib()
        output.check_directory(arguments.plot if arguments.plot.exists() else arguments.plot.parent)
    for file in filter(None, (arguments.json, arguments.csv)):
        output.check_writable(file)
    if arguments.compare is not None and len(arguments.threads) > 1:
        raise ValueError(
            f"--compare {arguments.compare} takes turns with one number of threads, --threads has "
            f"{len(arguments.threads)}; give one, or omit --compare"
        )
    options = {**engine_options(arguments), "rom_delay_ms": arguments.rom_delay_ms}
    package = Package.open(find_model(arguments.model), options)
    _check_memory(arguments, package)
    report = _measure(arguments, package, _plan(arguments, package.context))
    if arguments.json is not None:
        write_file(arguments.json, output.to_json(report))
    if arguments.csv is not None:
        write_file(arguments.csv, output.to_csv(report))
    if arguments.plot is not None:
        arguments.plot.mkdir(exist_ok=True)
        for name, image in plot.plots(report).items():
            write_file(arguments.plot / name, image)
    print(output.to_markdown(report))


def _check_memory(arguments: argparse.Namespace, package: Package) -> None:
    for option, given in (
        (f"--compare {arguments.compare}", arguments.compare is not None),
        ("--rom cold", arguments.rom == "cold"),
        ("--row-cache", arguments.row_cache > 0),
        ("--rom-delay-ms", arguments.rom_delay_ms > 0),
    ):
        if given and not package.has_memory:
            raise ValueError(f"{option} needs a model with a memory, {package.manifest['name']} is dense; omit it")


def _plan(arguments: argparse.Namespace, context: int) -> _core.Plan:
    """ValueError for what does not fit the model's context."""
    compare, group = arguments.compare is not None, _core.Plan.GROUP
    if compare and arguments.tokens % group:
        raise ValueError(
            f"--tokens is {arguments.tokens}, --compare takes turns in groups of {group}; give a multiple of {group}"
        )
    prefill = min(_PREFILL, context - 1) if arguments.prefill is None else arguments.prefill
    if prefill >= context:
        raise ValueError(
            f"--prefill {prefill} needs a context of {prefill + 1:,} tokens, the model's has {context:,}; "
            f"give at most {context - 1:,}"
        )

    def plan(depths: Sequence[int]) -> _core.Plan:
        return _core.Plan(
            depths=depths,
            prefill=prefill,
            tokens=arguments.tokens,
            repetitions=arguments.repetitions,
            synthetic_depth=arguments.synthetic_depth,
            compare=compare,
            cold=arguments.rom == "cold",
        )

    least = plan(()).context(0)
    deepest = context - least + 1
    if deepest < 1:
        raise ValueError(
            f"--tokens {arguments.tokens} takes {least:,} tokens of context, the model's has {context:,}; give fewer"
        )
    if arguments.depths is None:
        fitting = tuple(depth for depth in _DEPTHS if depth <= deepest)
        return plan(fitting if fitting == _DEPTHS else (*fitting, deepest))
    if max(arguments.depths) > deepest:
        depth = max(arguments.depths)
        raise ValueError(
            f"depth {depth:,} with {arguments.tokens} tokens to decode needs a context of {plan(()).context(depth):,} "
            f"tokens, the model's has {context:,}; give --depths of at most {deepest:,}"
        )
    return plan(arguments.depths)


def _measure(arguments: argparse.Namespace, package: Package, plan: _core.Plan) -> Report:
    packages = [package.with_threads(threads) for threads in arguments.threads]
    memories = (True, False) if arguments.compare == "dense" else (True,)
    variants = [(package, memory) for package in packages for memory in memories]
    engines = [package.engine(memory=memory) for package, memory in variants]
    contenders = [
        package.contender(engine, memory=memory) for (package, memory), engine in zip(variants, engines, strict=True)
    ]
    counts = [contender.threads for contender in contenders]
    if len(packages) > 1 and len(set(counts)) < len(counts):
        raise ValueError(
            f"--threads {','.join(map(str, arguments.threads))} are {', '.join(map(str, counts))} threads here; give "
            "different numbers, none above that of the available cores"
        )
    if arguments.compare == "ram":
        engines.append(_core.with_rows_in_ram(engines[0]))
        contenders.append(contenders[0].with_rows_in_ram())
    environment = describe(package, engines[0])
    profiled = [(depth, *variant) for depth in plan.depths for variant in variants]
    units = plan.units + len(profiled) * arguments.parts
    with tqdm(total=units, unit="run", leave=False, disable=None) as progress:

        def advance(text: str) -> None:
            progress.set_description_str(text)
            progress.update()

        measurement = _core.measure(engines, plan, advance, _BANDWIDTH_BYTES)
        parts: list[dict[str, Any]] = []
        for depth, its, memory in profiled if arguments.parts else ():
            advance(f"profiling at {depth:,}")
            parts.append(measure_parts(its, plan, memory=memory, depth=depth))
    protocol = {
        "depths": plan.depths,
        "prefill": plan.prefill,
        "tokens": plan.tokens,
        "repetitions": plan.repetitions,
        "turn": plan.turn,
        "compare": arguments.compare,
        "synthetic_depth": plan.synthetic_depth,
        "rom": arguments.rom if package.has_memory else None,
        "rom_delay_ms": arguments.rom_delay_ms,
        "row_cache_mib": arguments.row_cache,
    }
    return make_report(contenders, plan, measurement, parts=parts, environment=environment, protocol=protocol)
