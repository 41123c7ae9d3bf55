"""The engine against the PyTorch training form, and against itself on every path that must not matter."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from meki import Engine, _core
from meki._core import resident_memory
from meki.engine import find_onnxruntime
from meki.models.architectures.llama import Decoder

IDS = np.random.default_rng(11).integers(0, 300, 100).tolist()


def torch_logits(model: Decoder, ids: list[int]) -> NDArray[np.float32]:
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([ids]))[0].numpy()
    return logits


def core_session(engine: Engine, **options: object) -> _core.Session:
    return _core.Session(engine._core, _core.SessionOptions(**options))


def core_logits(engine: Engine, ids: list[int], **options: object) -> NDArray[np.float32]:
    session = core_session(engine, **options)
    session.append(ids)
    return session.logits()


@pytest.mark.parametrize(
    "overrides",
    [{}, {"qk_norm": False}, {"projector_norm": True}, {"memory_dim": 0}, {"memory_dim": 12, "kv_heads": 4}],
    ids=["default", "no-qk-norm", "projector-norm", "dense", "odd-memory"],
)
def test_float32_package_equals_the_training_form(
    make_package: Callable[..., Path], make_model: Callable[..., Decoder], overrides: dict[str, object]
) -> None:
    # Float32 on both sides: what differs is the order of sums of up to 100 terms, about 1e-6 of logits that reach 10.
    engine = Engine(make_package(weights="float32", rows="float32", **overrides), kv_type="float32")
    np.testing.assert_allclose(engine.logits(IDS), torch_logits(make_model(**overrides), IDS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rows", "bound"), [("float16", 1e-3), ("int8", 0.02), ("int4", 0.15)])
def test_row_types_cost_what_their_precision_says(
    make_package: Callable[..., Path], make_model: Callable[..., Decoder], rows: str, bound: float
) -> None:
    # Relative RMS error of the logits. A row's relative error is at most 2^-11, half of 1/127 of its largest value, and
    # half of 1/7 likewise; the injection is one of three terms of the residual stream, three layers deep.
    expected = torch_logits(make_model(), IDS)
    error = Engine(make_package(rows=rows), kv_type="float32").logits(IDS) - expected
    assert 0 < np.sqrt(np.mean(error**2)) / expected.std() < bound


# The same arithmetic in another grouping of tokens: what is left is the order in which splits of the cache are joined.
@pytest.mark.parametrize("kv_type", ["float32", "float16", "int8"])
@pytest.mark.parametrize("memory_dim", [32, 0], ids=["memory", "dense"])
def test_chunking_does_not_matter(make_package: Callable[..., Path], memory_dim: int, kv_type: str) -> None:
    engine = Engine(make_package(rows="float32", memory_dim=memory_dim), kv_type=kv_type)
    whole = core_logits(engine, IDS, chunk=128)
    for chunk in (1, 7, 64):
        np.testing.assert_allclose(core_logits(engine, IDS, chunk=chunk), whole, rtol=0, atol=1e-4)
    session = core_session(engine)
    one_by_one = []
    for token in IDS:
        session.append([token])
        one_by_one.append(session.logits()[0])
    np.testing.assert_allclose(one_by_one, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_access_and_prefetch_change_no_bit(make_package: Callable[..., Path], weights: str) -> None:
    package = make_package(weights=weights)
    results = []
    for access in ("mmap", "pread", "direct"):
        engine = Engine(package, rom_access=access)
        for prefetch in (True, False):
            results.append(core_logits(engine, IDS, chunk=16, prefetch=prefetch))
            generated = engine.generate("The old", max_new_tokens=20, seed=3, prefetch=prefetch)
            results.append(np.array(generated.token_ids))
    for result in results[2:]:
        np.testing.assert_array_equal(result, results[len(result) == len(results[1])])


def test_the_row_cache_changes_no_bit(make_package: Callable[..., Path]) -> None:
    package = make_package()
    expected = Engine(package, row_cache=0)
    ids, text = core_logits(expected, IDS, chunk=16), expected.generate("The old", max_new_tokens=60, seed=3)
    bundle = _core.Rom(package / "memory.rom").info.bundle_bytes
    for bundles in (1, 40, 400):  # room for none, for some, for all
        options = _core.EngineOptions(onnxruntime=find_onnxruntime(), row_cache=bundles * bundle)
        engine = _core.Engine.open(package, options)
        hits = 0
        for _ in range(3):  # the second time from the cache, as far as it reaches
            session = _core.Session(engine, _core.SessionOptions(chunk=16))
            session.append(IDS)
            np.testing.assert_array_equal(session.logits(), ids)
            hits = session.stats.rom_hits
            session.rewind(0)
            session.append(expected.tokenizer.encode("The old").ids)
            session.start(_core.SamplingOptions(seed=3), 60)
            assert list(iter(session.next, None)) == text.token_ids
        assert (hits == 0) == (bundles == 1)


def test_hits_are_the_tokens_that_came_before(make_package: Callable[..., Path]) -> None:
    package = make_package()
    engine = Engine(package)
    bundle = _core.Rom(package / "memory.rom").info.bundle_bytes
    session = core_session(engine)
    seen, requests, hits = {0}, 0, 0  # token 0 was tried when the package was opened
    for chunk in ([5, 9, 5, 5, 9, 280], [5], [0, 9, 10], [10], [11, 11], [12, 11, 280, 5]):
        session.append(chunk)
        session.logits()
        requests += len(set(chunk))
        hits += len(seen & set(chunk))
        seen |= set(chunk)
        stats = session.stats
        assert (stats.rom_requests, stats.rom_hits) == (requests, hits)
        assert stats.rom_bytes == (requests - hits) * bundle
    other = core_session(engine)  # all sessions of an engine share it
    other.append([280, 9])
    other.logits()
    assert (other.stats.rom_requests, other.stats.rom_hits, other.stats.rom_bytes) == (2, 2, 0)


def drop_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("access", ["mmap", "pread", "direct"])
def test_a_cold_rom_changes_nothing(make_package: Callable[..., Path], access: str) -> None:
    package = make_package(weights="int8")
    engine = Engine(package, rom_access=access, row_cache=0)
    warm = engine.generate("A small ship", max_new_tokens=30, seed=5)
    drop_page_cache(package / "memory.rom")
    cold = engine.generate("A small ship", max_new_tokens=30, seed=5)
    assert cold.token_ids == warm.token_ids


def test_one_request_a_token_and_distinct_ids_in_prefill(make_package: Callable[..., Path]) -> None:
    engine = Engine(make_package(), row_cache=0)
    session = core_session(engine)
    session.append([5, 9, 5, 5, 9, 280])
    session.start(_core.SamplingOptions(seed=1), 10)
    while session.next() is not None:
        pass
    stats = session.stats
    decoded = stats.decode_tokens
    assert (stats.rom_requests, stats.rom_hits) == (3 + decoded, 0)
    assert len(stats.stall_ns) == decoded
    layers, memory_dim, checksum = 3, 32, 4
    assert stats.rom_bytes == (3 + decoded) * (layers * memory_dim * 2 + checksum)


@pytest.mark.parametrize(("access", "most"), [("mmap", 32 << 20), ("pread", 0), ("direct", 0)])
def test_what_of_the_rom_is_resident_is_bounded(make_package: Callable[..., Path], access: str, most: int) -> None:
    """However many tokens were looked up: pages that were mapped are given back before they are more than 32 MiB."""
    package = make_package(vocab_size=20_000, memory_dim=256, rows="float32", weights="int8")
    rom = package / "memory.rom"
    assert rom.stat().st_size > 60_000_000
    engine = Engine(package, rom_access=access, row_cache=0)
    session = engine.session(context=100)
    resident = []
    for start in range(0, 20_000, 1000):
        session.logits(range(start, start + 1000, 17))
        session._core.rewind(0)
        resident.append(resident_memory(rom)["rom"])
    assert max(resident) <= most


@pytest.mark.parametrize("kv_type", ["float32", "float16", "int8", "int4"])
def test_continuing_after_a_rewind_equals_a_fresh_session(make_package: Callable[..., Path], kv_type: str) -> None:
    engine = Engine(make_package(head_dim=32), kv_type=kv_type)
    session = core_session(engine)
    session.append(IDS[:40])
    session.logits()
    session.rewind(25)
    session.append(IDS[60:80])
    again = session.logits()
    np.testing.assert_allclose(again, core_logits(engine, IDS[:25] + IDS[60:80])[25:], rtol=0, atol=1e-4)
