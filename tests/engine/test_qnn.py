"""The engine on compiled stages, in the HTP simulator, beside the CPU provider: the same model, the same text."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meki import Engine, _core
from meki.engine import find_onnxruntime, find_qnn_provider
from meki.models.checkpoints import open_checkpoint
from meki.models.checkpoints.checkpoint import checkpoint_source
from meki.models.package import export_package
from meki.models.qnn.package import compile_package
from meki.models.qnn.stages import Options
from meki.models.quantize import Int4Recipe, quantize_weight
from meki.models.tokenizer import read_tokenizer
from meki.package import bundled_models

pytestmark = pytest.mark.qnn

MODELS = Path(__file__).parents[2] / "models"
STORY = (
    "Once upon a time there was a miller who had three sons, and when he died he left the mill to the eldest, the "
    "donkey to the second, and to the youngest nothing but the cat. The youngest sat by the river and did not know "
    "what to do. Then the cat began to speak, and said that he should not be sad, for a cat that has boots can go far."
)
SOC, CONTEXT, CHUNK = "sm8750", 96, 32
SMALL: dict[str, dict[str, Any]] = {
    "small": {},
    "ple": {"memory_dim": 0, "ple_dim": 32, "ple_vocab_size": 100},
    "n-grams": {
        **{"memory_dim": 0, "engram_dim": 32, "engram_layers": (1,), "engram_heads": 2, "engram_rows": 50},
        **{"engram_kernel": 0, "engram_reset": (0,)},
    },
    "after attention": {"memory_position": "after_attention", "memory_fusion": "multiply_silu"},
}
"""Random models of two layers."""

# Values are rounded to float16, 11 bits, after each of some 55 operators a layer. An error of 2^-12 of a value each,
# adding up as a random walk over 8 layers, is sqrt(440) * 2^-12 = 0.5% of the final state, and reaches the logits, of
# which the RMS is 2 here and the largest of 64 * 4096 lies five deviations out: 0.005 * 2 * 5 = 0.05. The simulator
# rounds exponentials and sums of the softmax as well, which a trained model sharpens: three times that is allowed.
LARGEST = 0.15


def logits(
    package: Path, steps: list[list[int]], provider: str, memory: bool = True, kv_type: str | None = None
) -> np.ndarray:
    """float32 [all tokens, vocab_size] of one sequence, computed in these steps."""
    options = _core.EngineOptions(
        onnxruntime=str(find_onnxruntime()),
        provider=provider,
        qnn_library=str(find_qnn_provider()) if provider == "qnn" else "",
        kv_type=kv_type,
        memory=memory,
    )
    session = _core.Session(_core.Engine.open(str(package), options), _core.SessionOptions(context=CONTEXT))
    got = []
    for step in steps:
        session.append(step)
        got.append(session.logits())
    return np.concatenate(got)


@pytest.fixture(scope="module")
def compiled(make_package: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """compiled(name): one of SMALL, or meki-tiny with weights of the named precision."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name in made:
            return made[name]
        package = tmp_path_factory.mktemp("compiled") / name
        if name in SMALL:
            shutil.copytree(make_package("float32", layers=2, **SMALL[name]), package)
        elif name == "int8":
            shutil.copytree(bundled_models()["meki-tiny"], package)
        else:
            source = checkpoint_source(open_checkpoint(MODELS / "meki-tiny-checkpoint", {}))
            tokenizer = read_tokenizer(MODELS / "packages" / "meki-tiny" / "tokenizer.json")
            weights = "float32" if name == "float16" else name
            export_package(source, tokenizer, package, name=name, weights=weights, provenance={})
        precision = "float16" if name in ("float16", *SMALL) else name
        dense = name in ("small", "float16")
        entry, stages = compile_package(package, SOC, Options(CONTEXT, CHUNK, precision, dense))
        assert entry["nodes"] == sum(stage.nodes for stage in stages.values()) > 100
        made[name] = package
        return package

    return make


@pytest.fixture(scope="module")
def dequantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """dequantised(weight type): meki-tiny in float32, with the values that its quantised weights stand for.

    On the CPU the inputs of quantised layers are rounded to 8 bits; this one computes without that.
    """

    def make(weights: str) -> Path:
        source = checkpoint_source(open_checkpoint(MODELS / "meki-tiny-checkpoint", {}))
        recipe = Int4Recipe(source.config.layers)

        def values(name: str) -> np.ndarray:
            weight, type = source.weights(name), recipe.type(name) if weights == "int4" else weights
            return quantize_weight(weight, type, name).values() if weight.ndim == 2 else weight

        package = tmp_path_factory.mktemp("dequantised") / weights
        tokenizer = read_tokenizer(MODELS / "packages" / "meki-tiny" / "tokenizer.json")
        export_package(
            dataclasses.replace(source, weights=values),
            tokenizer,
            package,
            name=weights,
            weights="float32",
            provenance={},
        )
        return package

    return make


def test_small_model_prefill_and_decode_with_and_without_memory(compiled: Callable[[str], Path]) -> None:
    package = compiled("small")
    ids = [(7 * i * i + 3 * i) % 300 for i in range(64)]
    # A chunk and a padded one, then decode.
    steps = [ids[:41], *([token] for token in ids[41:])]
    for memory in (True, False):
        expected = logits(package, [ids], "cpu", memory, "float32")
        got = logits(package, steps, "qnn", memory)
        scale = np.sqrt(np.mean(np.square(expected)))
        # 2 layers of random weights: half of the argument at LARGEST, relative to the logits.
        assert np.abs(got - expected).max() < 0.02 * scale * 2
    with_memory = logits(package, [ids], "cpu", True, "float32")
    assert np.abs(with_memory - expected).max() > 0.5 * scale  # or the comparison would prove nothing about rows


@pytest.mark.parametrize("name", ["ple", "n-grams", "after attention"])
def test_other_memories(name: str, compiled: Callable[[str], Path]) -> None:
    steps = [list(range(90, 90 + CHUNK + 3)), [250], [7], [99]]
    on_npu, on_cpu = logits(compiled(name), steps, "qnn"), logits(compiled(name), steps, "cpu", kv_type="float32")
    # As of meki-tiny: logits are of RMS 2 here, too.
    assert np.abs(on_npu - on_cpu).max() < LARGEST


@pytest.mark.slow
@pytest.mark.parametrize(("name", "memory"), [("float16", True), ("float16", False), ("int8", True), ("int4", True)])
def test_meki_tiny_over_64_tokens(
    name: str, memory: bool, compiled: Callable[[str], Path], dequantised: Callable[[str], Path]
) -> None:
    package, exact = compiled(name), compiled("float16") if name == "float16" else dequantised(name)
    ids = Engine(package).tokenizer.encode(STORY).ids[:64]
    assert len(ids) == 64
    # A full chunk and a padded one, then one by one; of quantised weights the simulator computes a token in seconds.
    prompt = 40 if name == "float16" else 56
    steps = [ids[:prompt], *([token] for token in ids[prompt:])]
    expected = logits(exact, [ids], "cpu", memory, "float32")
    got = logits(package, steps, "qnn", memory)
    assert np.abs(got - expected).max() < LARGEST


@pytest.mark.slow
def test_greedy_text_is_the_cpus(compiled: Callable[[str], Path]) -> None:
    package = compiled("float16")
    expected = Engine(package, kv_type="float32").generate(STORY[:60], max_new_tokens=32, temperature=0)
    engine = Engine(package, provider="qnn")
    assert (engine.provider, engine.soc, engine.simulated, engine.kv_type) == ("qnn", SOC, True, "float16")
    assert not engine.shared_memory  # the simulator has none
    got = engine.generate(STORY[:60], max_new_tokens=32, temperature=0)
    assert got.token_ids == expected.token_ids and len(got.token_ids) == 32
    assert got.stats.rom_requests == expected.stats.rom_requests  # one a token, on either provider


@pytest.mark.slow
def test_a_draft_changes_no_text(compiled: Callable[[str], Path]) -> None:
    """Stages for one token and for several round differently in float16: a text that no near tie decides."""
    package = compiled("int8")
    engine = Engine(package, provider="qnn")
    expected = engine.generate(STORY[:60], max_new_tokens=32, temperature=0)
    for draft in (Engine(package), "lookup"):
        got = engine.generate(STORY[:60], max_new_tokens=32, temperature=0, draft=draft)
        assert got.token_ids == expected.token_ids
        assert draft == "lookup" or got.stats.accepted_tokens > 15


def test_rewinding_is_exact(compiled: Callable[[str], Path]) -> None:
    engine = Engine(compiled("small"), provider="qnn")
    session = engine.session()
    first = session.logits([5, 6, 7, 8, 9])
    session.logits([200, 201, 202])
    core = session._core
    core.rewind(3)
    again = session.logits([8, 9])
    # Computed in two chunks of other lengths: what is in the cache is the same, bit for bit.
    other = engine.session()
    other.logits([5, 6, 7])
    np.testing.assert_array_equal(again, other.logits([8, 9]))
    np.testing.assert_allclose(again, first[3:], atol=0.02)


def test_sessions_on_threads_do_not_disturb_each_other(compiled: Callable[[str], Path]) -> None:
    engine = Engine(compiled("small"), provider="qnn")
    prompts = [[first, *range(2, CHUNK + 4)] for first in range(3)]  # two chunks each

    def compute(prompt: list[int]) -> np.ndarray:
        return engine.session().logits(prompt)

    alone = [compute(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        for one, together in zip(alone, pool.map(compute, prompts), strict=True):
            np.testing.assert_array_equal(one, together)


def test_context_ends_where_it_was_compiled(compiled: Callable[[str], Path]) -> None:
    engine = Engine(compiled("small"), provider="qnn")
    assert engine.context == CONTEXT
    result = engine.generate("The keeper", max_new_tokens=0, temperature=1.0, seed=3, context=24)
    assert result.finish_reason in ("context", "eos")
    ids = [(11 * i + 1) % 300 for i in range(CONTEXT)]  # to the last slot, whose chunk has padding behind the context
    expected = Engine(compiled("small"), kv_type="float32").logits(ids)
    got = engine.session(context=CONTEXT).logits(ids)
    assert np.abs(got - expected).max() < 0.04 * np.sqrt(np.mean(np.square(expected)))
    with pytest.raises(ValueError, match="context is 97 tokens"):
        engine.session(context=CONTEXT + 1)


def test_a_package_that_is_not_compiled(make_package: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"meki-compile"):
        Engine(make_package("float32"), provider="qnn")


def test_a_chip_that_it_is_not_compiled_for(compiled: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"sm8550.*sm8750.*meki-compile"):
        Engine(compiled("small"), provider="qnn", soc="sm8550")
