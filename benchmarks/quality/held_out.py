"""What quantisation costs: held-out loss of one checkpoint in every weight and row type, through the engine.

    python -m benchmarks.quality.held_out CHECKPOINT_FOLDER HELD_OUT.txt[.xz] --tokenizer tokenizer.json

Each story is cut into windows of the model's context, each of which starts with the end-of-story token, so that every
token is predicted once. bits per byte = sum of -log2 p(token) / bytes of the stories in UTF-8 and one for each end.
The PyTorch training form is the reference: its loss, and the largest difference of a logit over the first windows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from meki import Engine
from meki.bench.markdown import head, row
from meki.models.architectures.base import Model
from meki.models.checkpoints.huggingface import load_model
from meki.models.package import export_package
from meki.models.quantize import ROW_TYPES, WEIGHT_TYPES
from meki.models.tokenizer import END_OF_STORY, parse_tokenizer, read_tokenizer
from meki.models.train.data import documents
from meki.package.files import write_file

Logits = Callable[[list[int]], NDArray[np.float32]]

KV_TYPES = ("float32", "float16", "int8", "int4")
REFERENCE_WINDOWS = 8


@dataclass(frozen=True)
class HeldOut:
    """Windows of token ids, the first of each being context only, and the bytes that the others stand for."""

    windows: list[list[int]]
    bytes: int

    @property
    def tokens(self) -> int:
        return sum(len(window) - 1 for window in self.windows)


def load_held_out(path: Path, tokenizer: Tokenizer, context: int, stories: int | None) -> HeldOut:
    end: int = tokenizer.get_vocab()[END_OF_STORY]
    windows, size = [], 0
    for story in itertools.islice((text for text, _ in documents(path, END_OF_STORY)), stories):
        ids = [*tokenizer.encode(story).ids, end]
        windows += [[end, *ids[i : i + context - 1]] for i in range(0, len(ids), context - 1)]
        size += len(story.encode()) + 1
    return HeldOut(windows, size)


def nats(logits: NDArray[np.float32], window: list[int]) -> float:
    """Sum of -ln p(token | before) over all but the first token. logits: [len(window), vocab]."""
    scores = torch.from_numpy(logits[:-1])
    return float(torch.nn.functional.cross_entropy(scores, torch.tensor(window[1:]), reduction="sum"))


def measure(logits: Logits, held_out: HeldOut, name: str) -> tuple[float, float]:
    """(nats a token, bits a byte)."""
    windows: Iterable[list[int]] = tqdm(held_out.windows, desc=name, file=sys.stderr, disable=None)
    total = sum(nats(logits(window), window) for window in windows)
    return total / held_out.tokens, total / math.log(2) / held_out.bytes


def torch_logits(model: Model) -> Logits:
    @torch.no_grad()
    def run(window: list[int]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = model(torch.tensor([window]))[0].numpy()
        return logits

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.held_out",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("held_out", type=Path, help="stories separated by lines <|story|>, .txt or .txt.xz")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--stories", type=int, help="only the first so many stories")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()

    model, provenance = load_model(args.checkpoint)
    spec = read_tokenizer(args.tokenizer)
    tokenizer = parse_tokenizer(spec.json)
    held_out = load_held_out(args.held_out, tokenizer, model.config.context, args.stories)
    print(f"{held_out.tokens:,} tokens, {held_out.bytes:,} bytes, {len(held_out.windows)} windows\n")

    reference = torch_logits(model)
    reference_nats, reference_bits = measure(reference, held_out, "PyTorch")
    probes = held_out.windows[:: max(1, len(held_out.windows) // REFERENCE_WINDOWS)]
    expected = [reference(window) for window in probes]
    print(f"PyTorch, training form: {reference_nats:.4f} nats a token, {reference_bits:.4f} bits a byte. By KV type:")
    names = ["weights", "rows", *KV_TYPES, "largest logit difference, float32 KV"]
    print("", *head(names, "ll"), sep="\n", flush=True)
    figures = [{"weights": "PyTorch", "nats": reference_nats, "bits_per_byte": reference_bits}]
    for weights, rows in itertools.product(WEIGHT_TYPES, ROW_TYPES):
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "package"
            export_package(model, spec, out, name="measured", weights=weights, rows=rows, provenance=provenance)
            changes = []
            for kv_type in KV_TYPES:
                engine = Engine(out, kv_type=kv_type)
                loss, bits = measure(engine.logits, held_out, f"{weights} / {rows} / {kv_type}")
                pairs = zip(probes, expected, strict=True)
                difference = max(float(np.abs(engine.logits(window) - logits).max()) for window, logits in pairs)
                changes.append((bits / reference_bits - 1, difference))
                figure = {"weights": weights, "rows": rows, "kv_type": kv_type, "nats": loss, "bits_per_byte": bits}
                figures.append({**figure, "logit_difference": difference})
        cells = [f"{change:+.3%}" for change, _ in changes]
        print(row([weights, rows, *cells, f"{changes[0][1]:.2g}"]), flush=True)
    if args.json:
        write_file(args.json, (json.dumps(figures, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
