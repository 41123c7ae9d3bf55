"""The comparison with other engines: its figures, ours, and the whole command. Scripts stand in for engines."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.peers import compare, ours
from benchmarks.peers.ours import Meki
from benchmarks.peers.workload import PeerError, Workload
from meki.package import read_manifest

from .case import DECODE, PREFILL, script


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
        {"meki": [[200.0, 300.0], [20.0, 20.0]], "same": [[100.0, 100.0], [5.0, 5.0]]},
        {"llama.cpp": [[100.0, 100.0], [10.0, 5.0]], "other": [[50.0, 50.0], [20.0, 20.0]]},
        {"llama.cpp": ["one", "two"], "other": ["", ""]},
    )
    # The median of ratios 2 and 3 is 2.5, p10 2.1, p90 2.9; of 2 and 4: 3, 2.2, 3.8; of 10 and 5: 7.5, 5.5, 9.5; of 0.5
    # and 1: 0.75, 0.55, 0.95; of 4 and 6: 5, 4.2, 5.8.
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()] == [
        [
            *("test", "peer", "its best setting", "peer, tokens/s"),
            *("meki, tokens/s", "meki / peer", "same, tokens/s", "same / peer", "best peer"),
        ],
        ["---"] * 3 + ["---:"] * 6,
        [
            *("prefill 128 at depth 0", "llama.cpp", "one", "100 (100 to 100)"),
            *("250 (210 to 290)", "2.50 (2.10 to 2.90)", "100 (100 to 100)", "1.00 (1.00 to 1.00)", "llama.cpp"),
        ],
        [
            *("prefill 128 at depth 0", "other", "as it comes", "50.0 (50.0 to 50.0)"),
            *("250 (210 to 290)", "5.00 (4.20 to 5.80)", "100 (100 to 100)", "2.00 (2.00 to 2.00)", "llama.cpp"),
        ],
        [
            *("decode 16 at depth 64", "llama.cpp", "two", "7.50 (5.50 to 9.50)"),
            *("20.0 (20.0 to 20.0)", "3.00 (2.20 to 3.80)", "5.00 (5.00 to 5.00)", "0.75 (0.55 to 0.95)", "other"),
        ],
        [
            *("decode 16 at depth 64", "other", "as it comes", "20.0 (20.0 to 20.0)"),
            *("20.0 (20.0 to 20.0)", "1.00 (1.00 to 1.00)", "5.00 (5.00 to 5.00)", "0.25 (0.25 to 0.25)", "other"),
        ],
    ]


# Ours


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """installed(name, body, interpreter): a script that stands in for the command `name`; its path."""
    found: dict[str, str] = {}
    monkeypatch.setattr(ours, "find_binary", lambda name, remedy: found[name])

    def install(name: str, body: str, interpreter: str = "/bin/sh") -> str:
        found[name] = script(tmp_path / name, body, interpreter)
        return found[name]

    return install


ECHO = """import json, sys
depths = [int(depth) for depth in sys.argv[sys.argv.index("--depths") + 1].split(",")]
results = [{"test": "decode", "depth": depth, "samples": [1.0 + depth]} for depth in reversed(depths)]
results.append({"test": "prefill", "depth": 0, "samples": [100.0]})
with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
    json.dump({"results": results, "arguments": sys.argv[1:]}, file)"""


def test_meki_bench_is_run_as_documented(tmp_path: Path, installed: Callable[..., str]) -> None:
    binary = installed("meki-bench", ECHO, sys.executable)
    workloads = [PREFILL, Workload("decode", 0, 16), DECODE]
    meki = Meki("meki", tmp_path / "package", workloads, 2, "int8")
    assert meki.binary == binary
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
def test_meki_bench_without_figures_is_an_error(tmp_path: Path, installed: Callable[..., str], report: str) -> None:
    installed("meki-bench", f"for last; do :; done; printf '%s' '{report}' > \"$last\"")
    meki = Meki("meki", tmp_path, [PREFILL, DECODE], 1, "int8")
    meki.workloads = [DECODE]
    with pytest.raises(PeerError, match=r"meki-bench: (its --json file lacks|got)"):
        meki.round()


def test_meki_bench_that_fails_is_quoted(tmp_path: Path, installed: Callable[..., str]) -> None:
    binary = installed("meki-bench", "echo first >&2; for i in 1 2 3 4 5 6 7 8; do echo l$i >&2; done; exit 3")
    with pytest.raises(PeerError) as caught:
        Meki("meki", tmp_path, [PREFILL, DECODE], 1, "int8").round()
    assert str(caught.value).startswith(f"{binary} ended with exit status 3; the last of its stderr:\n  l1\n")
    assert "first" not in str(caught.value)


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

IK_STAND_IN = """import json, sys
option = dict(zip(sys.argv[1::2], sys.argv[2::2]))
depth, generated = map(int, option["-gp"].split(",") if "-gp" in option else ("0", option["-n"]))
speed = (5.0 if depth else 50.0) + ("-rtr" in option) - ("-mqkv" in option) + (option["-ctk"] == "q8_KV")
print("[\\n  {")
print(f'"n_prompt": {int(option["-p"]) or depth}, "n_gen": {generated}, "build_commit": "def", "build_number": 43,')
print(f'"samples_ns": [ 1 ], "samples_ts": [ {speed} ]')
print("  }\\n]")"""


@pytest.fixture
def stand_ins(installed: Callable[..., str], tmp_path: Path) -> list[str]:
    """Options that name scripts as peers, and an installed meki-bench."""
    quick = f"{sys.executable} -IS"  # without what is installed
    installed("meki-bench", ECHO, quick)
    llama = script(tmp_path / "llama-bench", LLAMA_STAND_IN, quick)
    ik = script(tmp_path / "ik-llama-bench", IK_STAND_IN, quick)
    return ["--llama-bench", llama, "--ik-llama-bench", ik]


def test_comparison(package: Path, tmp_path: Path, stand_ins: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = "--depths 0,64 --prefill 128 --tokens 16 --repetitions 2 --threads 1"
    out = tmp_path / "figures.json"
    arguments = [str(package), *stand_ins, *options.split(), "--json", str(out), "--workdir", str(tmp_path / "work")]
    assert compare.main(arguments) == 0
    text = capsys.readouterr().out
    best = "flash attention on, K q8_0, V f16"
    repacked = "flash attention on, K q8_KV, V q8_0, repacked"
    assert "Our KV cache has a synthetic depth" in text
    lines = [
        f"| decode 16 at depth 64 | llama.cpp | {best} | 21.0 (21.0 to 21.0) | 65.0 (65.0 to 65.0) "
        "| 3.10 (3.10 to 3.10) | llama.cpp |",
        f"| decode 16 at depth 64 | ik_llama.cpp | {repacked} | 7.00 (7.00 to 7.00) | 65.0 (65.0 to 65.0) "
        "| 9.29 (9.29 to 9.29) | llama.cpp |",
    ]
    assert text.splitlines()[-2:] == lines
    assert "random int4 weights, a memory (meki), int8 KV\n- llama.cpp: abc (42), random Q4_0 weights\n" in text
    assert "- ik_llama.cpp: def (43), random Q4_0 weights\n" in text

    figures = json.loads(out.read_text())
    tests = figures["tests"]
    assert [(test["kind"], test["depth"]) for test in tests] == [("prefill", 0), ("decode", 0), ("decode", 64)]
    assert tests[2]["samples"] == {"meki": [65.0, 65.0], "llama.cpp": [21.0, 21.0], "ik_llama.cpp": [7.0, 7.0]}
    assert tests[2]["ratios"] == {"meki": {"llama.cpp": [65 / 21] * 2, "ik_llama.cpp": [65 / 7] * 2}}
    assert [test["best_peer"] for test in tests] == ["ik_llama.cpp", "ik_llama.cpp", "llama.cpp"]
    assert [test["settings"] for test in tests] == [{"llama.cpp": best, "ik_llama.cpp": repacked}] * 3
    assert [len(tried) for tried in figures["engines"]["llama.cpp"]["settings_tried"]] == [5] * 3
    assert [len(tried) for tried in figures["engines"]["ik_llama.cpp"]["settings_tried"]] == [18] * 3
    assert len(figures["engines"]["meki"]["meki_bench"]) == 2
    assert [file.suffix for file in (tmp_path / "work").iterdir()] == [".gguf"]


def test_the_same_bits_in_ours(
    package: Path, tmp_path: Path, stand_ins: list[str], installed: Callable[..., str], capsys
) -> None:
    log = tmp_path / "log"
    body = f"import sys\nfrom meki.models.convert import main\nprint(file=open({str(log)!r}, 'a'))\nsys.exit(main())"
    installed("meki-convert", body, sys.executable)
    options = "--same-bits --depths 0 --prefill 8 --tokens 16 --repetitions 1 --threads 1 --workdir"
    arguments = [str(package), *stand_ins[:2], *options.split(), str(tmp_path / "work")]
    for _ in range(2):
        assert compare.main(arguments) == 0
        out = capsys.readouterr().out
        assert "- meki, same bits: " in out and "source weights, no memory, int8 KV\n" in out
        assert (
            "| meki, tokens/s | meki / peer | meki, same bits, tokens/s | meki, same bits / peer | best peer |" in out
        )
    assert log.read_text() == "\n"  # once
    (converted,) = (tmp_path / "work").glob("*.package")
    assert read_manifest(converted)["weights"]["types"].keys() == {"int4"}


def test_failures_are_one_error_and_exit_status_1(
    package: Path, tmp_path: Path, stand_ins: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    arguments = [str(package), *stand_ins, "--depths", "0", "--prefill", "8", "--json", str(out)]
    script(Path(stand_ins[1]), "echo cannot load >&2; exit 1")
    assert compare.main([*arguments, "--workdir", str(tmp_path / "work")]) == 1
    error = capsys.readouterr().err
    assert f"peers: error: {stand_ins[1]} ended with exit status 1" in error and "cannot load" in error
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
