"""meki-bench on small packages, through main()."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meki import _core
from meki.bench.parts import PARTS
from meki.cli import bench
from meki.cli.bench import main
from meki.package import find_model, read_manifest

QUICK = ["--threads", "1", "--tokens", "8", "--repetitions", "1", "--prefill", "16"]


@pytest.fixture(autouse=True)
def small_bandwidth_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_BANDWIDTH_BYTES", 1 << 22)


@pytest.fixture
def dense_package(make_package: Callable[..., Path]) -> Path:
    return make_package(memory_dim=0, name="small-dense")


def result_keys(report: dict[str, Any]) -> list[tuple[str, int, str]]:
    return [(result["test"], result["depth"], result["memory"]) for result in report["results"]]


def test_the_bundled_model_with_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--threads", "1", "--tokens", "8", "--repetitions", "3", "--prefill", "32", "--depths", "0,64"]
    outputs = ["--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "plots")]
    assert main(["meki-tiny", *arguments, "--compare", "dense", "--parts", *outputs]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no terminal, no progress
    report = json.loads((tmp_path / "a.json").read_text())
    manifest = read_manifest(find_model("meki-tiny"))
    tests = [("prefill", 0), ("decode", 0), ("decode", 64)]
    assert result_keys(report) == [(*test, memory) for test in tests for memory in ("meki", "dense")]
    (bandwidth,) = report["read_bandwidth"]
    assert bandwidth["threads"] == 1 and len(bandwidth["samples_gb_s"]) == 4
    for result in report["results"]:
        assert len(result["samples"]) == 3 and result["threads"] == 1
        assert 0 < result["p10"] <= result["median"] <= result["p90"]
        assert (result["stall_us"] is not None) == (result["memory"] == "meki")
        assert result["synthetic_depth"] is False
        if result["test"] == "decode":
            key = "decode_bytes" if result["memory"] == "meki" else "dense_decode_bytes"
            assert result["weight_bytes"] == manifest["weights"][key]
            total = result["weight_bytes"] + result["kv_bytes"] + result["row_bytes"]
            assert result["bytes_per_token"] == total
            expected = total * result["median"] / (bandwidth["gb_s"] * 1e9)
            assert result["bandwidth_fraction"] == pytest.approx(expected)
    kv = {result["depth"]: result["kv_bytes"] for result in report["results"] if result["test"] == "decode"}
    assert 0 < kv[0] < kv[64]
    for entry in report["compare"]:
        assert len(entry["samples"]) == 3 and entry["ratio"] > 0 and entry["ci95"] is None
    assert [(entry["memory"], entry["depth"]) for entry in report["parts"]] == [
        (memory, depth) for depth in (0, 64) for memory in ("meki", "dense")
    ]
    for entry in report["parts"]:
        times = entry["us_per_token"]
        assert list(times) == list(PARTS)
        for part in ("attention", "linear", "head", "norms and elementwise", "sampling"):
            assert times[part] > 0
        assert (times["injection"] > 0) == (entry["memory"] == "meki")
        # What the profiler saw lies within the step. It counts whole microseconds, so it sees at most what there was.
        assert times["rest"] > 0
    memory = report["memory"]
    assert memory["resident"] >= memory["anonymous"] > 0
    assert memory["without_rom"] == memory["resident"] - memory["rom"] > 0
    assert f"without rom {memory['without_rom'] / 1e6:,.0f} MB" in printed.out
    assert report["environment"]["kv_type"] == "int8"
    assert report["environment"]["simd"] == _core.cpu_kernels()
    assert not report["environment"]["random_weights"]
    with (tmp_path / "a.csv").open() as file:
        assert [float(row["median"]) for row in csv.DictReader(file)] == [r["median"] for r in report["results"]]
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"speed.png", "parts.png"}
    for result in report["results"]:
        assert f"{result['median']:,.1f}" in printed.out


def test_defaults_fit_the_model(package: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert main([str(package), "--threads", "1", "--repetitions", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    # The context of 128 holds the depth, 32 steps, one that leads in, and the token that the last step makes.
    assert result_keys(report) == [("prefill", 0, "meki"), ("decode", 0, "meki"), ("decode", 94, "meki")]
    assert report["results"][0]["tokens"] == 127
    result = report["results"][1]
    assert result["median"] == result["p10"] == result["p90"] == result["samples"][0]
    assert any("random weights" in label for label in report["labels"])


@pytest.mark.parametrize("kv_type", ["float32", "float16", "int8"])
def test_a_synthetic_depth_is_labelled(package: Path, kv_type: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "report.json"
    arguments = ["--depths", "64", "--synthetic-depth", "--kv-type", kv_type, "--json", str(path)]
    assert main([str(package), *QUICK, *arguments]) == 0
    out = capsys.readouterr().out
    assert "the cache was filled, not computed" in out and "64 (synthetic)" in out and f"{kv_type} KV cache" in out
    report = json.loads(path.read_text())
    assert [result["synthetic_depth"] for result in report["results"]] == [False, True]
    assert report["environment"]["kv_type"] == kv_type


def test_a_cold_rom_is_told(package: Path, capsys) -> None:
    # That it is dropped before every step: tests/cpp/measure/measure_test.cc.
    assert main([str(package), *QUICK, "--depths", "0", "--rom", "cold"]) == 0
    out = capsys.readouterr().out
    assert "cold ROM" in out and "(pread, cold)" in out
    assert "from storage, bytes a token" in out


def test_a_delayed_rom_stalls(package: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "report.json"
    arguments = ["--prefill", "0", "--depths", "0", "--rom-delay-ms", "50", "--json", str(path)]
    assert main([str(package), *QUICK, *arguments]) == 0
    assert "artificial delay: 50 ms" in capsys.readouterr().out
    (decode,) = json.loads(path.read_text())["results"]
    # What is not waited for is what the step computes meanwhile: far below 1 ms, so that a busy machine has room.
    assert decode["stall_us"]["p50"] > 5_000


def test_rows_come_from_storage_unless_there_is_a_row_cache(package: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "report.json"
    for cache, rate in (([], 0), (["--row-cache", "1"], 1)):
        assert main([str(package), *QUICK, "--depths", "0", "--json", str(path), *cache]) == 0
        assert ("row cache of 1 MiB" in capsys.readouterr().out) == bool(cache)
        # The rounds read what the warm-up has read.
        assert [result["row_hit_rate"] for result in json.loads(path.read_text())["results"]] == [rate, rate]


@pytest.mark.parametrize("rom", ["warm", "cold"])
def test_beside_rows_in_ram(package: Path, rom: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "report.json"
    arguments = ["--compare", "ram", "--rom", rom, "--parts", "--json", str(path), "--plot", str(tmp_path)]
    assert main([str(package), *QUICK, "--depths", "0,64", "--repetitions", "6", *arguments]) == 0
    out = capsys.readouterr().out
    assert "from storage / in RAM" in out and "rows in RAM: all were read" in out and "random weights: " in out
    report = json.loads(path.read_text())
    tests = [("prefill", 0), ("decode", 0), ("decode", 64)]
    assert result_keys(report) == [(*test, memory) for test in tests for memory in ("meki", "meki in RAM")]
    for streamed, in_ram in zip(report["results"][::2], report["results"][1::2], strict=True):
        assert (streamed["row_hit_rate"], in_ram["row_hit_rate"]) == (0, 1)
        assert streamed["bytes_per_token"] == in_ram["bytes_per_token"]
    for entry in report["compare"]:
        low, high = entry["ci95"]
        assert len(entry["samples"]) == 6 and 0 < low <= entry["ratio"] <= high
    # Whose rows are where makes no difference to a kernel.
    assert [(entry["memory"], entry["depth"]) for entry in report["parts"]] == [("meki", 0), ("meki", 64)]
    assert report["protocol"]["compare"] == "ram"
    assert {file.name for file in tmp_path.iterdir()} == {"report.json", "speed.png", "parts.png"}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two threads need two cores")
def test_several_numbers_of_threads(package: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "report.json"
    arguments = [
        "--threads",
        "1,2",
        "--tokens",
        "4",
        "--repetitions",
        "2",
        "--prefill",
        "16",
        "--depths",
        "0",
        "--parts",
    ]
    assert main([str(package), *arguments, "--json", str(path)]) == 0
    assert "1 and 2 threads" in capsys.readouterr().out
    report = json.loads(path.read_text())
    expected = [(test, threads) for test in ("prefill", "decode") for threads in (1, 2)]
    assert [(result["test"], result["threads"]) for result in report["results"]] == expected
    assert all(len(result["samples"]) == 2 for result in report["results"])
    assert [(entry["threads"], len(entry["samples_gb_s"])) for entry in report["read_bandwidth"]] == [(1, 3), (2, 3)]
    assert [entry["threads"] for entry in report["parts"]] == [1, 2]


def test_a_dense_package(dense_package: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "report.json"
    assert main([str(dense_package), *QUICK, "--depths", "0", "--parts", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert result_keys(report) == [("prefill", 0, "dense"), ("decode", 0, "dense")]
    assert report["results"][1]["row_bytes"] == 0 and report["results"][1]["stall_us"] is None
    assert report["protocol"]["rom"] is None and report["environment"]["rows"] is None
    assert report["parts"][0]["us_per_token"]["injection"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "0,1e3"], "expected different numbers of tokens with commas between them"),
        (["--depths", ""], "expected different numbers"),
        (["--depths", "5,5"], "got '5,5'"),
        (["--depths", "-1"], "got '-1'"),
        (["--tokens", "0"], "expected an integer of at least 1, got '0'"),
        (["--repetitions", "x"], "expected an integer of at least 1, got 'x'"),
        (["--prefill", "-1"], "expected an integer of at least 0, got '-1'"),
        (["--rom-delay-ms", "nan"], "expected milliseconds from 0 to 10000, got 'nan'"),
        (["--compare", "peers"], "dense"),
    ],
)
def test_arguments_of_the_wrong_form(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "0,100"], "depth 100 .* context of 134 tokens, the model's has 128; .* at most 94"),
        (["--tokens", "126"], "takes 129 tokens of context, the model's has 128"),
        (["--prefill", "128"], "needs a context of 129 tokens, the model's has 128; give at most 127"),
        (["--compare", "dense", "--tokens", "12"], "--tokens is 12, .* give a multiple of 8"),
        (["--threads", "-1"], "threads must be from 0 to 1024, got -1"),
        (
            ["--threads", "1,2", "--compare", "ram"],
            "--compare ram takes turns with one number of threads, --threads has 2",
        ),
        (["--threads", "900,1000"], r"--threads 900,1000 are \d+, \d+ threads here; give different numbers"),
    ],
)
def test_arguments_that_do_not_fit_the_model(package: Path, arguments: list[str], message: str, capsys) -> None:
    assert main([str(package), *arguments]) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err)
    assert printed.err.startswith("meki-bench: error: ") and printed.out == ""


@pytest.mark.parametrize(
    "arguments",
    [["--compare", "dense"], ["--compare", "ram"], ["--rom", "cold"], ["--row-cache", "1"], ["--rom-delay-ms", "1"]],
)
def test_a_dense_package_has_no_memory(dense_package: Path, arguments: list[str], capsys) -> None:
    assert main([str(dense_package), *arguments]) == 2
    assert "needs a model with a memory, small-dense is dense" in capsys.readouterr().err


def test_an_unknown_model(capsys) -> None:
    assert main(["no-such-model"]) == 2
    assert "no model 'no-such-model'" in capsys.readouterr().err


@pytest.fixture
def no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("measured before the arguments were checked")

    monkeypatch.setattr(_core, "measure", fail)


@pytest.mark.usefixtures("no_measurement")
def test_outputs_are_checked_before_measuring(package: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "file"
    file.touch()
    for arguments in (["--json", str(tmp_path)], ["--csv", str(file / "a.csv")], ["--plot", str(file)]):
        assert main([str(package), *arguments]) == 2
        assert "directory" in capsys.readouterr().err


@pytest.mark.usefixtures("no_measurement")
def test_a_missing_matplotlib_is_told_before_measuring(
    package: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert main([str(package), "--plot", str(tmp_path)]) == 2
    assert "pip install 'meki[plot]'" in capsys.readouterr().err


def test_an_interrupted_run_leaves_nothing(package: Path, tmp_path: Path, capsys) -> None:
    outputs = ["--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "plots")]
    endless = ["--prefill", "0", "--tokens", "90", "--repetitions", str(10**9)]
    interrupt = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    try:
        assert main([str(package), "--threads", "1", "--depths", "0", *endless, *outputs]) == 130
    finally:
        interrupt.cancel()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_without_sizes_is_refused(change_package: Callable[..., Path], capsys) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        del manifest["weights"]["dense_decode_bytes"]

    assert main([str(change_package(edit))]) == 1
    assert "weights.dense_decode_bytes is None" in capsys.readouterr().err
