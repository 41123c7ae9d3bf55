"""int4 weights that are rounded with a text: what is seen of it, and what comes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from meki import Engine
from meki.models.architectures import ARCHITECTURES
from meki.models.architectures.base import Model
from meki.models.architectures.llama import Decoder
from meki.models.calibration import TEXT, TOKENS, WINDOW, CalibratedBlocks, calibration_windows
from meki.models.checkpoints import open_checkpoint
from meki.models.checkpoints.checkpoint import checkpoint_source
from meki.models.checkpoints.huggingface import save_pretrained
from meki.models.convert import main as convert
from meki.models.gptq import gptq
from meki.models.memories import base as memory_base
from meki.models.package import export_package
from meki.models.quantize import Int4Recipe, quantize_weight
from meki.models.source import model_source
from meki.models.tokenizer import TokenizerSpec, parse_tokenizer, read_tokenizer

ROOT = Path(__file__).parents[2]
WINDOWS = torch.from_numpy(np.random.default_rng(11).integers(0, 300, (6, 40)))


def inputs_of(model: Model, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each matrix is multiplied with, [tokens, k], by the whole model at once."""
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, its, name=f"{name}.weight": seen.update({name: its[0].flatten(0, -2)})
            )
    with torch.no_grad():
        model(windows)
    return seen


@pytest.mark.parametrize(
    "overrides",
    [
        {"layers": 4},
        {"memory_dim": 0, "qkv_bias": True, "tied_embeddings": False, "nope_layers": (1,)},
        {"memory_dim": 0, "ffn_kind": "moe", "experts": 4, "experts_per_token": 2, "ffn": 32},
        {"memory_dim": 0, "ple_dim": 32},
        {"memory_dim": 0, "engram_dim": 64, "engram_layers": (0, 2), "engram_heads": 2, "engram_rows": 50},
    ],
    ids=str,
)
def test_matrices_are_rounded_with_their_own_inputs(
    make_model: Callable[..., Decoder], overrides: dict[str, Any]
) -> None:
    assert_rounded_with_their_own_inputs(make_model(**overrides))


GEMMA: dict[str, Any] = {
    "vocab_size": 300,
    "layers": 6,
    "hidden": 64,
    "ffn": 96,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "context": 128,
    "norm_eps": 1e-6,
    "window": 9,
    "full_layers": (1, 3, 5),
}
GEMMA4: dict[str, Any] = {
    **GEMMA,
    "full_head_dim": 32,
    "shared_layers": 3,
    "double_wide": True,
    "per_layer_dim": 32,
    "per_layer_vocab_size": 250,
    "logit_softcap": 30.0,
}


def make_gemma(kind: str, settings: dict[str, Any]) -> Model:
    model = ARCHITECTURES[kind].from_settings(settings).module().initialise(3, std=0.2)
    torch.manual_seed(3)
    with torch.no_grad():  # tokens whose embeddings are in few directions, as a trained model's
        model.embed_tokens.weight.copy_(torch.randn(300, 8) @ torch.randn(8, 64) + 0.1 * torch.randn(300, 64))
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma3", {**GEMMA, "query_scalar": 16}),
        ("gemma4", GEMMA4),
        ("gemma4", {**GEMMA4, "per_layer_dim": 0, "per_layer_vocab_size": 0, "shared_layers": 0}),
    ],
    ids=str,
)
def test_matrices_of_gemma_are_rounded_with_their_own_inputs(kind: str, settings: dict[str, Any]) -> None:
    """What later layers see of earlier ones is kept between them."""
    assert_rounded_with_their_own_inputs(make_gemma(kind, settings))


def test_of_a_per_layer_embedding_few_rows_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_base, "BLOCK_BYTES", 4 * 6 * 32 * 40)  # blocks of 40 entries
    model, windows = make_gemma("gemma4", GEMMA4), WINDOWS[:1, :7]
    source = model_source(model)
    weights = replace(source, weights=lambda name: source.weights(name) if "tokens_per_layer" not in name else 1 / 0)
    with torch.device("meta"):
        started = source.config.module()
    started.load_begin(weights, windows)
    with torch.no_grad():
        (x, (_, inputs)), (expected_x, (_, expected)) = started.begin(windows), model.begin(windows)
    assert torch.equal(x, expected_x) and torch.equal(inputs, expected)
    rows = started.embed_tokens_per_layer.rows
    assert rows.shape == (len({id if id < 250 else 0 for id in windows.flatten().tolist()}), 6 * 32)


def test_int4_of_gemma_loses_less_with_a_text() -> None:
    """Logits of the model with matrices as they are and rounded, with the tokens that are looked at and without."""
    model = make_gemma("gemma4", GEMMA4)
    source, state = model_source(model), model.state_dict()
    with torch.no_grad():
        expected = model(WINDOWS)

    def loss(blocks: Int4Recipe) -> float:
        rounded = dict(state)
        for name in state:
            if name.startswith("layers.") and state[name].dim() == 2 and blocks.type(name) == "int4":
                its = blocks.read(name) or quantize_weight(state[name].numpy(), "int4", name)
                values = its.codes.reshape(len(its.codes), -1, 32) * its.scales[..., None]
                rounded[name] = torch.from_numpy(values.reshape(its.codes.shape).astype(np.float32))
        other = source.config.module()
        other.load_state_dict(rounded)
        with torch.no_grad():
            return float((other(WINDOWS) - expected).square().mean())

    assert loss(CalibratedBlocks(source, WINDOWS)) < 0.8 * loss(Int4Recipe(6))


def assert_rounded_with_their_own_inputs(model: Model) -> None:
    blocks, seen = CalibratedBlocks(model_source(model), WINDOWS), inputs_of(model, WINDOWS)
    state, checked = model.state_dict(), 0
    for name, x in seen.items():  # in the order in which the model computes
        if not name.startswith("layers.") or name.endswith(".gate.weight") or "word_emb_projection" in name:
            continue
        if blocks.type(name) == "int8":
            assert blocks.read(name) is None
            continue
        got, expected = blocks.read(name), gptq(state[name].numpy(), x.T @ x, "int4", name)
        assert got is not None and got.type == "int4"
        # Sums of products in another order: what lies at the edge of two codes may fall to the other side.
        assert (got.codes == expected.codes).mean() > 0.99, name
        checked += 1
    assert checked >= 4 * model.config.layers


def test_types(make_model: Callable[..., Decoder]) -> None:
    blocks = CalibratedBlocks(model_source(make_model(layers=17)), WINDOWS)
    assert {blocks.type(name) for name in ("embed_tokens.weight", "lm_head.weight")} == {"int8"}
    for layer in range(17):
        down = "int8" if layer < 3 or layer >= 14 else "int4"  # an eighth of 17, rounded up
        assert blocks.type(f"layers.{layer}.mlp.down_proj.weight") == down
        assert blocks.type(f"layers.{layer}.mlp.experts.7.down_proj.weight") == down
        assert blocks.type(f"layers.{layer}.self_attn.v_proj.weight") == "int8"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "meki.out_proj"):
            assert blocks.type(f"layers.{layer}.{name}.weight") == "int4"


def log_probabilities(package: Path, text: str) -> np.ndarray:
    """Of each token of the vocabulary at each position, float64."""
    engine = Engine(package, kv_type="float32")
    logits = engine.logits(np.array(engine.tokenizer.encode(text).ids)).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_a_trained_model_is_changed_less(tmp_path: Path) -> None:
    """meki-tiny on a story: KL divergence from its float32 weights, with the text that comes along and without."""
    checkpoint, tokenizer = ROOT / "models/meki-tiny-checkpoint", ROOT / "models/packages/meki-tiny/tokenizer.json"
    story = (
        "Once upon a time there was a little goat who lived on a hill with her mother and seven sheep. Every morning "
        "she ran down to the brook and drank. One day the water was gone. The goat called the sheep, and they all went "
        "up the hill together to see what had become of it. There lay a big stone in the middle of the spring. They "
        "pushed and pushed, but it did not move. Then the oldest sheep said: let us dig beside it. And so they did, "
        "until the sun went down, and when the first star came out the water ran into the valley again."
    )
    for name, weights in (("exact", "float32"), ("calibrated", "int4")):
        options = ["--tokenizer", str(tokenizer), "--weights", weights, "--rows", "float32"]
        assert convert([str(checkpoint), "-o", str(tmp_path / name), *options]) == 0
    source = checkpoint_source(open_checkpoint(checkpoint, {}))
    alone: dict[str, Any] = {"name": "alone", "weights": "int4", "rows": "float32", "provenance": {}}
    export_package(source, read_tokenizer(tokenizer), tmp_path / "alone", **alone)
    provenance = json.loads((tmp_path / "calibrated" / "manifest.json").read_text())["provenance"]
    assert provenance["calibration"] == f"calibration.txt, {TOKENS} tokens"
    exact, *others = (log_probabilities(tmp_path / name, story) for name in ("exact", "calibrated", "alone"))
    loss, loss_alone = ((np.exp(exact) * (exact - its)).sum(axis=1).mean() for its in others)
    # 0.0018 and 0.0027 were seen; the text is not of the model's kind.
    assert loss < 0.8 * loss_alone < 0.01


def test_windows(tokenizer_json: bytes) -> None:
    tokenizer = parse_tokenizer(tokenizer_json)
    digits = "7" * 1300  # a token each
    assert tokenizer.encode(digits).ids == tokenizer.encode("7").ids * 1300
    assert calibration_windows(digits, tokenizer, 4096, "t").shape == (2, WINDOW)
    assert calibration_windows(digits, tokenizer, 64, "t").shape == (20, 64)
    assert calibration_windows("7" * 100_000, tokenizer, 4096, "t").shape == (TOKENS // WINDOW, WINDOW)
    with pytest.raises(ValueError, match=r"story\.txt: 63 tokens are too few to calibrate with, expected 64 or more"):
        calibration_windows("7" * 63, tokenizer, 64, "story.txt")


def test_the_text_is_enough() -> None:
    tokenizer = parse_tokenizer((ROOT / "models/packages/meki-tiny/tokenizer.json").read_bytes())
    text = TEXT.read_text(encoding="utf-8")
    assert len(tokenizer.encode(text).ids) > TOKENS and len(text) > 4 * TOKENS  # of larger vocabularies, too


@pytest.fixture
def checkpoint(make_model: Callable[..., Decoder], tokenizer_spec: TokenizerSpec, tmp_path: Path) -> Path:
    save_pretrained(tmp_path / "checkpoint", make_model(), tokenizer_spec, provenance={})
    return tmp_path / "checkpoint"


def test_a_text_of_ones_own(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("The cat sat on the mat and the dog ran to the hill. " * 60)
    for name, options in (("mine", ["--calibrate", str(text)]), ("ours", [])):
        assert convert([str(checkpoint), "-o", str(tmp_path / name), "--weights", "int4", *options]) == 0
    mine, ours = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("mine", "ours"))
    assert mine["provenance"]["calibration"].startswith("mine.txt, ")
    assert mine["files"]["weights.bin"]["bytes"] == ours["files"]["weights.bin"]["bytes"]
    assert mine["files"]["weights.bin"]["sha256"] != ours["files"]["weights.bin"]["sha256"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--weights", "int8"], 2, "--calibrate: only int4 weights of a checkpoint are rounded with a text; omit it"),
        ([], 2, "--calibrate: only int4 weights"),
        (["--weights", "int4"], 1, "short.txt: .* tokens are too few to calibrate with, expected 128 or more"),
    ],
    ids=str,
)
def test_what_cannot_be(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("The cat sat.")
    assert convert([str(checkpoint), "-o", str(tmp_path / "out"), "--calibrate", str(text), *options]) == code
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_not_there(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--weights", "int4", "--calibrate", str(tmp_path / "none.txt")]
    assert convert([str(checkpoint), "-o", str(tmp_path / "out"), *options]) == 2
    assert "none.txt: no such file of text" in capsys.readouterr().err


def test_folded_memories(
    make_model: Callable[..., Decoder],
    tokenizer_spec: TokenizerSpec,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_pretrained(tmp_path / "folded", make_model(), tokenizer_spec, provenance={}, folded=True)
    out, text = tmp_path / "out", tmp_path / "t.txt"
    text.write_text("The cat sat on the mat. " * 100)
    assert convert([str(tmp_path / "folded"), "-o", str(out), "--weights", "int4", "--calibrate", str(text)]) == 2
    assert "--calibrate: the memory is folded" in capsys.readouterr().err
    assert convert([str(tmp_path / "folded"), "-o", str(out), "--weights", "int4"]) == 0
    assert "warning: " in (error := capsys.readouterr().err) and "int4 weights are rounded without a text" in error
    assert "calibration" not in json.loads((out / "manifest.json").read_text())["provenance"]
