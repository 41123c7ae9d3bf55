"""Log-probabilities, penalties and biases of an engine's generations, against numpy on the logits of the whole text."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meki import AsyncEngine, Engine, GenerationResult
from meki.cli.run import main as run

PROMPT = "The keeper"
# Of the sum, 3e-6, and of logits that are computed in a prompt's chunk here and one by one there: float32 products in
# another order differ by some 1e-6 of logits below 10.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def plain(package: Path) -> Engine:
    """With a cache that does not round: a chunk and single steps see the same keys and values."""
    return Engine(package, threads=1, kv_type="float32")


def logits_of(engine: Engine, result: GenerationResult) -> np.ndarray:
    """float32 [new tokens, vocab_size]: those that each token was chosen from."""
    prompt = engine.tokenizer.encode(PROMPT).ids
    return engine.logits(prompt + result.token_ids, start=len(prompt) - 1)[:-1]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def check(engine: Engine, result: GenerationResult, count: int) -> None:
    expected = log_softmax(logits_of(engine, result))
    assert result.logprobs is not None and len(result.logprobs) == len(result.token_ids)
    for token_id, row, token in zip(result.token_ids, expected, result.logprobs, strict=True):
        assert token.token_id == token_id
        assert token.logprob == pytest.approx(row[token_id], abs=TOLERANCE)
        assert len({other.token_id for other in token.top}) == len(token.top) == count
        values = [other.logprob for other in token.top]
        assert values == sorted(values, reverse=True)
        np.testing.assert_allclose(values, np.sort(row)[::-1][:count], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(values, row[[other.token_id for other in token.top]], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.5, "top_k": 30, "repetition_penalty": 1.5, "logit_bias": {5: 3.0}},
        {"presence_penalty": 2, "frequency_penalty": 2},
    ],
    ids=["greedy", "sampled", "penalties"],
)
def test_they_are_those_of_the_models_own_logits(plain: Engine, count: int, options: dict[str, Any]) -> None:
    result = plain.generate(PROMPT, logprobs=count, seed=3, max_new_tokens=12, **options)
    check(plain, result, count)
    without = plain.generate(PROMPT, seed=3, max_new_tokens=12, **options)
    assert (without.token_ids, without.logprobs) == (result.token_ids, None)


def test_what_a_grammar_forbids_has_a_probability_all_the_same(plain: Engine) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'meki[structured]'")
    result = plain.generate(PROMPT, regex="[0-9]{4}", temperature=0, logprobs=3)
    assert result.token_ids
    check(plain, result, 3)


def test_the_text_is_that_of_the_tokens(plain: Engine) -> None:
    result = plain.generate(PROMPT, seed=5, temperature=1.2, max_new_tokens=40, logprobs=2)
    assert result.logprobs is not None
    text = b"".join(token.text for token in result.logprobs).decode(errors="replace")
    # Bytes that are no characters become U+FFFD, of which a decoder of the whole may make fewer or more.
    assert text.replace("\ufffd", "") == result.text.replace("\ufffd", "")
    known = {token.token_id: token.text for token in result.logprobs}
    assert all(other.text == known.get(other.token_id, other.text) for token in result.logprobs for other in token.top)


def test_a_stream_tells_them_as_it_goes(plain: Engine) -> None:
    options: dict[str, Any] = {"seed": 5, "max_new_tokens": 30, "logprobs": 1, "stop": "zqx"}
    stream = plain.stream(PROMPT, **options)
    live, lengths = stream.logprobs, []
    for _ in stream:
        lengths.append(len(live))
        assert len(live) == len(stream.result.token_ids)
    assert lengths == sorted(set(lengths))
    assert list(live) == stream.result.logprobs == plain.generate(PROMPT, **options).logprobs
    assert list(plain.stream(PROMPT, max_new_tokens=1).logprobs) == []


def test_an_async_stream_tells_them_with_its_pieces(plain: Engine) -> None:
    async def main() -> None:
        engine = AsyncEngine(plain, parallel=2, context=128)
        try:
            options: dict[str, Any] = {"seed": 6, "temperature": 2.0, "max_new_tokens": 30, "logprobs": 2}
            expected = plain.generate(PROMPT, **options)
            other = asyncio.create_task(engine.generate(PROMPT, max_new_tokens=30, temperature=0))
            stream, text = engine.stream(PROMPT, **options), ""
            async for piece in stream:
                text += piece
                told = b"".join(token.text for token in stream.logprobs).decode(errors="replace")
                assert len(told.replace("\ufffd", "")) >= len(text.replace("\ufffd", ""))  # no text without them
            assert stream.result is not None
            assert stream.logprobs == stream.result.logprobs == expected.logprobs
            assert (await other).logprobs is None
            assert engine.stream(PROMPT).logprobs == []
        finally:
            await engine.close()

    asyncio.run(main())


def naive_logits(engine: Engine, made: list[int], **options: Any) -> np.ndarray:
    """float64 [vocab_size], behind the prompt and what is made: as docs/python.md words the options."""
    sequence = [*engine.tokenizer.encode(PROMPT).ids, *made]
    logits = engine.logits(sequence)[-1].astype(np.float64)
    repetition = options.get("repetition_penalty", 1.0)
    for token_id in set(sequence):
        logits[token_id] *= repetition if logits[token_id] < 0 else 1 / repetition
    for token_id, times in Counter(made).items():
        logits[token_id] -= options.get("presence_penalty", 0) + options.get("frequency_penalty", 0) * times
    for token_id, bias in options.get("logit_bias", {}).items():
        logits[token_id] += bias
    return logits


numbers = st.floats(-2, 2)


@settings(max_examples=15, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "presence_penalty": numbers,
            "frequency_penalty": numbers,
            "repetition_penalty": st.floats(0.5, 2),
            "logit_bias": st.dictionaries(st.integers(0, 299), st.floats(-100, 100), max_size=5),
        },
    )
)
def test_penalties_and_biases_are_those_of_a_naive_loop(plain: Engine, options: dict[str, Any]) -> None:
    result = plain.generate(PROMPT, temperature=0, max_new_tokens=10, ignore_eos=True, logprobs=2, **options)
    assert len(result.token_ids) == 10
    for at, token_id in enumerate(result.token_ids):
        logits = naive_logits(plain, result.token_ids[:at], **options)
        # The greatest, or nearly: the engine adds in float32, where 1e-5 is the place of 100, and see TOLERANCE.
        assert logits[token_id] >= logits.max() - TOLERANCE


def test_tokens_of_the_prompt_are_not_penalised(plain: Engine) -> None:
    first = plain.generate(PROMPT, temperature=0, max_new_tokens=1).token_ids
    prompt = [*plain.tokenizer.encode(PROMPT).ids]
    session = plain.session()
    for _ in range(3):  # nor those of an earlier generation of the session
        session.rewind(0)
        assert session.generate(prompt, temperature=0, max_new_tokens=1, presence_penalty=2).token_ids == first


def test_a_bias_forces_and_forbids(plain: Engine) -> None:
    result = plain.generate(PROMPT, seed=1, max_new_tokens=5, logit_bias={7: 100})
    assert result.token_ids == [7] * 5
    usual = plain.generate(PROMPT, temperature=0, max_new_tokens=1).token_ids[0]
    assert usual not in plain.generate(PROMPT, temperature=0, max_new_tokens=5, logit_bias={usual: -100}).token_ids


def test_drafts_change_nothing(package: Path) -> None:
    engine = Engine(package, threads=1)
    prompt = PROMPT + ", " + PROMPT + ", " + PROMPT
    options: dict[str, Any] = {"max_new_tokens": 40, "logprobs": 4, "presence_penalty": 0.3, "frequency_penalty": 0.1}
    for more in ({"temperature": 0, "logit_bias": {9: 4.0}}, {"temperature": 0.6, "seed": 4}):
        alone = engine.session().generate(prompt, **options, **more)
        drafted = engine.session(draft="lookup").generate(prompt, **options, **more)
        assert drafted.token_ids == alone.token_ids
        assert alone.logprobs is not None and drafted.logprobs is not None
        for one, other in zip(alone.logprobs, drafted.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE)
            assert [top.logprob for top in one.top] == pytest.approx([top.logprob for top in other.top], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"presence_penalty": 2.5}, ValueError, "presence_penalty.*from -2 to 2"),
        ({"frequency_penalty": math.nan}, ValueError, "frequency_penalty.*from -2 to 2"),
        ({"frequency_penalty": "1"}, TypeError, "frequency_penalty must be a number"),
        ({"presence_penalty": None}, TypeError, "presence_penalty must be a number"),
        ({"logit_bias": {300: 1.0}}, ValueError, "token id of logit_bias must be from 0 to 299, got 300"),
        ({"logit_bias": {-1: 1.0}}, ValueError, "token id of logit_bias must be from 0 to 299, got -1"),
        ({"logit_bias": {"5": 1.0}}, TypeError, "token id of logit_bias must be an integer"),
        ({"logit_bias": {5: "1"}}, TypeError, "logit_bias must be a number"),
        ({"logit_bias": {5: 101}}, ValueError, "logit_bias of token 5 is 101.*from -100 to 100"),
        ({"logit_bias": [5]}, TypeError, "logit_bias must be a dict"),
        ({"logit_bias": None}, TypeError, "logit_bias must be a dict"),
        ({"logprobs": 21}, ValueError, "logprobs must be from 0 to 20, got 21"),
        ({"logprobs": -1}, ValueError, "logprobs must be from 0 to 20"),
        ({"logprobs": "5"}, TypeError, "logprobs must be an integer"),
    ],
)
def test_what_cannot_be(plain: Engine, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plain.generate(PROMPT, **options)


def test_on_the_command_line(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(package), "--max-new-tokens", "6", "--seed", "3", "--logprobs", "2"]
    penalties = ["--presence-penalty", "0.5", "--frequency-penalty", "0.25"]
    assert run([*arguments, *penalties, "--json", PROMPT]) == 0
    out = json.loads(capsys.readouterr().out)
    result = Engine(package).generate(
        PROMPT, max_new_tokens=6, seed=3, logprobs=2, presence_penalty=0.5, frequency_penalty=0.25
    )
    assert out["token_ids"] == result.token_ids
    assert result.logprobs is not None
    for printed, token in zip(out["logprobs"], result.logprobs, strict=True):
        assert (printed["token_id"], bytes(printed["bytes"])) == (token.token_id, token.text)
        assert printed["logprob"] == token.logprob
        assert printed["text"] == token.text.decode(errors="replace")
        assert [other["token_id"] for other in printed["top"]] == [other.token_id for other in token.top]
    assert run([*arguments, PROMPT]) == 2
    assert "--logprobs is a part of the JSON object; add --json" in capsys.readouterr().err
