"""Configurations: what they refuse, what they count."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from meki.models.config import CONFIGS, ConfigError, ModelConfig
from meki.models.decoder import Decoder
from meki.models.importers.checkpoint import wanted_shapes
from meki.models.source import decoder_shapes


@pytest.mark.parametrize("name", CONFIGS)
def test_json_holds_it(name: str) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(CONFIGS[name].to_dict()))) == CONFIGS[name]


def test_json_holds_rotary_factors(make_model: Callable[..., Decoder]) -> None:
    config = make_model(rope_factors=(1.0, 1.0, 1.5, 2.0, 2.5, 4.0, 8.0, 8.0)).config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


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
        ({"depth": 3}, "unknown configuration keys ['depth']"),
    ],
)
def test_what_no_model_can_have(make_model: Callable[..., Decoder], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict({**make_model().config.to_dict(), **changes})
    assert message in str(error.value)


VARIANTS: list[dict[str, Any]] = [{}, {"memory_dim": 0}, {"qkv_bias": True, "tied_embeddings": False, "qk_norm": False}]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_counts(make_model: Callable[..., Decoder], overrides: dict[str, Any]) -> None:
    """What stays in memory is what a folded model has beside its tables."""
    config = make_model(**overrides).config
    shapes = wanted_shapes(config, folded=config.memory_dim > 0)
    tables = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith("folded_table"))
    assert config.rom_weights == tables
    assert config.ram_parameters == sum(map(math.prod, shapes.values())) - tables


@pytest.mark.parametrize("overrides", [*VARIANTS, {"projector_norm": True}], ids=str)
def test_shapes_of_a_decoder(make_model: Callable[..., Decoder], overrides: dict[str, Any]) -> None:
    model = make_model(**overrides)
    assert decoder_shapes(model.config) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
