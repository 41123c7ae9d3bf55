"""The native benchmark program: its figures, its logits, and everything that it refuses.

MEKI_BENCH names the program (docs/development.md says how to build it).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meki import _core
from meki.engine import find_onnxruntime
from meki.package import find_model

TINY = find_model("meki-tiny")
IDS = np.random.default_rng(5).integers(0, 4096, 70).tolist()  # more than one block of the KV cache
MEASURED = {
    *("version", "onnxruntime", "load_s", "decode_tokens_per_s", "prefill_tokens_per_s", "stall_us"),
    *("storage_bytes_per_token", "resident_bytes", "resident_without_rom_bytes", "peak_resident_bytes"),
}
QUICK = ("--depth", 100, "--prefill", 20, "--tokens", 6, "--repetitions", 3)


@pytest.fixture(scope="session")
def bench(make_program: Callable[[Path, Path], Any]) -> Any:
    command = os.environ.get("MEKI_BENCH")
    if not command:
        pytest.skip("MEKI_BENCH does not name the program meki_bench")
    return make_program(Path(command), find_onnxruntime())


def positive(figures: list[float]) -> bool:
    return all(math.isfinite(figure) and figure > 0 for figure in figures)


def test_report(bench: Any) -> None:
    report = bench.report(TINY, *QUICK)
    manifest = json.loads((TINY / "manifest.json").read_text())
    expected = {
        "program": "meki_bench",
        "model": "meki-tiny",
        "random_weights": False,
        "provider": "cpu",
        "simulated": False,
        "shared_memory": False,
        "soc": None,
        "precision": None,
        "weights": manifest["weights"]["type"],
        "memory": "meki",
        "rom": "warm",
        "rom_access": "pread",
        "row_cache_mib": 0,
        "row_hit_rate": 0,
        "kv_type": "int8",
        "threads": 1,
        "simd": _core.cpu_kernels(),
        "depth": 100,
        "synthetic_depth": True,
        "tokens": 6,
        "prefill_tokens": 20,
        "repetitions": 3,
    }
    assert {name: value for name, value in report.items() if name not in MEASURED} == expected
    assert report.keys() - expected.keys() == MEASURED
    assert report["version"] == version("meki")
    assert report["onnxruntime"] in find_onnxruntime().name  # libonnxruntime.so.<version>
    assert len(report["decode_tokens_per_s"]) == len(report["prefill_tokens_per_s"]) == 3
    assert positive(report["decode_tokens_per_s"]) and positive(report["prefill_tokens_per_s"])
    assert len(report["stall_us"]) == 3 * 6 and min(report["stall_us"]) >= 0
    assert report["load_s"] > 0
    assert report["storage_bytes_per_token"] is None or report["storage_bytes_per_token"] >= 0
    # The program has touched the weights of the package at least, and is not larger than what it ever was.
    assert manifest["weights"]["decode_bytes"] < report["resident_bytes"] <= report["peak_resident_bytes"]
    assert report["resident_without_rom_bytes"] == report["resident_bytes"]  # the ROM is read, not mapped


def test_a_row_cache_has_what_the_round_before_read(bench: Any) -> None:
    report = bench.report(TINY, *QUICK, "--row-cache", 1)
    assert (report["row_cache_mib"], report["row_hit_rate"]) == (1, 1)


def test_dense_has_no_rows(bench: Any) -> None:
    report = bench.report(TINY, *QUICK, "--memory", "off", "--prefill", 0, "--kv-type", "float16")
    nothing: dict[str, Any] = {
        "memory": "dense",
        "rom": None,
        "rom_access": None,
        "row_cache_mib": None,
        "row_hit_rate": None,
        "stall_us": [],
        "prefill_tokens_per_s": [],
    }
    assert {name: report[name] for name in nothing} == nothing
    assert report["kv_type"] == "float16"
    assert len(report["decode_tokens_per_s"]) == 3


def test_defaults_fill_the_context(bench: Any) -> None:
    report = bench.report(TINY, "--repetitions", 1)
    assert (report["tokens"], report["depth"], report["prefill_tokens"]) == (32, 512 - 32 - 1, 511)
    report = bench.report(TINY, "--repetitions", 1, "--depth", 0, "--tokens", 510, "--prefill", 0)
    assert report["synthetic_depth"] is False
    assert len(report["stall_us"]) == 510


def test_cold_with_a_file_for_the_figures(bench: Any, tmp_path: Path) -> None:
    # Of a ROM of its own: dropping it from the page cache would disturb who measures with the bundled one.
    package = shutil.copytree(TINY, tmp_path / "package")
    output = tmp_path / "out.json"
    done = bench.run(package, *QUICK, "--rom", "cold", "--json", output)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(output.read_text())["rom"] == "cold"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "package"]


@pytest.mark.parametrize("kv_type", ["float32", "float16", "int8", "int4"])
def test_logits_are_those_of_the_python_module(
    bench: Any, python_logits: Callable[..., Any], tmp_path: Path, kv_type: str
) -> None:
    got = bench.logits(TINY, IDS, tmp_path / "logits", "--kv-type", kv_type)
    assert np.array_equal(got, python_logits(TINY, IDS, kv_type=kv_type))


def test_logits_without_the_memory(bench: Any, python_logits: Callable[..., Any], tmp_path: Path) -> None:
    got = bench.logits(TINY, IDS, tmp_path / "logits", "--memory", "off")
    assert np.array_equal(got, python_logits(TINY, IDS, memory=False))
    assert not np.array_equal(got, python_logits(TINY, IDS))


def refusal(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert (done.returncode, done.stdout) == (code, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("meki_bench: error: ")
    return lines[0].removeprefix("meki_bench: error: ")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--fast",), "--fast is not an option here; see meki_bench --help"),
        (("more",), "got 2 packages, expected one directory; see meki_bench --help"),
        (("--depth", "deep"), '--depth is "deep", expected a whole number of 0 to 18446744073709551615'),
        (("--depth", 480), "--depth with --tokens 32 is 480 tokens, expected at most 479: the context is 512"),
        (("--tokens", 511), "--tokens is 511 tokens, expected at most 510: the context is 512"),
        (("--prefill", 512), "--prefill is 512 tokens, expected at most 511: the context is 512"),
        (("--threads", 1025), "threads is 1025, expected 0 to 1024"),
        (
            ("--memory", "off", "--rom", "cold"),
            "--rom cold needs a memory, meki-tiny is opened without one; omit it",
        ),
        (("--token-ids", "1"), "--token-ids and --logits need each other; give both or neither"),
        (
            ("--token-ids", "1", "--logits", "x", "--rom", "cold"),
            "--token-ids measures nothing, --rom belongs to a measurement; omit one of them",
        ),
        (("--provider", "qnn"), "--provider qnn and --qnn-library need each other; give both or neither"),
    ],
)
def test_usage(bench: Any, options: tuple[object, ...], expected: str) -> None:
    assert refusal(bench.run(TINY, *options), 2) == expected


def test_a_package_that_is_not_compiled(bench: Any) -> None:
    done = bench.run(TINY, "--provider", "qnn", "--qnn-library", "libonnxruntime_providers_qnn.so")
    assert "not compiled for any chip; run meki-compile" in refusal(done, 2)


def test_token_ids_that_the_model_does_not_have(bench: Any, tmp_path: Path) -> None:
    output = tmp_path / "logits"
    done = bench.run(TINY, "--token-ids", "1,4096", "--logits", output)
    assert refusal(done, 2) == "token id 4096 is outside the vocabulary, expected 0 to 4095"
    done = bench.run(TINY, "--token-ids", ",".join(["1"] * 513), "--logits", output)
    assert refusal(done, 2) == "context is 513 tokens, the model supports at most 512"
    assert list(tmp_path.iterdir()) == []


def test_no_package(bench: Any, tmp_path: Path) -> None:
    assert str(tmp_path / "manifest.json") in refusal(bench.run(tmp_path), 1)


def test_no_onnxruntime(bench: Any, tmp_path: Path) -> None:
    missing = tmp_path / "libonnxruntime.so"
    assert f"cannot load ONNX Runtime from {missing}" in refusal(bench.run(TINY, "--onnxruntime", missing), 1)
    other = find_onnxruntime().with_name("libonnxruntime_providers_shared.so")
    assert f"{other}: not an ONNX Runtime library" in refusal(bench.run(TINY, "--onnxruntime", other), 1)


def test_a_damaged_rom_leaves_no_file(bench: Any, tmp_path: Path) -> None:
    package = shutil.copytree(TINY, tmp_path / "package")
    rom = package / "memory.rom"
    rom.write_bytes(rom.read_bytes()[:4096] + bytes(rom.stat().st_size - 4096))
    output = tmp_path / "out.json"
    assert "memory.rom: bundle " in refusal(bench.run(package, *QUICK, "--json", output), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_figures_that_cannot_be_written(bench: Any, tmp_path: Path) -> None:
    output = tmp_path / "missing" / "out.json"
    assert refusal(bench.run(TINY, "--json", output), 1) == f"{output}: cannot write: No such file or directory"
    assert refusal(bench.run(TINY, "--json", tmp_path), 1) == f"{tmp_path}: cannot write: Is a directory"
    with open("/dev/full", "w") as full:
        done = subprocess.run(bench.arguments(TINY, *QUICK), stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "meki_bench: error: standard output: cannot write\n")


def test_streams_that_are_closed(bench: Any, tmp_path: Path) -> None:
    output = tmp_path / "out.json"

    def run(redirect: str, *options: object) -> subprocess.CompletedProcess[str]:
        shell = ["sh", "-c", f'exec "$@" {redirect}', "sh", *bench.arguments(TINY, *QUICK, *options)]
        return subprocess.run(shell, capture_output=True, text=True)

    closed = "standard output is closed; open or redirect it, or name a file with --json"
    assert refusal(run(">&-"), 1) == closed
    done = run("<&- >&- 2>&-", "--json", output)  # which no stream gets into
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(output.read_text())["model"] == "meki-tiny"
    done = run("<&- >&- 2>&-", "--fast")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_without_a_file(bench: Any, tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "out.json"
    command = bench.arguments(TINY, "--tokens", 400, "--repetitions", 10**9, "--json", output)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not catches(process, number):  # it has begun
                assert process.poll() is None
            process.send_signal(number)
            printed = process.communicate(timeout=60)
        finally:
            process.kill()  # or leaving the context would wait for all repetitions
    assert (process.returncode, *printed) == (130, "", "")
    assert list(tmp_path.iterdir()) == []


def catches(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal: proc(5), a mask in hexadecimal digits."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_help(bench: Any) -> None:
    done = subprocess.run([bench.command, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: meki_bench PACKAGE --onnxruntime LIB")
