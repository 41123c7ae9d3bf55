"""Random Gemma models in transformers, which is the oracle, and as packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma4ForCausalLM, Gemma4TextConfig

from meki.models.architectures import ARCHITECTURES
from meki.models.architectures.gemma import GemmaDecoder
from meki.models.package import export_package
from meki.models.tokenizer import TokenizerSpec

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}


def layer_types(layers: int, pattern: int) -> list[str]:
    """Every pattern-th layer, and the last one, sees all positions."""
    full = [(layer + 1) % pattern == 0 or layer == layers - 1 for layer in range(layers)]
    return ["full_attention" if is_full else "sliding_attention" for is_full in full]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Every parameter random, norms and scalars included. Queries are small: what attention in float32 rounds differs
    by e to the power of what scores round, which have no factor head_dim^-0.5 in Gemma 4."""
    generator = torch.Generator().manual_seed(7)
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in name or "embed_scale" in name:
            continue
        if values.dim() == 2:
            values.normal_(0.0, values.shape[1] ** -0.5, generator=generator)
        else:
            values.uniform_(0.5, 1.5, generator=generator)
        if "q_norm" in name:
            values.mul_(0.1)


def gemma4(layers: int = 7, pattern: int = 3, window: int = 24, **settings: Any) -> tuple[nn.Module, GemmaDecoder]:
    """The same model twice: transformers' and ours."""
    settings = {
        "global_head_dim": 32,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        **SHAPE,
        **settings,
    }
    types = layer_types(layers, pattern)
    theirs = Gemma4ForCausalLM(
        Gemma4TextConfig(
            **settings,
            num_hidden_layers=layers,
            layer_types=types,
            sliding_window=window,
            vocab_size_per_layer_input=SHAPE["vocab_size"],
        )
    ).eval()
    ours = {
        "full_head_dim": settings["global_head_dim"],
        "logit_softcap": settings["final_logit_softcapping"] or 0.0,
        "per_layer_dim": settings["hidden_size_per_layer_input"],
        "shared_layers": settings["num_kv_shared_layers"],
        "double_wide": settings["use_double_wide_mlp"],
    }
    return theirs, _ours("gemma4", theirs, types, window, settings, ours)


def gemma3(layers: int = 7, pattern: int = 3, window: int = 24, **settings: Any) -> tuple[nn.Module, GemmaDecoder]:
    settings = {"query_pre_attn_scalar": 48, **SHAPE, **settings}
    types = layer_types(layers, pattern)
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    theirs = Gemma3ForCausalLM(
        Gemma3TextConfig(
            **settings, num_hidden_layers=layers, layer_types=types, sliding_window=window, rope_parameters=rope
        )
    ).eval()
    return theirs, _ours("gemma3", theirs, types, window, settings, {"query_scalar": 48, "rope_factor": 4.0})


def _ours(
    kind: str, theirs: nn.Module, types: list[str], window: int, settings: dict[str, Any], own: dict[str, Any]
) -> GemmaDecoder:
    randomise(theirs)
    config = ARCHITECTURES[kind].from_settings(
        {
            "vocab_size": settings["vocab_size"],
            "layers": len(types),
            "hidden": settings["hidden_size"],
            "ffn": settings["intermediate_size"],
            "heads": settings["num_attention_heads"],
            "kv_heads": settings["num_key_value_heads"],
            "head_dim": settings["head_dim"],
            "context": settings["max_position_embeddings"],
            "norm_eps": 1e-6,
            "window": window,
            "full_layers": [layer for layer, its in enumerate(types) if its == "full_attention"],
            **own,
        }
    )
    model = config.module()
    assert isinstance(model, GemmaDecoder)
    state = {name.removeprefix("model."): values.clone() for name, values in theirs.state_dict().items()}
    if kind == "gemma3":  # whose norms lack 1
        for name in state:
            if name.endswith("norm.weight"):
                state[name] += 1
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


def export(
    model: GemmaDecoder, tokenizer: TokenizerSpec, path: Path, weights: str = "float32", rows: str = "float32"
) -> Path:
    export_package(model, tokenizer, path, name="gemma", weights=weights, rows=rows, provenance={"weights": "random"})
    return path
