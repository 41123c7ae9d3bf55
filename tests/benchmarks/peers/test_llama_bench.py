"""Programs of the name llama-bench: what they are asked, when they stand still, how they fail."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import llama_bench
from benchmarks.peers.llama_bench import (
    IK_SETTINGS,
    LLAMA_SETTINGS,
    Bench,
    FreshBench,
    LlamaBench,
    Setting,
    StandingBench,
    best_setting,
)
from benchmarks.peers.workload import PeerError, Workload

from .case import DECODE, PREFILL, script

SETTING = Setting(False, "q8_0", "f16")


def record(workload: Workload = DECODE, **changes: Any) -> str:
    """A line of llama.cpp's `llama-bench -o jsonl`, with the fields that are read."""
    prompt, generated = (workload.tokens, 0) if workload.kind == "prefill" else (0, workload.tokens)
    fields = {"n_prompt": prompt, "n_gen": generated, "n_depth": workload.depth, "samples_ns": [1000]}
    return json.dumps(
        fields | {"samples_ts": [7.5], "build_commit": "abc", "build_number": 1, "cpu_info": "CPU"} | changes
    )


def test_best_setting_is_the_best_median_of_a_short_run() -> None:
    reached = {"f16": [9.0, 10.0, 11.0], "q8_0": [1.0, 12.0, 12.5], "q4_0": [8.0, 9.0, 99.0]}
    seen = []

    def measure(workload: Workload, setting: Setting) -> list[float]:
        seen.append(workload)
        return reached[setting.key_type]

    settings = [Setting(False, key_type, "f16") for key_type in reached]
    best, tried = best_setting(measure, Workload("decode", 640, 1000), settings)
    assert best.key_type == "q8_0"
    assert tried == {str(setting): reached[setting.key_type] for setting in settings}
    assert set(seen) == {Workload("decode", 640, llama_bench.PROBE_DECODE)}
    best_setting(measure, Workload("prefill", 0, 3), settings)
    assert seen[-1] == Workload("prefill", 0, 3)


def test_a_setting_that_fails_is_not_the_best() -> None:
    settings = [Setting(True, key_type, "f16") for key_type in ("q4_0", "q8_0")]

    def measure(workload: Workload, setting: Setting) -> list[float]:
        if setting.key_type == "q4_0":
            raise PeerError("no such kernel")
        return [3.0]

    best, tried = best_setting(measure, DECODE, settings)
    assert best == settings[1]
    assert tried == {str(settings[0]): [], str(settings[1]): [3.0]}
    with pytest.raises(PeerError, match="no such kernel"):
        best_setting(measure, DECODE, settings[:1])


def bench(binary: str, workload: Workload = DECODE, measurements: int = 1) -> StandingBench:
    return StandingBench(binary, Path("model.gguf"), workload, SETTING, 2, measurements, 1)


def fresh(binary: str, workload: Workload = DECODE, setting: Setting = SETTING) -> FreshBench:
    return FreshBench(binary, Path("model.gguf"), workload, setting, 2, 5, 1)


def test_options() -> None:
    start = "llama-bench -m model.gguf -t 2"
    with bench("llama-bench", measurements=3) as decode, bench("llama-bench", PREFILL, 2) as prefill:
        common = "-d {} -r 1 -fa 0 -ctk q8_0 -ctv f16 -o jsonl --delay 1"
        assert " ".join(decode.command) == f"{start} -p 0 -n 16,16,16 {common.format(64)}"
        assert " ".join(prefill.command) == f"{start} -p 128,128 -n 0 {common.format(0)}"
    # ik_llama.cpp has no -d, and its -p and -n are tests of their own.
    common = "-r 1 -fa 0 -ctk q8_0 -ctv f16 -o json"
    for workload, lengths in (
        (PREFILL, "-p 128 -n 0"),
        (replace(DECODE, depth=0), "-p 0 -n 16"),
        (DECODE, "-p 0 -n 0 -gp 64,16"),
    ):
        assert " ".join(fresh("llama-bench", workload).command) == f"{start} {lengths} {common}"
    merged = Setting(True, "q8_KV", "q8_0", repack=True, merge=True)
    assert " ".join(fresh("llama-bench", setting=merged).command).endswith(
        "-fa 1 -ctk q8_KV -ctv q8_0 -rtr 1 -mqkv 1 -o json"
    )
    assert str(merged) == "flash attention on, K q8_KV, V q8_0, repacked, QKV merged"
    assert set(LLAMA_SETTINGS) < set(IK_SETTINGS)
    # Neither quantises V without flash attention.
    assert all(setting.flash_attention or setting.value_type == "f16" for setting in IK_SETTINGS)
    assert len({str(setting) for setting in IK_SETTINGS}) == len(IK_SETTINGS)


def state(pid: int) -> str:
    """Linux's letter for a process: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_llama_bench_stands_still_between_measurements(tmp_path: Path) -> None:
    # A wrapper script whose child measures: the child must be stopped too.
    lines = [record(samples_ts=[speed]) for speed in (1.5, 2.5, 3.5)]
    body = f"import os, time\nprint(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w'), flush=True)\n"
    body += f"for line in {lines!r}:\n    print(line, flush=True)\n    time.sleep(1)"
    worker = script(tmp_path / "worker", body, sys.executable)
    binary = script(tmp_path / "llama-bench", f"{worker} & wait $!")
    with bench(binary, measurements=3) as measured:
        for speed in (1.5, 2.5):
            assert measured.measure()["samples_ts"] == [speed]
            assert measured.process is not None
            for pid in (measured.process.pid, int((tmp_path / "pid").read_text())):
                for _ in range(1000):  # the signal is on its way
                    if state(pid) == "T":
                        break
                    time.sleep(0.01)
                assert state(pid) == "T"
        assert measured.measure()["samples_ts"] == [3.5]
        assert measured.process.returncode == 0


def test_closing_ends_a_stopped_llama_bench(tmp_path: Path) -> None:
    binary = script(tmp_path / "llama-bench", f"echo '{record()}'; sleep 1000")
    with bench(binary, measurements=2) as measured:
        measured.measure()
    assert measured.process is not None
    assert measured.process.returncode == -9


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo reason >&2; exit 7", "ended with exit status 7; the last of its stderr:\n  reason"),
        ("kill -SEGV $$", "was ended by signal 11; the last of its stderr:\n  (nothing)"),
        (f"echo '{record()}'; echo late >&2; exit 1", "ended with exit status 1; the last of its stderr:\n  late"),
        ("true", "got '', expected a record of llama-bench in JSON"),
        ("echo '| model | t/s |'", "got '| model | t/s |\\n', expected"),
        ("echo '[1]'", "got '[1]\\n', expected"),
        ("echo '{}'", "got '{}\\n', expected"),
        (f"echo '{record(samples_ts=[-1])}'", "got -1, expected tokens/s"),
        (f"echo '{record(samples_ts=[])}'", "expected decode 16 at depth 64"),
        (f"echo '{record(n_depth=0)}'", "measured {'n_prompt': 0, 'n_gen': 16, 'n_depth': 0}, expected decode 16"),
        (f"echo '{record(samples_ns=[10**13])}'", "was stopped within a measurement"),
    ],
)
def test_llama_bench_that_fails(tmp_path: Path, body: str, message: str) -> None:
    binary = script(tmp_path / "llama-bench", body)
    with bench(binary) as measured, pytest.raises(PeerError) as caught:
        measured.measure()
    assert str(caught.value).startswith(binary) and message in str(caught.value)


def test_llama_bench_that_fails_later(tmp_path: Path) -> None:
    binary = script(tmp_path / "llama-bench", f"echo '{record()}'; sleep 1; echo out of memory >&2; exit 1")
    with bench(binary, measurements=2) as measured:
        assert measured.measure()["samples_ts"] == [7.5]
        with pytest.raises(PeerError, match=r"exit status 1; the last of its stderr:\n  out of memory"):
            measured.measure()


# ik_llama.cpp's

FRESH = """[
loaded
  {
    "n_prompt": 64,
    "n_gen": 16, "build_commit": "abc", "build_number": 1,
    "samples_ns": [ 1000 ],
    "samples_ts": [ 7.5 ]
  }
]
"""


def test_every_measurement_is_a_process(tmp_path: Path) -> None:
    (tmp_path / "out").write_text(FRESH)
    log = tmp_path / "log"
    binary = script(tmp_path / "llama-bench", f"echo run >> {log}; cat {tmp_path / 'out'}")
    with fresh(binary) as measured:
        for _ in range(2):
            assert measured.measure()["samples_ts"] == [7.5]
    assert log.read_text() == "run\nrun\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo reason >&2; exit 7", "ended with exit status 7; the last of its stderr:\n  reason"),
        ("echo '| model | t/s |'", "got '| model | t/s |\\n', expected a record of llama-bench in JSON"),
        ("printf '[\n  {\n  }\n]\n'", "got '  {\\n  }', expected a record"),
        (
            f"echo '{FRESH.replace('64', '63')}'",
            "measured {'n_prompt': 63, 'n_gen': 16}, expected decode 16 at depth 64",
        ),
    ],
)
def test_a_process_that_fails(tmp_path: Path, body: str, message: str) -> None:
    binary = script(tmp_path / "llama-bench", body)
    with fresh(binary) as measured, pytest.raises(PeerError) as caught:
        measured.measure()
    assert str(caught.value).startswith(binary) and message in str(caught.value)


# The engine


@pytest.mark.parametrize(("bench", "repetitions"), [(StandingBench, ["3", "3"]), (FreshBench, ["3", "1"])])
def test_a_setting_is_tried_as_often_as_is_cheap(
    tmp_path: Path, bench: type[Bench], repetitions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What fills its depth for every repetition is asked for one.
    asked = []

    def measure(self: Bench) -> dict[str, Any]:
        asked.append(self.command[self.command.index("-r") + 1])
        speed = 2.0 if "q8_0" in self.command else 1.0
        return {"samples_ts": [speed], "build_commit": "abc", "build_number": 42}

    monkeypatch.setattr(bench, "measure", measure)
    binary = script(tmp_path / "llama-bench", "")
    tried = [Setting(False, "f16", "f16"), SETTING]
    engine = LlamaBench("engine", bench, tried, binary, Path("model.gguf"), [PREFILL, DECODE], 2, 5)
    engine.prepare()
    assert asked == [repetitions[0]] * 2 + [repetitions[1]] * 2
    assert engine.round() == [2.0, 2.0]
    assert engine.settings() == [str(SETTING)] * 2
    assert engine.describe() == "abc (42), random Q4_0 weights"
    assert engine.figures()["settings_tried"] == [{str(tried[0]): [1.0], str(SETTING): [2.0]}] * 2
    engine.close()
