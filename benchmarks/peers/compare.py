"""Prefill and decode speed beside other engines: the same shapes, the same threads, measured in turn.

    python -m benchmarks.peers.compare PACKAGE --llama-bench PATH [--ik-llama-bench PATH] [--genai DIR] [--openvino DIR]
        [--same-bits] [--depths 0,10240] [--json FILE]

Needs `meki-bench` and the Python package `gguf`. PACKAGE gives the shapes. llama.cpp and ik_llama.cpp run a model with
random Q4_0 weights of these shapes, which is written to --workdir once. All its matrices have 4.5 bits a weight, the
tied head too: llama-quantize would make the head Q6_K, which is more to read. Peers run the dense backbone, of a Gemma
4 with the per-layer embedding; ours runs PACKAGE as it is, with its memory. With --same-bits ours runs, besides, the
very model that they run: `meki-convert` makes a package of it, which keeps its bits, so that equal bytes are read.

Both get their best setting: for each test every one in LLAMA_SETTINGS or IK_SETTINGS (llama_bench.py) is tried first,
briefly. A llama-bench fills the KV cache by real prefill, which for 10,240 tokens takes up to minutes: llama.cpp's once
for each setting that is tried, once to measure; ik_llama.cpp's once for each setting and each round. One llama-bench
process of llama.cpp makes all measurements of a test. It is stopped (SIGSTOP) while others measure, and keeps its
memory: for each test a copy of the weights, for each depth two of its KV cache. Their threads wait for each other by
spinning: with other work on the machine they fall tenfold, so measure on a quiet one.

onnxruntime-genai and openvino-genai are measured if --genai or --openvino names a folder with a model of the same
shapes, for example made by (needs torch, transformers, onnx and onnx_ir, or optimum-intel and nncf)

    python -c "import torch; from transformers import Qwen3Config, Qwen3ForCausalLM; \\
        torch.set_default_dtype(torch.bfloat16); \\
        Qwen3ForCausalLM(Qwen3Config(vocab_size=151680, num_hidden_layers=28, hidden_size=1024, \\
            intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128, \\
            max_position_embeddings=40960, rope_theta=5e5, tie_word_embeddings=True, \\
            bos_token_id=0, eos_token_id=0, pad_token_id=0)).save_pretrained('hf')"
    python -m onnxruntime_genai.models.builder -m hf -o genai -p int4 -e cpu
    optimum-cli export openvino -m hf --task text-generation-with-past --weight-format int4 --group-size 32 \\
        --ratio 1.0 --sym --all-layers openvino
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from meki.bench.markdown import head, row
from meki.bench.output import check_writable, to_json
from meki.cli.arguments import integer, token_counts
from meki.cli.errors import run_command
from meki.models.architectures import read_config
from meki.package import read_manifest
from meki.package.files import write_file

from .engines import PEERS, Job, Peer
from .llama_model import PeerConfig, cached_gguf
from .ours import Meki, same_bits
from .workload import Engine, Workload

PROGRAM = "peers"
OURS, SAME_BITS = "meki", "meki, same bits"

Samples = Mapping[str, Sequence[Sequence[float]]]
"""Of each engine, by its name: tokens/s [workloads, rounds]."""


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """ours / theirs, round by round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values: Sequence[float]) -> str:
    """median (10th to 90th percentile), with linear interpolation between values."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return f"{number(median)} ({number(low)} to {number(high)})"


def best(samples: Samples, test: int) -> str:
    """The engine with the greatest median."""
    return max(samples, key=lambda name: float(np.median(samples[name][test])))


def table(workloads: Sequence[Workload], ours: Samples, peers: Samples, settings: Mapping[str, Sequence[str]]) -> str:
    """A markdown table: a line for each test and peer. settings: of each peer, [workloads]."""
    figures = [column for name in ours for column in (f"{name}, tokens/s", f"{name} / peer")]
    lines = [*head(["test", "peer", "its best setting", "peer, tokens/s", *figures, "best peer"], "lll")]
    for test, workload in enumerate(workloads):
        for peer, theirs in peers.items():
            cells = [str(workload), peer, settings[peer][test] or "as it comes", spread(theirs[test])]
            for its in ours.values():
                cells += [spread(its[test]), spread(ratios(its[test], theirs[test]))]
            lines.append(row([*cells, best(peers, test)]))
    return "\n".join(lines)


def run_rounds(engines: Sequence[Engine], rounds: int) -> dict[str, list[list[float]]]:
    """tokens/s of each engine [workloads, rounds]."""
    samples: dict[str, list[list[float]]] = {engine.name: [] for engine in engines}
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for engine in engines:
            samples[engine.name].append(engine.round())
    return {name: np.transpose(values).tolist() for name, values in samples.items()}


def named_peers(args: argparse.Namespace) -> list[tuple[Peer, str]]:
    """With the values of their options."""
    return [(peer, value) for peer in PEERS if (value := getattr(args, peer.option)) is not None]


def compare(args: argparse.Namespace, manifest: dict[str, Any], config: PeerConfig) -> dict[str, Any]:
    """Measures, prints the table and returns all figures."""
    workloads = [
        Workload("prefill", 0, args.prefill),
        *(Workload("decode", depth, args.tokens) for depth in args.depths),
    ]
    gguf = cached_gguf(config, args.workdir)
    packages = {OURS: args.package} | ({SAME_BITS: same_bits(gguf, args.package)} if args.same_bits else {})
    job = Job(gguf, config, workloads, args.threads, args.repetitions)
    with contextlib.ExitStack() as stack:
        engines: list[Engine] = []
        for name, package in packages.items():
            engines.append(Meki(name, package, workloads, args.threads, args.kv_type))
        for peer, value in named_peers(args):
            engines.append(peer.open(value, job))
            stack.callback(engines[-1].close)
        for engine in engines:
            engine.prepare()
        samples = run_rounds(engines, args.repetitions)

    ours = {name: values for name, values in samples.items() if name in packages}
    peers = {name: values for name, values in samples.items() if name not in packages}
    settings = {engine.name: engine.settings() for engine in engines}
    print(
        f"{config.layers} layers, hidden {config.hidden}, FFN {config.ffn}, {config.heads} query and {config.kv_heads} "
        f"KV heads of {config.head_dim}, vocabulary {config.vocab_size:,}. Threads: {args.threads}. "
        f"tokens/s, and ours / theirs round by round: median (p10 to p90) of {args.repetitions} interleaved rounds. "
        f"Our KV cache has a synthetic depth, theirs real tokens.\n"
    )
    print("\n".join(f"- {engine.name}: {engine.describe()}" for engine in engines), end="\n\n")
    print(table(workloads, ours, peers, settings))
    return {
        "package": manifest["name"],
        "architecture": manifest["architecture"],
        "synthetic_depth": {name: name in ours for name in samples},
        "threads": args.threads,
        "platform": platform.platform(),
        "tests": [
            {
                **dataclasses.asdict(workload),
                "samples": {name: values[test] for name, values in samples.items()},
                "ratios": {
                    name: {peer: ratios(its[test], theirs[test]) for peer, theirs in peers.items()}
                    for name, its in ours.items()
                },
                "settings": {name: settings[name][test] for name in peers},
                "best_peer": best(peers, test),
            }
            for test, workload in enumerate(workloads)
        ],
        "engines": {engine.name: {"description": engine.describe(), **engine.figures()} for engine in engines},
    }


def run(args: argparse.Namespace) -> None:
    if args.json:
        check_writable(args.json)
    if not named_peers(args):
        raise ValueError(f"no peer to compare with; name one with {', '.join(peer.option for peer in PEERS)}")
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
    for peer in PEERS:
        add(peer.option, dest=peer.option, metavar=peer.metavar, help=peer.help)
    add("--same-bits", action="store_true", help="measure the peers' model in ours, too, converted to the bit")
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
