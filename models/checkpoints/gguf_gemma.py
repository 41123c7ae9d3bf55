"""What a GGUF file says of Gemma 3 and Gemma 4, as settings of a decoder; and what of it cannot be run.

Keys are those of the GGUF specification; what they leave open is as llama.cpp has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..architectures.llama import MOST_LAYERS
from .checkpoint import CheckpointError, check_setting

if TYPE_CHECKING:
    from .gguf_file import GgufFile

GEMMA = ("gemma3", "gemma4")
ROPE_FACTORS = "rope_freqs.weight"
_FIELDS = {
    "layers": "block_count",
    "hidden": "embedding_length",
    "heads": "attention.head_count",
    "context": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
    "local_rope_theta": "rope.freq_base_swa",
    "logit_softcap": "final_logit_softcapping",
}
"""Settings and their keys, without the architecture's name before them."""
_PATTERN = "attention.sliding_window_pattern"
_NO_TURN = 1e29
"""A rotary frequency that is divided by so much, or more, is none."""
_LAYERS_27B = 62
"""Of Gemma 3 27B, which alone has another attention scale, and no key that says so."""


def gemma_fields(file: GgufFile, architecture: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Settings. architecture: one of GEMMA. CheckpointError for what this runtime does not compute."""
    if architecture == "gemma4":
        _check_supported(file)
    stated = {field: file.number(f"{architecture}.{key}") for field, key in _FIELDS.items()}
    values = {field: value for field, value in stated.items() if value is not None} | dict(overrides)
    for name in values.keys() & {"layers", "heads", "hidden"}:
        check_setting(file.path, name, values[name])
    layers, heads = min(values.get("layers", 0), MOST_LAYERS), values.get("heads")
    if not values.get("window") and "context" in values:  # of one that sees all positions in every layer
        values = {"full_layers": tuple(range(layers)), **values, "window": values["context"]}
    own = _gemma4_fields(file, layers) if architecture == "gemma4" else _gemma3_fields(file, layers, values)
    return {
        "vocab_size": next(iter(file.shapes.get("token_embd.weight", ())), None),
        "kv_heads": file.number(f"{architecture}.attention.head_count_kv", heads),
        "full_layers": _full_layers(file, architecture, layers),
        "rope_theta": 1_000_000.0,
        "tied_embeddings": "output.weight" not in file.shapes,
        **own,
        **values,
    }


def _check_supported(file: GgufFile) -> None:
    """CheckpointError for the models of Gemma 4 whose attention is another."""
    for name in file.shapes:
        if name.endswith(".attn_k.weight") and name.replace("attn_k", "attn_v") not in file.shapes:
            raise CheckpointError(
                f"{file.path}: {name} has no attn_v beside it, keys are values, too, as in Gemma 4 12B and 31B; "
                "supported are E2B and E4B"
            )


def _gemma3_fields(file: GgufFile, layers: int, values: Mapping[str, Any]) -> dict[str, Any]:
    heads, hidden = values.get("heads"), values.get("hidden")
    is_27b = file.number("gemma3.block_count") == _LAYERS_27B
    head_dim = values.get("head_dim") or file.number("gemma3.attention.key_length")
    _check_same(file, "head_dim", head_dim, "gemma3.attention.value_length", "gemma3.rope.dimension_count")
    return {
        "ffn": file.number("gemma3.feed_forward_length"),
        "head_dim": head_dim,
        "query_scalar": hidden // heads if is_27b and hidden and heads else head_dim,
        "rope_factor": file.rope_factor("gemma3"),  # of full layers alone
    }


def _gemma4_fields(file: GgufFile, layers: int) -> dict[str, Any]:
    shared = file.number("gemma4.attention.shared_kv_layers", 0)
    head_dim = file.number("gemma4.attention.key_length_swa")
    full_head_dim = file.number("gemma4.attention.key_length")
    _check_same(file, "head_dim", head_dim, "gemma4.attention.value_length_swa", "gemma4.rope.dimension_count_swa")
    _check_same(file, "full_head_dim", full_head_dim, "gemma4.attention.value_length", "gemma4.rope.dimension_count")
    if (factor := file.rope_factor("gemma4")) != 1:
        raise CheckpointError(f"{file.path}: gemma4.rope.scaling.factor is {factor}; supported is 1")
    ffn, double_wide = _ffn(file, layers, shared)
    entries = next(iter(file.shapes.get("per_layer_token_embd.weight", ())), 0)
    return {
        "ffn": ffn,
        "double_wide": double_wide,
        "head_dim": head_dim,
        "full_head_dim": full_head_dim,
        "shared_layers": shared,
        "rotary_part": _rotary_part(file, full_head_dim),
        "per_layer_dim": file.number("gemma4.embedding_length_per_layer_input", 0),
        "per_layer_vocab_size": 0 if (entries,) == file.shapes.get("token_embd.weight", ())[:1] else entries,
    }


def _full_layers(file: GgufFile, architecture: str, layers: int) -> tuple[int, ...] | None:
    """A pattern is a number n, of which every n-th layer sees all positions, or says of each layer whether it has a
    window. None: the file has none, and no other may be assumed."""
    key = f"{architecture}.{_PATTERN}"
    pattern = file.metadata.get(key, 6 if architecture == "gemma3" else None)
    if pattern is None:
        return None
    if type(pattern) is int and pattern > 0:
        return tuple(range(pattern - 1, layers, pattern))
    if isinstance(pattern, list) and len(pattern) >= layers and all(its in (0, 1) for its in pattern):
        return tuple(layer for layer in range(layers) if not pattern[layer])
    raise CheckpointError(
        f"{file.path}: {key} is {pattern!r}, expected every how many layers one has no window, or of each of {layers} "
        "layers whether it has one; convert the file again"
    )


def _ffn(file: GgufFile, layers: int, shared: int) -> tuple[Any, bool]:
    """The width of FFNs, and whether those of the last `shared` layers are twice as wide."""
    key = "gemma4.feed_forward_length"
    widths = file.metadata.get(key)
    if not isinstance(widths, list) or not widths or shared not in range(1, layers):
        return file.number(key), False
    width, first = widths[0], layers - shared
    for last in (width, 2 * width):
        if widths[:layers] == [width] * first + [last] * shared:
            return width, last != width
    raise CheckpointError(
        f"{file.path}: {key} is {widths!r}; supported is one width, or twice that in the last {shared} layers"
    )


def _rotary_part(file: GgufFile, head_dim: int | None) -> float | None:
    """The part of the pairs of full layers' heads that turns: it comes first, and the file divides the frequencies of
    the others until nothing is left of them."""
    if head_dim is None:
        return None
    shape, pairs = file.shapes.get(ROPE_FACTORS), head_dim // 2
    if shape != (pairs,):
        raise CheckpointError(
            f"{file.path}: {ROPE_FACTORS} has shape {shape}, expected {(pairs,)}, which say what part of the heads of "
            "full layers turns; convert the file again"
        )
    factors = file.read(ROPE_FACTORS).tolist()
    turning = sum(factor == 1 for factor in factors)
    if any(factor != 1 for factor in factors[:turning]) or any(factor < _NO_TURN for factor in factors[turning:]):
        raise CheckpointError(
            f"{file.path}: {ROPE_FACTORS} has other factors than 1 for the first pairs and 1e30 for the rest, which is "
            "not supported"
        )
    part = turning / pairs
    return part if int(part * pairs) == turning else math.nextafter(part, 1)  # the configuration takes whole pairs


def _check_same(file: GgufFile, name: str, expected: Any, *keys: str) -> None:
    for key in keys if expected is not None else ():
        if (got := file.number(key, expected)) != expected:
            raise CheckpointError(f"{file.path}: {key} is {got}; supported is {name}, {expected}")
