"""Generations that are computed together: what each says is what it says alone."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meki import Engine, GenerationResult, PackageError, _core
from meki.scheduler import Event, Piece, Scheduler

PACKAGE = Path(__file__).parents[2] / "models" / "packages" / "meki-tiny"
PROMPTS = ["Once upon a time", "The dog", "A small fish", "Lily and her", "One day a", "Tom", "The red ball", "In the"]


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return Engine(PACKAGE, threads=2)


def session(engine: Engine, number: int, *, count: int = 20, temperature: float = 0.8) -> _core.Session:
    """Of its own length, context and seed; its prompt is read but for the last token."""
    its = _core.Session(engine._core, _core.SessionOptions(context=200 + 64 * number))
    its.append([(7 * i + 3 * number) % 500 + 1 for i in range(3 + 17 * number)])
    its.start(_core.SamplingOptions(temperature=temperature, seed=number), count, [])
    return its


@pytest.mark.parametrize("kv_type", ["float32", "float16", "int8", "int4"])
def test_sessions_that_come_and_go(kv_type: str) -> None:
    engine = Engine(PACKAGE, threads=2, kv_type=kv_type)
    alone = [list(iter(session(engine, n % 5, count=8 + n).next, None)) for n in range(18)]
    sessions = [session(engine, n % 5, count=8 + n) for n in range(18)]
    made: list[list[int]] = [[] for _ in sessions]
    for round in range(200):
        # Other ones are there in each round, from 1 to all 18, which are more than one step takes.
        chosen = [n for n in range(18) if (round + n) % 4 != 0] if round % 3 else list(range(18))
        _core.step([sessions[n] for n in chosen])
        for n in chosen:
            if (token := sessions[n].next()) is not None:
                made[n].append(token)
    assert made == alone


def test_what_a_shared_step_counts(tiny: Engine) -> None:
    sessions = [session(tiny, n, count=6) for n in range(3)]
    for its in sessions:
        assert its.compute(10_000) == 0
        its.next()
    for _ in range(5):
        idle = [its.stats for its in sessions]
        _core.step(sessions)
        before = [its.stats for its in sessions]
        (taken,) = {its.decode_ns - was.decode_ns for its, was in zip(before, idle, strict=True)}
        assert taken > 0  # one step's time counts for each
        _core.step(sessions)  # there is nothing left to compute
        assert [its.stats.decode_ns for its in sessions] == [its.decode_ns for its in before]
        for its in sessions:
            its.next()
    for number, its in enumerate(sessions):
        assert its.finish_reason == "length"
        assert its.stats.prefill_tokens == 3 + 17 * number
        assert its.stats.decode_tokens == len(its.stats.stall_ns) == 5
        assert its.stats.decode_ns > its.stats.sample_ns


def test_a_prompt_in_parts(tiny: Engine) -> None:
    expected = list(iter(session(tiny, 4).next, None))
    its = session(tiny, 4)
    assert [its.compute(30) for _ in range(4)] == [41, 11, 0, 0]
    assert list(iter(its.next, None)) == expected


def test_wrong_lists(tiny: Engine) -> None:
    one = session(tiny, 1)
    with pytest.raises(ValueError, match="there twice"):
        _core.step([one, session(tiny, 2), one])
    with pytest.raises(TypeError, match="None"):
        _core.step([one, None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="call start first"):
        _core.step([_core.Session(tiny._core, _core.SessionOptions())])
    _core.step([])


class Ends:
    """The events of some generations, until all are over."""

    def __init__(self, count: int) -> None:
        self.events: list[list[Event]] = [[] for _ in range(count)]
        self._left = threading.Semaphore(0)

    def deliver(self, index: int, event: Event) -> None:
        self.events[index].append(event)
        if not isinstance(event, Piece):
            self._left.release()

    def wait(self) -> list[Event]:
        for _ in self.events:
            assert self._left.acquire(timeout=100)
        return [events[-1] for events in self.events]


@pytest.fixture
def scheduler(tiny: Engine) -> Iterator[Scheduler]:
    scheduler = Scheduler(tiny.session, tiny.prefix_cache, parallel=5)
    yield scheduler
    scheduler.close()


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"]}


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.1}, {"json_schema": SCHEMA}],
    ids=["greedy", "sampled", "schema"],
)
def test_a_scheduler_says_what_each_says_alone(tiny: Engine, scheduler: Scheduler, options: dict[str, Any]) -> None:
    # One of the prompts is read in several parts while others go on.
    prompts = [*PROMPTS, " ".join(PROMPTS * 8)]
    ends = Ends(len(prompts))
    for index, prompt in enumerate(prompts):
        request = tiny.requests.text(prompt, first=True, whole=True, max_new_tokens=10 + index, seed=index, **options)
        scheduler.submit(request, lambda event, index=index: ends.deliver(index, event))
    for index, (prompt, end) in enumerate(zip(prompts, ends.wait(), strict=True)):
        alone = tiny.generate(prompt, max_new_tokens=10 + index, seed=index, **options)
        assert isinstance(end, GenerationResult)
        assert (end.text, end.token_ids, end.finish_reason) == (alone.text, alone.token_ids, alone.finish_reason)
        assert end.stats.time_to_first_token_s is not None
        assert "".join(piece.text for piece in ends.events[index] if isinstance(piece, Piece)) == alone.text


def test_a_batch(tiny: Engine) -> None:
    results = tiny.generate_batch(PROMPTS, parallel=3, max_new_tokens=12, seed=4)
    assert [its.text for its in results] == [tiny.generate(p, max_new_tokens=12, seed=4).text for p in PROMPTS]
    assert tiny.generate_batch([]) == []
    with pytest.raises(ValueError, match="the prompt has 513 tokens, the context holds 512; shorten it or choose"):
        tiny.generate_batch([*PROMPTS, [1] * 513], max_new_tokens=12)
    with pytest.raises(ValueError, match="parallel"):
        tiny.generate_batch(PROMPTS, parallel=0)


def test_an_error_of_one_is_its_own(tmp_path: Path, tiny: Engine) -> None:
    """The bundle of a token that one of them says is damaged."""
    prompts = PROMPTS[:4]
    alone = [tiny.generate(prompt, max_new_tokens=16, temperature=0) for prompt in prompts]
    said = [
        set(its.token_ids) | set(tiny.requests.prompts.encode(p, first=True))
        for p, its in zip(prompts, alone, strict=True)
    ]
    bad, victim = next(
        (token, index)
        for index, its in enumerate(alone)
        for token in its.token_ids[:-1]
        if token not in tiny.requests.prompts.encode(prompts[index], first=True)
        and all(token not in other for other in said if other is not said[index])
    )
    shutil.copytree(PACKAGE, tmp_path / "package")
    rom = tmp_path / "package" / "memory.rom"
    info = _core.Rom(rom).info
    with rom.open("r+b") as file:
        file.seek(info.file_bytes - (info.entries - bad) * info.bundle_stride)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 255]))
    engine = Engine(tmp_path / "package", threads=2)
    scheduler = Scheduler(engine.session, engine.prefix_cache, parallel=4)
    ends = Ends(len(prompts))
    for index, prompt in enumerate(prompts):
        request = engine.requests.text(prompt, first=True, whole=True, max_new_tokens=16, temperature=0)
        scheduler.submit(request, lambda event, index=index: ends.deliver(index, event))
    for index, end in enumerate(ends.wait()):
        if index == victim:
            assert isinstance(end, PackageError)
            assert f"bundle {bad}" in str(end)
        else:
            assert isinstance(end, GenerationResult)
            assert end.text == alone[index].text
    scheduler.close()
