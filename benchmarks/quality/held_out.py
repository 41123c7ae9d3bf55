"""What quantisation costs: held-out loss of one checkpoint in every weight and row type, through the engine.

    python -m benchmarks.quality.held_out CHECKPOINT_FOLDER HELD_OUT.txt[.xz] --tokenizer tokenizer.json

Each story is cut into windows of the model's context as `meki-eval --perplexity` cuts a text, the first one behind the
end-of-story token, so that every token is predicted once. bits per byte = sum of -log2 p(token) / bytes of the
stories in UTF-8 and one for each end.
The PyTorch training form is the reference: its loss, and the largest difference of a logit over the first windows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from meki import Engine
from meki.bench.markdown import head, row
from meki.evaluation.perplexity import HeldOut, Score, engine_score, measure, windows
from meki.evaluation.scorer import log_probabilities
from meki.models.architectures.base import Model
from meki.models.calibration import TEXT, calibration_windows
from meki.models.checkpoints.huggingface import load_model
from meki.models.package import export_package
from meki.models.quantize import ROW_TYPES
from meki.models.tokenizer import END_OF_STORY, parse_tokenizer, read_tokenizer
from meki.models.train.data import documents
from meki.package.files import write_file

KV_TYPES = ("float32", "float16", "int8", "int4")
REFERENCE_WINDOWS = 8


def load_held_out(path: Path, tokenizer: Tokenizer, context: int, stories: int | None) -> HeldOut:
    end: int = tokenizer.get_vocab()[END_OF_STORY]
    pieces, size = [], 0
    for story in itertools.islice((text for text, _ in documents(path, END_OF_STORY)), stories):
        pieces += list(windows([*tokenizer.encode(story).ids, end], end, context))
        size += len(story.encode()) + 1
    return HeldOut(pieces, size)


@torch.no_grad()
def torch_logits(model: Model, token_ids: Sequence[int]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = model(torch.tensor([token_ids]))[0].numpy()
    return logits


def torch_score(model: Model) -> Score:
    def score(token_ids: Sequence[int], start: int) -> NDArray[np.float64]:
        return log_probabilities(torch_logits(model, token_ids[:-1])[start - 1 :], np.array(token_ids[start:]))

    return score


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

    reference = measure(torch_score(model), held_out, "PyTorch")
    probes = [
        token_ids[:-1] for token_ids, _ in held_out.windows[:: max(1, len(held_out.windows) // REFERENCE_WINDOWS)]
    ]
    expected = [torch_logits(model, token_ids) for token_ids in probes]
    nats, bits = reference.nats_per_token, reference.bits_per_byte
    print(f"PyTorch, training form: {nats:.4f} nats a token, {bits:.4f} bits a byte. By KV type:")
    names = ["weights", "rows", *KV_TYPES, "largest logit difference, float32 KV"]
    print("", *head(names, "ll"), sep="\n", flush=True)
    figures: list[dict[str, Any]] = [{"weights": "PyTorch", "nats": nats, "bits_per_byte": bits}]
    text = TEXT.read_text(encoding="utf-8")
    calibration = calibration_windows(text, tokenizer, model.config.context, TEXT.name)
    for weights, rows in itertools.product(("float32", "int8", "int4"), ROW_TYPES):
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "package"
            how: dict[str, Any] = {"weights": weights, "rows": rows, "calibration": calibration}
            export_package(model, spec, out, name="measured", provenance=provenance, **how)
            changes = []
            for kv_type in KV_TYPES:
                engine = Engine(out, kv_type=kv_type)
                found = measure(engine_score(engine, model.config.context), held_out, f"{weights} / {rows} / {kv_type}")
                pairs = zip(probes, expected, strict=True)
                difference = max(float(np.abs(engine.logits(token_ids) - logits).max()) for token_ids, logits in pairs)
                changes.append((found.bits_per_byte / bits - 1, difference))
                figure = {"weights": weights, "rows": rows, "kv_type": kv_type, "logit_difference": difference}
                figures.append({**figure, "nats": found.nats_per_token, "bits_per_byte": found.bits_per_byte})
        cells = [f"{change:+.3%}" for change, _ in changes]
        print(row([weights, rows, *cells, f"{changes[0][1]:.2g}"]), flush=True)
    if args.json:
        write_file(args.json, (json.dumps(figures, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
