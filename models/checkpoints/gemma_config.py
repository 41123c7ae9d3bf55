"""What a config.json says of Gemma 3 and Gemma 4, as settings of a decoder; and what of it cannot be run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architectures.base import Architecture
from ..architectures.gemma import Gemma
from ..architectures.llama import MOST_LAYERS
from ..config import as_number
from .checkpoint import CheckpointError, check_setting

GEMMA = {"gemma3_text": "gemma3", "gemma4_text": "gemma4"}
"""Model types and architectures, which are also the model types of those that see and hear, too."""
RELATIVES = {
    "gemma": "Gemma 1, a decoder without norms behind attention and FFN",
    "gemma2": "Gemma 2, which caps the logits of its attention",
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "Gemma 3n, which has several residual streams (AltUp) and LAuReL"),
    **dict.fromkeys(
        ("gemma4_unified", "gemma4_unified_text"), "Gemma 4 12B, whose keys are values, too (attention_k_eq_v)"
    ),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "a draft model, which reads another's keys and values; give the model that it is for",
    ),
    "gemma-embedding": "EmbeddingGemma, which writes no text",
}
"""Model types, and architectures of GGUF files, that are known and cannot be run."""
_ACTIVATION = "gelu_pytorch_tanh"
_COMMON: dict[str, tuple[str, Any]] = {
    "hidden": ("hidden_size", 2304),
    "ffn": ("intermediate_size", 9216),
    "heads": ("num_attention_heads", 8),
    "kv_heads": ("num_key_value_heads", 4),
    "head_dim": ("head_dim", 256),
    "context": ("max_position_embeddings", 131_072),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "logit_softcap": ("final_logit_softcapping", 0.0),
    "tied_embeddings": ("tie_word_embeddings", True),
}
_FIELDS: dict[str, dict[str, tuple[str, Any]]] = {
    "gemma3": {
        **_COMMON,
        "vocab_size": ("vocab_size", 262_208),
        "layers": ("num_hidden_layers", 26),
        "window": ("sliding_window", 4096),
        "query_scalar": ("query_pre_attn_scalar", 256),
    },
    "gemma4": {
        **_COMMON,
        "vocab_size": ("vocab_size", 262_144),
        "layers": ("num_hidden_layers", 30),
        "window": ("sliding_window", 512),
        "shared_layers": ("num_kv_shared_layers", 0),
        "double_wide": ("use_double_wide_mlp", False),
        "per_layer_dim": ("hidden_size_per_layer_input", 256),
        "per_layer_vocab_size": ("vocab_size_per_layer_input", 262_144),
    },
}
"""Settings, their names in config.json, and what transformers takes where it does not say."""
_SUPPORTED: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "gemma3": {
        "hidden_activation": ((_ACTIVATION,), ""),
        "attention_bias": ((False,), ""),
        "attn_logit_softcapping": ((), ""),
        "use_bidirectional_attention": ((False,), "; a model for embeddings, as EmbeddingGemma, writes no text"),
    },
    "gemma4": {
        "hidden_activation": ((_ACTIVATION,), ""),
        "attention_bias": ((False,), ""),
        "enable_moe_block": ((False,), "; it is so in Gemma 4 26B-A4B"),
        "attention_k_eq_v": ((False,), "; it is so in Gemma 4 31B"),
        "use_bidirectional_attention": (("vision",), ""),  # of images, which there are none of
    },
}
"""What there may be beside null, as it does not change the arithmetic of a text; and who has it otherwise."""
_SHARED = ("k_proj", "v_proj", "k_norm")


def check_gemma(path: Path, whole: Mapping[str, Any], inner: Mapping[str, Any]) -> None:
    """CheckpointError for a relative of Gemma's that cannot be run. inner: of `whole`, the language model's part."""
    outer, kind = str(whole.get("model_type")), str(inner.get("model_type"))
    for name in (outer, kind):
        if name in RELATIVES:
            raise CheckpointError(
                f"{path}: model_type is {name!r}: {RELATIVES[name]}; supported are Gemma 3 and Gemma 4 E2B and E4B"
            )
    if kind in GEMMA and outer not in (kind, GEMMA[kind]):
        raise CheckpointError(
            f"{path}: model_type is {outer!r} with a {kind} inside; supported are {kind} and {GEMMA[kind]}"
        )


def gemma_fields(path: Path, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the configuration `values`, read from `path`, whose model type is one of GEMMA. CheckpointError for
    what this runtime does not compute."""
    kind = GEMMA[values["model_type"]]
    for name, (supported, whose) in _SUPPORTED[kind].items():
        if (got := values.get(name)) is not None and got not in supported:
            expected = " or ".join(map(repr, supported)) or "None"
            raise CheckpointError(f"{path}: {name} is {got!r}; supported is {expected}{whose}")
    stated = {field: as_number(values.get(name)) for field, (name, _) in _FIELDS[kind].items()}
    defaults = {field: default for field, (_, default) in _FIELDS[kind].items()}
    fields = defaults | {field: value for field, value in stated.items() if value is not None} | dict(overrides)
    for name in ("layers", "heads", "kv_heads", "head_dim"):
        check_setting(path, name, fields[name])
    types = _layer_types(path, values, fields["layers"], kind)
    fields.setdefault("full_layers", tuple(layer for layer, its in enumerate(types) if its == "full_attention"))
    if "sliding_window" in values and stated["window"] is None and "window" not in overrides:
        fields["window"] = fields["context"]  # null: none
    rotary = _gemma4_rope(path, values) if kind == "gemma4" else _gemma3_rope(path, values)
    fields = rotary | fields
    if kind == "gemma4":
        fields.setdefault("full_head_dim", _full_head_dim(path, values, fields))
        if fields["per_layer_vocab_size"] == (stated["vocab_size"] or fields["vocab_size"]):
            fields["per_layer_vocab_size"] = 0
    return fields


def gemma_gain(name: str, config: Architecture) -> bool:
    """Whether the weight `name` lacks 1 in a folder, as norms of Gemma 3 do."""
    return config.kind == "gemma3" and name.endswith("norm.weight")


def unused_weights(config: Architecture) -> list[str]:
    """Names that weights of the decoder would have, which it does not need but a checkpoint may have all the same: of
    layers that see the keys and values of others."""
    if not isinstance(config, Gemma):
        return []
    shared = [layer for layer in range(config.layers) if config.attention(layer).source is not None]
    return [f"layers.{layer}.self_attn.{part}.weight" for layer in shared for part in _SHARED]


def _layer_types(path: Path, values: Mapping[str, Any], layers: int, kind: str) -> list[str]:
    """Of each layer."""
    layers = min(layers, MOST_LAYERS)
    pattern = (as_number(values.get("sliding_window_pattern")) if kind == "gemma3" else None) or 6
    types = values.get("layer_types") or [
        "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)
    ]
    if len(types) < layers:
        raise CheckpointError(f"{path}: layer_types has {len(types)} entries, expected one of each of {layers} layers")
    if other := set(types) - {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"{path}: layer_types has {min(other)!r}; supported are 'full_attention' and 'sliding_attention'"
        )
    types = list(types[:layers])
    return [*types[:-1], "full_attention"] if kind == "gemma4" else types  # whatever it says, as in transformers


def _rope(path: Path, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is said of rotary positions of full layers and of the others."""
    both = values.get("rope_parameters") or {}
    if both and not both.keys() & {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"{path}: rope_parameters is {dict(both)!r}, expected settings of full_attention and of sliding_attention"
        )
    full, local = both.get("full_attention") or {}, both.get("sliding_attention") or {}
    local_kind = local.get("rope_type") or "default"
    if local_kind != "default":
        raise CheckpointError(f"{path}: rope_type of sliding_attention is {local_kind!r}; supported is 'default'")
    return {**full, **(values.get("rope_scaling") or {})}, dict(local)


def _thetas(values: Mapping[str, Any], full: Mapping[str, Any], local: Mapping[str, Any]) -> dict[str, Any]:
    theta = as_number(full.get("rope_theta") or values.get("rope_theta"))
    local_theta = as_number(local.get("rope_theta") or values.get("rope_local_base_freq"))
    return {"rope_theta": theta or 1_000_000.0, "local_rope_theta": local_theta or 10_000.0}


def _gemma3_rope(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    full, local = _rope(path, values)
    kind = full.get("rope_type") or full.get("type") or "default"
    if kind not in ("default", "linear"):
        raise CheckpointError(f"{path}: rope_type of full_attention is {kind!r}; supported are 'default' and 'linear'")
    if (part := as_number(full.get("partial_rotary_factor"))) not in (None, 1):
        raise CheckpointError(f"{path}: partial_rotary_factor is {part!r}; supported is 1")
    factor = float(full["factor"]) if kind == "linear" else 1.0
    return {**_thetas(values, full, local), "rope_factor": factor}


def _gemma4_rope(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    full, local = _rope(path, values)
    if not full:
        full = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    kind = full.get("rope_type") or "default"
    if kind not in ("default", "proportional"):
        raise CheckpointError(
            f"{path}: rope_type of full_attention is {kind!r}; supported are 'default' and 'proportional'"
        )
    if kind == "proportional" and (factor := as_number(full.get("factor"))) not in (None, 1):
        raise CheckpointError(f"{path}: factor of full_attention's rope_parameters is {factor!r}; supported is 1")
    part = as_number(full.get("partial_rotary_factor")) if kind == "proportional" else None
    return {**_thetas(values, full, local), "rotary_part": 1.0 if part is None else part}


def _full_head_dim(path: Path, values: Mapping[str, Any], fields: Mapping[str, Any]) -> int:
    """Of full layers, and CheckpointError for anything else that would differ between layers."""
    usual = {"head_dim": fields["head_dim"], "num_key_value_heads": fields["kv_heads"]}
    full = {"head_dim": values.get("global_head_dim", 512)}
    full |= {"num_key_value_heads": heads} if (heads := values.get("num_global_key_value_heads")) is not None else {}
    each: Mapping[str, Any] | None = values.get("per_layer_config")  # by layers' numbers, as transformers saves it
    if each is None:
        each = {str(layer): full for layer in fields["full_layers"]}
    seen = {layer: {**usual, **each.get(str(layer), {})} for layer in range(fields["layers"])}
    dims = [its["head_dim"] for layer, its in seen.items() if layer in fields["full_layers"]]
    dim = dims[0] if dims else usual["head_dim"]
    for layer, its in seen.items():
        expected = {**usual, "head_dim": dim} if layer in fields["full_layers"] else usual
        for name, value in its.items():
            if value != expected.get(name):
                raise CheckpointError(
                    f"{path}: {name} of layer {layer} is {value!r}; supported is {expected.get(name)!r}, "
                    "as Gemma 4 E2B and E4B have it: one head_dim of all full layers, one of all others, and no other "
                    "difference"
                )
    return int(dim)
