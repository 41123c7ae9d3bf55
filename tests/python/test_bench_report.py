"""What meki-bench makes of a measurement: figures, and the outputs that hold them."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from meki._core import Plan
from meki.bench import output, plot
from meki.bench.contender import Contender
from meki.bench.parts import PARTS
from meki.bench.report import Report, make_report
from meki.package.files import write_file

KV_BYTES, BANDWIDTH = 300_000, 2e9
SPEEDS = {"meki": (1.00, 1.05, 1.02), "dense": (0.98, 1.00, 1.01)}
"""How long each of three rounds takes, relative to the others."""


NOTHING_ADDED = {"rom_delay_ms": 0.0, "row_cache_mib": 0}

# In place of what meki._core.measure() returns.
Measurement = Case = Block = SimpleNamespace


def block(tokens: int, ns: float, stall_ns: tuple[int, ...] = ()) -> Block:
    rows = dict(rom_requests=2 * tokens, rom_hits=tokens // 4) if stall_ns else dict(rom_requests=0, rom_hits=0)
    return Block(tokens=tokens, ns=round(ns), sample_ns=100, stall_ns=stall_ns, storage_bytes=tokens * 512, **rows)


def decode_blocks(slowness: float, *, stalls: bool) -> list[Block]:
    """Four turns, 1 ms a token at slowness 1; the second and third take 1% longer, the fourth 2%."""
    stall = (1_000, 2_000, 3_000, 50_000) if stalls else ()
    return [block(4, 4e6 * slowness * longer, stall) for longer in (1.0, 1.01, 1.01, 1.02)]


@pytest.fixture
def report() -> Report:
    contenders = [
        Contender(2, "meki", weight_bytes=500_000, row_bytes=2_048),
        Contender(2, "dense", weight_bytes=480_000, row_bytes=0),
    ]
    cases = [
        Case(kind="prefill", depth=0, tokens=64, kv_bytes=None),
        Case(kind="decode", depth=0, tokens=16, kv_bytes=10_000),
        Case(kind="decode", depth=1024, tokens=16, kv_bytes=KV_BYTES),
    ]
    rounds = []
    for i in range(3):
        prefill = [[block(64, 32e6 * SPEEDS[name][i], (7,) if name == "meki" else ())] for name in SPEEDS]
        shallow = [decode_blocks(SPEEDS[name][i], stalls=name == "meki") for name in SPEEDS]
        deep = [decode_blocks(3 * SPEEDS[name][i], stalls=name == "meki") for name in SPEEDS]
        rounds.append([prefill, shallow, deep])
    memory = {"resident": 90_000_000, "anonymous": 60_000_000, "file": 30_000_000, "shared": 0, "peak": 95_000_000}
    memory |= {"rom": 2_000_000, "without_rom": 88_000_000}
    environment = {
        "model": "small",
        "random_weights": True,
        "weights": "int4",
        "rows": "float16",
        "kv_type": "int8",
        "context": 4096,
        "cpu": "A Processor, of some kind",
        "simd": "avx2",
        "cores": 4,
        "available_cores": 2,
        "rom_access": "mmap",
        "system": "Linux 6.1 x86_64",
        "python": "3.11.7",
        "onnxruntime": "1.24",
        "meki": "0.1.0",
        "started": "2026-01-02T03:04:05+00:00",
        "load_average": 1.5,
        "machine_note": "other work was running at the start: load average 1.50",
    }
    protocol = {
        "depths": [0, 1024],
        "prefill": 64,
        "tokens": 16,
        "repetitions": 3,
        "turn": 4,
        "compare": "dense",
        "synthetic_depth": True,
        "rom": "cold",
        "rom_delay_ms": 5.0,
        "row_cache_mib": 3,
    }
    parts = [
        {"memory": "meki", "threads": 2, "depth": depth, "tokens": 16, "synthetic_depth": True, "us_per_token": times}
        for depth, times in ((0, dict.fromkeys(PARTS, 10.0)), (1024, {part: 20.0 + len(part) for part in PARTS}))
    ]
    return make_report(
        contenders,
        Plan(depths=(0, 1024), prefill=64, tokens=16, repetitions=3, synthetic_depth=True, compare=True),
        Measurement(cases=cases, rounds=rounds, bandwidths={2: [1e9, BANDWIDTH, BANDWIDTH, 3e9]}, memory=memory),
        parts=parts,
        environment=environment,
        protocol=protocol,
    )


def find(report: Report, test: str, depth: int, memory: str) -> dict[str, Any]:
    (result,) = (r for r in report["results"] if (r["test"], r["depth"], r["memory"]) == (test, depth, memory))
    return result


def test_speeds_and_their_spread(report: Report) -> None:
    assert len(report["results"]) == 6
    for memory, slowness in SPEEDS.items():
        prefill = find(report, "prefill", 0, memory)
        assert prefill["samples"] == pytest.approx([2000 / s for s in slowness])
        # 16 tokens in 4 * (1 + 1.01 + 1.01 + 1.02) ms at 1 ms a token; integer nanoseconds round by 1e-7.
        deep = find(report, "decode", 1024, memory)
        samples = [16e3 / (3 * 4 * 4.04 * s) for s in slowness]
        assert deep["samples"] == pytest.approx(samples, rel=1e-6)
        assert deep["median"] == pytest.approx(statistics.median(samples), rel=1e-6)
        low, middle, high = sorted(samples)
        assert deep["p10"] == pytest.approx(low + 0.2 * (middle - low), rel=1e-6)
        assert deep["p90"] == pytest.approx(high - 0.2 * (high - middle), rel=1e-6)


def test_stalls_are_those_of_all_steps(report: Report) -> None:
    # 12 blocks of each of four stalls: the median lies between the second and the third, p99 within the greatest.
    assert find(report, "decode", 0, "meki")["stall_us"] == {"p50": 2.5, "p99": 50.0}
    assert find(report, "prefill", 0, "meki")["stall_us"] == {"p50": 0.007, "p99": 0.007}
    assert find(report, "decode", 0, "dense")["stall_us"] is None


def test_bytes_and_bandwidth(report: Report) -> None:
    meki, dense = (find(report, "decode", 1024, memory) for memory in ("meki", "dense"))
    assert meki["bytes_per_token"] == 500_000 + KV_BYTES + 2_048
    assert dense["bytes_per_token"] == 480_000 + KV_BYTES
    # The median of four.
    assert report["read_bandwidth"] == [{"threads": 2, "gb_s": 2.0, "samples_gb_s": [1.0, 2.0, 2.0, 3.0]}]
    assert meki["bandwidth_fraction"] == pytest.approx(802_048 * meki["median"] / BANDWIDTH)
    assert meki["storage_bytes_per_token"] == 512
    prefill = find(report, "prefill", 0, "meki")
    assert prefill["bytes_per_token"] is None and prefill["bandwidth_fraction"] is None


def test_storage_that_the_system_does_not_tell_is_absent(report: Report) -> None:
    plan = Plan(depths=(), prefill=64, tokens=16, repetitions=1)
    cases = [Case(kind="prefill", depth=0, tokens=64, kv_bytes=None)]
    counts = {"sample_ns": 0, "stall_ns": (1,), "storage_bytes": None, "rom_requests": 9, "rom_hits": 0}
    rounds = [[[[Block(tokens=64, ns=1000, **counts)]]]]
    made = make_report(
        [Contender(2, "meki", 1, 1)],
        plan,
        Measurement(cases=cases, rounds=rounds, bandwidths={2: [1e9]}, memory=None),
        parts=[],
        environment={**report["environment"], "machine_note": None, "random_weights": False},
        protocol={**report["protocol"], "synthetic_depth": False, "rom": "warm", **NOTHING_ADDED},
    )
    assert made["results"][0]["storage_bytes_per_token"] is None
    assert (made["labels"], made["compare"]) == ([], [])
    assert "resident" not in output.to_markdown(made) and "from the cache" not in output.to_markdown(made)


def test_rows_from_the_cache(report: Report) -> None:
    assert (
        find(report, "decode", 1024, "meki")["row_hit_rate"]
        == find(report, "prefill", 0, "meki")["row_hit_rate"]
        == 0.125
    )
    assert find(report, "decode", 0, "dense")["row_hit_rate"] is None
    lines = [line for line in output.to_markdown(report).splitlines() if "| meki |" in line]
    assert "rows from the cache" in output.to_markdown(report) and all("| 12% |" in line for line in lines)


def test_the_ratio_is_of_neighbouring_turns(report: Report) -> None:
    for entry in report["compare"]:
        # Two groups a round; within one, both models are slowed alike.
        expected = [SPEEDS["dense"][i] / SPEEDS["meki"][i] for i in range(3) for _ in range(2)]
        assert entry["samples"] == pytest.approx(expected, rel=1e-6)
        assert entry["ratio"] == pytest.approx(statistics.median(expected), rel=1e-6)
        # With six samples the interval for 95% is all of them.
        assert entry["ci95"] == pytest.approx([min(expected), max(expected)], rel=1e-6)
    assert [entry["depth"] for entry in report["compare"]] == [0, 1024]


def test_only_a_filled_cache_is_synthetic(report: Report) -> None:
    synthetic = {(result["test"], result["depth"]) for result in report["results"] if result["synthetic_depth"]}
    assert synthetic == {("decode", 1024)}


LABELS = (
    "random weights",
    "row cache of 3 MiB",
    "the cache was filled, not computed",
    "cold ROM",
    "artificial delay: 5 ms",
    "load average",
)


def test_every_output_says_what_is_artificial(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in LABELS:
        assert any(label in known for known in report["labels"])
    markdown = output.to_markdown(report)
    captions: list[str] = []
    monkeypatch.setattr(Figure, "supxlabel", lambda self, text, **_: captions.append(text))
    plot.plots(report)
    for text in (output.to_json(report).decode(), markdown, *captions):
        assert all(label in text for label in LABELS)
    assert len(captions) == 2
    (row,) = (
        row
        for row in csv.DictReader(io.StringIO(output.to_csv(report).decode()))
        if row["memory"] == "meki" and row["depth"] == "1024"
    )
    flags = (row["synthetic_depth"], row["random_weights"], row["rom"], row["rom_delay_ms"], row["row_cache_mib"])
    assert flags == ("True", "True", "cold", "5.0", "3")


def test_json_holds_everything(report: Report) -> None:
    assert json.loads(output.to_json(report)) == report


def test_csv_has_a_line_for_every_result(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(output.to_csv(report).decode())))
    assert len(rows) == len(report["results"])
    for row, result in zip(rows, report["results"], strict=True):
        assert (row["test"], int(row["depth"]), row["memory"]) == (result["test"], result["depth"], result["memory"])
        assert float(row["median"]) == result["median"]
        assert row["stall_us_p99"] == ("" if result["stall_us"] is None else str(result["stall_us"]["p99"]))
        assert row["cpu"] == "A Processor, of some kind"  # its comma is quoted
        assert None not in row and None not in row.values()


def tables(markdown: str) -> list[list[dict[str, str]]]:
    """The rows of every table."""
    found: list[list[dict[str, str]]] = []
    header: list[str] | None = None
    for line in markdown.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if header is None:
            header = cells
            found.append([])
        elif not set(cells[0]) <= {"-"}:
            assert len(cells) == len(header)
            found[-1].append(dict(zip(header, cells, strict=True)))
    return found


def test_markdown(report: Report) -> None:
    markdown = output.to_markdown(report)
    results, compare, parts = tables(markdown)
    assert len(results) == 6
    deep = next(row for row in results if row["test"] == "decode 16" and row["depth"].startswith("1,024"))
    result = find(report, "decode", 1024, "meki")
    assert deep["memory"] == "meki" and deep["threads"] == "2" and deep["depth"] == "1,024 (synthetic)"
    assert deep["tokens/s"] == f"{result['median']:.1f}"
    assert (deep["wait p50, us"], deep["wait p99, us"]) == ("2.50", "50.00")
    assert deep["MB a token"] == "0.8"
    assert deep["from storage, bytes a token"] == "512"
    assert results[1]["memory"] == "dense" and results[1]["wait p99, us"] == "-"
    assert [row["with memory / dense"] for row in compare] == [f"{report['compare'][0]['ratio']:.4f}"] * 2
    assert [row["part"] for row in parts] == [*PARTS, "sum"]
    assert parts[0]["meki at 0"] == "10.0 (11%)"
    assert parts[-1]["meki at 0"] == "90.0"
    for shown in ("small", "int4 weights", "float16 rows (mmap, cold)", "int8 KV", "4 cores (2 available)", "avx2"):
        assert shown in markdown
    assert "2.0 GB/s" in markdown and "90 MB (anonymous 60 MB" in markdown and "of both models" in markdown


@pytest.fixture
def several(report: Report) -> Report:
    """Of one contender with 1 thread and with 4, which are twice as fast."""
    plan = Plan(depths=(0, 1024), prefill=0, tokens=16, repetitions=1)
    cases = [Case(kind="decode", depth=depth, tokens=16, kv_bytes=10_000) for depth in (0, 1024)]
    rounds = [[[[block(16, ns, (1,))] for ns in (32e6, 16e6)] for _ in cases]]
    parts = [{**report["parts"][0], "threads": threads} for threads in (1, 4)]
    return make_report(
        [Contender(threads, "meki", weight_bytes=500_000, row_bytes=2_048) for threads in (1, 4)],
        plan,
        Measurement(cases=cases, rounds=rounds, bandwidths={1: [1e9, 1e9], 4: [3e9, 3e9]}, memory=report["memory"]),
        parts=parts,
        environment=report["environment"],
        protocol={**report["protocol"], "compare": None},
    )


def test_every_figure_says_with_how_many_threads(several: Report) -> None:
    found = [(result["depth"], result["threads"], result["median"]) for result in several["results"]]
    assert found == [(depth, *figure) for depth in (0, 1024) for figure in ((1, 500.0), (4, 1000.0))]
    for result in several["results"]:
        # Of the bandwidth with as many threads.
        expected = 512_048 * result["median"] / {1: 1e9, 4: 3e9}[result["threads"]]
        assert result["bandwidth_fraction"] == pytest.approx(expected)
    markdown = output.to_markdown(several)
    results, parts = tables(markdown)
    assert [row["threads"] for row in results] == ["1", "4", "1", "4"]
    assert {"meki at 0, 1 thread", "meki at 0, 4 threads"} <= parts[0].keys()
    assert "1 and 4 threads" in markdown and "1.0 GB/s (1 thread), 3.0 GB/s (4 threads)" in markdown
    assert "with all caches for every number of threads" in markdown
    rows = list(csv.DictReader(io.StringIO(output.to_csv(several).decode())))
    assert [(row["threads"], row["read_bandwidth_gb_s"]) for row in rows] == [("1", "1.0"), ("4", "3.0")] * 2
    axes = Figure().add_subplot()
    plot._speed(several, axes)
    assert [line.get_label() for line in axes.lines] == ["meki, 1 thread", "meki, 4 threads"]
    axes = Figure().add_subplot()
    plot._parts(several, axes)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["meki at 0, 1 thread", "meki at 0, 4 threads"]


def test_too_few_groups_have_no_interval(report: Report) -> None:
    report["compare"][0]["ci95"] = None
    assert tables(output.to_markdown(report))[1][0]["95% confidence interval"] == "needs 6 groups"


def test_the_table_says_what_was_compared(report: Report) -> None:
    report["protocol"]["compare"] = "ram"
    assert tables(output.to_markdown(report))[1][0]["from storage / in RAM"] == f"{report['compare'][0]['ratio']:.4f}"


def test_plots_show_the_figures(report: Report) -> None:
    images = plot.plots(report)
    assert set(images) == {"speed.png", "parts.png"}
    assert all(image.startswith(b"\x89PNG\r\n\x1a\n") for image in images.values())
    axes = Figure().add_subplot()
    plot._speed(report, axes)
    assert {line.get_label() for line in axes.lines} == {"meki", "dense"}
    for line in axes.lines:
        expected = [(depth, find(report, "decode", depth, line.get_label())["median"]) for depth in (0, 1024)]
        assert list(zip(*line.get_data(), strict=True)) == expected
    axes = Figure().add_subplot()
    plot._parts(report, axes)
    total = sum(report["parts"][1]["us_per_token"].values()) / 1000
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches if bar.get_x() > 0.5]
    assert max(tops) == pytest.approx(total)
    report["parts"] = []
    assert set(plot.plots(report)) == {"speed.png"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_file(path, b"old")
    assert path.read_bytes() == b"old"

    def fail(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
