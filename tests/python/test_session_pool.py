"""Sessions and states that requests share: less is computed, and nothing else changes."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meki import AsyncEngine, Engine, GenerationResult, Session, _core, session_pool
from meki.prefix_cache import Kept, PrefixCache, common_prefix, pack
from meki.session_pool import SessionPool

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
TOKENS = st.lists(st.integers(0, 2), max_size=6)


def naive_prefix(first: list[int], second: list[int]) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


@given(start=st.lists(st.integers(0, 2**63 - 1), max_size=40), first=TOKENS, second=TOKENS)
def test_common_prefix(start: list[int], first: list[int], second: list[int]) -> None:
    assert common_prefix(start + first, start + second) == naive_prefix(start + first, start + second)


def kept(tokens: list[int], size: int, common: bool = False) -> Kept:
    """Takes `size` bytes."""
    return Kept(pack(tokens), SimpleNamespace(state=memoryview(bytes(size - 8 * len(tokens)))), common)


@settings(max_examples=200)
@given(
    budget=st.integers(0, 400),
    moves=st.lists(st.tuples(TOKENS, st.sampled_from([60, 100, 150, 350]), st.booleans(), st.booleans()), max_size=12),
)
def test_what_was_used_last_is_kept(budget: int, moves: list[tuple[list[int], int, bool, bool]]) -> None:
    """Against a list in order of use."""
    cache, naive = PrefixCache(budget), list[tuple[list[int], int, bool]]()
    for tokens, size, common, put in moves:
        if put:
            cache.put(kept(tokens, size, common))
            if size <= budget:
                naive = [its for its in naive if its[0] != tokens]
                while sum(its[1] for its in naive) + size > budget:
                    del naive[0]
                naive.append((tokens, size, common))
        else:
            shared, best = cache.longest(pack(tokens))
            assert shared == max((naive_prefix(its[0], tokens) for its in naive), default=0)
            if best is None:
                continue
            entry = next(its for its in naive if pack(its[0]) == best.sequence)
            assert naive_prefix(entry[0], tokens) == shared
            cache.take(best, shared)
            naive.remove(entry)
            if entry[2] or shared < len(entry[0]):
                naive.append(entry)
        assert cache.size == sum(its[1] for its in naive) <= budget


def test_a_snapshot_of_a_window_serves_only_what_goes_on_at_its_end() -> None:
    cache = PrefixCache(1000, window=4)
    cache.put(kept([1, 2, 3, 4, 5, 6], 100))
    cache.put(kept([1, 2, 3], 100))
    assert cache.longest(pack([1, 2, 3, 4, 5, 6, 7]))[0] == 6
    assert cache.longest(pack([1, 2, 3, 4, 5, 9]))[0] == 5  # its last token is computed again
    assert cache.longest(pack([1, 2, 3, 4, 9]))[0] == 3
    assert cache.longest(pack([1, 9]))[0] == 1


@functools.cache
def opened(package: Path) -> Engine:
    return Engine(package, threads=1, kv_type="float32")


@pytest.fixture(scope="module", autouse=True)
def close_engines() -> Iterator[None]:
    yield
    opened.cache_clear()


def one_by_one(engine: Engine) -> Session:
    """Computes every token in a step of its own: results are then equal to the last bit."""
    session = engine.session(context=100)
    session._core = _core.Session(engine._core, _core.SessionOptions(chunk=1, context=100))
    return session


PARTS = [[5, 6, 7], [8, 9] * 6, [10] * 20, [11, 12, 13, 14], [15]]


@pytest.mark.parametrize("package", ["chat_package", "ngrams_chat_package"])
@settings(deadline=None, max_examples=40)
@given(
    most=st.integers(1, 3),
    budget=st.sampled_from([0, 150_000, 1 << 30]),
    prompts=st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4), min_size=2, max_size=7),
    out=st.integers(0, 2),
)
def test_whatever_was_computed_is_reused_and_changes_nothing(
    request: pytest.FixtureRequest, package: str, most: int, budget: int, prompts: list[list[list[int]]], out: int
) -> None:
    """With memory enough, each prompt finds its longest beginning among all prompts before it."""
    engine = opened(request.getfixturevalue(package))
    cache = PrefixCache(budget)
    pool = SessionPool(cache, most)
    patch = pytest.MonkeyPatch()
    patch.setattr(session_pool, "WORTH", 1)
    try:
        seen: list[list[int]] = []
        running: list[Session] = []  # up to `out` sessions are not given back at once
        for parts in prompts:
            tokens = [token for part in parts for token in part]
            session = pool.take(tokens, lambda: one_by_one(engine), running)
            assert session is not None and session not in running
            its = session.run(engine.requests.text(tokens, first=True, whole=True, **GREEDY)).finish()
            assert its.token_ids == one_by_one(engine).generate(tokens, **GREEDY).token_ids
            assert session.tokens == tokens + its.token_ids
            if budget == 1 << 30:
                expected = max((naive_prefix(before, tokens[:-1]) for before in seen), default=0)
                assert its.stats.cached_tokens >= expected
            seen.append(tokens)
            running.append(session)
            while len(running) > out:
                pool.give(running.pop(0))
            assert cache.size <= budget
    finally:
        patch.undo()


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


FIRST = user("The old lighthouse keeper counted the ships and wrote their names in a blue book. " * 3)
SECOND = user("In the morning the ship was there, and on it a cat that looked at the lighthouse. " * 3)


def alternate(engine: Engine) -> list[GenerationResult]:
    """Two conversations of two turns each, in turns."""
    results, conversations = [], ([FIRST], [SECOND])
    for _ in range(2):
        for messages in conversations:
            results.append(engine.chat(messages, **GREEDY))
            messages += [{"role": "assistant", "content": results[-1].text}, user("And then?")]
    return results


def test_conversations_alternate_without_being_computed_again(chat_package: Path) -> None:
    results = alternate(Engine(chat_package, threads=1, kv_type="float32"))
    assert max(result.stats.cached_tokens for result in results[:2]) < 5  # what the template begins every chat with
    for before, after in zip(results[:2], results[2:], strict=True):
        assert after.stats.cached_tokens >= before.stats.prompt_tokens - 1
    without = alternate(Engine(chat_package, threads=1, kv_type="float32", prefix_cache=0))
    assert [result.token_ids for result in without] == [result.token_ids for result in results]
    assert max(result.stats.cached_tokens for result in without) < 5


def test_options_of_a_session_do_not_matter_for_its_state(chat_package: Path) -> None:
    engine = Engine(chat_package, threads=1, kv_type="float32")
    first = engine.chat([FIRST], **GREEDY)
    again = engine.chat([FIRST], context=500, draft="lookup", **GREEDY)
    assert again.stats.cached_tokens == first.stats.prompt_tokens - 1
    assert again.token_ids == first.token_ids


def test_a_question_asked_again_gives_up_its_answer_alone(chat_package: Path) -> None:
    engine = Engine(chat_package, threads=1, kv_type="float32")
    for seed in range(3):
        engine.chat([FIRST], temperature=1.0, seed=seed, max_new_tokens=100, ignore_eos=True)
    assert engine.prefix_cache.size == 0


@pytest.mark.parametrize("parallel", [1, 3])
def test_requests_that_begin_alike_compute_it_once(chat_package: Path, parallel: int) -> None:
    engine = Engine(chat_package, threads=1, kv_type="float32")
    begin = [int(token) for token in range(20, 220)]
    ends = [[token] * 5 for token in range(1, 8)]
    expected = [engine.generate(begin + end, **GREEDY).token_ids for end in ends]

    async def ask() -> list[GenerationResult]:
        asked = AsyncEngine(engine, parallel=parallel)
        try:
            return await asyncio.gather(*(asked.generate(begin + end, **GREEDY) for end in ends))
        finally:
            await asked.close()

    results = asyncio.run(ask())
    assert [result.token_ids for result in results] == expected
    cached = sorted(result.stats.cached_tokens for result in results)
    assert cached[0] == 0 and cached[1] >= len(begin)


def test_a_session_that_runs_is_not_waited_for_twice(chat_package: Path) -> None:
    """It is about to compute what two have in common: the second waits, and then copies that."""
    engine = opened(chat_package)
    pool = SessionPool(PrefixCache(1 << 30), 2)
    tokens = list(range(20, 110))
    first = pool.take(tokens, lambda: one_by_one(engine))
    assert first is not None
    stream = first.run(engine.requests.text(tokens, first=True, whole=True, **GREEDY))
    other = [*tokens[:60], 7, 8]
    assert pool.take(other, lambda: one_by_one(engine), [first]) is None
    stream.advance()
    second = pool.take(other, lambda: one_by_one(engine), [first])
    assert second is not None and second is not first
    assert second.computed_tokens == tokens[:60]
    assert stream.finish().token_ids == one_by_one(engine).generate(tokens, **GREEDY).token_ids


def test_threads_share_what_is_kept(chat_package: Path) -> None:
    engine = Engine(chat_package, threads=1, kv_type="float32", prefix_cache=1)
    messages = [[user(f"{word} " * 60), FIRST, SECOND][: 1 + turn % 3] for turn, word in enumerate("abcdefgh")]
    expected = [engine.session().chat(its, **GREEDY).token_ids for its in messages]
    got: list[list[int]] = [[] for _ in messages]

    def chat(start: int) -> None:
        for index in range(start, len(messages), 2):
            for _ in range(3):
                got[index] = engine.chat(messages[index], **GREEDY).token_ids

    threads = [threading.Thread(target=chat, args=(start,)) for start in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected
    assert engine.prefix_cache.size <= 1 << 20


def test_a_refused_request_loses_nothing(chat_package: Path) -> None:
    engine = Engine(chat_package, threads=1, kv_type="float32")
    first = engine.chat([FIRST], **GREEDY)
    with pytest.raises(ValueError, match="the context holds"):
        engine.chat([user("a b " * 2000)], **GREEDY)
    assert engine.chat([FIRST], **GREEDY).stats.cached_tokens == first.stats.prompt_tokens - 1


@pytest.mark.parametrize("value", [-1, 2**21, 1.5, "1"])
def test_bad_budgets(chat_package: Path, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="prefix_cache must be"):
        Engine(chat_package, prefix_cache=value)
