"""Hugging Face folders of Gemma 3 and Gemma 4, against transformers: what they compute, and what is refused."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from meki.models.arguments import UsageError
from meki.models.checkpoints import CheckpointError, open_checkpoint
from meki.models.checkpoints.checkpoint import checkpoint_model
from meki.models.memories.gemma_ple import GemmaPLEConfig
from meki.models.tokenizer import TokenizerSpec
from meki.models.train.base_model import open_base

from .gemma_models import GEMMA4, IDS, TYPES4, export, logits_of, random_gemma, save_gemma
from .huggingface_folders import edit_config

# Eight layers of 64 in float32, summed in another order: some 1e-6 of logits that reach about 10.
TOLERANCE = 1e-4
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 500_000.0}


def assert_same(folder: Path, model: torch.nn.Module, **overrides: Any) -> None:
    expected = logits_of(model)
    assert expected.std() > 1
    ours = logits_of(checkpoint_model(open_checkpoint(folder, overrides)))
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("gemma3_text", {}),
        ("gemma3_text", {"layer_types": ["full_attention", *["sliding_attention"] * 6], "tie_word_embeddings": False}),
        ("gemma3_text", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_theta": 5e3}}}),
        ("gemma3_text", {"final_logit_softcapping": 20.0, "num_key_value_heads": 4, "head_dim": 32}),
        ("gemma4_text", {}),
        ("gemma4_text", {"use_double_wide_mlp": False, "tie_word_embeddings": False, "num_kv_shared_layers": 5}),
        ("gemma4_text", {"num_kv_shared_layers": 0, "layer_types": None, "final_logit_softcapping": None}),
        ("gemma4_text", {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "num_key_value_heads": 1}),
        (
            "gemma4_text",
            {
                "rope_parameters": {
                    "full_attention": {
                        "rope_type": "proportional",
                        "partial_rotary_factor": 0.5,
                        "rope_theta": 5e5,
                    },
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
                },
                "use_bidirectional_attention": "vision",
            },
        ),
    ],
    ids=str,
)
def test_logits_of_transformers(
    kind: str, overrides: dict[str, Any], tokenizer_spec: TokenizerSpec, tmp_path: Path
) -> None:
    model = save_gemma(kind, tmp_path / "m", **overrides)
    assert_same(tmp_path / "m", model)
    package = export(tmp_path / "m", tmp_path / "p", tokenizer_spec)
    np.testing.assert_allclose(package.logits(IDS), logits_of(model).numpy(), rtol=0, atol=TOLERANCE)


def test_an_older_configuration(tmp_path: Path) -> None:
    """Of Gemma 3: rotary positions and the pattern of layers as they were said before there were lists of them."""
    parameters = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}
    types = ["full_attention" if layer in (2, 5) else "sliding_attention" for layer in range(7)]
    model = save_gemma("gemma3_text", tmp_path, rope_parameters=parameters, layer_types=types)
    edit_config(
        tmp_path,
        rope_parameters=None,
        rope_theta=500_000.0,
        rope_local_base_freq=5e3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        layer_types=None,
        sliding_window_pattern=3,
        tie_word_embeddings=None,
    )
    assert_same(tmp_path, model)
    edit_config(tmp_path, rope_scaling={"type": "linear", "factor": 8.0})
    assert_same(tmp_path, model)


def test_a_configuration_as_published(tmp_path: Path) -> None:
    """Of Gemma 4: the heads of full layers are said for all of them."""
    model = save_gemma("gemma4_text", tmp_path)
    edit_config(tmp_path, per_layer_config=None, global_head_dim=32)
    assert_same(tmp_path, model)


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    """A configuration that says next to nothing, as that of the first Gemma 3 4B."""
    for kind, cls in (("gemma3_text", transformers.Gemma3TextConfig), ("gemma4_text", transformers.Gemma4TextConfig)):
        folder = tmp_path / kind
        folder.mkdir()
        layers = 6
        (folder / "config.json").write_text(json.dumps({"model_type": kind, "num_hidden_layers": layers}))
        save_file({f"t{i}": torch.zeros(1) for i in range(3 * layers)}, folder / "model.safetensors")
        config, expected = open_checkpoint(folder, {}).config, cls(num_hidden_layers=layers)
        assert config.kind == kind.removesuffix("_text")
        names = {
            "vocab_size": "vocab_size",
            "hidden": "hidden_size",
            "ffn": "intermediate_size",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "context": "max_position_embeddings",
            "norm_eps": "rms_norm_eps",
            "window": "sliding_window",
            "tied_embeddings": "tie_word_embeddings",
        }
        settings, expected = config.settings(), json.loads(expected.to_json_string(use_diff=False))
        assert {name: settings[name] for name in names} == {name: expected[its] for name, its in names.items()}
        assert settings["full_layers"] == [5] and settings["logit_softcap"] == 0
        rope = expected["rope_parameters"]
        assert settings["rope_theta"] == rope["full_attention"]["rope_theta"]
        assert settings["local_rope_theta"] == rope["sliding_attention"]["rope_theta"]
        if kind == "gemma3_text":
            assert settings["query_scalar"] == expected["query_pre_attn_scalar"]
        else:
            assert settings["full_head_dim"] == expected["per_layer_config"]["5"]["head_dim"] == 512
            assert settings["rotary_part"] == rope["full_attention"]["partial_rotary_factor"]
            assert config.memory == GemmaPLEConfig(256) and expected["hidden_size_per_layer_input"] == 256


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_models_that_see(kind: str, prefix: str, tmp_path: Path) -> None:
    """The language model of one that also sees and hears, by both names that its tensors have had."""
    model = save_gemma(f"{kind}_text", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    named = {f"{prefix}{name.removeprefix('model.')}": tensor for name, tensor in tensors.items()}
    others = ("vision_tower.encoder.layers.0.mlp.up_proj.weight", "multi_modal_projector.mm_input_projection_weight")
    others += ("model.audio_tower.layers.0.norm.weight", "model.embed_vision.embedding_projection.weight")
    save_file(named | {name: torch.zeros(2, 2) for name in others}, tmp_path / "model.safetensors")
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "text_config": text, "vision_config": {}}))
    with pytest.warns(UserWarning, match=f"of this {kind} the language model alone is converted"):
        assert_same(tmp_path, model)


def test_keys_and_values_of_layers_that_share_others(tmp_path: Path) -> None:
    """Published checkpoints have them; nothing else may be left over."""
    model = save_gemma("gemma4_text", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(4, 8):
        for part, shape in (("k_proj", (32, 64)), ("v_proj", (32, 64)), ("k_norm", (16,))):
            name = f"model.layers.{layer}.self_attn.{part}.weight"
            assert name not in tensors
            tensors[name] = torch.ones(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(tmp_path, model)
    save_file(tensors | {"model.layers.4.self_attn.v_proj.bias": torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.4\.self_attn\.v_proj\.bias has no place"):
        checkpoint_model(open_checkpoint(tmp_path, {}))


def test_shards_in_half_precision(tmp_path: Path) -> None:
    model = random_gemma("gemma4_text").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same(tmp_path, transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def test_a_smaller_vocabulary(tmp_path: Path) -> None:
    """Rows beyond it are left out of the table of the per-layer embedding, too."""
    save_gemma("gemma4_text", tmp_path)
    checkpoint = open_checkpoint(tmp_path, {"vocab_size": 260})
    model = checkpoint_model(checkpoint)
    assert model.embed_tokens_per_layer.num_embeddings == model.embed_tokens.num_embeddings == 260


MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
PER_LAYER = {str(layer): {"head_dim": 32, "intermediate_size": 128} for layer in (1, 3, 5, 7)}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gemma3_text", {"attention_bias": True}, "attention_bias is True; supported is False"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0; supported is None"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True; .*EmbeddingGemma"),
        ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation is 'silu'; supported is 'gelu_pytorch_tanh'"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 7}, "layer_types has 'chunked_attention'; supported"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, expected one of each of 7"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}},
            "rope_type of full_attention is 'yarn'; supported are 'default' and 'linear'",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": LINEAR}},
            "rope_type of sliding_attention is 'linear'; supported is 'default'",
        ),
        ("gemma3_text", {"rope_parameters": LINEAR}, "rope_parameters is {.*}, expected settings of full_attention"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
            r"partial_rotary_factor is 0\.5; supported is 1",
        ),
        ("gemma4_text", MOE, "enable_moe_block is True; supported is False; it is so in Gemma 4 26B-A4B"),
        ("gemma4_text", {"attention_k_eq_v": True}, "attention_k_eq_v is True; supported is False; .* Gemma 4 31B"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'; supported is"),
        (
            "gemma4_text",
            {"per_layer_config": None, "global_head_dim": 32, "num_global_key_value_heads": 1},
            "num_key_value_heads of layer 1 is 1; supported is 2, as Gemma 4 E2B and E4B have it",
        ),
        ("gemma4_text", {"per_layer_config": PER_LAYER}, "intermediate_size of layer 1 is 128; supported is None"),
        ("gemma4_text", {"per_layer_config": {"1": {"head_dim": 32}}}, "head_dim of layer 3 is 16; supported is 32"),
        (
            "gemma4_text",
            {"rope_parameters": {"full_attention": {"rope_type": "proportional", "factor": 2.0}}},
            r"factor of full_attention's rope_parameters is 2; supported is 1",
        ),
        ("gemma4_text", {"num_kv_shared_layers": 8}, "shared_layers is 8: among the 0 layers before them none is"),
        ("gemma4_text", {"vocab_size_per_layer_input": 400}, "per_layer_vocab_size is 400, the model has 300 tokens"),
        ("gemma", {}, "model_type is 'gemma': Gemma 1, .*; supported are Gemma 3 and Gemma 4 E2B and E4B"),
        ("gemma2", {}, "model_type is 'gemma2': Gemma 2, which caps the logits of its attention"),
        ("gemma3n_text", {}, "model_type is 'gemma3n_text': Gemma 3n, .*AltUp.*LAuReL"),
        ("gemma4_unified_text", {}, "model_type is 'gemma4_unified_text': Gemma 4 12B, whose keys are values"),
        ("gemma3", {"text_config": {"model_type": "gemma2"}}, "model_type is 'gemma2': Gemma 2"),
        ("gemma4_unified", {"text_config": {"model_type": "gemma4_unified_text"}}, "'gemma4_unified': Gemma 4 12B"),
        ("gemma4_assistant", {"text_config": {"model_type": "gemma4_text"}}, "'gemma4_assistant': a draft model"),
        ("new", {"text_config": {"model_type": "gemma4_text"}}, "'new' with a gemma4_text inside; supported are"),
        ("gemma3_text", {"sliding_window_pattern": 0, "layer_types": None}, ""),
        ("gemma4_text", {"per_layer_config": [3]}, "has a value of another kind than expected"),
        ([], {}, "model_type is .*; supported are"),
    ],
    ids=str,
)
def test_what_is_refused(kind: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = kind if kind in ("gemma3_text", "gemma4_text") else "gemma4_text"
    save_gemma(base, tmp_path)
    edit_config(tmp_path, **{"model_type": kind, **changes})
    if not message:
        open_checkpoint(tmp_path, {})
        return
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path, {})
    text = str(error.value)
    assert text.startswith(str(tmp_path)) and re.search(message, text), text


def test_settings_of_the_user(tmp_path: Path) -> None:
    model = save_gemma("gemma4_text", tmp_path)
    assert TYPES4[0] == "sliding_attention" and GEMMA4["sliding_window"] == 5
    edit_config(tmp_path, sliding_window=4, final_logit_softcapping=None)
    assert_same(tmp_path, model, window=5, logit_softcap=30.0)


def test_memories_are_not_added(tmp_path: Path) -> None:
    """By training, or by a setting of the user."""
    save_gemma("gemma3_text", tmp_path)
    with pytest.raises(
        CheckpointError, match="a decoder of kind gemma3 has no memory, got meki; correct it with --set"
    ):
        open_checkpoint(tmp_path, {"memory_dim": 16})
    args = argparse.Namespace(base=tmp_path, rate=1e-3, base_rate=None, tokenizer=None)
    with pytest.raises(
        UsageError, match="is a decoder of kind gemma3; those of the Llama family can be given a memory"
    ):
        open_base(args, {"memory_dim": 16})
