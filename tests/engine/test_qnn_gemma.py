"""Gemma on compiled stages, in the HTP simulator, beside the CPU: windows, caches that layers and stages share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from meki import Engine
from meki.models.architectures.gemma import GemmaDecoder
from meki.models.qnn import stages as stages_module
from meki.models.qnn.package import compile_package
from meki.models.qnn.stages import Options
from meki.models.qnn.weights import PackageWeights
from meki.models.quantize import Int4Recipe, quantize_weight
from meki.models.tokenizer import TokenizerSpec
from meki.package import read_manifest
from tests.engine.gemma_models import export, gemma3, gemma4

pytestmark = pytest.mark.qnn

SOC, CONTEXT, CHUNK = "sm8750", 64, 16  # the windows are of 24 tokens
IDS = np.random.default_rng(8).integers(0, 300, CONTEXT).tolist()
CASES: dict[str, tuple[Callable[[], Any], int]] = {
    "gemma3": (gemma3, 7),
    "gemma4": (gemma4, 7),
    # Layers 4 to 6 see what layers 2 and 3 have, in the stage before.
    "gemma4-cut": (gemma4, 3),
    "gemma4-no-memory": (functools.partial(gemma4, hidden_size_per_layer_input=0), 7),
}
"""Models, and the layers of a stage at most."""

# Values are rounded to float16, 11 bits, after each of some 70 operators a layer: over 7 layers a random walk of
# sqrt(490) * 2^-12 = 0.5% of the final state, five times that for the largest of 20,000 logits, and for the
# exponentials and sums that the simulator rounds as well. A mask that is off by a token gives more than 10%.
LARGEST = 0.03


@pytest.fixture
def compile_case(
    tokenizer_spec: TokenizerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, GemmaDecoder]]:
    """compile_case(case, weights): the package, compiled to what its weights are, and its model."""

    def make(case: str, weights: str = "float32") -> tuple[Path, GemmaDecoder]:
        model, layers = CASES[case][0]()[1], CASES[case][1]
        path = export(model, tokenizer_spec, tmp_path / case, weights)
        precision = "float16" if weights == "float32" else weights
        layer_bytes = PackageWeights(path, read_manifest(path)).layer_bytes(precision)
        monkeypatch.setattr(stages_module, "SHARD_BYTES", layers * layer_bytes)
        entry, _ = compile_package(path, SOC, Options(CONTEXT, CHUNK, precision, dense=False))
        stages = {"gemma3": 1, "gemma4": 2, "gemma4-cut": 3, "gemma4-no-memory": 1}
        assert len(entry["decode"]) == len(entry["prefill"]) == stages[case]
        return path, model

    return make


def check(path: Path, expected: NDArray[np.float32]) -> None:
    """The logits of IDS, computed in all ways, against the CPU's in float32."""
    engine, largest = Engine(path, provider="qnn"), LARGEST * np.sqrt(np.mean(np.square(expected)))
    session = engine.session(context=CONTEXT)
    # Whole chunks and a padded one, past the window; tokens one by one; to the last slot of the cache.
    for first, last in ((0, 40), *((token, token + 1) for token in range(40, 55)), (55, CONTEXT)):
        got = session.logits(IDS[first:last])
        assert np.abs(got - expected[first:last]).max() < largest, first
    # Back across the window's edge, and on.
    session._core.rewind(20)
    assert np.abs(session.logits(IDS[20:50]) - expected[20:50]).max() < largest


@pytest.mark.parametrize("case", CASES)
def test_equals_the_cpu(case: str, compile_case: Callable[..., tuple[Path, GemmaDecoder]]) -> None:
    path, _ = compile_case(case)
    check(path, Engine(path, kv_type="float32").logits(IDS))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_packed_weights_equal_what_they_stand_for(
    weights: str, compile_case: Callable[..., tuple[Path, GemmaDecoder]], tokenizer_spec: TokenizerSpec, tmp_path: Path
) -> None:
    path, model = compile_case("gemma4-cut", weights)
    recipe = Int4Recipe(model.config.layers)
    for name, values in model.named_parameters():
        if values.ndim == 2 and not name.startswith("embed_tokens_per_layer"):  # which becomes rows
            type = recipe.type(name) if weights == "int4" else weights
            values.data = torch.from_numpy(quantize_weight(values.detach().numpy(), type, name).values())
    exact = export(model, tokenizer_spec, tmp_path / "exact")
    check(path, Engine(exact, kv_type="float32").logits(IDS))


def test_greedy_text_is_the_cpus(compile_case: Callable[..., tuple[Path, GemmaDecoder]]) -> None:
    path, _ = compile_case("gemma4")
    engines = Engine(path, kv_type="float32"), Engine(path, provider="qnn")
    texts = [its.generate("The keeper of the lighthouse", max_new_tokens=24, temperature=0) for its in engines]
    assert texts[0].token_ids == texts[1].token_ids
    assert texts[0].stats.rom_requests == texts[1].stats.rom_requests
