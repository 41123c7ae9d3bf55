"""Hugging Face folders, against transformers as the independent reference and against the models they were made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from meki import Engine
from meki.models.architectures.llama import Decoder
from meki.models.checkpoints import CheckpointError, open_checkpoint
from meki.models.checkpoints.checkpoint import checkpoint_source
from meki.models.checkpoints.huggingface import load_model, save_pretrained
from meki.models.checkpoints.huggingface_config import llama3_factors
from meki.models.package import export_package
from meki.models.tokenizer import TokenizerSpec

from .huggingface_folders import LLAMA3, MIXTURE, edit_config

IDS = [0, 17, 299, 4, 4, 250, 31, 8, 100, 77, 3, 212, 90, 91, 92, 5]

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,  # so that logits differ far beyond rounding
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 16}


def make_pretrained(kind: str, path: Path, **overrides: Any) -> torch.nn.Module:
    """A random model of transformers, saved in `path`. Biases and gains are random, too."""
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **overrides})
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return model.eval()


def convert(source: Path, out: Path, tokenizer: TokenizerSpec, **overrides: Any) -> Path:
    checkpoint = open_checkpoint(source, overrides)
    options: dict[str, Any] = {"weights": "float32", "rows": "float32", "provenance": checkpoint.provenance}
    export_package(checkpoint_source(checkpoint), checkpoint.read_tokenizer() or tokenizer, out, name="p", **options)
    return out


def logits_of(package: Path) -> np.ndarray:
    return Engine(package, kv_type="float32", threads=1).logits(IDS)


# Three layers of 64 in float32, summed in another order: some 1e-6 of logits that reach about 10.
TOLERANCE = 1e-4


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}),
        ("llama", {"head_dim": 32}),
        ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen3", {"head_dim": 32}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
        ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
        ("qwen3_moe", {**EXPERTS, "norm_topk_prob": False, "num_experts_per_tok": 5, "tie_word_embeddings": True}),
        ("qwen3_moe", {**EXPERTS, "num_experts_per_tok": 6, "moe_intermediate_size": 40, "head_dim": 32}),
        ("mistral", {"sliding_window": None, "head_dim": 32}),
        ("ministral", {"sliding_window": 4, "layer_types": ["full_attention"] * 3, "head_dim": 32}),
        ("smollm3", {"no_rope_layer_interval": 2, "pad_token_id": None}),
        ("smollm3", {"no_rope_layers": [0, 1, 0], "tie_word_embeddings": False, "pad_token_id": None}),
        ("seed_oss", {"head_dim": 32}),
        ("iquestcoder", {"head_dim": 32}),
        ("internlm3", {"rope_parameters": {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 5e7}, "head_dim": 16}),
        # Windows that never apply.
        ("mistral", {"sliding_window": 128}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0, "head_dim": 16}),
    ],
)
def test_logits_of_transformers(
    kind: str, overrides: dict[str, Any], tokenizer_spec: TokenizerSpec, tmp_path: Path
) -> None:
    model = make_pretrained(kind, tmp_path / "source", **overrides)
    package = convert(tmp_path / "source", tmp_path / "p", tokenizer_spec)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    assert expected.std() > 1
    np.testing.assert_allclose(logits_of(package), expected, rtol=0, atol=TOLERANCE)


def test_sharded_and_half_precision(tokenizer_spec: TokenizerSpec, tmp_path: Path) -> None:
    """Shards and bfloat16 as large models are published; an older configuration's way to write the rotary base."""
    model = make_pretrained("llama", tmp_path / "source").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.float32)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    edit_config(tmp_path / "shards", rope_parameters=None, rope_theta=10_000.0, torch_dtype="bfloat16")
    package = convert(tmp_path / "shards", tmp_path / "p", tokenizer_spec)
    with torch.no_grad():
        expected = rounded(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(logits_of(package), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"projector_norm": True},
        {"memory_dim": 0},
        {"qk_norm": False, "memory_dim": 0},
        {"qk_norm": False, "qkv_bias": True, "memory_dim": 0, "tied_embeddings": False},
        {"qkv_bias": True, "memory_dim": 0},
        {"rope_factors": (1.0, 1.0, 1.5, 2.0, 2.5, 4.0, 8.0, 8.0), "tied_embeddings": False},
        {"nope_layers": (0, 2), "qk_norm": False, "memory_dim": 0},
        MIXTURE,
        {**MIXTURE, "memory_dim": 0, "norm_topk_prob": False},
    ],
)
def test_what_is_saved_comes_back(
    make_model: Callable[..., Decoder], tmp_path: Path, overrides: dict[str, Any]
) -> None:
    model = make_model(**overrides)
    save_pretrained(tmp_path / "saved", model, provenance={"data": "none"})
    loaded, provenance = load_model(tmp_path / "saved")
    assert loaded.config == model.config
    assert provenance == {"source": "saved", "format": "huggingface", "data": "none"}
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_transformers_reads_what_is_saved(make_model: Callable[..., Decoder], tmp_path: Path, kind: str) -> None:
    """Models without a memory are written as what they are."""
    features = {"qk_norm": "qwen3" in kind, "qkv_bias": kind == "qwen2", "tied_embeddings": kind == "qwen3"}
    model = make_model(memory_dim=0, **features, **(MIXTURE if kind == "qwen3_moe" else {}))
    save_pretrained(tmp_path / "saved", model, provenance={})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert theirs.config.model_type == kind
    ids = torch.tensor([IDS])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"projector_norm": True, "tied_embeddings": False},
        {"memory_experts": "dynamic", "memory_projector": "linear", "memory_position": "after_attention"},
        {"memory_experts": "static", "memory_fusion": "multiply_silu"},
        {"memory_dim": 0, "ple_dim": 16, "ple_vocab_size": 100},
        {"memory_dim": 0, "engram_dim": 32, "engram_layers": (0, 2), "engram_rows": 99, "engram_canonical": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("folded", [False, True])
def test_memory_in_both_forms(
    make_model: Callable[..., Decoder],
    tokenizer_spec: TokenizerSpec,
    tmp_path: Path,
    overrides: dict[str, Any],
    folded: bool,
) -> None:
    model = make_model(**overrides)
    save_pretrained(tmp_path / "saved", model, tokenizer_spec, provenance={"weights": "random"}, folded=folded)
    package = convert(tmp_path / "saved", tmp_path / "p", tokenizer_spec)
    with torch.no_grad():
        expected = model(torch.tensor([IDS]))[0].numpy()
    np.testing.assert_allclose(logits_of(package), expected, rtol=0, atol=TOLERANCE)
    assert Engine(package).random_weights
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert (f"model.layers.0.{model.config.memory.kind}.folded_table" in names) == folded
    table = {"meki": "alpha_scale", "ple": "embed_tokens.weight", "engram": "embedding.weight"}[
        model.config.memory.kind
    ]
    assert (f"model.layers.0.{model.config.memory.kind}.{table}" in names) != folded


def test_tokenizer_comes_along(make_model: Callable[..., Decoder], tokenizer_json: bytes, tmp_path: Path) -> None:
    spec = TokenizerSpec(
        tokenizer_json, 0, (0, 5), "{{ messages }}", {"bos_token": "<|story|>"}, {"temperature": 0.6, "top_k": 5}
    )
    save_pretrained(tmp_path / "saved", make_model(), spec, provenance={})
    assert open_checkpoint(tmp_path / "saved", {}).read_tokenizer() == spec
    (tmp_path / "saved" / "tokenizer.json").unlink()
    assert open_checkpoint(tmp_path / "saved", {}).read_tokenizer() is None


def test_names_without_prefix(make_model: Callable[..., Decoder], tmp_path: Path) -> None:
    """As the base model alone is saved."""
    save_pretrained(tmp_path / "saved", make_model(), provenance={})
    file = tmp_path / "saved" / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    loaded, _ = load_model(tmp_path / "saved")
    assert torch.equal(loaded.norm.weight, make_model().norm.weight)


def test_trimmed_vocabulary(make_model: Callable[..., Decoder], tokenizer_spec: TokenizerSpec, tmp_path: Path) -> None:
    """--set vocab_size: the rows beyond are left out, of the embedding, the head and every memory."""
    model = make_model(vocab_size=320, tied_embeddings=False)
    save_pretrained(tmp_path / "saved", model, provenance={})
    package = convert(tmp_path / "saved", tmp_path / "p", tokenizer_spec, vocab_size=300)
    with torch.no_grad():
        expected = model(torch.tensor([IDS]))[0, :, :300].numpy()
    np.testing.assert_allclose(logits_of(package), expected, rtol=0, atol=TOLERANCE)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \[320, 64\], .* needs \[321, 64\]"):
        checkpoint_source(open_checkpoint(tmp_path / "saved", {"vocab_size": 321}))


def test_head_that_is_said_to_be_tied_and_is_not(
    make_model: Callable[..., Decoder], tokenizer_spec: TokenizerSpec, tmp_path: Path
) -> None:
    model, folder = make_model(tied_embeddings=False), tmp_path / "saved"
    save_pretrained(folder, model, provenance={})
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight is not model.embed_tokens.weight; .*tied_embeddings=false"
    ):
        open_checkpoint(folder, {})
    package = convert(folder, tmp_path / "p", tokenizer_spec, tied_embeddings=False)
    with torch.no_grad():
        expected = model(torch.tensor([IDS]))[0].numpy()
    np.testing.assert_allclose(logits_of(package), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "overrides", "expected"),
    [
        ({"rope_theta": None}, {}, (10_000.0, ())),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {}, (10_000.0, (2.0,) * 8)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_factors": ()}, (10_000.0, ())),
        ({"rope_scaling": LLAMA3}, {"rope_theta": 1e4}, (1e4, llama3_factors(16, 1e4, LLAMA3))),
        ({"rope_scaling": LLAMA3, "head_dim": None}, {}, (500_000.0, llama3_factors(16, 5e5, LLAMA3))),
    ],
)
def test_rotary_settings(saved: Path, changes: dict[str, Any], overrides: dict[str, Any], expected: Any) -> None:
    """What the user states comes before what follows from the configuration."""
    edit_config(saved, **changes)
    config = open_checkpoint(saved, overrides).config
    assert (config.rope_theta, config.rope_factors) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": "1e-06", "rope_theta": "10000.0", "num_hidden_layers": "3", "hidden_size": 64.0},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": None, "type": "linear", "factor": 1.0}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"hidden_act": "swish", "torch_dtype": "float16", "dtype": None, "tie_word_embeddings": None},
        {"use_sliding_window": True, "sliding_window": 128},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": False, "sliding_window": 8, "layer_types": ["full_attention"] * 3},
    ],
)
def test_one_configuration_in_other_words(saved: Path, changes: dict[str, Any]) -> None:
    plain = open_checkpoint(saved, {}).config
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **changes}))  # nulls stay
    assert open_checkpoint(saved, {}).config == plain


def test_as_many_key_heads_as_query_heads(make_model: Callable[..., Decoder], tmp_path: Path) -> None:
    """Where their number is null, or not said."""
    save_pretrained(tmp_path / "saved", make_model(kv_heads=4), provenance={})
    text = (tmp_path / "saved" / "config.json").read_text()
    assert '"num_key_value_heads": 4' in text
    for said in ('"num_key_value_heads": null', '"x": 0'):
        (tmp_path / "saved" / "config.json").write_text(text.replace('"num_key_value_heads": 4', said))
        assert open_checkpoint(tmp_path / "saved", {}).config.kv_heads == 4


@pytest.mark.parametrize("changes", [{"norm_topk_prob": None}, {"num_experts": None, "num_local_experts": 3}])
def test_mixtures_in_other_words(make_model: Callable[..., Decoder], tmp_path: Path, changes: dict[str, Any]) -> None:
    """Without a word the shares are not divided, as in transformers, whose version 5 saves another name, too."""
    model = make_model(memory_dim=0, **MIXTURE, norm_topk_prob=False)
    save_pretrained(tmp_path / "saved", model, provenance={})
    edit_config(tmp_path / "saved", **changes)
    assert open_checkpoint(tmp_path / "saved", {}).config == model.config


def test_a_window_beyond_a_shorter_context(tokenizer_spec: TokenizerSpec, tmp_path: Path) -> None:
    """What the refusal advises: within the window the model is the same."""
    model = make_pretrained("mistral", tmp_path / "source", sliding_window=32)
    with pytest.raises(CheckpointError, match=r"sliding_window is 32, .*give --set context=32"):
        open_checkpoint(tmp_path / "source", {})
    package = convert(tmp_path / "source", tmp_path / "p", tokenizer_spec, context=32)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(logits_of(package), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_a_model_that_also_sees(tokenizer_spec: TokenizerSpec, tmp_path: Path, prefix: str) -> None:
    """Its language model is a whole one; what is for images is left out, with a word of it."""
    folder = tmp_path / "source"
    model = make_pretrained("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": config, "vision_config": {}}))
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", prefix) if name.startswith("model.") else name: x for name, x in tensors.items()}
    save_file({**renamed, "model.vision_tower.patch.weight": torch.ones(4)}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="of this llava the language model alone is converted"):
        package = convert(folder, tmp_path / "p", tokenizer_spec)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(logits_of(package), expected, rtol=0, atol=TOLERANCE)
    edit_config(folder, text_config={**config, "model_type": "phi3"})
    with pytest.raises(CheckpointError, match="model_type is 'phi3'; supported are"):
        open_checkpoint(folder, {})
