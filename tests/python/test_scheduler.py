"""Who waits, who runs and who is told, where something goes wrong."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from queue import SimpleQueue
from typing import Any

import pytest

from meki import AsyncEngine, Engine
from meki.scheduler import Event, Piece, QueueFullError, Scheduler

PROMPT = "Once upon a time there was a little fox who lived in a wood. " * 6


@pytest.fixture(scope="module")
def tiny() -> Engine:
    return Engine("meki-tiny", threads=1)


def last(events: SimpleQueue[Event]) -> Event:
    while isinstance(event := events.get(timeout=60), Piece):
        pass
    return event


def request(engine: Engine, prompt: str = "Once", **options: Any) -> Any:
    return engine.requests.text(prompt, first=True, whole=True, **{"max_new_tokens": 8, "temperature": 0, **options})


def test_what_is_kept_may_be_longer_than_a_session(tiny: Engine) -> None:
    """The cache of beginnings is the engine's, of schedulers with any context."""

    async def run() -> None:
        async with AsyncEngine(tiny, parallel=1, context=512) as large:
            await large.generate(PROMPT, max_new_tokens=4)
            await large.generate("Something else. " * 40, max_new_tokens=4)
        async with AsyncEngine(tiny, parallel=1, context=96) as small:
            for _ in range(3):
                result = await small.generate(PROMPT[:200], max_new_tokens=4, temperature=0)
                assert result.token_ids == tiny.generate(PROMPT[:200], max_new_tokens=4, temperature=0).token_ids

    asyncio.run(run())


def test_a_stream_is_closed_while_another_task_reads_it(tiny: Engine) -> None:
    async def run() -> None:
        async with AsyncEngine(tiny, parallel=1) as runner:
            stream = runner.stream("Once", max_new_tokens=0, ignore_eos=True)
            await anext(stream)
            pieces: list[str] = []

            async def read() -> None:
                pieces.extend([piece async for piece in stream])

            reading = asyncio.create_task(read())
            await asyncio.sleep(0.01)
            await asyncio.wait_for(stream.aclose(), 60)
            await asyncio.wait_for(reading, 60)
            assert stream.result is not None and stream.result.finish_reason is None

    asyncio.run(run())


def test_who_forgets_to_close_ends_all_the_same() -> None:
    code = (
        "import asyncio\nfrom meki import AsyncEngine, Engine\n"
        "async def main():\n"
        "    runner = AsyncEngine(Engine('meki-tiny', threads=1))\n"
        "    async for piece in runner.stream('Once', max_new_tokens=0, ignore_eos=True): break\n"
        "asyncio.run(main())\n"
    )
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_only_who_has_no_session_waits(tiny: Engine) -> None:
    scheduler = Scheduler(tiny.session, tiny.prefix_cache, parallel=2, waiting=0)
    try:
        events: SimpleQueue[Event] = SimpleQueue()
        jobs = [scheduler.submit(request(tiny, max_new_tokens=0, ignore_eos=True), events.put) for _ in range(2)]
        with pytest.raises(QueueFullError):
            scheduler.submit(request(tiny), events.put)
        for job in jobs:
            scheduler.cancel(job)
    finally:
        scheduler.close()


def test_a_failure_of_nobody_in_particular_is_told_to_all(tiny: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(tiny.session, tiny.prefix_cache, parallel=1, waiting=4)
    monkeypatch.setattr(scheduler._pool, "give", lambda session: 1 / 0)
    ends: list[SimpleQueue[Event]] = [SimpleQueue() for _ in range(3)]
    jobs = [scheduler.submit(request(tiny), events.put) for events in ends]
    assert len(jobs) == 3
    assert last(ends[0]).token_ids == tiny.generate("Once", max_new_tokens=8, temperature=0).token_ids  # type: ignore[union-attr]
    for events in ends[1:]:
        assert isinstance(last(events), ZeroDivisionError)
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.submit(request(tiny), ends[0].put)
    scheduler.close()


def test_in_a_forked_process(tiny: Engine) -> None:
    scheduler = Scheduler(tiny.session, tiny.prefix_cache)
    asked = request(tiny)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"nothing"
        try:
            scheduler.submit(asked, lambda event: None)
        except RuntimeError as error:
            said = str(error).encode()
        os.write(write, said)
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert b"forked" in pipe.read()
    scheduler.close()


def test_a_prompt_that_cannot_be_leaves_the_session_as_it_was(tiny: Engine) -> None:
    session = tiny.session()
    session.generate("Once upon", max_new_tokens=3)
    before = session.tokens
    with pytest.raises(ValueError, match="token id"):
        session.run(tiny.requests.text([1, tiny.vocab_size], first=True, whole=True))
    assert session.tokens == before
