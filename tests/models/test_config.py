"""Configurations: what they refuse, what they count."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meki.models.architectures import read_config
from meki.models.architectures.llama import Decoder, LlamaConfig
from meki.models.config import ConfigError
from meki.models.sizes import SIZES
from meki.package.registry import PUBLISHED_SIZES


@pytest.mark.parametrize("name", SIZES)
def test_json_holds_it(name: str) -> None:
    config = LlamaConfig.from_settings(SIZES[name])
    assert config.settings().items() >= SIZES[name].items()
    assert LlamaConfig.from_settings(json.loads(json.dumps(config.settings()))) == config


def test_json_holds_rotary_factors(make_model: Callable[..., Decoder]) -> None:
    config = make_model(rope_factors=(1.0, 1.0, 1.5, 2.0, 2.5, 4.0, 8.0, 8.0)).config
    assert LlamaConfig.from_settings(json.loads(json.dumps(config.settings()))) == config


MIXTURE = {"ffn_kind": "moe", "experts": 5, "experts_per_token": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be an integer from 1 to 65535, got 0"),
        ({"layers": 65_536}, "layers must be an integer from 1 to 65535, got 65536"),
        ({"hidden": 64.0}, "hidden must be an integer from 1 to 1048576, got 64.0"),
        ({"vocab_size": True}, "vocab_size must be an integer from 1 to 2147483647, got True"),
        ({"memory_dim": -1}, "memory_dim must be an integer from 0 to 1048576, got -1"),
        ({"heads": 3}, "heads (3) must be a multiple of kv_heads (2)"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"hidden": 65}, "hidden must be even for the memory projector"),
        ({"norm_eps": "small"}, "norm_eps must be a positive number, got 'small'"),
        ({"rope_theta": 0}, "rope_theta must be a positive number, got 0"),
        ({"rope_theta": math.nan}, "rope_theta must be a positive number, got nan"),
        ({"norm_eps": math.inf}, "norm_eps must be a positive number, got inf"),
        ({"norm_eps": True}, "norm_eps must be a positive number, got True"),
        ({"qkv_bias": 1}, "qkv_bias must be true or false, got 1"),
        ({"rope_factors": (1.0,)}, "rope_factors must be head_dim / 2 = 8 numbers, got 1"),
        ({"rope_factors": (0.0,) * 8}, "rope_factors must be positive numbers"),
        ({"rope_factors": (math.inf,) * 8}, "rope_factors must be positive numbers"),
        ({"rope_factors": 2.0}, "rope_factors must be positive numbers, got 2.0"),
        ({"nope_layers": (3,)}, "nope_layers must be below layers (3), got 3"),
        ({"nope_layers": (-1,)}, "nope_layers must be layers' numbers, from 0, got (-1,)"),
        ({"depth": 3}, "unknown configuration keys ['depth']"),
        ({"ffn_kind": "reglu"}, "ffn_kind must be one of swiglu, geglu, moe, got 'reglu'"),
        ({"experts": 4}, "unknown configuration keys ['experts']; known with ffn_kind swiglu: "),
        ({"ffn_kind": "moe", "experts": 4}, "ffn_kind moe needs experts_per_token, which nobody gave"),
        ({**MIXTURE, "experts": 4097}, "experts must be an integer from 1 to 4096, got 4097"),
        ({**MIXTURE, "experts_per_token": 6}, "experts_per_token (6) must be at most experts (5)"),
        ({**MIXTURE, "norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
    ],
)
def test_what_no_model_can_have(make_model: Callable[..., Decoder], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        LlamaConfig.from_settings({**make_model().config.settings(), **changes})
    assert message in str(error.value)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"memory_dim": 0},
    {"qkv_bias": True, "tied_embeddings": False, "qk_norm": False},
    {"projector_norm": True},
    {"memory_position": "parallel_attention", "memory_fusion": "multiply_silu"},
    MIXTURE,
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_a_manifest_holds_it(
    make_package: Callable[..., Path], make_model: Callable[..., Decoder], overrides: dict[str, Any]
) -> None:
    manifest = json.loads((make_package(**overrides) / "manifest.json").read_text())
    assert read_config(manifest) == make_model(**overrides).config
    for name in ("architecture", "memory") if manifest["memory"] else ("architecture",):
        other = {**manifest, name: {**manifest[name], "kind": "mamba"}}
        with pytest.raises(ConfigError, match=f"{name}.kind is 'mamba', this version has .*; convert the model again"):
            read_config(other)


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_counts(make_model: Callable[..., Decoder], overrides: dict[str, Any]) -> None:
    """What stays in memory, matrix by matrix, and what is in the tables."""
    config = make_model(**overrides).config
    hidden, memory_dim = config.hidden, config.memory.dim if config.memory else 0
    attention = hidden * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    if config.qkv_bias:
        attention += config.head_dim * (config.heads + 2 * config.kv_heads)
    norms = 2 * hidden + (2 * config.head_dim if config.qk_norm else 0)
    memory = 2 * hidden * memory_dim + hidden if memory_dim else 0
    ffn = 3 * hidden * config.ffn
    if "experts" in overrides:
        ffn = hidden * 5 + 5 * ffn
    layer = attention + norms + ffn + memory
    tables = 1 if config.tied_embeddings else 2
    assert config.ram_parameters == tables * config.vocab_size * hidden + config.layers * layer + hidden
    idle = config.layers * 3 * 3 * hidden * config.ffn if "experts" in overrides else 0
    assert config.active_parameters == config.ram_parameters - idle
    assert config.rom_parameters == config.layers * config.vocab_size * memory_dim


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_shapes_of_a_decoder(make_model: Callable[..., Decoder], overrides: dict[str, Any]) -> None:
    model = make_model(**overrides)
    assert model.config.shapes() == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_sizes_that_a_newcomer_is_told_of() -> None:
    """python/meki, which imports nothing of meki.models, names the configurations without weights."""
    assert {*PUBLISHED_SIZES, "meki-tiny"} == set(SIZES)
