"""meki_bench on 64-bit ARM, emulated, against the Python module on this machine.

MEKI_AARCH64 names a directory with the program (or a script that emulates it), meki_bench, and the library that it
loads, libonnxruntime.so; .ci/aarch64 makes one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from meki.models import convert
from meki.package import find_model

ROOT = Path(__file__).parents[2]
TINY = find_model("meki-tiny")
IDS = np.random.default_rng(6).integers(0, 4096, 70).tolist()  # more than one block of the KV cache

Logits = Callable[..., NDArray[np.float32]]


@pytest.fixture(scope="module")
def bench(make_program: Callable[[Path, Path], Any]) -> Any:
    directory = os.environ.get("MEKI_AARCH64")
    if not directory:
        pytest.skip("MEKI_AARCH64 does not name a directory that .ci/aarch64 has made")
    return make_program(Path(directory) / "meki_bench", Path(directory) / "libonnxruntime.so")


@pytest.fixture(scope="module")
def float32_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with the weights of its checkpoint as they are."""
    path = tmp_path_factory.mktemp("float32") / "package"
    checkpoint, tokenizer = ROOT / "models" / "meki-tiny-checkpoint", TINY / "tokenizer.json"
    arguments = [checkpoint, "--tokenizer", tokenizer, "--weights", "float32", "-o", path]
    assert convert.main([str(argument) for argument in arguments]) == 0
    return path


def rounding(expected: NDArray[np.float32]) -> float:
    """What float32 rounding may make of logits when sums are added in another order: a sum of n terms is off by about
    sqrt(n) half units in the last place (2^-24 each) of its largest part. The longest sums have 512 terms, and a logit
    is behind some 60 of them in a row (8 layers): sqrt(60 * 512) * 2^-24 = 1.0e-5 of the largest logit."""
    return 1e-5 * float(np.abs(expected).max())


@pytest.mark.parametrize("memory", ["on", "off"])
def test_float32(bench: Any, python_logits: Logits, float32_package: Path, tmp_path: Path, memory: str) -> None:
    got = bench.logits(float32_package, IDS, tmp_path / "logits", "--kv-type", "float32", "--memory", memory)
    expected = python_logits(float32_package, IDS, kv_type="float32", memory=memory == "on")
    assert np.abs(got - expected).max() < rounding(expected)


@pytest.mark.parametrize("token", IDS[:3])
def test_int8_of_one_token(bench: Any, python_logits: Logits, tmp_path: Path, token: int) -> None:
    """All instruction sets compute the same integers from the same floats, and one token has no long float sums that
    could bring a value to the other side of a rounding boundary."""
    got = bench.logits(TINY, [token], tmp_path / "logits")
    expected = python_logits(TINY, [token])
    assert np.abs(got - expected).max() < rounding(expected)


def test_int8_of_many_tokens(bench: Any, python_logits: Logits, float32_package: Path, tmp_path: Path) -> None:
    """Sooner or later a float sum that differs in its last place is rounded to the neighbouring integer, and from then
    on everything is rounded a little differently: by less than what rounding to integers costs at all."""
    got = bench.logits(TINY, IDS, tmp_path / "logits")
    expected = python_logits(TINY, IDS)
    exact = python_logits(float32_package, IDS, kv_type="float32")
    assert rms(got - expected) < rms(expected - exact)


def rms(values: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def test_measurement(bench: Any) -> None:
    report = bench.report(TINY, "--depth", 70, "--prefill", 9, "--tokens", 3, "--repetitions", 2)
    assert report["simd"].startswith("neon")
    assert len(report["decode_tokens_per_s"]) == len(report["prefill_tokens_per_s"]) == 2
    assert len(report["stall_us"]) == 6
