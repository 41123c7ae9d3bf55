"""Hugging Face folders that are refused: damaged ones, and models that differ from what their configuration says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from meki.models.architectures.llama import Decoder
from meki.models.checkpoints import CheckpointError, open_checkpoint
from meki.models.checkpoints.checkpoint import checkpoint_source
from meki.models.checkpoints.huggingface import load_model, save_pretrained

from .huggingface_folders import LLAMA3, MIXTURE, edit_config


def test_missing_tensor(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.2.meki.out_proj.weight"):
        del tensors[name]
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no tensor model.layers.1.mlp.up_proj.weight \(and 1 more\), .*\[96, 64\]"
    ):
        checkpoint_source(open_checkpoint(saved, {}))


def test_missing_embedding_of_a_tied_head(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor model.embed_tokens.weight, .*needs with shape \[300, 64\]"):
        checkpoint_source(open_checkpoint(saved, {}))


def test_wrong_shape(saved: Path) -> None:
    edit_config(saved, intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"mlp.gate_proj.weight has shape \[96, 64\], .* needs \[128, 64\]"):
        checkpoint_source(open_checkpoint(saved, {}))
    checkpoint_source(open_checkpoint(saved, {"ffn": 96}))


def test_tensor_left_over(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"self_attn.sinks has no place in"):
        checkpoint_source(open_checkpoint(saved, {}))
    del tensors["model.layers.0.self_attn.sinks"]
    # These two hold nothing that is not elsewhere: a tied head, and what follows from rope_theta.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, saved / "model.safetensors")
    checkpoint_source(open_checkpoint(saved, {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "gpt_neox"},
            "model_type is 'gpt_neox'; supported are llama, mistral, .*, qwen3_moe, gemma3_text, gemma4_text, meki",
        ),
        ({"model_type": None}, "model_type is None; supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        (
            {"use_sliding_window": True, "sliding_window": 64},
            "sliding_window is 64, supported is attention to all .* which is 128; .* --set context=64",
        ),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types has 'chunked_attention'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "another kind than expected: IndexError"),
        ({"model_type": "seed_oss", "attention_bias": False}, "attention_bias is False; supported is True"),
        ({"model_type": "internlm3", "bias": True}, "bias is True; supported is False"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": None}, "'dynamic'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method is 'fp8'; supported are gptq, awq"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'; supported are default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "value of another kind than expected: KeyError"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "another kind than expected: ValueError"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "another kind than expected: ZeroDivisionError"),
        ({"rope_scaling": "linear"}, "another kind than expected: AttributeError"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rotary positions differ between layers"),
        ({"model_type": []}, r"model_type is \[\]; supported"),
        ({"num_hidden_layers": 10**9}, "layers must be an integer from 1 to 65535, got 1000000000"),
        ({"max_position_embeddings": None}, "does not say what context is"),
        ({"rms_norm_eps": None}, "does not say what norm_eps is"),
        ({"rms_norm_eps": True}, "norm_eps must be a positive number, got True"),
        ({"hidden_size": None}, "does not say what hidden is; give it with --set hidden=VALUE"),
        ({"num_attention_heads": 3}, "heads"),
        ({"num_hidden_layers": "three"}, "layers must be an integer from 1 to 65535, got 'three'"),
        ({"num_hidden_layers": 3.5}, "layers must be an integer from 1 to 65535, got 3.5"),
        ({"provenance": "mine"}, "provenance is 'mine', expected an object"),
    ],
)
def test_configurations_that_are_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(saved, **changes)
    with pytest.raises(CheckpointError, match=f"{saved}/config.json: .*{message}"):
        open_checkpoint(saved, {})


def test_a_window_that_is_not_mentioned(saved: Path) -> None:
    """Then transformers' mistral has one of 4096."""
    edit_config(saved, model_type="mistral", max_position_embeddings=8192)
    with pytest.raises(CheckpointError, match="sliding_window is 4096"):
        open_checkpoint(saved, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; supported is \[\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; supported is 1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is 'silu'"),
        ({"num_experts_per_tok": 4}, r"experts_per_token \(4\) must be at most experts \(3\)"),
        ({"num_experts_per_tok": 0}, "experts_per_token must be an integer from 1 to 4096, got 0"),
        ({"num_experts": 0}, "experts must be an integer from 1 to 4096, got 0"),
        ({"num_experts": 4096}, "layers is 3, which have at least 36867 tensors, but the checkpoint has"),
        ({"num_experts": None}, "ffn_kind moe needs experts, which nobody gave; correct it with --set"),
        ({"moe_intermediate_size": None}, "does not say what ffn is"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false, got 'yes'"),
    ],
)
def test_mixtures_that_are_refused(
    make_model: Callable[..., Decoder], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save_pretrained(tmp_path / "saved", make_model(memory_dim=0, **MIXTURE), provenance={})
    edit_config(tmp_path / "saved", **changes)
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        open_checkpoint(tmp_path / "saved", {})


def test_a_mixture_of_a_kind_that_is_not_known(make_model: Callable[..., Decoder], tmp_path: Path) -> None:
    save_pretrained(tmp_path / "saved", make_model(**MIXTURE), provenance={})
    for kind in ("soft", ["moe"], 3):
        edit_config(tmp_path / "saved", ffn_kind=kind)
        with pytest.raises(CheckpointError, match="ffn_kind must be one of swiglu, geglu, moe, got "):
            open_checkpoint(tmp_path / "saved", {})
    edit_config(tmp_path / "saved", ffn_kind="swiglu")
    with pytest.raises(CheckpointError, match=r"unknown configuration keys \['experts', .*known with ffn_kind swiglu"):
        open_checkpoint(tmp_path / "saved", {})


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_configuration_that_is_none(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json: (not valid JSON|got a JSON list)"):
        open_checkpoint(saved, {})


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights(saved: Path, size: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_checkpoint(saved, {})


def test_weights_that_are_not_there(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor .* save_pretrained makes"):
        open_checkpoint(saved, {})
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"00001-of-00002.safetensors: no such file, of the 1 .* incomplete"):
        open_checkpoint(saved, {})
    for listed in (None, {"a": "../model.safetensors"}, {"a": 1}):
        index.write_text(json.dumps({"weight_map": listed}))
        with pytest.raises(CheckpointError, match=r"weight_map is not an object|1: no such file"):
            open_checkpoint(saved, {})


def test_a_cache_of_links(saved: Path, tmp_path: Path) -> None:
    """As Hugging Face's downloads are kept: a folder of links to files that are named by their sums."""
    cache = tmp_path / "models--a--b with spaces"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in saved.iterdir():
        file.rename(cache / "blobs" / f"sum-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sum-{file.name}")
    checkpoint_source(open_checkpoint(snapshot, {}))
    with pytest.raises(CheckpointError, match=r"b with spaces: the model is not here, but at .*snapshots/0123; give"):
        open_checkpoint(cache, {})
    for name in ("model.safetensors", "config.json"):
        (cache / "blobs" / f"sum-{name}").unlink()
        with pytest.raises(CheckpointError, match=rf"{name}: .*the download is incomplete"):
            open_checkpoint(snapshot, {})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_pointers_of_git_lfs(saved: Path, name: str) -> None:
    if name.endswith("index.json"):
        (saved / "model.safetensors").unlink()
    (saved / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=f"{saved / name}: is a Git LFS pointer, .*: git lfs pull"):
        open_checkpoint(saved, {})


def test_a_tensor_twice(saved: Path) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, saved / "other.safetensors")
    (saved / "model.safetensors").rename(saved / "first.safetensors")
    files = {"a": "first.safetensors", "model.norm.weight": "other.safetensors"}
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(CheckpointError, match=r"model.norm.weight is also in first.safetensors"):
        open_checkpoint(saved, {})


def test_folded_cannot_be_loaded_in_training_form(make_model: Callable[..., Decoder], tmp_path: Path) -> None:
    save_pretrained(tmp_path / "saved", make_model(), provenance={}, folded=True)
    with pytest.raises(CheckpointError, match="folded, which cannot be undone"):
        load_model(tmp_path / "saved")


def test_saving_replaces_only_what_is_a_model(make_model: Callable[..., Decoder], saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="exists already"):
        save_pretrained(saved, make_model(), provenance={})
    save_pretrained(saved, make_model(memory_dim=0), provenance={}, overwrite=True)
    assert load_model(saved)[0].config.memory is None
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(FileExistsError, match=r"has no config.json"):
        save_pretrained(other, make_model(), provenance={}, overwrite=True)
