"""GGUF files of Gemma 3 and Gemma 4, written as llama.cpp's converter does, against transformers' models that they were
made of; and what is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from meki import Engine
from meki.models.checkpoints import CheckpointError, open_checkpoint
from meki.models.checkpoints.checkpoint import checkpoint_model, checkpoint_source
from meki.models.package import export_package
from meki.models.tokenizer import TokenizerSpec

from .gemma_models import IDS, export, logits_of, random_gemma
from .gguf_models import write_file

# Eight layers of 64 in float32, summed in another order: some 1e-6 of logits that reach about 10.
TOLERANCE = 1e-4
SCALED = {"rope_type": "linear", "factor": 8.0, "rope_theta": 500_000.0}
ROPE3 = {"full_attention": SCALED, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}


def tensors_of(model: torch.nn.Module, kind: str) -> dict[str, np.ndarray]:
    """The weights under the names that the gguf package gives them; gains of Gemma 3 whole."""
    config = model.config
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("layer_scalar"):
            name += ".weight"
        if kind == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        stored = names.get_name(name, (".weight",))
        assert stored is not None, name
        tensors[stored] = values
    if kind == "gemma4":
        pairs, part = (
            config.per_layer_config["full_attention"].head_dim // 2,
            full_rope(config)["partial_rotary_factor"],
        )
        turning = int(pairs * part)
        tensors["rope_freqs.weight"] = np.array([1.0] * turning + [1e30] * (pairs - turning), np.float32)
    return tensors


def full_rope(config: Any) -> dict[str, Any]:
    return config.rope_parameters["full_attention"]


def metadata_of(model: torch.nn.Module, kind: str) -> dict[str, Any]:
    config = model.config
    stated = config.to_dict()
    head_dim = stated["head_dim"]
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": stated["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base": full_rope(config)["rope_theta"],
    }
    if config.final_logit_softcapping:
        values["final_logit_softcapping"] = config.final_logit_softcapping
    if kind == "gemma3":
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
        if full_rope(config)["rope_type"] == "linear":
            values |= {"rope.scaling.type": "linear", "rope.scaling.factor": full_rope(config)["factor"]}
    else:
        full_head_dim = config.per_layer_config["full_attention"].head_dim
        for key, dim in (("", full_head_dim), ("_swa", head_dim)):
            values |= {f"attention.{its}_length{key}": dim for its in ("key", "value")}
            values |= {f"rope.dimension_count{key}": dim}
        values |= {
            "rope.freq_base_swa": config.rope_parameters["sliding_attention"]["rope_theta"],
            "attention.sliding_window_pattern": [its == "sliding_attention" for its in config.layer_types],
            "attention.shared_kv_layers": config.num_kv_shared_layers,
            "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        }
        if config.use_double_wide_mlp:
            own, shared = config.num_hidden_layers - config.num_kv_shared_layers, config.num_kv_shared_layers
            ffn = config.intermediate_size
            values["feed_forward_length"] = [ffn] * own + [2 * ffn] * shared
    return {f"{kind}.{key}": value for key, value in values.items()}


def write(
    path: Path,
    model: torch.nn.Module,
    kind: str,
    changes: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray | None] | None = None,
    types: Mapping[str, Type] | None = None,
) -> Path:
    """changes, extra: of the metadata and the tensors, None leaves one out."""
    named = {f"{kind}.{key}" if not key.startswith("general.") else key: its for key, its in (changes or {}).items()}
    tensors = {**tensors_of(model, kind), **(extra or {})}
    kept = {name: values for name, values in tensors.items() if values is not None}
    return write_file(path, kind, {**metadata_of(model, kind), **named}, kept, types)


@pytest.mark.parametrize(
    ("kind", "overrides", "changes"),
    [
        # The scale of attention is that of the heads, in all but 27B; the pattern is 6 where the file does not say.
        ("gemma3", {"query_pre_attn_scalar": 16}, {}),
        ("gemma3", {"query_pre_attn_scalar": 16, "tie_word_embeddings": False}, {"rope.freq_base": None}),
        ("gemma3", {"query_pre_attn_scalar": 16, "rope_parameters": ROPE3}, {}),
        (
            "gemma3",
            {
                "query_pre_attn_scalar": 16,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
                "num_hidden_layers": 6,
            },
            {"attention.sliding_window_pattern": 2},
        ),
        (
            "gemma3",
            {"query_pre_attn_scalar": 16, "layer_types": ["full_attention"] * 7},
            {"attention.sliding_window": None},
        ),
        ("gemma3", {"query_pre_attn_scalar": 12, "num_hidden_layers": 62, "hidden_size": 48}, {}),
        ("gemma4", {}, {}),
        ("gemma4", {"tie_word_embeddings": False, "use_double_wide_mlp": False, "num_kv_shared_layers": 5}, {}),
        ("gemma4", {"num_kv_shared_layers": 0, "final_logit_softcapping": None}, {"rope.freq_base_swa": None}),
        ("gemma4", {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}, {}),
        ("gemma4", {}, {"attention.head_count_kv": [2] * 8}),
    ],
    ids=str,
)
def test_logits_of_transformers(
    kind: str,
    overrides: dict[str, Any],
    changes: dict[str, Any],
    tokenizer_spec: TokenizerSpec,
    tmp_path: Path,
) -> None:
    model = random_gemma(f"{kind}_text", **overrides)
    path = write(tmp_path / "m.gguf", model, kind, changes)
    expected, ours = logits_of(model), logits_of(checkpoint_model(open_checkpoint(path, {})))
    assert expected.std() > 1
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE)
    package = export(path, tmp_path / "p", tokenizer_spec)
    np.testing.assert_allclose(package.logits(IDS), expected.numpy(), rtol=0, atol=TOLERANCE)


def test_keys_and_values_of_layers_that_share_others(tmp_path: Path) -> None:
    model = random_gemma("gemma4_text")
    layers = range(4, 8)
    unused = {f"blk.{layer}.attn_{part}.weight": np.ones((32, 64), np.float32) for layer in layers for part in "kv"}
    unused |= {f"blk.{layer}.attn_k_norm.weight": np.ones(16, np.float32) for layer in layers}
    ours = checkpoint_model(open_checkpoint(write(tmp_path / "m.gguf", model, "gemma4", {}, unused), {}))
    torch.testing.assert_close(logits_of(ours), logits_of(model), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_matrices_keep_their_bits(kind: str, tmp_path: Path) -> None:
    model = random_gemma(f"{kind}_text", query_pre_attn_scalar=16)
    types = {"token_embd.weight": Type.Q8_0, "per_layer_token_embd.weight": Type.Q4_0}
    types |= {
        f"blk.{n}.{name}.weight": Type.Q4_0 for n in range(8) for name in ("attn_q", "attn_k", "ffn_down", "inp_gate")
    }
    path = write(tmp_path / "m.gguf", model, kind, types=types)
    source = checkpoint_source(open_checkpoint(path, {}))
    assert source.blocks is not None
    tensors = tensors_of(model, kind)

    def stored(name: str, type: Type) -> np.ndarray:
        return dequantize(quantize(tensors[name], type), type)

    for name, its, type, expected in (
        ("embed_tokens.weight", "token_embd.weight", Type.Q8_0, "int8"),
        ("layers.2.self_attn.q_proj.weight", "blk.2.attn_q.weight", Type.Q4_0, "int4"),
        ("layers.2.self_attn.k_proj.weight", "blk.2.attn_k.weight", Type.Q4_0, "int4"),
        ("layers.2.mlp.down_proj.weight", "blk.2.ffn_down.weight", Type.Q4_0, "int4"),
    ):
        assert source.blocks.type(name) == expected
        blocks = source.blocks.read(name)
        assert blocks is not None
        # Queries and keys are in halves already: their rows keep their places.
        np.testing.assert_array_equal(source.weights(name), stored(its, type))
        values = blocks.codes.reshape(len(blocks.codes), -1, 32) * blocks.scales[..., None]
        np.testing.assert_array_equal(values.reshape(blocks.codes.shape), stored(its, type))
    if kind == "gemma4":
        rows = np.concatenate(list(source.row_blocks()), axis=1)
        table = stored("per_layer_token_embd.weight", Type.Q4_0)
        np.testing.assert_array_equal(rows.transpose(1, 0, 2).reshape(table.shape), table)


@pytest.mark.parametrize(
    "quantised", [("attn_q", "ffn_down"), ("attn_q", "ffn_down", "inp_gate"), ("inp_gate", "proj")]
)
def test_a_mixture_of_types_runs(quantised: tuple[str, ...], tokenizer_spec: TokenizerSpec, tmp_path: Path) -> None:
    """The small matrices of the per-layer embedding may be floats, both or one, where others are quantised."""
    wide = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 300}
    types = {f"blk.{n}.{name}.weight": Type.Q8_0 for n in range(8) for name in quantised}
    model = random_gemma("gemma4_text", **wide)
    path = write(tmp_path / "m.gguf", model, "gemma4", types=types)
    checkpoint = open_checkpoint(path, {})
    export_package(
        checkpoint_source(checkpoint), tokenizer_spec, tmp_path / "p", name="p", weights="source", provenance={}
    )
    expected = logits_of(checkpoint_model(checkpoint))
    got = Engine(tmp_path / "p", kv_type="float32").logits(IDS)
    # Inputs of products are rounded to 8 bits: some 0.4% each.
    assert np.sqrt(np.mean((got - expected.numpy().reshape(got.shape)) ** 2)) < 0.1 * expected.numpy().std()


FACTORS = "rope_freqs.weight"


@pytest.mark.parametrize(
    ("kind", "changes", "extra", "message"),
    [
        ("gemma3", {"rope.scaling.type": "yarn"}, {}, r"gemma3\.rope\.scaling\.type is 'yarn'; supported are"),
        ("gemma3", {"rope.dimension_count": 8}, {}, r"gemma3\.rope\.dimension_count is 8; supported is head_dim, 16"),
        ("gemma3", {"attention.value_length": 8}, {}, r"gemma3\.attention\.value_length is 8; supported is head_dim"),
        ("gemma3", {"attention.sliding_window_pattern": 0}, {}, "sliding_window_pattern is 0, expected every how many"),
        ("gemma3", {"attention.sliding_window_pattern": [True]}, {}, r"is \[True\], expected .* of each of 7 layers"),
        ("gemma3", {"attention.key_length": None}, {}, "does not say what head_dim is"),
        ("gemma3", {}, {FACTORS: np.ones(8, np.float32)}, r"tensor rope_freqs\.weight has no place"),
        ("gemma4", {"expert_count": 128}, {}, "expert_count is 128; supported is 0; it is so in Gemma 4 26B-A4B"),
        ("gemma4", {}, {"blk.1.attn_v.weight": None}, r"blk\.1\.attn_k\.weight has no attn_v .* Gemma 4 12B and 31B"),
        ("gemma4", {"attention.head_count_kv": [2, 1] * 4}, {}, r"head_count_kv is \[2, 1, .*supported is one number"),
        ("gemma4", {"feed_forward_length": [96] * 7 + [192]}, {}, "feed_forward_length is .* in the last 4 layers"),
        ("gemma4", {"attention.sliding_window_pattern": None}, {}, "does not say what full_layers is"),
        ("gemma4", {"rope.dimension_count_swa": 8}, {}, r"rope\.dimension_count_swa is 8; supported is head_dim, 16"),
        ("gemma4", {"rope.dimension_count": 8}, {}, r"rope\.dimension_count is 8; supported is full_head_dim, 32"),
        ("gemma4", {"rope.scaling.factor": 2.0}, {}, r"gemma4\.rope\.scaling\.factor is 2\.0; supported is 1"),
        ("gemma4", {}, {FACTORS: None}, r"rope_freqs\.weight has shape None, expected \(16,\)"),
        ("gemma4", {}, {FACTORS: np.linspace(1, 2, 16, dtype=np.float32)}, r"rope_freqs\.weight has other factors"),
        ("gemma4", {"attention.key_length": None}, {}, "does not say what full_head_dim is"),
    ],
    ids=str,
)
def test_what_is_refused(
    kind: str, changes: dict[str, Any], extra: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", random_gemma(f"{kind}_text", query_pre_attn_scalar=16), kind, changes, extra)
    with pytest.raises(CheckpointError) as error:
        checkpoint_model(open_checkpoint(path, {}))
    text = str(error.value)
    assert text.startswith(str(path)) and re.search(message, text), text


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("gemma", "is 'gemma': Gemma 1, "),
        ("gemma2", "is 'gemma2': Gemma 2, which caps"),
        ("gemma3n", "is 'gemma3n': Gemma 3n, .*AltUp"),
        ("gemma-embedding", "is 'gemma-embedding': EmbeddingGemma"),
    ],
)
def test_relatives_are_refused_by_name(architecture: str, message: str, tmp_path: Path) -> None:
    path = write_file(tmp_path / "m.gguf", architecture, {}, {"token_embd.weight": np.ones((4, 32), np.float32)})
    with pytest.raises(CheckpointError, match=f"general.architecture {message}.*; supported are llama, .*gemma4"):
        open_checkpoint(path, {})
