"""The comparison with other engines: its figures, engines that fail. Scripts stand in for engines."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import compare, engines
from benchmarks.peers.engines import Genai, LlamaBench, Meki, PeerError, Setting, Workload, best_setting
from meki.models.architectures.llama import LlamaConfig

SMALL = LlamaConfig.from_settings(
    dict(vocab_size=96, layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=32, memory_dim=16, context=256)
)
PREFILL, DECODE = Workload("prefill", 0, 128), Workload("decode", 64, 16)
SETTING = Setting(False, "q8_0", "f16")


def script(path: Path, body: str, interpreter: str = "/bin/sh") -> str:
    path.write_text(f"#!{interpreter}\n{body}\n")
    path.chmod(0o755)
    return str(path)


def record(workload: Workload = DECODE, **changes: Any) -> str:
    """A line of `llama-bench -o jsonl`, with the fields that are read."""
    prompt, generated = (workload.tokens, 0) if workload.kind == "prefill" else (0, workload.tokens)
    fields = {"n_prompt": prompt, "n_gen": generated, "n_depth": workload.depth, "samples_ns": [1000]}
    return json.dumps(
        fields | {"samples_ts": [7.5], "build_commit": "abc", "build_number": 1, "cpu_info": "CPU"} | changes
    )


@pytest.fixture
def package(make_package: Callable[..., Path]) -> Path:
    return make_package("int4", context=256)


# Figures


def test_ratios_are_taken_round_by_round() -> None:
    assert compare.ratios([10.0, 30.0], [5.0, 10.0]) == [2.0, 3.0]
    with pytest.raises(ValueError):
        compare.ratios([1.0], [1.0, 2.0])


def test_spread_interpolates_between_values() -> None:
    # Of five sorted values, p10 lies at position 0.4 and p90 at 3.6.
    assert compare.spread([50.0, 10.0, 30.0, 20.0, 40.0]) == "30.0 (14.0 to 46.0)"
    assert compare.spread([1234.4]) == "1,234 (1,234 to 1,234)"
    assert compare.spread([0.25, 0.25]) == "0.25 (0.25 to 0.25)"


def test_table() -> None:
    text = compare.table(
        [PREFILL, DECODE],
        {"meki": [[200.0, 300.0], [20.0, 20.0]], "llama.cpp": [[100.0, 100.0], [10.0, 5.0]]},
        {"meki": "ours", "llama.cpp": "theirs"},
        [SETTING, Setting(True, "f16", "f16")],
    )
    # The median of ratios 2 and 3 is 2.5, p10 2.1, p90 2.9; of 2 and 4: 3, 2.2, 3.8; of 10 and 5: 7.5, 5.5, 9.5.
    assert text.splitlines() == [
        "| test | ours | theirs | ratio | best setting of llama.cpp |",
        "| --- | --- | --- | --- | --- |",
        "| prefill 128 at depth 0 | 250 (210 to 290) | 100 (100 to 100) | 2.50 (2.10 to 2.90) "
        "| flash attention off, K q8_0, V f16 |",
        "| decode 16 at depth 64 | 20.0 (20.0 to 20.0) | 7.50 (5.50 to 9.50) | 3.00 (2.20 to 3.80) "
        "| flash attention on, K f16, V f16 |",
    ]


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
    assert set(seen) == {Workload("decode", 640, engines.PROBE_DECODE)}
    best_setting(measure, Workload("prefill", 0, 3), settings)
    assert seen[-1] == Workload("prefill", 0, 3)


# Ours

ECHO = """import json, sys
depths = [int(depth) for depth in sys.argv[sys.argv.index("--depths") + 1].split(",")]
results = [{"test": "decode", "depth": depth, "samples": [1.0 + depth]} for depth in reversed(depths)]
results.append({"test": "prefill", "depth": 0, "samples": [100.0]})
with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
    json.dump({"results": results, "arguments": sys.argv[1:]}, file)"""


def test_meki_bench_is_run_as_documented(tmp_path: Path) -> None:
    binary = script(tmp_path / "meki-bench", ECHO, sys.executable)
    workloads = [PREFILL, Workload("decode", 0, 16), DECODE]
    meki = Meki(binary, tmp_path / "package", workloads, 2, "int8")
    assert meki.round() == [100.0, 1.0, 65.0]
    assert meki.round() == [100.0, 1.0, 65.0]
    expected = f"{tmp_path / 'package'} --depths 0,64 --synthetic-depth --prefill 128 --tokens 16 --repetitions 1"
    assert [report["arguments"][:-2] for report in meki.reports] == [
        [*expected.split(), "--threads", "2", "--kv-type", "int8"]
    ] * 2


@pytest.mark.parametrize(
    "report",
    [
        "",
        "[]",
        '{"results": []}',
        '{"results": [{"test": "decode", "depth": 64, "samples": []}]}',
        '{"results": [{"test": "decode", "depth": 64, "samples": [1, 2]}]}',
        '{"results": [{"test": "decode", "depth": 64, "samples": [NaN]}]}',
        '{"results": [{"test": "decode", "depth": 64, "samples": [0]}]}',
        '{"results": [{"test": "decode", "depth": 64, "samples": ["1"]}]}',
    ],
)
def test_meki_bench_without_figures_is_an_error(tmp_path: Path, report: str) -> None:
    binary = script(tmp_path / "meki-bench", f"for last; do :; done; printf '%s' '{report}' > \"$last\"")
    meki = Meki(binary, tmp_path, [PREFILL, DECODE], 1, "int8")
    meki.workloads = [DECODE]
    with pytest.raises(PeerError, match=r"meki-bench: (its --json file lacks|got)"):
        meki.round()


def test_meki_bench_that_fails_is_quoted(tmp_path: Path) -> None:
    binary = script(tmp_path / "meki-bench", "echo first >&2; for i in 1 2 3 4 5 6 7 8; do echo l$i >&2; done; exit 3")
    with pytest.raises(PeerError) as caught:
        Meki(binary, tmp_path, [PREFILL, DECODE], 1, "int8").round()
    assert str(caught.value).startswith(f"{binary} ended with exit status 3; the last of its stderr:\n  l1\n")
    assert "first" not in str(caught.value)


# llama-bench


def bench(binary: str, workload: Workload = DECODE, measurements: int = 1) -> LlamaBench:
    return LlamaBench(binary, Path("model.gguf"), workload, SETTING, 2, measurements, 1)


def test_llama_bench_options() -> None:
    with bench("llama-bench", measurements=3) as decode, bench("llama-bench", PREFILL, 2) as prefill:
        common = "-d {} -r 1 -fa 0 -ctk q8_0 -ctv f16 -o jsonl --delay 1"
        start = "llama-bench -m model.gguf -t 2"
        assert " ".join(decode.command) == f"{start} -p 0 -n 16,16,16 {common.format(64)}"
        assert " ".join(prefill.command) == f"{start} -p 128,128 -n 0 {common.format(0)}"


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
        ("true", "got '', expected a line of llama-bench -o jsonl"),
        ("echo '| model | t/s |'", "got '| model | t/s |\\n', expected"),
        ("echo '[1]'", "got '[1]\\n', expected"),
        ("echo '{}'", "got '{}\\n', expected"),
        (f"echo '{record(samples_ts=[-1])}'", "got -1, expected tokens/s"),
        (f"echo '{record(samples_ts=[])}'", "expected decode 16 at depth 64"),
        (f"echo '{record(n_depth=0)}'", "measured (0, 16, 0) (prompt, generated, depth), expected decode 16"),
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


# onnxruntime-genai


class FakeGenerator:
    """Counts tokens as onnxruntime-genai does: logits of the last token are there after append_tokens, and
    generate_next_token computes those of the token before it only if they are not."""

    def __init__(self, calls: list[tuple[str, int]], max_length: int) -> None:
        self.calls, self.max_length, self.sequence, self.computed = calls, max_length, 0, 0

    def append_tokens(self, tokens: np.ndarray) -> None:
        assert tokens.dtype == np.int32 and tokens.min() >= 0 and tokens.max() < SMALL.vocab_size
        self.sequence += len(tokens)
        assert self.sequence < self.max_length
        self.calls.append(("append", len(tokens)))
        self.computed = self.sequence

    def rewind_to(self, length: int) -> None:
        self.sequence = self.computed = length

    def generate_next_token(self) -> None:
        if self.computed < self.sequence:
            self.calls.append(("step at", self.computed))
            self.computed = self.sequence
        self.sequence += 1
        assert self.sequence <= self.max_length


@pytest.fixture
def fake_genai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A fake of the package, a model folder of SMALL's shapes in tmp_path, and the list of the fake's calls."""
    calls: list[tuple[str, int]] = []
    module = ModuleType("onnxruntime_genai")
    module.Config = lambda path: SimpleNamespace(overlay=json.loads)  # type: ignore[attr-defined]
    module.Model = lambda config: None  # type: ignore[attr-defined]

    class Parameters(SimpleNamespace):
        def set_search_options(self, max_length: int, min_length: int, do_sample: bool) -> None:
            assert min_length == max_length and not do_sample
            self.max_length = max_length

    module.GeneratorParams = lambda model: Parameters()  # type: ignore[attr-defined]
    module.Generator = lambda model, parameters: FakeGenerator(calls, parameters.max_length)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", module)
    decoder = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = {"vocab_size": 96, "decoder": {**decoder, "head_size": 32}}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": model}))
    return calls


def test_genai_decodes_at_its_depth_and_fills_it_once(tmp_path: Path, fake_genai: list[tuple[str, int]]) -> None:
    genai = Genai(tmp_path, SMALL, 2)
    workload = Workload("decode", 1100, 3)
    steps = [("append", 1), ("step at", 1100), ("step at", 1101), ("step at", 1102)]
    assert genai.measure(workload) > 0
    assert fake_genai == [("append", 512), ("append", 512), ("append", 76), *steps]
    fake_genai.clear()
    assert genai.measure(workload) > 0
    assert fake_genai == steps


def test_genai_prefill(tmp_path: Path, fake_genai: list[tuple[str, int]]) -> None:
    assert Genai(tmp_path, SMALL, 2).measure(Workload("prefill", 0, 700)) > 0
    assert fake_genai == [("append", 700), ("append", 700)]  # a warm-up, and what is measured


def test_genai_of_other_shapes_or_without_a_model(tmp_path: Path, fake_genai: list[tuple[str, int]]) -> None:
    with pytest.raises(PeerError, match=r"are \[96, 2, 64, 4, 2, 32\], expected the package's \[96, 3, 64, 4, 2, 32\]"):
        Genai(tmp_path, replace(SMALL, layers=3), 2)
    with pytest.raises(PeerError, match="not a model of onnxruntime-genai"):
        Genai(tmp_path / "nowhere", SMALL, 2)


def test_genai_errors_are_named(tmp_path: Path, fake_genai: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("eos_token_id out of range")

    genai = Genai(tmp_path, SMALL, 2)
    monkeypatch.setattr(sys.modules["onnxruntime_genai"], "Generator", broken)
    with pytest.raises(PeerError, match="onnxruntime-genai: eos_token_id out of range"):
        genai.measure(DECODE)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(PeerError, match=r"not installed.*pip install onnxruntime-genai"):
        Genai(tmp_path, SMALL, 2)


# The whole command

LLAMA_STAND_IN = """import json, sys, time
option = dict(zip(sys.argv[1::2], sys.argv[2::2]))
speed = 10.0 * (1 + int(option["-fa"])) + ("q8_0" in option["-ctk"]) - ("q8_0" in option["-ctv"])
prompts, generated = (option[name].split(",") for name in ("-p", "-n"))
for _ in range(max(len(prompts), len(generated))):
    print(json.dumps({"n_prompt": int(prompts[0]), "n_gen": int(generated[0]),
        "n_depth": int(option["-d"]), "samples_ns": [1] * int(option["-r"]), "samples_ts": [speed] * int(option["-r"]),
        "build_commit": "abc", "build_number": 42, "cpu_info": "some CPU"}), flush=True)
    time.sleep(0.2)"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found = {
        "llama": script(tmp_path / "llama-bench", LLAMA_STAND_IN, sys.executable),
        "meki-bench": script(tmp_path / "meki-bench", ECHO, sys.executable),
    }
    monkeypatch.setattr(compare, "find_binary", lambda name, remedy: found[name])
    return found


def test_comparison(
    package: Path, tmp_path: Path, stand_ins: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--llama-bench llama --depths 0,64 --prefill 128 --tokens 16 --repetitions 2 --threads 1"
    out = tmp_path / "figures.json"
    arguments = [str(package), *options.split(), "--json", str(out), "--workdir", str(tmp_path / "work")]
    assert compare.main(arguments) == 0
    text = capsys.readouterr().out
    best = "flash attention on, K q8_0, V f16"
    assert "llama.cpp: random weights of these shapes" in text and "Our KV cache has a synthetic depth" in text
    assert (
        f"| decode 16 at depth 64 | 65.0 (65.0 to 65.0) | 21.0 (21.0 to 21.0) | 3.10 (3.10 to 3.10) | {best} |" in text
    )
    assert "| meki" in text and "int4 weights, int8 KV | llama.cpp abc (42), Q4_0 weights |" in text

    figures = json.loads(out.read_text())
    assert [(test["kind"], test["depth"]) for test in figures["tests"]] == [
        ("prefill", 0),
        ("decode", 0),
        ("decode", 64),
    ]
    assert figures["tests"][2]["samples"] == {"meki": [65.0, 65.0], "llama.cpp": [21.0, 21.0]}
    assert figures["tests"][2]["ratios"] == {"llama.cpp": [65 / 21, 65 / 21]}
    assert {test["llama_setting"] for test in figures["tests"]} == {best}
    assert len(figures["tests"][0]["llama_settings_tried"]) == 5
    assert len(figures["meki_bench"]) == 2
    assert [file.suffix for file in (tmp_path / "work").iterdir()] == [".gguf"]


def test_failures_are_one_error_and_exit_status_1(
    package: Path, tmp_path: Path, stand_ins: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    arguments = [str(package), "--llama-bench", "llama", "--depths", "0", "--prefill", "8", "--json", str(out)]
    script(Path(stand_ins["llama"]), "echo cannot load >&2; exit 1")
    assert compare.main([*arguments, "--workdir", str(tmp_path / "work")]) == 1
    error = capsys.readouterr().err
    assert f"peers: error: {stand_ins['llama']} ended with exit status 1" in error and "cannot load" in error
    assert not out.exists()


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"\xff", b'{"architecture": {}}', b'{"architecture": 1}'])
def test_what_is_no_package_is_named(tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    assert compare.main([str(tmp_path), "--llama-bench", "llama"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"peers: error: {tmp_path}")


def test_missing_binaries_are_named(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "llama-bench"
    plain.write_text("not executable")
    assert compare.main([str(package), "--llama-bench", str(plain), "--depths", "0", "--prefill", "8"]) == 1
    assert f"{plain}: no such executable; build it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--depths 0,0", "expected different numbers of tokens"),
        ("--depths 0,-1", "expected different numbers of tokens"),
        ("--depths", "expected one argument"),
        ("--repetitions 0", "expected an integer of at least 1, got '0'"),
        ("--threads x", "expected an integer of at least 1, got 'x'"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        compare.main(["package", "--llama-bench", "llama", *options.split()])
    assert caught.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--depths 250 --prefill 8", "283 tokens, but .* has a context of 256"),
        ("--depths 0 --prefill 257", "257 tokens, but .* has a context of 256"),
        ("--json nowhere/figures.json", "nowhere is not a directory"),
    ],
)
def test_what_does_not_fit(package: Path, capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
    assert compare.main([str(package), "--llama-bench", "llama", *options.split()]) == 2
    assert re.search(f"^peers: error: .*{message}", capsys.readouterr().err)
