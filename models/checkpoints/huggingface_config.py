"""What a config.json of a Hugging Face folder says, as settings of a decoder; and what of it cannot be run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..architectures.llama import MOST_LAYERS
from ..config import as_number
from ..ffns import FFNS
from ..memories import MEMORIES
from .checkpoint import CheckpointError, check_setting, check_window
from .gemma_config import GEMMA, check_gemma, gemma_fields

_LLAMA = {"qk_norm": False, "qkv_bias": False}
FEATURES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "smollm3": _LLAMA,
    "internlm3": _LLAMA,
    "iquestcoder": _LLAMA,
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "seed_oss": {"qk_norm": False, "qkv_bias": True},
    "qwen3": {"qk_norm": True, "qkv_bias": False},
    "qwen3_moe": {"qk_norm": True, "qkv_bias": False, "ffn_kind": "moe"},
}
"""What the model types that have no flag for it do."""
_WINDOWED = ("mistral", "ministral")
"""Have a sliding window unless they say that it is null; the others only if they say that they use it."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "smollm3": {"rope_theta": 2_000_000.0},
    **{kind: {"head_dim": 128} for kind in ("qwen3", "seed_oss", "internlm3", "iquestcoder")},
}
"""What transformers takes where a configuration of the model type says nothing."""
_UNSUPPORTED: dict[str, Any] = {
    **dict.fromkeys(("attention_bias", "attention_out_bias", "mlp_bias"), False),
    **{"partial_rotary_factor": 1, "clip_qkv": None},
}
"""What changes the arithmetic unless it is so, or null."""
_UNSUPPORTED_IN: dict[str, dict[str, Any]] = {
    "seed_oss": {"attention_bias": True},
    "internlm3": {"qkv_bias": False, "bias": False},
    "qwen3_moe": {"mlp_only_layers": [], "decoder_sparse_step": 1},  # experts in every layer
}
OWN = "meki"
"""The model type of our own layout, with a memory or without (docs/sources/huggingface.md)."""
OWN_FIELDS = (
    "qk_norm",
    "qkv_bias",
    "rope_factors",
    "nope_layers",
    "ffn_kind",
    *(name for kind in FFNS.values() for name in kind.RULES),
    *(name for kind in MEMORIES.values() for name in kind.SETTINGS),
)
FIELDS = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
"""Settings and their names in config.json."""
MIXTURE_FIELDS = {
    "ffn": "moe_intermediate_size",
    "experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "norm_topk_prob": "norm_topk_prob",
}
"""The same of what Qwen3-MoE says otherwise."""


def language_model(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """`values`, read from `path`, or, of a model that also sees or hears, the configuration of its language model.
    CheckpointError for one that is known not to be run."""
    inner = values.get("text_config")
    if values.get("model_type") in (*FEATURES, *GEMMA, OWN) or not isinstance(inner, dict):
        check_gemma(path, values, values)
        return values
    check_gemma(path, values, inner)
    quantized = inner.get("quantization_config") or values.get("quantization_config")
    return {**inner, "quantization_config": quantized}


def config_fields(
    path: Path, values: Mapping[str, Any], overrides: Mapping[str, Any], has_head: bool
) -> dict[str, Any]:
    """Settings of the configuration `values`, read from `path`: those of an architecture, None or absent where it does
    not say. has_head: there is a tensor for it. CheckpointError for what this runtime does not compute."""
    kind = values.get("model_type")
    if kind in tuple(GEMMA):
        return gemma_fields(path, values, overrides)
    if kind not in (*FEATURES, OWN):
        raise CheckpointError(
            f"{path}: model_type is {kind!r}; supported are {', '.join((*FEATURES, *GEMMA, OWN))}: decoders of the "
            "Llama family, Gemma and MeKi"
        )
    own = {name: values.get(name) for name in OWN_FIELDS} if kind == OWN else FEATURES[kind]
    # Newer configurations have all about rotary positions in rope_parameters.
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    for name, expected in {**_UNSUPPORTED, **_UNSUPPORTED_IN.get(kind, {})}.items():
        if (got := scaling.get(name, values.get(name))) not in (None, expected):
            raise CheckpointError(f"{path}: {name} is {got!r}; supported is {expected!r}")
    defaults = {"rope_theta": 10_000.0, **_DEFAULTS.get(kind, {})}
    defaults = {field: value for field, value in defaults.items() if FIELDS.get(field) not in values}
    stated = {field: as_number(values.get(name)) for field, name in FIELDS.items()} | own
    stated["ffn_kind"] = _ffn_kind(path, values, own.get("ffn_kind"))
    if kind == "qwen3_moe":
        stated |= _mixture_fields(values)
    stated["rope_theta"] = as_number(scaling.get("rope_theta") or values.get("rope_theta"))
    fields = {field: value for field, value in stated.items() if value not in (None, [])} | dict(overrides)
    fields = {**defaults, **fields}
    if "heads" in fields:
        fields.setdefault("kv_heads", fields["heads"])
        if "hidden" in fields:
            fields.setdefault("head_dim", fields["hidden"] // fields["heads"])
    fields.setdefault("tied_embeddings", not has_head)
    fields.setdefault("rope_factors", _rope_factors(path, scaling, values, fields))
    if kind == "smollm3" and "layers" in fields:
        fields.setdefault("nope_layers", _nope_layers(values, min(fields["layers"], MOST_LAYERS)))
    _check_windows(path, values, fields)
    return fields


def _ffn_kind(path: Path, values: Mapping[str, Any], stated: Any) -> Any:
    """stated: what the model type, or the configuration itself, says that it is; None: the activation tells."""
    if stated not in (None, *FFNS):
        return stated  # an error of the configuration
    kinds = {ffn.hidden_act: name for name, ffn in FFNS.items() if (name == stated if stated else not ffn.RULES)}
    activation = values.get("hidden_act") or "silu"
    activation = "silu" if activation == "swish" else activation  # two names of one function
    if activation not in kinds:
        raise CheckpointError(f"{path}: hidden_act is {activation!r}; supported is {' or '.join(map(repr, kinds))}")
    return kinds[activation]


def _mixture_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    fields = {field: as_number(values.get(name)) for field, name in MIXTURE_FIELDS.items()}
    if fields["experts"] is None:
        fields["experts"] = as_number(values.get("num_local_experts"))  # as transformers saves it since version 5
    return {**fields, "norm_topk_prob": fields["norm_topk_prob"] or False}


def _nope_layers(values: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Layers without rotary positions."""
    interval = values.get("no_rope_layer_interval") or 4
    rotated = values.get("no_rope_layers") or [(layer + 1) % interval for layer in range(layers)]
    return tuple(layer for layer in range(layers) if not rotated[layer])


def _check_windows(path: Path, values: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """CheckpointError if a layer does not attend to the whole context."""
    kinds = set(values.get("layer_types") or ())
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise CheckpointError(f"{path}: layer_types has {other.pop()!r}; supported is 'full_attention'")
    if not (values.get("use_sliding_window") or values["model_type"] in _WINDOWED):
        return
    if kinds == {"full_attention"} and values["model_type"] != "mistral":  # which does not look at it
        return
    first = as_number(values.get("max_window_layers"))
    if first is not None and not kinds and first >= fields.get("layers", 0):
        return
    # 4096 is what model types with a window have where the configuration does not say.
    window = as_number(values.get("sliding_window", 4096))
    check_window(path, "sliding_window", window, fields.get("context"))


def _rope_factors(
    path: Path, scaling: Mapping[str, Any], values: Mapping[str, Any], fields: Mapping[str, Any]
) -> tuple[float, ...]:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if any(isinstance(value, dict) for value in scaling.values()):
        raise CheckpointError(
            f"{path}: rotary positions differ between layers: {dict(scaling)!r}; supported is one kind"
        )
    trained = as_number(values.get(FIELDS["context"]))
    if kind == "default" or (kind == "dynamic" and trained and fields["context"] <= trained):  # it scales beyond
        return ()
    check_setting(path, "head_dim", fields["head_dim"])
    if kind == "linear":
        factor = float(scaling["factor"])
        return (factor,) * (fields["head_dim"] // 2) if factor != 1 else ()
    if kind == "llama3":
        return llama3_factors(fields["head_dim"], fields["rope_theta"], scaling)
    raise CheckpointError(f"{path}: rope scaling {kind!r}; supported are default, linear and llama3")


def llama3_factors(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[float, ...]:
    """What Llama 3.1 divides each rotary frequency by: nothing where a wave is short against the original context,
    `factor` where it is long; in between 1 / ((1 - s) / factor + s), where s goes from 0 at the long end to 1."""
    factor, context = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    factors = []
    for index in range(0, head_dim, 2):
        waves = context / (2 * math.pi * theta ** (index / head_dim))  # in the original context
        smooth = min(1.0, max(0.0, (waves - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)
