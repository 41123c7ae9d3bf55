"""Engine and Session on a small random package. The tests' reference is `Engine.logits`, which the tests of the models
compare with PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from meki import Engine, _core

PROMPT = "Once upon a time"


def assert_greedy(engine: Engine, tokens: list[int], prompt_length: int) -> None:
    """Every token after the prompt was the most probable one. Prefill and decode sum in different orders, so the best
    two may swap when they are this close: 1e-3 is far below the spread of the logits (about 1)."""
    logits = engine.logits(tokens)
    assert np.std(logits) > 0.1
    for position in range(prompt_length, len(tokens)):
        row = logits[position - 1]
        assert row[tokens[position]] >= row.max() - 1e-3


def test_greedy_text_is_what_the_logits_say(endless: Engine) -> None:
    result = endless.generate(PROMPT, max_new_tokens=24, temperature=0)
    prompt = endless.tokenizer.encode(PROMPT).ids
    assert len(result.token_ids) == 24
    assert_greedy(endless, prompt + result.token_ids, len(prompt))
    assert result.text == endless.tokenizer.decode(result.token_ids)
    assert result.finish_reason == "length"


def test_stats_count_this_generation(endless: Engine) -> None:
    session = endless.session()
    session.generate(PROMPT, max_new_tokens=9)
    stats = session.generate(" and a day", max_new_tokens=12, seed=5).stats
    prompt_tokens = len(endless.tokenizer.encode(" and a day").ids)
    assert (stats.prompt_tokens, stats.new_tokens, stats.seed) == (prompt_tokens, 12, 5)
    assert stats.rom_access == "pread"
    # One bundle for each of the 11 decode steps, at least one for the prompt; no token is read twice for one step.
    assert 12 <= stats.rom_requests <= 11 + prompt_tokens + 1
    assert 0 <= stats.rom_hits <= stats.rom_requests
    assert (stats.rom_bytes > 0) == (stats.rom_hits < stats.rom_requests)
    for measured in (stats.time_to_first_token_s, stats.prefill_tokens_per_s, stats.decode_tokens_per_s):
        assert measured is not None and measured > 0
    assert stats.stall_us_p50 is not None and stats.stall_us_p99 is not None
    assert 0 <= stats.stall_us_p50 <= stats.stall_us_p99
    assert stats.resident_bytes is not None and stats.resident_bytes > 1_000_000


def test_what_was_not_measured_is_none(endless: Engine) -> None:
    stats = endless.generate(PROMPT, max_new_tokens=1).stats  # its one token comes from the prefill
    assert stats.time_to_first_token_s is not None
    assert (stats.decode_tokens_per_s, stats.stall_us_p50, stats.stall_us_p99) == (None, None, None)


def test_same_seed_same_text(endless: Engine) -> None:
    first = endless.generate(PROMPT, max_new_tokens=16, temperature=1.5, top_p=1.0, seed=11)
    assert endless.generate(PROMPT, max_new_tokens=16, temperature=1.5, top_p=1.0, seed=11).token_ids == first.token_ids
    assert endless.generate(PROMPT, max_new_tokens=16, temperature=1.5, top_p=1.0, seed=12).token_ids != first.token_ids


def test_without_a_seed_the_stats_tell_it(endless: Engine) -> None:
    options = {"max_new_tokens": 16, "temperature": 1.5, "top_p": 1.0}
    one, two = (endless.generate(PROMPT, **options) for _ in range(2))
    assert one.stats.seed != two.stats.seed  # 32 random bits
    assert endless.generate(PROMPT, **options, seed=one.stats.seed).token_ids == one.token_ids


def test_prefetch_and_access_change_no_token(endless: Engine) -> None:
    options = {"max_new_tokens": 16, "seed": 3}
    expected = endless.generate(PROMPT, **options).token_ids
    assert endless.generate(PROMPT, **options, prefetch=False).token_ids == expected
    for access in ("pread", "direct"):
        other = Engine(endless.path, threads=1, rom_access=access)
        assert other.generate(PROMPT, **options).token_ids == expected


def test_stream_is_generate_in_pieces(endless: Engine) -> None:
    expected = endless.generate(PROMPT, max_new_tokens=32, seed=2)
    stream = endless.stream(PROMPT, max_new_tokens=32, seed=2)
    pieces = list(stream)
    assert all(pieces)
    assert "".join(pieces) == stream.result.text == expected.text
    assert stream.result.token_ids == expected.token_ids
    assert stream.result.finish_reason == "length"


def test_stop_strings_end_the_text(endless: Engine) -> None:
    options = {"max_new_tokens": 48, "seed": 4, "temperature": 1.0}
    whole = endless.generate(PROMPT, **options)
    decode = endless.tokenizer.decode
    for start in range(2, len(whole.text) - 3, 5):
        stop = whole.text[start : start + 3]
        result = endless.generate(PROMPT, **options, stop=[stop, "never in the text"])
        assert result.finish_reason == "stop"
        assert result.text == whole.text[: whole.text.index(stop)]
        assert result.token_ids == whole.token_ids[: len(result.token_ids)]
        assert stop in decode(result.token_ids)
        before = decode(result.token_ids[:-1])
        assert stop not in before or before.endswith("\ufffd")  # what may be half a character waits for the next token
    assert endless.generate(PROMPT, **options, stop="never in the text").text == whole.text


def test_a_stop_string_in_the_flushed_end(endless: Engine) -> None:
    """Text that was held back until the generation ended is searched too."""
    options = {"temperature": 0, "max_new_tokens": 40}
    ids = endless.generate(PROMPT, **options).token_ids
    decode = endless.tokenizer.decode
    cut = next((n for n in range(1, len(ids)) if decode(ids[:n]).endswith("\ufffd")), None)
    if cut is None:
        pytest.fail("the random model's text has no broken character any more; choose another prompt")
    result = endless.generate(PROMPT, temperature=0, max_new_tokens=cut, stop="\ufffd")
    assert result.finish_reason == "stop"
    assert result.text == decode(ids[:cut]).split("\ufffd")[0]


def test_the_end_token_ends_the_text(endless: Engine) -> None:
    ids = endless.generate(PROMPT, max_new_tokens=8, temperature=0).token_ids
    manifest = json.loads((endless.path / "manifest.json").read_text())
    manifest["tokenizer"]["eos_token_ids"] = [ids[5]]
    (endless.path / "manifest.json").write_text(json.dumps(manifest))
    result = Engine(endless.path, threads=1).generate(PROMPT, max_new_tokens=8, temperature=0)
    assert result.finish_reason == "eos"
    assert result.token_ids == ids[: ids.index(ids[5])]


def test_the_context_ends_the_text(endless: Engine) -> None:
    prompt = len(endless.tokenizer.encode(PROMPT).ids)
    result = endless.generate(PROMPT, max_new_tokens=0, context=prompt + 7)
    assert (result.finish_reason, len(result.token_ids)) == ("context", 7)


def test_a_prompt_longer_than_the_context_names_both(engine: Engine) -> None:
    text = "a b " * 200
    tokens = len(engine.tokenizer.encode(text).ids)
    with pytest.raises(ValueError, match=f"{tokens}.*{engine.context}"):
        engine.generate(text)


def test_turns_share_one_sequence(endless: Engine) -> None:
    session = endless.session()
    encode = endless.tokenizer.encode
    first = session.generate(PROMPT, max_new_tokens=7, temperature=0)
    second = session.generate(" The fox", max_new_tokens=5, temperature=0)
    third = session.generate("", max_new_tokens=4, temperature=0)  # goes on
    prompt, turn = encode(PROMPT).ids, encode(" The fox").ids
    assert session.tokens == prompt + first.token_ids + turn + second.token_ids + third.token_ids
    assert_greedy(endless, session.tokens[: len(prompt) + 7], len(prompt))
    assert_greedy(endless, session.tokens, len(prompt) + 7 + len(turn))
    assert third.stats.prompt_tokens == 0


def test_an_abandoned_stream_leaves_a_usable_session(endless: Engine) -> None:
    session = endless.session()
    stream = session.stream(PROMPT, max_new_tokens=50, temperature=0)
    next(stream)
    second = session.generate(" The fox", max_new_tokens=5, temperature=0)
    assert list(stream) == []  # ended by the second generation
    assert stream.result.finish_reason is None
    before = len(session.tokens) - 5
    assert session.tokens[before:] == second.token_ids
    assert_greedy(endless, session.tokens, before)


def test_a_closed_stream_has_ended(endless: Engine) -> None:
    stream = endless.stream(PROMPT, max_new_tokens=50, seed=1)
    text = next(stream) + next(stream)
    stream.close()
    assert list(stream) == []
    assert (stream.result.text, stream.result.finish_reason) == (text, None)


def test_a_refused_call_changes_nothing(endless: Engine) -> None:
    session, untouched = endless.session(), endless.session()
    for one in (session, untouched):
        one.generate(PROMPT, max_new_tokens=6, temperature=0)
    with pytest.raises(ValueError, match="temperature"):
        session.generate(" The fox", temperature=-1)
    with pytest.raises(ValueError, match="context"):
        session.generate("a b " * 200)
    assert session.tokens == untouched.tokens
    after = [one.generate(" said", max_new_tokens=6, temperature=0).token_ids for one in (session, untouched)]
    assert after[0] == after[1]


def test_a_rejected_call_leaves_the_stream_running(engine: Engine) -> None:
    session = engine.session()
    stream = session.stream("The old", max_new_tokens=12, temperature=0)
    next(stream)
    with pytest.raises(ValueError, match="temperature"):
        session.stream("and", temperature=-1)
    with pytest.raises(ValueError, match="vocabulary"):
        session.logits([2**40])
    with pytest.raises(ValueError, match="context"):
        session.stream("and " * 500)
    for _ in stream:
        pass
    assert stream.result.text == engine.generate("The old", max_new_tokens=12, temperature=0).text


def test_threads_get_what_they_get_alone(endless: Engine) -> None:
    def generate(seed: int) -> list[int]:
        return endless.generate(PROMPT, max_new_tokens=24, seed=seed).token_ids

    alone = [generate(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(generate, range(8))) == alone


def test_logits(endless: Engine) -> None:
    ids = [5, 6, 7, 8]
    logits = endless.logits(ids)
    assert (logits.dtype, logits.shape) == (np.float32, (4, endless.vocab_size))
    # One token at a time sums in another order than all at once: float32 noise, far below the logits' spread of 1.
    session = endless.session()
    np.testing.assert_allclose(np.concatenate([session.logits([token_id]) for token_id in ids]), logits, atol=1e-4)


def test_logits_after_a_generation_are_those_asked_for(endless: Engine) -> None:
    session = endless.session()
    session.generate(PROMPT, max_new_tokens=3)
    logits = session.logits([9, 10])
    np.testing.assert_allclose(logits, endless.logits(session.tokens)[-2:], atol=1e-4)


def test_logits_from_a_position_on(endless: Engine) -> None:
    ids = [5, 6, 7, 8, 9]
    logits = endless.logits(ids)
    for start in range(len(ids)):
        # Fewer rows of the output head at once may sum in another order: float32 noise, as above.
        np.testing.assert_allclose(endless.logits(ids, start=start), logits[start:], atol=1e-4)
    session = endless.session()
    session.logits(ids[:2])
    np.testing.assert_allclose(session.logits(ids[2:], 1), logits[3:], atol=1e-4)
    assert session.tokens == ids


def test_a_rewound_session_goes_on_from_there(endless: Engine) -> None:
    session = endless.session()
    stream = session.stream([5, 6, 7, 8], max_new_tokens=9, temperature=0)
    next(stream)
    session.rewind(3)
    assert session.tokens == [5, 6, 7]
    assert list(stream) == []  # it has ended
    np.testing.assert_allclose(session.logits([9]), endless.logits([5, 6, 7, 9], start=3), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="length must be from 0 to 4, got 5"):
        session.rewind(5)
    assert session.tokens == [5, 6, 7, 9]


def test_prompting_ends_a_running_generation(engine: Engine) -> None:
    core = _core.Session(engine._core, _core.SessionOptions(context=8))
    core.append([1, 2, 3])
    core.start(_core.SamplingOptions(seed=1), 0)
    assert core.next() is not None
    core.append([4] * 4)  # the context is full
    with pytest.raises(ValueError, match="no generation"):
        core.next()
    with pytest.raises(ValueError, match="context holds 8"):
        core.append([5])


def test_a_dense_model_waits_for_no_rows(make_package: Callable[..., Path]) -> None:
    stats = Engine(make_package(memory_dim=0)).generate("The old", max_new_tokens=5, temperature=0).stats
    assert stats.stall_us_p50 is None and stats.rom_access is None
    assert stats.decode_tokens_per_s is not None
