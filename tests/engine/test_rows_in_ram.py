"""An engine with its rows in memory, which benchmarks measure another beside: it differs in nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meki import Engine, _core
from meki.models.tokenizer import TokenizerSpec
from tests.engine.gemma_models import export, gemma4

IDS = np.random.default_rng(11).integers(0, 300, 50).tolist()
ENGRAM = {"memory_dim": 0, "engram_dim": 64, "engram_layers": (0, 2), "engram_heads": 2, "engram_rows": 50}


@pytest.fixture(params=["meki", "engram", "gemma_ple"])
def package(
    request: pytest.FixtureRequest, make_package: Callable[..., Path], tokenizer_spec: TokenizerSpec, tmp_path: Path
) -> Path:
    if request.param == "gemma_ple":
        return export(gemma4()[1], tokenizer_spec, tmp_path / "gemma")
    return make_package(rows="int8", **(ENGRAM if request.param == "engram" else {}))


def generate(engine: _core.Engine) -> tuple[Any, list[int], _core.Stats]:
    """Logits of IDS, and what follows them."""
    session = _core.Session(engine, _core.SessionOptions(context=100))
    session.append(IDS)
    logits = session.logits()
    session.start(_core.SamplingOptions(temperature=0), 40, [])
    while session.next() is not None:
        pass
    return logits, session.tokens, session.stats


@pytest.mark.parametrize("options", [{}, {"rom_delay_ms": 1.0}, {"row_cache": 1, "rom_access": "direct"}])
def test_the_same_logits_and_tokens_and_nothing_read(package: Path, options: dict[str, Any]) -> None:
    streamed = Engine(package, **{"row_cache": 0, **options})._core
    in_ram = _core.with_rows_in_ram(streamed)
    assert (streamed.rom_access in ("pread", "direct"), in_ram.rom_access) == (True, "ram")
    expected, got = generate(streamed), generate(in_ram)
    np.testing.assert_array_equal(got[0], expected[0])
    assert got[1] == expected[1] and len(got[1]) == 90
    assert got[2].rom_requests == got[2].rom_hits > 0 and got[2].rom_bytes == 0 < expected[2].rom_bytes


def test_it_outlives_the_engine_that_it_was_made_of(make_package: Callable[..., Path]) -> None:
    package = make_package(rows="int4")
    expected = generate(Engine(package)._core)
    in_ram = _core.with_rows_in_ram(Engine(package)._core)
    np.testing.assert_array_equal(generate(in_ram)[0], expected[0])


def test_a_damaged_row_is_found(make_package: Callable[..., Path], tmp_path: Path) -> None:
    package = tmp_path / "damaged"
    package.mkdir()
    for file in make_package(rows="int8").iterdir():
        (package / file.name).write_bytes(file.read_bytes())
    engine = Engine(package)._core
    with (package / "memory.rom").open("r+b") as rom:
        rom.seek(-5000, 2)  # within the bundles: the file's end is padding of less than a page
        rom.write(bytes(200))
    with pytest.raises(_core.PackageError, match=r"bundle .* the file is damaged: restore it"):
        _core.with_rows_in_ram(engine)


def test_a_dense_model_has_none(make_package: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="the model runs without a memory and so without rows"):
        _core.with_rows_in_ram(Engine(make_package(), memory=False)._core)
