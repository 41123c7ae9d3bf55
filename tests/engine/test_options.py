"""What the options of an engine change, and what they must not: KV types, memory off, threads, delays, profiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from meki import Engine, _core
from meki.cli.run import main
from meki.engine import find_onnxruntime
from meki.models.architectures.llama import Decoder

KV_TYPES = ["float32", "float16", "int8", "int4"]
IDS = np.random.default_rng(12).integers(0, 300, 100).tolist()
# Matrices large enough that their work is shared between threads, and a cache of several blocks of 64 tokens.
LARGER = {"hidden": 256, "ffn": 512, "head_dim": 32, "context": 512}

Logits = NDArray[np.float32]


def open_core(package: Path, **options: object) -> _core.Engine:
    return _core.Engine.open(package, _core.EngineOptions(onnxruntime=find_onnxruntime(), **options))


def core_session(engine: _core.Engine, **options: object) -> _core.Session:
    return _core.Session(engine, _core.SessionOptions(**options))


def core_logits(engine: _core.Engine, ids: list[int]) -> Logits:
    session = core_session(engine)
    session.append(ids)
    return session.logits()


def generate(session: _core.Session, count: int) -> list[int]:
    session.start(_core.SamplingOptions(temperature=0), count)
    return [token for token in iter(session.next, None)]


def relative_error(logits: Logits, expected: Logits) -> float:
    return float(np.sqrt(np.mean((logits - expected) ** 2)) / expected.std())


@pytest.mark.parametrize("kv_type", ["int5", "INT8", "", "float8"])
def test_an_unknown_kv_type(make_package: Callable[..., Path], kv_type: str, capsys) -> None:
    with pytest.raises(ValueError, match=f'"{kv_type}", expected float32, float16, int8 or int4'):
        Engine(make_package(), kv_type=kv_type)
    with pytest.raises(SystemExit) as exit_info:
        main(["--model", str(make_package()), "--kv-type", kv_type, "text"])
    assert exit_info.value.code == 2
    assert f"--kv-type: invalid choice: '{kv_type}'" in capsys.readouterr().err


def test_an_int4_cache_of_heads_that_it_cannot_hold(make_package: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"head_dim is 16, a KV cache of type int4 needs a multiple of 32"):
        Engine(make_package(head_dim=16), kv_type="int4")


@pytest.mark.parametrize("overrides", [{}, {"qk_norm": False}, {"projector_norm": True}], ids=str)
def test_memory_off_is_the_backbone(
    make_package: Callable[..., Path], make_model: Callable[..., Decoder], overrides: dict[str, object]
) -> None:
    backbone = make_model(**overrides, memory_dim=0)
    weights = make_model(**overrides).state_dict()
    backbone.load_state_dict({name: value for name, value in weights.items() if ".meki." not in name})
    with torch.no_grad():
        expected: Logits = backbone(torch.tensor([IDS]))[0].numpy()

    package = make_package(**overrides)
    engine = open_core(package, kv_type="float32", memory=False)
    session = core_session(engine)
    session.append(IDS)
    logits = session.logits()
    # As with the memory: float32 on both sides, another order of sums.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    assert relative_error(core_logits(open_core(package, kv_type="float32"), IDS), expected) > 0.1

    assert engine.rom_access is None
    assert len(generate(session, 10)) == 10 or session.finish_reason == "eos"
    stats = session.stats
    assert (stats.rom_requests, stats.rom_bytes, stats.stall_ns, stats.prefill_stall_ns) == (0, 0, [], 0)


def test_memory_off_changes_nothing_in_a_dense_package(make_package: Callable[..., Path]) -> None:
    package = make_package(memory_dim=0)
    on, off = (core_logits(open_core(package, memory=memory), IDS) for memory in (True, False))
    np.testing.assert_array_equal(on, off)


def test_kv_types_cost_what_their_precision_says(make_package: Callable[..., Path]) -> None:
    package = make_package(head_dim=32)
    exact = core_logits(open_core(package, kv_type="float32"), IDS)
    errors = [relative_error(core_logits(open_core(package, kv_type=name), IDS), exact) for name in KV_TYPES[1:]]
    # Rounding error, relative to the RMS of keys and values that are about normal: float16 2^-11 / sqrt(3) of each;
    # int8 1/sqrt(12) of a step of 2.2 / 127, 2.2 being the expected largest of 32; int4 likewise of 2.2 / 7.5. That is
    # 0.03%, 0.5% and 8.5%. A key's error moves a score (about 1) and so a softmax weight by as much; three layers add
    # theirs up, the residual stream and the average over tokens thin them. Twice the error of one covers it.
    for error, bound in zip(errors, (6e-4, 0.01, 0.17), strict=True):
        assert bound / 40 < error < bound


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_two_sessions_at_once_compute_the_same_bits_as_in_turn(make_package: Callable[..., Path], kv_type: str) -> None:
    engine = open_core(make_package(weights="int8", **LARGER), kv_type=kv_type, threads=2)
    prompts = [IDS[:70], IDS[30:] + IDS[:60]]
    both_ready = Barrier(2, timeout=60)

    def compute(prompt: list[int], wait: Callable[[], object]) -> tuple[Logits, list[int], Logits]:
        session = core_session(engine, chunk=32)
        wait()
        session.append(prompt)
        logits = session.logits()
        tokens = generate(session, 60)
        session.append(prompt[:3])
        return logits, tokens, session.logits()

    expected = [compute(prompt, lambda: None) for prompt in prompts]
    assert len(expected[0][1]) > 1
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            results = list(pool.map(compute, prompts, [both_ready.wait] * 2))
            for (logits, tokens, last), (first_logits, first_tokens, first_last) in zip(results, expected, strict=True):
                np.testing.assert_array_equal(logits, first_logits)
                assert tokens == first_tokens
                np.testing.assert_array_equal(last, first_last)


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_the_number_of_threads_does_not_matter(make_package: Callable[..., Path], kv_type: str, weights: str) -> None:
    """Not to the bit: how work is cut, and in which order its parts are joined, depends on shapes alone."""
    package = make_package(weights, **LARGER)
    ids = (IDS * 4)[:400]  # seven blocks of the cache, of which several are a part
    first, *others = (open_core(package, kv_type=kv_type, threads=threads) for threads in (1, 2, 3, 5))
    cores = len(os.sched_getaffinity(0))
    assert [engine.threads for engine in (first, *others)] == [min(threads, cores) for threads in (1, 2, 3, 5)]

    def outcome(engine: _core.Engine) -> tuple[bytes, list[int], bytes]:
        session = core_session(engine, chunk=100)
        session.append(ids)
        prefill = session.logits()
        tokens = generate(session, 20)
        session.append([1])
        return prefill.tobytes(), tokens, session.logits().tobytes()

    expected = outcome(first)
    for engine in others:
        assert outcome(engine) == expected


@pytest.mark.parametrize("threads", [0, 1, 8])
def test_no_more_threads_than_cores(make_package: Callable[..., Path], threads: int) -> None:
    core = min(os.sched_getaffinity(0))
    code = "import os, sys; from meki import Engine; os.sched_setaffinity(0, [int(sys.argv[2])]); "
    code += "print(Engine(sys.argv[1], threads=int(sys.argv[3])).threads)"
    command = [sys.executable, "-c", code, str(make_package()), str(core), str(threads)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize("threads", [-1, 1025])
def test_thread_counts_out_of_range(make_package: Callable[..., Path], threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads is {threads}, expected 0 to 1024"):
        open_core(make_package(), threads=threads)


def test_a_synthetic_depth(make_package: Callable[..., Path]) -> None:
    package = make_package(head_dim=32)
    logits = {}
    for kv_type in KV_TYPES:
        session = core_session(open_core(package, kv_type=kv_type))
        session.fill_synthetic(100)
        assert len(session.tokens) == 100
        assert set(session.tokens) <= set(range(300))
        assert session.stats.prefill_tokens == 0
        session.append(IDS[:5])
        logits[kv_type] = session.logits()
        session.rewind(100)
        assert len(generate(session, 8)) == 8 or session.finish_reason == "eos"
        layers, kv_heads, blocks_of_64 = 3, 2, 2
        value_bytes = {"float32": 32 * 4, "float16": 32 * 2, "int8": 32 + 4, "int4": 32 // 2 + 2}[kv_type]
        assert session.kv_bytes(100) == layers * kv_heads * blocks_of_64 * 64 * 2 * value_bytes
    # The depth is in the logits: they are not those of the five tokens alone. And the noise is the same in the types
    # that store keys as they come (integers are rotated): the bound is as between KV types above.
    exact = logits["float32"]
    assert relative_error(core_logits(open_core(package, kv_type="float32"), IDS[:5]), exact) > 0.1
    assert 0 < relative_error(logits["float16"], exact) < 6e-4
    assert np.isfinite(logits["int8"]).all() and np.isfinite(logits["int4"]).all()


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_a_synthetic_depth_leaves_what_was_before_it(make_package: Callable[..., Path], kv_type: str) -> None:
    engine = open_core(make_package(head_dim=32), kv_type=kv_type)
    session = core_session(engine)
    session.append(IDS[:40])
    session.logits()
    session.fill_synthetic(60)
    session.rewind(40)
    session.append(IDS[40:50])
    np.testing.assert_allclose(session.logits(), core_logits(engine, IDS[:50])[40:], rtol=0, atol=1e-4)


def test_a_synthetic_depth_that_is_refused(make_package: Callable[..., Path]) -> None:
    session = core_session(open_core(make_package()))
    with pytest.raises(ValueError, match=r"129 tokens.*128"):
        session.fill_synthetic(129)
    session.append([1])
    with pytest.raises(ValueError, match="pending"):
        session.fill_synthetic(1)
    assert session.tokens == [1]


def test_delayed_rows_show_in_the_stall(make_package: Callable[..., Path]) -> None:
    package, delay_us = make_package(), 2000
    slow = open_core(package, row_cache=0, rom_delay_us=delay_us)
    np.testing.assert_array_equal(core_logits(slow, IDS[:3]), core_logits(open_core(package), IDS[:3]))
    session = core_session(slow, prefetch=False)
    session.append([5, 9, 5])
    generate(session, 10)
    stats = session.stats
    assert stats.prefill_stall_ns >= 2 * delay_us * 1000  # two distinct tokens
    assert len(stats.stall_ns) == stats.decode_tokens > 0
    assert min(stats.stall_ns) >= delay_us * 1000
    assert sum(stats.stall_ns) + stats.sample_ns <= stats.decode_ns


def test_a_negative_delay(make_package: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="rom_delay"):
        open_core(make_package(), rom_delay_us=-5)


@pytest.mark.parametrize(("memory", "stages"), [(True, ["stage0", "stage1"]), (False, ["dense"])])
def test_a_profile_is_a_trace_of_every_stage(
    make_package: Callable[..., Path], tmp_path: Path, memory: bool, stages: list[str]
) -> None:
    engine = open_core(make_package(weights="int8"), profile=tmp_path / "trace", memory=memory)
    session = core_session(engine)
    session.append(IDS)
    session.logits()
    del session, engine  # the files are complete when both are gone
    files = sorted(tmp_path.iterdir())
    assert [file.name.split(".")[1].split("_")[0] for file in files] == stages
    for file, stage in zip(files, stages, strict=True):
        assert file.name.startswith(f"trace.{stage}")
        operators = [event["args"].get("op_name") for event in json.loads(file.read_text()) if "args" in event]
        # One token when the package is opened, one chunk of the prompt: two runs of every layer of the stage.
        layers = {"stage0": 1, "stage1": 2, "dense": 3}[stage]
        assert operators.count("Attention") == 2 * layers
