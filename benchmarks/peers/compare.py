"""Prefill and decode speed beside other engines: the same shapes, the same threads, measured in turn.

    python -m benchmarks.peers.compare PACKAGE --llama-bench PATH [--genai DIR] [--depths 0,10240] [--json FILE]

Needs `meki-bench` and the Python package `gguf`. PACKAGE gives the shapes. llama.cpp runs a model with random Q4_0
weights of these shapes, which is written to --workdir once. All its matrices have 4.5 bits a weight, the tied head too:
llama-quantize would make the head Q6_K, which is more to read. Peers run the dense backbone, of a Gemma 4 with the
per-layer embedding; ours runs PACKAGE as it is, with its memory.

llama.cpp gets its best setting: for each test every one in SETTINGS is tried first, briefly. Its llama-bench fills the
KV cache by real prefill, which for 10,240 tokens takes minutes: once for each setting that is tried, once to measure.
One llama-bench process makes all measurements of a test. It is stopped (SIGSTOP) while others measure, and keeps its
memory: for each test a copy of the weights, for each depth two of its KV cache. llama.cpp's threads wait for each other
by spinning: with other work on the machine it falls tenfold, so measure on a quiet one.

onnxruntime-genai is measured if --genai names a folder with a model of the same shapes, for example made by (needs
torch, transformers, onnx and onnx_ir too)

    python -c "import torch; from transformers import Qwen3Config, Qwen3ForCausalLM; \\
        torch.set_default_dtype(torch.bfloat16); \\
        Qwen3ForCausalLM(Qwen3Config(vocab_size=151680, num_hidden_layers=28, hidden_size=1024, \\
            intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128, \\
            max_position_embeddings=40960, rope_theta=5e5, tie_word_embeddings=True, \\
            bos_token_id=0, eos_token_id=0, pad_token_id=0)).save_pretrained('hf')"
    python -m onnxruntime_genai.models.builder -m hf -o genai -p int4 -e cpu
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from meki.bench.markdown import head, row
from meki.bench.output import check_writable, to_json
from meki.cli.arguments import integer, token_counts
from meki.cli.errors import run_command
from meki.models.architectures import read_config
from meki.package import has_random_weights, read_manifest
from meki.package.files import write_file

from .engines import PROBE_REPETITIONS, SETTINGS, Genai, LlamaBench, Meki, Setting, Workload, best_setting, find_binary
from .llama_model import PeerConfig, cached_gguf

PROGRAM = "peers"
OURS, LLAMA, GENAI = "meki", "llama.cpp", "onnxruntime-genai"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """ours / theirs, round by round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values: Sequence[float]) -> str:
    """median (10th to 90th percentile), with linear interpolation between values."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return f"{number(median)} ({number(low)} to {number(high)})"


def table(
    workloads: Sequence[Workload],
    samples: Mapping[str, Sequence[Sequence[float]]],
    labels: Mapping[str, str],
    settings: Sequence[Setting],
) -> str:
    """A markdown table.

    samples: for each engine, ours first, tokens/s [workloads, rounds]; settings: llama.cpp's, [workloads].
    """
    ours, *peers = samples
    names = ["test", labels[ours], *(name for peer in peers for name in (labels[peer], "ratio"))]
    lines = [*head([*names, "best setting of llama.cpp"], "l" * (len(names) + 1))]
    for i, workload in enumerate(workloads):
        cells = [str(workload), spread(samples[ours][i])]
        for peer in peers:
            cells += [spread(samples[peer][i]), spread(ratios(samples[ours][i], samples[peer][i]))]
        lines.append(row([*cells, str(settings[i])]))
    return "\n".join(lines)


def find_settings(
    llama_bench: str, model: Path, workloads: Sequence[Workload], threads: int
) -> list[tuple[Setting, dict[str, list[float]]]]:
    """llama.cpp's best setting for each workload, and the tokens/s that each setting reached."""

    def probe(workload: Workload, setting: Setting) -> list[float]:
        with LlamaBench(llama_bench, model, workload, setting, threads, 1, PROBE_REPETITIONS) as bench:
            samples: list[float] = bench.measure()["samples_ts"]
        progress.write(f"llama.cpp, {workload}, {setting}: {spread(samples)} tokens/s", file=sys.stderr)
        progress.update()
        return samples

    with tqdm(desc="settings", total=len(workloads) * len(SETTINGS), disable=None) as progress:
        return [best_setting(probe, workload) for workload in workloads]


def run_rounds(
    meki: Meki, benches: Sequence[LlamaBench], genai: Genai | None, rounds: int
) -> tuple[dict[str, list[list[float]]], dict[str, Any]]:
    """tokens/s of each engine [workloads, rounds], and the last record of llama-bench."""
    samples: dict[str, list[list[float]]] = {name: [] for name in (OURS, LLAMA, *([GENAI] if genai else []))}
    record: dict[str, Any] = {}
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        samples[OURS].append(meki.round())
        samples[LLAMA].append([])
        for bench in benches:
            record = bench.measure()
            samples[LLAMA][-1] += record["samples_ts"]
        if genai:
            samples[GENAI].append([genai.measure(workload) for workload in meki.workloads])
    return {name: np.transpose(values).tolist() for name, values in samples.items()}, record


def compare(args: argparse.Namespace, manifest: dict[str, Any], config: PeerConfig) -> dict[str, Any]:
    """Measures, prints the table and returns all figures."""
    workloads = [
        Workload("prefill", 0, args.prefill),
        *(Workload("decode", depth, args.tokens) for depth in args.depths),
    ]
    llama_bench = find_binary(args.llama_bench, "build it from llama.cpp's sources and name its path")
    meki_bench = find_binary("meki-bench", "install this package: pip install .")
    meki = Meki(meki_bench, args.package, workloads, args.threads, args.kv_type)
    genai = Genai(args.genai, config, args.threads) if args.genai else None
    meki.round()  # what it cannot do is known before minutes are spent on others; its files are warm
    meki.reports.clear()

    model = cached_gguf(config, args.workdir)
    found = find_settings(llama_bench, model, workloads, args.threads)
    settings = [setting for setting, _ in found]
    with contextlib.ExitStack() as stack:
        benches = [
            stack.enter_context(LlamaBench(llama_bench, model, workload, setting, args.threads, args.repetitions, 1))
            for workload, setting in zip(workloads, settings, strict=True)
        ]
        samples, record = run_rounds(meki, benches, genai, args.repetitions)

    versions = {OURS: metadata.version("meki"), LLAMA: f"{record['build_commit']} ({record['build_number']})"}
    models = {OURS: f"{manifest['weights']['type']} weights, {args.kv_type} KV", LLAMA: "Q4_0 weights"}
    if genai:
        versions[GENAI], models[GENAI] = metadata.version(GENAI), f"model {args.genai.resolve().name}"
    own = "random too" if has_random_weights(manifest) else "its own weights"
    print(
        f"{config.layers} layers, hidden {config.hidden}, FFN {config.ffn}, {config.heads} query and {config.kv_heads} "
        f"KV heads of {config.head_dim}, vocabulary {config.vocab_size:,}. "
        f"llama.cpp: random weights of these shapes; ours: {own}. "
        f"Our KV cache has a synthetic depth, theirs real tokens.\n"
        f"Threads: {args.threads}. tokens/s, and ours / theirs round by round: median (p10 to p90) of "
        f"{args.repetitions} interleaved rounds.\n"
    )
    labels = {name: f"{name} {versions[name]}, {models[name]}" for name in samples}
    print(table(workloads, samples, labels, settings))
    return {
        "package": manifest["name"],
        "architecture": manifest["architecture"],
        "llama_weights": "random weights of these shapes, Q4_0",
        "own_weights": manifest["provenance"].get("weights"),
        "synthetic_depth": {name: name == OURS for name in samples},
        "threads": args.threads,
        "machine": {"platform": platform.platform(), "cpu": record["cpu_info"]},
        "versions": versions,
        "tests": [
            {
                **dataclasses.asdict(workload),
                "samples": {name: values[i] for name, values in samples.items()},
                "ratios": {name: ratios(samples[OURS][i], samples[name][i]) for name in samples if name != OURS},
                "llama_setting": str(found[i][0]),
                "llama_settings_tried": found[i][1],
            }
            for i, workload in enumerate(workloads)
        ],
        "llama_bench": record,
        "meki_bench": meki.reports,
    }


def run(args: argparse.Namespace) -> None:
    if args.json:
        check_writable(args.json)
    manifest = read_manifest(args.package)
    config = read_config(manifest)
    if not isinstance(config, PeerConfig):
        raise ValueError(f"{args.package} has an architecture of kind {config.kind}, expected llama or gemma4")
    longest = max(args.prefill, max(*args.depths, 1) + args.tokens + 1)  # decode begins and ends with a token
    if longest > config.context:
        raise ValueError(f"{longest:,} tokens, but {args.package} has a context of {config.context:,}")
    figures = compare(args, manifest, config)
    if args.json:
        write_file(args.json, to_json(figures))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("package", type=Path, help="a directory made by meki-convert")
    add("--llama-bench", required=True, metavar="PATH", help="a build of llama.cpp for this machine")
    add("--genai", type=Path, metavar="DIR", help="a model of onnxruntime-genai with the same shapes")
    add("--depths", type=token_counts, default=(0, 10240), help="tokens in the KV cache, such as 0,10240")
    add("--prefill", type=integer(1), default=512, help="tokens of the prefill test")
    add("--tokens", type=integer(1), default=32, help="tokens of a decode test")
    add("--repetitions", type=integer(1), default=5, help="rounds")
    add("--threads", type=integer(1), default=2)
    add("--kv-type", default="int8", help="our KV cache, as meki-bench takes it")
    add("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    add(
        "--workdir",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meki-peers",
        help="where models for peers are kept (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    return run_command(PROGRAM, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
