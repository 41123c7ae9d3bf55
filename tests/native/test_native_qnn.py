"""The native benchmark program on compiled stages, in Qualcomm's simulator."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meki.cli.output import SIMULATED
from meki.engine import find_onnxruntime, find_qnn_provider
from meki.models.qnn.package import compile_package
from meki.models.qnn.stages import Options

pytestmark = pytest.mark.qnn

SOC, CONTEXT, CHUNK = "sm8750", 48, 16
IDS = [(7 * i * i + 3 * i) % 300 for i in range(CHUNK + 5)]  # a chunk and a padded one


@pytest.fixture(scope="module")
def bench(make_program: Callable[[Path, Path], Any]) -> Any:
    command = os.environ.get("MEKI_BENCH")
    if not command:
        pytest.skip("MEKI_BENCH does not name the program meki_bench")
    return make_program(Path(command), find_onnxruntime())


@pytest.fixture(scope="module")
def compiled(make_package: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = shutil.copytree(make_package("float32", layers=2), tmp_path_factory.mktemp("compiled") / "package")
    compile_package(package, SOC, Options(CONTEXT, CHUNK, "float16", dense=False))
    return package


def test_report_names_no_cores_or_kernels(bench: Any, compiled: Path) -> None:
    """The NPU computes, whatever the CPU has."""
    qnn = ("--provider", "qnn", "--qnn-library", find_qnn_provider())
    done = bench.run(compiled, *qnn, "--tokens", 2, "--repetitions", 2, "--prefill", 20)
    assert (done.returncode, done.stderr) == (0, f"{SIMULATED}\n")
    report = json.loads(done.stdout)
    expected = {
        "provider": "qnn",
        "simulated": True,
        "shared_memory": False,
        "soc": SOC,
        "precision": "float16",
        "weights": None,
        "memory": "meki",
        "kv_type": "float16",
        "threads": None,
        "simd": None,
        "depth": CONTEXT - 2 - 1,
        "prefill_tokens": 20,
    }
    assert {name: report[name] for name in expected} == expected
    assert len(report["decode_tokens_per_s"]) == len(report["prefill_tokens_per_s"]) == 2
    assert len(report["stall_us"]) == 2 * 2


def test_logits_are_those_of_the_python_module(
    bench: Any, python_logits: Callable[..., Any], compiled: Path, tmp_path: Path
) -> None:
    output = tmp_path / "logits"
    qnn = ("--provider", "qnn", "--qnn-library", find_qnn_provider(), "--soc", SOC)
    done = bench.run(compiled, *qnn, "--token-ids", ",".join(map(str, IDS)), "--logits", output)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"{SIMULATED}\n")
    got = np.fromfile(output, "<f4").reshape(len(IDS), -1)
    expected = python_logits(compiled, IDS, provider="qnn", qnn_library=str(find_qnn_provider()), soc=SOC)
    assert np.array_equal(got, expected)
