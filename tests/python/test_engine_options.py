"""What Engine and its generations are told: options and what they change, and arguments that are refused."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meki import Engine

PROMPT = "Once upon a time"


@pytest.mark.parametrize("start", [-1, 3, 2**40])
def test_logits_from_an_impossible_position(engine: Engine, start: int) -> None:
    session = engine.session()
    with pytest.raises(ValueError, match="start must be from 0 to 2"):
        session.logits([5, 6, 7], start)
    assert session.tokens == []


@pytest.mark.parametrize("ids", [[], [-1], [10_000], [1] * 1000])
def test_logits_of_impossible_tokens(engine: Engine, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"token|context"):
        engine.logits(ids)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("max_new_tokens", -2),
        ("stop", ["x", ""]),
        ("context", -1),
        ("context", 10**6),
    ],
)
def test_options_out_of_range(engine: Engine, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option.replace("_", ".")):
        engine.generate(PROMPT, **{option: value})


def test_options_that_do_not_exist(engine: Engine) -> None:
    with pytest.raises(TypeError, match=r"'max_tokens'.*max_new_tokens"):
        engine.generate(PROMPT, max_tokens=3)
    with pytest.raises(TypeError, match="seed must be an integer"):
        engine.generate(PROMPT, seed=1.5)


WRONG = {
    **dict.fromkeys(("threads", "context", "top_k", "row_cache"), (None, "4", [4], 1.5)),
    **dict.fromkeys(("max_new_tokens", "seed"), ("4", [4], 1.5)),  # None: no limit; a fresh one
    "stop_token_ids": (None, 1, "12", ["1"], [1.0]),
    "ignore_eos": (None, "yes", [1], 1),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "rom_delay_ms"), (None, "1", [1], 10**400)),
    **dict.fromkeys(("memory", "prefetch"), (None, "yes", [1], 1)),
    **dict.fromkeys(("rom_access", "provider"), (None, 1, ["pread"], b"pread")),
    **dict.fromkeys(("kv_type", "soc"), (1, ["int8"], b"int8")),
    **dict.fromkeys(("model", "profile"), (None, 1, ["a"], b"a")),
    "chat_template": (1, ["a"], b"a"),
    "stop": (None, 1),
    "prompt": (None, 1, b"a"),
    "token_ids": (None, 1, "12", b"12", ["1"], [1.0], [None], [[1]], [2**70]),
    "start": (None, "1", [1], 1.5),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values], ids=repr
)
def test_arguments_of_wrong_types_are_named(package: Path, engine: Engine, name: str, value: Any) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "model": lambda: Engine(value),
        "prompt": lambda: engine.generate(value),
        "token_ids": lambda: engine.logits(value),
        "start": lambda: engine.logits([1, 2], value),
    }
    options = inspect.signature(Engine).parameters
    other = (
        (lambda: Engine(package, **{name: value})) if name in options else lambda: engine.generate("a", **{name: value})
    )
    with pytest.raises(TypeError) as caught:
        calls.get(name, other)()
    message = str(caught.value)
    assert message.startswith(name) and " must be " in message
    assert "\n" not in message


@pytest.mark.parametrize("stop", [[5], [None], b"x", [""]])
def test_stop_strings_of_a_wrong_type(engine: Engine, stop: object) -> None:
    session = engine.session()
    with pytest.raises(ValueError, match="stop string"):
        session.stream("The old", stop=stop)
    assert session.tokens == []


def test_a_prompt_that_is_not_unicode(engine: Engine) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        engine.generate("a \udcff")


def test_engine_options_out_of_range(package: Path) -> None:
    with pytest.raises(ValueError, match="threads must be from 0"):
        Engine(package, threads=-1)
    with pytest.raises(ValueError, match=r"tape.*expected mmap, pread or direct"):
        Engine(package, rom_access="tape")


@pytest.mark.parametrize("size", [-1, 2**20 + 1])
def test_a_row_cache_out_of_range(package: Path, size: int) -> None:
    with pytest.raises(ValueError, match=f"row_cache must be from 0 to 1048576, got {size}"):
        Engine(package, row_cache=size)


def test_a_row_cache_is_there_unless_it_is_switched_off(package: Path) -> None:
    for options, cached in (({}, True), ({"row_cache": 1}, True), ({"row_cache": 0}, False)):
        engine = Engine(package, threads=1, **options)
        first, second = (engine.generate(PROMPT, max_new_tokens=8, temperature=0).stats for _ in range(2))
        assert first.rom_requests == second.rom_requests == second.rom_hits + (0 if cached else first.rom_requests)
        assert (second.rom_bytes == 0) == cached and first.rom_bytes > 0


@pytest.mark.parametrize("delay", [-0.001, 10_001, float("nan")])
def test_a_delay_out_of_range(package: Path, delay: float) -> None:
    with pytest.raises(ValueError, match="rom_delay_ms must be from 0 to 10000, got "):
        Engine(package, rom_delay_ms=delay)


def test_a_memory_switched_off(package: Path, engine: Engine) -> None:
    backbone = Engine(package, threads=1, memory=False, rom_delay_ms=10_000)  # no reads, no delay
    assert backbone.rom_access is None
    result = backbone.generate(PROMPT, max_new_tokens=3, temperature=0)
    assert result.stats.rom_requests == 0
    assert np.abs(backbone.logits([5, 6]) - engine.logits([5, 6])).max() > 0.01  # what the memory adds is not noise


def test_a_delayed_rom_stalls_every_step(package: Path) -> None:
    engine = Engine(package, threads=1, row_cache=0, rom_delay_ms=20.0)
    stats = engine.generate(PROMPT, max_new_tokens=6, temperature=0).stats
    # What is not waited for is what a step computes meanwhile: far below 10 ms, so that a busy machine has room.
    assert stats.stall_us_p50 is not None and stats.stall_us_p50 > 10_000


def test_a_profile_is_there_when_the_engine_is_gone(package: Path, tmp_path: Path) -> None:
    engine = Engine(package, threads=1, profile=tmp_path / "trace")
    engine.generate(PROMPT, max_new_tokens=2)
    del engine
    traces = list(tmp_path.glob("trace*"))
    assert len(traces) == 2  # one a stage
    for trace in traces:
        assert any(event["name"] == "model_run" for event in json.loads(trace.read_bytes()))
