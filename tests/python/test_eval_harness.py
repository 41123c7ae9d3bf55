"""The engine as a model of the lm-evaluation-harness, against a prefill of each request from scratch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meki import Engine, Session
from meki.evaluation.perplexity import windows

pytest.importorskip("lm_eval", reason="needs the harness: pip install 'meki[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows

from meki.evaluation.harness import MekiLM

STORY = "The old lighthouse keeper counted the ships and wrote their names in a blue book."
QUESTIONS = [
    ("In the morning the ship was", [" there", " blue", " a cat that looked at the lighthouse"]),
    ("A small ship came in", [" the night", " there", " a book"]),
]


@pytest.fixture(scope="module")
def exact(make_package: Callable[..., Path]) -> Engine:
    return Engine(make_package(), threads=1, kv_type="float32")


@pytest.fixture
def model(exact: Engine) -> MekiLM:
    return MekiLM(exact)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def naive(engine: Engine, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The log-likelihood of a continuation, and whether it is what greedy decoding would say."""
    logits = engine.logits([*context, *continuation]).astype(np.float64)[len(context) - 1 : -1]
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    score = sum(row[token] for row, token in zip(logs, continuation, strict=True))
    return float(score), logits.argmax(axis=1).tolist() == continuation


def encoded(engine: Engine, context: str, continuation: str) -> tuple[list[int], list[int]]:
    first = engine.tokenizer.encode(context).ids
    return first, engine.tokenizer.encode(context + continuation).ids[len(first) :]


def assert_answers(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    """Scores of some 20 tokens, each within 1e-5: sums in float32 in another order."""
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], rtol=0, atol=5e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@given(st.integers(0, 60), st.integers(1, 20))
def test_windows_are_the_harness_s_own(count: int, size: int) -> None:
    theirs = get_rolling_token_windows(list(range(count)), prefix_token=-1, max_seq_len=size, context_len=1)
    expected = [([*given, *predicted[-1:]], len(given) + 1 - len(predicted)) for given, predicted in theirs]
    assert list(windows(list(range(count)), -1, size)) == expected


def test_loglikelihoods(model: MekiLM, exact: Engine) -> None:
    pairs = [(f"{STORY}\n\n{question}", choice) for question, choices in QUESTIONS for choice in choices]
    pairs = [*pairs[::2], *pairs[1::2], pairs[0]]  # in no order, and one twice
    expected = [naive(exact, *encoded(exact, *pair)) for pair in pairs]
    assert_answers(model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True), expected)


def test_a_greedy_continuation_is_told(model: MekiLM, exact: Engine) -> None:
    said = exact.generate(STORY, temperature=0, max_new_tokens=3, ignore_eos=True)
    ids = exact.tokenizer.encode(STORY).ids
    found = model._loglikelihood_tokens([(None, ids, said.token_ids), (None, ids, [*said.token_ids[:2], 5])])
    assert [greedy for _, greedy in found] == [True, False]


def test_what_requests_have_in_common_is_computed_once(
    model: MekiLM, exact: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header before two questions of three choices, which come in turns: the header once, each question once but for
    its last token, whose logits each choice begins with."""
    header, first, second = list(range(20, 60)), [3, 4, 5, 6], [7, 8, 9]
    choices = [[11, 12], [13, 14, 15], [16]]
    pieces = [(None, [*header, *question], choice) for choice in choices for question in (first, second)]
    computed = []
    whole = Session.logits

    def logits(session: Session, token_ids: list[int], start: int = 0) -> Any:
        computed.append(len(token_ids))
        return whole(session, token_ids, start)

    monkeypatch.setattr(Session, "logits", logits)
    found = model._loglikelihood_tokens(pieces)
    monkeypatch.undo()
    questions = len(first) - 1 + len(second) - 1
    assert sum(computed) == len(header) + questions + 2 * sum(len(choice) for choice in choices)
    assert_answers(found, [naive(exact, context, choice) for _, context, choice in pieces])


def test_an_empty_context_is_the_token_that_begins_a_text(model: MekiLM, exact: Engine) -> None:
    ids = exact.tokenizer.encode("The cat").ids
    found = model.loglikelihood(requests("loglikelihood", ("", "The cat")), disable_tqdm=True)
    assert_answers(found, [naive(exact, [0], ids)])  # without a bos token, the end of the text before
    white = model._loglikelihood_tokens([(None, [], ids)])  # what is left of a context of spaces alone
    assert_answers(white, [naive(exact, [0], ids)])


def test_bos_begins_every_text_once(change_package: Callable[..., Path], exact: Engine) -> None:
    def with_bos(manifest: dict[str, Any]) -> None:
        manifest["tokenizer"]["bos_token_id"] = 0

    engine = Engine(change_package(with_bos), threads=1, kv_type="float32")
    model, begins = MekiLM(engine), engine.tokenizer.id_to_token(0)
    assert model.prefix_token_id == 0
    ids = engine.tokenizer.encode("The cat").ids
    assert model.tok_encode("The cat") == model.tok_encode(f"{begins}The cat") == [0, *ids]
    assert model.tok_encode("The cat", add_special_tokens=False) == ids
    found = model.loglikelihood(requests("loglikelihood", ("The cat", " and")), disable_tqdm=True)
    context, continuation = encoded(engine, "The cat", " and")
    assert_answers(found, [naive(exact, [0, *context], continuation)])
    (rolled,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", ("The cat",)), disable_tqdm=True)
    assert rolled == pytest.approx(naive(exact, [0], ids)[0], abs=1e-4)


def test_requests_longer_than_the_context_lose_their_beginning(exact: Engine) -> None:
    notes: list[str] = []
    model = MekiLM(exact, context=16, note=notes.append)
    long, short = list(range(30, 60)), [5, 6]
    found = model._loglikelihood_tokens(
        [(None, long, [7, 8, 9]), (None, short, [7, 8, 9]), (None, long[:14], [7, 8, 9])]
    )
    expected = [naive(exact, long[-14:], [7, 8, 9]), naive(exact, short, [7, 8, 9]), naive(exact, long[:14], [7, 8, 9])]
    assert_answers(found, expected)  # 16 tokens are given, and a 17th is predicted
    assert notes == ["1 of 3 requests do not fit the context of 16 tokens: their beginnings were left out"]
    with pytest.warns(UserWarning, match="1 of 1 requests do not fit"):
        MekiLM(exact, context=16)._loglikelihood_tokens([(None, long, [7])])


def test_a_continuation_longer_than_the_context(exact: Engine) -> None:
    with pytest.raises(ValueError, match=r"a continuation has 17 tokens, expected 1 to 16.* larger context"):
        MekiLM(exact, context=16)._loglikelihood_tokens([(None, [1], list(range(17)))])


def test_rolling_windows(exact: Engine) -> None:
    model = MekiLM(exact, context=16)
    texts = [STORY, "The cat", ""]
    found = model.loglikelihood_rolling(
        requests("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True
    )
    expected = []
    for text in texts:
        pieces = get_rolling_token_windows(exact.tokenizer.encode(text).ids, 0, 16, 1)
        parts = ((given[: len(given) + 1 - len(predicted)], predicted) for given, predicted in pieces)
        expected.append(sum(naive(exact, *part)[0] for part in parts))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert found[2] == 0


def generate(model: MekiLM, *contexts: str, **options: Any) -> list[str]:
    return model.generate_until(requests("generate_until", *((each, options) for each in contexts)), disable_tqdm=True)


def test_generated_texts_are_greedy_and_end_where_they_are_told(model: MekiLM, exact: Engine) -> None:
    contexts = [STORY, f"{STORY} The", "A small ship", STORY]
    whole = [exact.generate(context, temperature=0, max_new_tokens=12).text for context in contexts]
    assert generate(model, *contexts, until=[], max_gen_toks=12) == whole
    assert whole[0] and len(set(whole)) == 3
    stop = whole[0][3:5]
    assert generate(model, STORY, until=[stop, ""], max_gen_toks=12) == [whole[0].partition(stop)[0]]
    assert generate(model, STORY, until=stop, max_gen_toks=12) == [whole[0].partition(stop)[0]]
    assert generate(model, STORY, until=["\n\n\n"], max_gen_toks=2) == [
        exact.generate(STORY, temperature=0, max_new_tokens=2).text
    ]


def test_a_package_s_own_sampling_does_not_change_a_greedy_text(
    change_package: Callable[..., Path], model: MekiLM
) -> None:
    def opinionated(manifest: dict[str, Any]) -> None:
        manifest["sampling"] = {"temperature": 1.5, "repetition_penalty": 1.8}

    engine = Engine(change_package(opinionated), threads=1, kv_type="float32")
    assert generate(MekiLM(engine), STORY, max_gen_toks=20) == generate(model, STORY, max_gen_toks=20)


def test_samples_are_the_same_at_every_run_and_differ_among_themselves(model: MekiLM) -> None:
    first = generate(model, STORY, STORY, do_sample=True, temperature=1.0, max_gen_toks=16)
    assert first == generate(model, STORY, STORY, do_sample=True, temperature=1.0, max_gen_toks=16)
    assert first[0] != first[1]


def test_a_long_text_is_cut_to_leave_room(exact: Engine) -> None:
    notes: list[str] = []
    ids = exact.tokenizer.encode(STORY).ids
    found = generate(MekiLM(exact, context=24, note=notes.append), STORY, until=[], max_gen_toks=8)
    assert found == [exact.generate(ids[-16:], temperature=0, max_new_tokens=8).text]
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "generation option 'num_beams' is none of the engine's: temperature,"),
        ({"max_gen_toks": 128}, "128 new tokens are asked for, the context holds 128 with the text before them"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0, expected at least 1"),
    ],
)
def test_options_of_a_generation_that_cannot_be(model: MekiLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, STORY, **options)


def test_no_requests_no_answers(model: MekiLM) -> None:
    assert model.loglikelihood([], disable_tqdm=True) == []
    assert model.loglikelihood_rolling([], disable_tqdm=True) == []
    assert generate(model) == []


def test_a_model_that_nothing_begins_a_text_of(change_package: Callable[..., Path]) -> None:
    def without_end(manifest: dict[str, Any]) -> None:
        manifest["tokenizer"]["eos_token_ids"] = []

    engine = Engine(change_package(without_end), threads=1)
    with pytest.raises(ValueError, match="no token that begins a text"):
        MekiLM(engine)
