"""The bundled model: the package that a new user runs, against the checkpoint that it was exported from."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from meki import Engine, _core
from meki.models.architectures.llama import Decoder
from meki.models.checkpoints.huggingface import load_model
from meki.models.package import export_package
from meki.models.tokenizer import read_tokenizer
from meki.package import bundled_models

CHECKPOINT = Path(__file__).parents[2] / "models" / "meki-tiny-checkpoint"

STORY = """Once upon a time there was an old woman who lived alone in a little house at the edge of the forest. \
She had a grey cat, and every evening the cat sat by the fire and looked at her as if it wished to speak.

"If you could talk," said the old woman, "what would you tell me?"

"I would tell you," said the cat, "that the king's daughter is lost, and that nobody looks for her where she is."

The old woman was so astonished that she let her spoon fall into the soup. But she was not afraid, for she had \
known the cat a long time. So she took her cloak and her stick, and the two of them went out together into the snow."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("meki-tiny")


@pytest.fixture(scope="module")
def reference() -> Decoder:
    return load_model(CHECKPOINT)[0]


@pytest.fixture(scope="module")
def ids(engine: Engine) -> list[int]:
    token_ids: list[int] = engine.tokenizer.encode(STORY).ids
    return token_ids


def bits_per_byte(logits: np.ndarray, ids: list[int]) -> float:
    scores = logits[:-1].astype(np.float64)
    log_sums = np.logaddexp.reduce(scores, axis=1)
    nats = (log_sums - scores[np.arange(len(ids) - 1), ids[1:]]).sum()
    return float(nats / math.log(2) / len(STORY.encode()))


def torch_logits(model: Decoder, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([ids]))[0].numpy()
    return logits


@pytest.mark.parametrize("rows", ["float32", "float16"])
def test_a_float32_package_of_the_checkpoint_equals_pytorch(
    tmp_path: Path, reference: Decoder, ids: list[int], rows: str
) -> None:
    tokenizer = read_tokenizer(bundled_models()["meki-tiny"] / "tokenizer.json")
    package = tmp_path / "package"
    export_package(reference, tokenizer, package, name="exact", weights="float32", rows=rows, provenance={})
    # Sums in another order give some 1e-5 on logits that reach 20; float16 rows are rounded to 2^-11 of their value.
    tolerance = {"float32": 1e-4, "float16": 2e-3}[rows]
    logits = Engine(package, kv_type="float32").logits(ids)
    np.testing.assert_allclose(logits, torch_logits(reference, ids), rtol=0, atol=tolerance)


def test_the_rom_holds_the_folded_checkpoint(engine: Engine, reference: Decoder) -> None:
    path = engine.path / "memory.rom"
    info = _core.Rom(path).info
    assert info.row_type == "float16"
    bundles = np.fromfile(path, np.uint8, offset=4096)[: info.entries * info.bundle_stride]
    values = bundles.reshape(info.entries, -1)[:, : 2 * info.layers * info.row_dim].copy().view(np.float16)
    rows = values.reshape(info.entries, info.layers, info.row_dim).swapaxes(0, 1).astype(np.float32)
    words = reference.embed_tokens.weight.detach()
    ids = torch.arange(len(words))
    with torch.no_grad():
        expected = torch.stack([layer.meki.experts(ids, words) for layer in reference.layers]).numpy()
    np.testing.assert_allclose(rows, expected, rtol=2**-10, atol=1e-6)


def test_it_has_learnt_the_language_of_stories(engine: Engine, reference: Decoder, ids: list[int]) -> None:
    exact = bits_per_byte(torch_logits(reference, ids), ids)
    # A uniform guess over 4,096 tokens costs over 3 bits a byte, letter frequencies alone about 4.1.
    assert exact < 2
    # What int8 weights (and activations, in blocks of 32) and int8 keys and values may cost.
    assert bits_per_byte(engine.logits(ids), ids) == pytest.approx(exact, rel=0.01)


# On held-out text int8 costs less than 0.5%, int4 some tenths of a percent; this text is short. Whatever changes an
# activation a little makes some others round to another int8 code.
@pytest.mark.parametrize(("kv_type", "cost"), [("float16", 1e-3), ("int8", 0.005), ("int4", 0.02)])
def test_what_a_quantised_kv_cache_costs(engine: Engine, ids: list[int], kv_type: str, cost: float) -> None:
    exact = bits_per_byte(Engine(engine.path, kv_type="float32").logits(ids), ids)
    assert bits_per_byte(Engine(engine.path, kv_type=kv_type).logits(ids), ids) == pytest.approx(exact, rel=cost)


def test_it_tells_a_story(engine: Engine) -> None:
    first = engine.generate("Once upon a time", max_new_tokens=120, seed=7)
    again = engine.generate("Once upon a time", max_new_tokens=120, seed=7)
    assert first.text == again.text
    words = first.text.split()
    assert len(words) > 30 or first.finish_reason == "eos"
    assert first.text.isprintable() or "\n" in first.text


def test_its_card_and_licence_of_data_are_there(engine: Engine) -> None:
    card = (engine.path / "README.md").read_text(encoding="utf-8")
    for promised in ("Project Gutenberg", "bits per byte", "Samples", "tokens"):
        assert promised in card
    assert sum(file.stat().st_size for file in engine.path.iterdir()) < 30e6
