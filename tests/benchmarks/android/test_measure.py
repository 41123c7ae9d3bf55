"""android.measure end to end: the real adb client, a stand-in phone on loopback, and a stand-in for meki_bench."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.android import measure

from ..compiled import compiled_package
from .adb_device import Phone, elf
from .case import LIBRARIES, REMOTE, Case, calls
from .conftest import battery, connect


def test_npu_from_nothing_to_the_table(phone: Phone, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert case.run("--rounds", "2") == 0
    report = case.report()

    # What is on the phone is what was asked for, and no file of the CPU provider.
    there = phone.path(f"{REMOTE}/packages/my small model")
    names = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    target = case.package / "qnn/sm8750"
    assert names == {"manifest.json", "memory.rom", *(f"qnn/sm8750/{path.name}" for path in target.iterdir())}
    assert all((there / name).read_bytes() == (case.package / name).read_bytes() for name in names)
    remote = phone.path(f"{REMOTE}/bin")
    expected = {"meki_bench", "libonnxruntime.so", "libQnnHtpV79Skel.so", *LIBRARIES, "calls"}
    assert {path.name for path in remote.iterdir()} == expected

    # Each variant twice a round, in an order that a drift does not favour, each with the libraries' directory.
    roms = [dict(zip(call[0][2::2], call[0][3::2], strict=True)).get("--rom") for call in calls(phone)]
    turn = [None, "warm", "cold"]
    assert roms == [*turn, *reversed(turn), *reversed(turn), *turn]
    assert all(call[1:] == [str(remote)] * 2 for call in calls(phone))
    assert calls(phone)[0][0][1] == str(there)
    assert report["environment"]["phone"]["chip"] == "SM8750"

    # Ratios from the formula of BENCH: a round's runs of a variant, 3 repetitions of equal length each.
    def joint(rom: str | None, number: int) -> float:
        base = {None: 10.0, "warm": 9.0, "cold": 8.0}[rom]
        indices = [i for i in range(6 * number - 6, 6 * number) if roms[i] == rom]
        speeds = [base * (1 + (i + 1) / 100) + k / 10 for i in indices for k in range(3)]
        return len(speeds) / sum(1 / speed for speed in speeds)

    for result in (result for result in report["compare"] if result["test"] == "decode"):
        ratios = [joint(result["rom"], number) / joint(None, number) for number in (1, 2)]
        assert result["samples"] == pytest.approx(ratios)
        assert result["ratio"] == pytest.approx(sum(ratios) / 2)
        assert result["ci95"] is None  # 2 rounds
    assert [(r["test"], r["memory"], r["rom"], len(r["samples"])) for r in report["results"]] == [
        (test, "dense" if rom is None else "meki", rom, 12) for test in ("decode", "prefill") for rom in turn
    ]
    warm = report["results"][1]
    assert warm["stall_us"] == {"p50": 5.5, "p99": 11.0}  # 0 to 11, of each of 4 runs: rank 47.52 of 48 sorted is 11
    assert (warm["battery_ma"], warm["battery_celsius"], warm["depth"]) == (812.0, 30.5, 479)
    assert len(report["runs"]) == 12
    assert report["failure"] is None
    assert report["environment"]["rom_access"] == "pread"
    assert report["memory"]["MeKi, cold ROM"] == {"resident_bytes": 1012, "peak_resident_bytes": 2012}

    # Everything is on the phone's storage before the first run: a page that is not could not be dropped.
    first = next(i for i, command in enumerate(phone.commands) if "./meki_bench " in command)
    last = max(i for i, command in enumerate(phone.commands[:first]) if command.startswith("sync:"))
    assert any("( sync\n)" in command for command in phone.commands[last:first])

    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| dense", "| MeKi, warm ROM", "| MeKi, cold ROM"]
    assert "decode at 479" in rows[0]
    assert f"| {warm['median']:.1f} ({warm['p10']:.1f} to {warm['p90']:.1f}) |" in rows[2]
    column = rows[0].split(" | ").index("from storage, bytes a token")
    assert [row.split(" | ")[column] for row in rows[1:]] == ["-", "0", "4,096"]
    for label in ("random weights", "synthetic depth", "cold ROM"):
        assert f"- **{label}" in table
    assert "storage reads not seen" not in table
    assert "- provider qnn, float16 weights, float16 KV cache\n" in table  # no cores, no kernels of the CPU


def test_second_time_nothing_is_sent(phone: Phone, case: Case) -> None:
    assert case.run() == 0
    sent = len(phone.received)
    phone.path(f"{REMOTE}/bin/libQnnHtp.so").write_bytes(elf("# another release"))
    assert case.run() == 0
    assert [name for name, _ in phone.received[sent:]] == [f"{REMOTE}/bin/libQnnHtp.so.piece"]
    assert phone.path(f"{REMOTE}/bin/libQnnHtp.so").read_bytes() == (case.qnn / "libQnnHtp.so").read_bytes()


def test_cpu_needs_no_npu(phone: Phone, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    phone.set("getprop", ro__soc__model="Tensor G9")
    assert case.run("--provider", "cpu", "--prefill", "0", "--depth", "100") == 0
    there = phone.path(f"{REMOTE}/packages/my small model")
    manifest = json.loads((case.package / "manifest.json").read_text())
    assert {path.name for path in there.rglob("*") if path.is_file()} == {"manifest.json", *manifest["files"]}
    assert not any("--soc" in call[0] or "--qnn-library" in call[0] for call in calls(phone))
    assert [result["depth"] for result in case.report()["results"]] == [100] * 3
    assert ", 8 threads, neon_i8mm kernels\n" in capsys.readouterr().out


def test_package_without_dense_graphs_or_without_memory(
    phone: Phone, tmp_path: Path, case: Case, make_package: Callable[..., Path]
) -> None:
    case.package = compiled_package(make_package("int8", context=600), tmp_path / "no dense", dense=False)
    assert case.run() == 0
    report = case.report()
    assert {result["memory"] for result in report["results"]} == {"meki"}
    assert report["compare"] == []
    assert any(label.startswith("MeKi alone") for label in report["labels"])
    case.package = compiled_package(make_package("int8", context=600, memory_dim=0), tmp_path / "dense")
    assert case.run() == 0
    assert {result["memory"] for result in case.report()["results"]} == {"dense"}


def test_push_goes_on_after_the_last_piece(
    phone: Phone, case: Case, pieces: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rom = (case.package / "memory.rom").read_bytes()
    before = sum(path.stat().st_size for path in (case.bench, case.onnxruntime, *case.qnn.iterdir()))
    phone.unplug_after = before + 2 * pieces + 1000
    assert case.run() == 1
    error = capsys.readouterr().err
    assert "lost during pushing" in error
    assert "Connect it again" in error
    part = phone.path(f"{REMOTE}/packages/my small model/memory.rom.part")
    assert part.read_bytes() == rom[: 2 * pieces]
    assert not case.json.exists()

    with part.open("ab") as file:
        file.write(b"half a piece")
    phone.plug()
    connect(phone)
    sent = len(phone.received)
    assert case.run() == 0
    again = [size for name, size in phone.received[sent:] if name.endswith("memory.rom.piece")]
    assert again == [min(pieces, len(rom) - start) for start in range(2 * pieces, len(rom), pieces)]
    assert part.with_suffix("").read_bytes() == rom
    assert not part.exists()


def test_part_of_another_file_is_sent_again(phone: Phone, case: Case, pieces: int) -> None:
    part = phone.path(f"{REMOTE}/packages/my small model/memory.rom.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(2 * pieces))
    assert case.run() == 0
    assert part.with_suffix("").read_bytes() == (case.package / "memory.rom").read_bytes()
    assert (
        sum(size for name, size in phone.received if name.endswith("memory.rom.piece"))
        == (case.package / "memory.rom").stat().st_size
    )


def test_another_chip_by_name(phone: Phone, case: Case) -> None:
    case.install(phone)
    phone.set("getprop", ro__soc__model="SM8750P")
    assert case.run("--soc", "sm8750") == 0
    assert "compiled for sm8750, run on SM8750P" in case.report()["labels"]


def test_hot_phone_is_waited_for(
    phone: Phone, case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case.install(phone)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        phone.set("dumpsys", thermalservice=f"Thermal Status: {2 - len(waits)}")

    monkeypatch.setattr(measure, "sleep", sleep)
    phone.set("dumpsys", thermalservice="Thermal Status: 2")
    assert case.run("--cool-down", "5") == 0
    assert waits == [measure.POLL_SECONDS] * 2
    assert "hot (thermal status 2, battery 30.5 C): waiting" in capsys.readouterr().err
    assert not any(label.startswith("hot") for label in case.report()["labels"])

    phone.set("dumpsys", battery=battery(celsius=41.0, level=15, usb=True))
    assert case.run() == 0  # --cool-down 0: goes on, and says so
    assert "still hot (thermal status 0, battery 41.0 C)" in capsys.readouterr().err
    labels = case.report()["labels"]
    for start_ in ("hot: 6 of 6 runs", "plugged in", "battery below 20%"):
        assert any(label.startswith(start_) for label in labels)


@pytest.mark.parametrize("fetched", [0, None])
def test_cold_runs_that_read_nothing_from_storage(phone: Phone, case: Case, fetched: int | None) -> None:
    case.hook(f"if call == 3: report['storage_bytes_per_token'] = {fetched}")
    case.install(phone)
    assert case.run() == 0
    assert any(label.startswith("cold ROM: storage reads not seen in 1 of 2 runs") for label in case.report()["labels"])


def test_phone_that_tells_nothing(phone: Phone, case: Case) -> None:
    case.install(phone)
    phone.set("dumpsys", thermalservice="Can't find service: thermalservice", battery="")
    for path in phone.path("/sys/class/power_supply/battery").iterdir():
        path.unlink()
    assert case.run() == 0
    report = case.report()
    assert {result["battery_ma"] for result in report["results"]} == {None}
    assert {sample["current_ua"] for run in report["runs"] for sample in run["power"]} == {None}
    for label in ("temperature unknown", "battery current unknown"):
        assert any(text.startswith(label) for text in report["labels"])
