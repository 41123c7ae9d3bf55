"""What android.measure is made of: files, libraries, order of runs, figures. No phone."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.android.bench import REPETITIONS, Run, Variant, order, parse_power
from benchmarks.android.device import AndroidError, Phone, State
from benchmarks.android.files import Target, check_elf, package_items, qnn_libraries
from benchmarks.android.measure import find_variants, main
from benchmarks.android.report import make_report, to_markdown
from meki.cli.output import SIMULATED

from .adb_device import elf

DENSE, WARM, COLD = Variant("dense", None), Variant("meki", "warm"), Variant("meki", "cold")
COOL = State(0, 80, 30.0, False)
LIBRARIES = ["libonnxruntime_providers_qnn.so", "libQnnHtp.so", "libQnnSystem.so", "libQnnHtpV79Stub.so"]


# Files


@pytest.mark.parametrize(
    ("address", "rows"),
    [
        ({"kind": "token"}, {"memory.rom"}),
        ({"kind": "ngram_hash", "canonical": None}, {"memory.rom"}),
        ({"kind": "ngram_hash", "canonical": {"file": "canonical_ids.bin"}}, {"memory.rom", "canonical_ids.bin"}),
    ],
)
def test_a_compiled_package_goes_with_what_its_rows_need(
    tmp_path: Path, address: dict[str, Any], rows: set[str]
) -> None:
    (tmp_path / "manifest.json").write_text("{}", "utf-8")
    files = {name: {"bytes": 4, "sha256": ""} for name in ("memory.rom", "canonical_ids.bin", "stage0.onnx")}
    manifest = {"memory": {"address": address, "file": "memory.rom"}, "files": files}
    target = Target("sm8750", {"files": {"head.onnx": {"bytes": 4, "sha256": ""}}})
    sent = {item.remote for item in package_items(tmp_path, manifest, target, "there")}
    assert sent == {f"there/{name}" for name in (*rows, "manifest.json", "qnn/sm8750/head.onnx")}


def test_what_is_measured_is_named_after_the_memory() -> None:
    engram = [Variant("engram", "warm"), Variant("engram", "cold")]
    assert find_variants({"memory": {"kind": "engram"}}, None) == [DENSE, *engram]
    assert find_variants({"memory": {"kind": "engram"}}, Target("sm8750", {"dense_decode": None})) == engram
    assert find_variants({"memory": None}, None) == [DENSE]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an ELF file, expected one for aarch64"),
        (b"\x7fELF", "not an ELF file"),
        (b"#!/bin/sh\n" * 20, "not an ELF file"),
        (elf(machine=62), "built for x86-64, expected aarch64: build it with `cmake --preset android-arm64`"),
        (elf(machine=40), "built for 32-bit ARM"),
        (elf(machine=999), "built for machine 999"),
        (elf("libc.so.6\0GLIBC_2.17\0"), "built for Linux with glibc, expected Android"),
    ],
)
def test_program_that_the_phone_cannot_load(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "meki_bench"
    path.write_bytes(data)
    with pytest.raises(AndroidError, match=re.escape(message)):
        check_elf(path)


def test_program_for_android(tmp_path: Path) -> None:
    path = tmp_path / "meki_bench"
    path.write_bytes(elf("libc.so\0LIBC\0"))
    check_elf(path)


def test_qnn_libraries(tmp_path: Path) -> None:
    for name in LIBRARIES:
        (tmp_path / name).write_bytes(elf())
    with pytest.raises(AndroidError, match=r"lacks libQnnHtpV79Skel.so\. .*qnn-runtime.*lib/hexagon-v79/unsigned"):
        qnn_libraries(tmp_path, 79)
    skel = tmp_path / "libQnnHtpV79Skel.so"
    skel.write_bytes(elf())
    with pytest.raises(AndroidError, match=r"Skel\.so: built for aarch64, expected Hexagon"):
        qnn_libraries(tmp_path, 79)
    skel.write_bytes(elf(machine=164))
    for other in ("libQnnHtpPrepare.so", "libQnnGpu.so", "libQnnHtpV75Stub.so"):
        (tmp_path / other).write_bytes(elf())
    expected = {*LIBRARIES, "libQnnHtpV79Skel.so", "libQnnHtpPrepare.so"}
    assert {path.name for path in qnn_libraries(tmp_path, 79)} == expected
    with pytest.raises(AndroidError, match=r"lacks libQnnHtpV75Skel.so\."):
        qnn_libraries(tmp_path, 75)


# Order


def test_a_linear_drift_favours_no_variant() -> None:
    variants = [DENSE, WARM, COLD]
    for number in (1, 2):
        turn = order(variants, number)
        means = {variant: sum(i for i, v in enumerate(turn) if v == variant) / turn.count(variant) for variant in turn}
        assert set(means.values()) == {2.5}
        assert len(turn) == 6
    assert order(variants, 1) != order(variants, 2)


# Figures


def test_power_lines() -> None:
    text = "-812000 4100000 305\n- - -\n790000 4090000 -\n8120"  # the last one was not finished
    assert parse_power(text) == [
        {"current_ua": -812_000, "voltage_uv": 4_100_000, "temperature_tenths": 305},
        {"current_ua": None, "voltage_uv": None, "temperature_tenths": None},
        {"current_ua": 790_000, "voltage_uv": 4_090_000, "temperature_tenths": None},
    ]


def run(variant: Variant, number: int, speed: float, **changes: Any) -> Run:
    report: dict[str, Any] = {
        "model": "m", "random_weights": False, "provider": "qnn", "simulated": False, "shared_memory": True,
        "soc": "sm8750",
        "precision": "float16", "kv_type": "float16", "threads": None, "simd": None, "onnxruntime": "1", "version": "0",
        "load_s": 1.5, "depth": 64, "tokens": 4, "prefill_tokens": 512, "synthetic_depth": False,
        "decode_tokens_per_s": [speed] * REPETITIONS,
        "prefill_tokens_per_s": [100 * speed] * REPETITIONS, "stall_us": [5.0] if variant.rom else [],
    }  # fmt: skip
    power = [dict.fromkeys(("current_ua", "voltage_uv", "temperature_tenths"), value) for value in (9, 9, -2000, 4000)]
    return Run(variant, number, COOL, COOL, [dict(sample) for sample in power], report | changes)


def make(runs: list[Run], failure: str | None = None) -> dict[str, Any]:
    return make_report(
        runs,
        [DENSE, WARM, COLD],
        phone=Phone("SM8750", "Stand-in", "arm64-v8a", 35, "15"),
        environment={"started": "now"},
        protocol={"rounds": 6},
        notes=[],
        failure=failure,
    )


def test_ratio_and_its_interval() -> None:
    ratios = [0.9, 0.8, 0.95, 0.85, 0.7, 0.99]
    runs = []
    for number, ratio in enumerate(ratios, 1):
        # Dense at 10 and 30 tokens/s: the same tokens take 1/10 + 1/30 s, together 15 tokens/s.
        runs += [run(DENSE, number, 10.0), run(WARM, number, 15.0 * ratio)]
        runs += [run(WARM, number, 15.0 * ratio), run(DENSE, number, 30.0)]
    runs += [run(DENSE, 7, 10.0), run(WARM, 7, 1.0)]  # an unfinished round does not count
    report = make(runs, "unplugged")
    compared = {entry["test"]: entry for entry in report["compare"]}
    assert compared.keys() == {"decode", "prefill"}
    for entry in compared.values():
        assert entry["rom"] == "warm"
        assert entry["samples"] == pytest.approx(ratios)
        assert entry["ratio"] == pytest.approx((0.85 + 0.9) / 2)
        # 6 samples lie all below or all above the median with probability 2 / 2^6 = 3.1%: the extremes enclose it.
        assert entry["ci95"] == pytest.approx([0.7, 0.99])
    assert report["labels"] == ["not complete: unplugged"]
    row = next(line for line in to_markdown(report).splitlines() if line.startswith("| MeKi, warm ROM"))
    assert "| 0.875 (0.700 to 0.990) |" in row


def test_current_is_that_after_loading() -> None:
    (result, _) = make([run(DENSE, 1, 10.0)])["results"]
    assert result["battery_ma"] == 3.0  # 2 and 4 mA; the first two samples are of the 1.5 s of loading
    assert math.isclose(result["median"], 10.0)


def test_simulated_figures_say_so() -> None:
    assert SIMULATED in make([run(DENSE, 1, 10.0, simulated=True)])["labels"]


# Usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--provider qnn needs --qnn DIR"),
        (["--provider", "cpu", "--soc", "sm8750"], "--qnn and --soc belong to --provider qnn"),
        (["--qnn", "q", "--rounds", "0"], "expected an integer of at least 1, got '0'"),
        (["--qnn", "q", "--cool-down", "nan"], "expected minutes from 0 to 1440, got 'nan'"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["package", "--bench", "b", "--onnxruntime", "o", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("--bench", "no such file; docs/android.md, step 1"),
        ("--onnxruntime", "no such file; docs/android.md, step 2"),
        ("--qnn", "no such directory; docs/android.md, step 2"),
    ],
)
def test_files_that_are_not_there(
    tmp_path: Path, missing: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    there.write_bytes(elf())
    paths = {"--bench": there, "--onnxruntime": there, "--qnn": tmp_path} | {missing: tmp_path / "missing"}
    assert main(["package", *(str(part) for option in paths.items() for part in option)]) == 2
    assert f"android: error: {missing} {tmp_path / 'missing'}: {message}" in capsys.readouterr().err
