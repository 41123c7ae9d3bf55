"""Whether evaluation through the engine says what the lm-evaluation-harness's own model says of the same weights.

    python -m benchmarks.quality.harness MODEL.gguf PACKAGE... --task-data DIR --tasks arc_easy,piqa,lambada_openai

The GGUF file is read by transformers, which dequantises it to float32, and evaluated by the harness's `hf` model, one
request at a time, its softmax in float64; then each package that meki-convert made of the same file, with the same
tokenizer. The table has each one's metrics and, request by request, the largest and the mean difference of a
log-likelihood to `hf`. A package of float32 weights is given a KV cache of float32, another one of int8.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from meki import Engine
from meki.bench.markdown import head, row
from meki.evaluation.harness import MekiLM
from meki.evaluation.tasks import load_tasks
from meki.package import read_manifest
from meki.package.files import write_file


def reference(gguf: Path, package: Path) -> HFLM:
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(package / "tokenizer.json"))
    tokenizer.eos_token_id = read_manifest(package)["tokenizer"]["eos_token_ids"][0]
    # PyTorch's log_softmax in float32 is 1.7e-5 too large for each token (of 49,152): over a long answer, more than its
    # logits are off.
    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1, softmax_dtype=torch.float64)


def evaluate(model: LM, args: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Of each task its metrics, and the log-likelihoods of its requests in their order."""
    tasks = load_tasks(args.tasks.split(","), directory=args.task_data)
    found = lm_eval.evaluate(model, tasks, limit=args.limit, bootstrap_iters=0)
    scores = {
        name: [answer[0] for sample in samples for answer in sample["filtered_resps"]]
        for name, samples in found["samples"].items()
    }
    return found["results"], scores


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("gguf", type=Path)
    parser.add_argument("packages", type=Path, nargs="+", metavar="PACKAGE", help="of that file, by meki-convert")
    parser.add_argument("--tasks", required=True, help="loglikelihood tasks, with commas between them")
    parser.add_argument("--task-data", type=Path, required=True, help="docs/evaluation.md")
    parser.add_argument("--limit", type=int, default=100, help="questions of each task (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of the engine")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of defaults
    figures: list[dict[str, Any]] = []
    expected_metrics, expected = evaluate(reference(args.gguf, args.packages[0]), args)
    names = ["task", "metric", "model", "value", "largest difference", "mean difference"]
    print(*head(names, "lll"), sep="\n", flush=True)

    def show(name: str, metrics: dict[str, dict[str, Any]], scores: dict[str, list[float]]) -> None:
        for task, values in metrics.items():
            apart = np.abs(np.subtract(scores[task], expected[task]))
            for metric in (key for key in values if key.endswith(",none") and "stderr" not in key):
                value, label = values[metric], metric.removesuffix(",none")
                figures.append({"task": task, "metric": label, "model": name, "value": value, "apart": apart.tolist()})
                cells = [f"{value:.4f}", f"{apart.max():.2g}", f"{apart.mean():.2g}"]
                print(row([task, label, name, *cells]), flush=True)

    show("hf, float32", expected_metrics, expected)
    for package in args.packages:
        exact = read_manifest(package)["weights"]["type"] == "float32"
        engine = Engine(package, threads=args.threads, kv_type="float32" if exact else None)
        show(f"{engine.name}, {engine.kv_type} KV", *evaluate(MekiLM(engine), args))
    if args.json:
        write_file(args.json, (json.dumps(figures, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
