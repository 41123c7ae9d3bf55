"""TextStream on a session that says given tokens, and on an engine: where a text ends, and what its text is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tokenizers import Tokenizer

from meki import Engine, GenerationResult, _core
from meki.generation import TextStream
from meki.models.tokenizer import END_OF_STORY
from meki.options import check_options
from meki.text import Vocabulary

from .tokenizers_of_kinds import KINDS

PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 10}


class Saying:
    """Has the face of a `_core.Session`."""

    finish_reason = "length"

    def __init__(self, engine: Engine, ids: list[int]) -> None:
        self._ids: Iterator[int] = iter(ids)
        self.stats = _core.Session(engine._core, _core.SessionOptions()).stats

    def next(self) -> int | None:
        return next(self._ids, None)


@pytest.fixture
def say(engine: Engine) -> Callable[..., GenerationResult]:
    """say(prompt, *tokens, **options): what the texts or ids in `tokens` become with Llama 2's kind of tokenizer."""
    vocabulary = Vocabulary(KINDS["prepend"]())

    def result(prompt: list[str], *tokens: str, **options: Any) -> GenerationResult:
        ids, sequence = ([vocabulary.tokenizer.token_to_id(token) for token in part] for part in (tokens, prompt))
        stop_ids = [vocabulary.tokenizer.token_to_id(token) for token in options.pop("stop_tokens", ())]
        checked = check_options({**options, "stop_token_ids": stop_ids})
        core = cast(_core.Session, Saying(engine, ids))
        result = TextStream(core, vocabulary, sequence, None, len(sequence), 0, checked).finish()
        assert result.token_ids == ids[: len(result.token_ids)]
        return result

    return result


def test_a_first_space_is_part_of_text_and_stop_strings(say: Callable[..., GenerationResult]) -> None:
    assert say(["<s>", "▁the"], "▁a", "b").text == " ab"
    assert say(["<s>", "▁the", "</s>"], "▁a", "b").text == " ab"  # as after the control tokens of a chat
    result = say(["<s>", "▁the"], "▁a", "b", stop=" a")
    assert (result.text, result.finish_reason, result.stop, len(result.token_ids)) == ("", "stop", " a", 1)
    assert say(["<s>"], "▁a", "b", stop=" a").text == "ab"  # no space begins a text


def test_a_special_token_is_a_stop_string(say: Callable[..., GenerationResult]) -> None:
    said = ("▁a", "<0xC3>", "<0xA9>", "</s>", "▁ab")
    result = say(["▁the"], *said, stop="</s>")
    assert (result.text, result.finish_reason, len(result.token_ids)) == (" aé", "stop", 4)
    assert say(["▁the"], *said, stop="é</s> ").text == " a"
    result = say(["▁the"], *said, stop=["<s>", "</s>a"])
    assert (result.text, result.finish_reason) == (" aé ab", "length")


def test_stop_token_ids(say: Callable[..., GenerationResult]) -> None:
    said = ("▁a", "<0xC3>", "<0xA9>", "e", "h")
    result = say(["▁the"], *said, stop_tokens=["b", "e"])
    assert (result.text, result.finish_reason, result.stop, len(result.token_ids)) == (" aé", "stop", None, 4)
    result = say(["▁the"], *said, stop_tokens=["e"], stop="éx")  # what was held back for the stop string
    assert (result.text, result.finish_reason) == (" aé", "stop")


def with_tokenizer(kind: str, **settings: Any) -> Callable[[dict[str, Any]], None]:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["tokenizer"].update({"eos_token_ids": [], **settings})
        manifest["contents"]["tokenizer.json"] = KINDS[kind]().to_str().encode()

    return edit


@pytest.mark.parametrize("kind", ["prepend", "metaspace, first", "unigram", "byte level, prefix space"])
def test_the_texts_of_a_session_are_its_text(kind: str, change_package: Callable[..., Path]) -> None:
    engine = Engine(change_package(with_tokenizer(kind)), threads=1)
    session, text = engine.session(), ""
    for seed, prompt in enumerate(["the", "ab.", " the", "", "a"]):
        before = engine.tokenizer.decode(session.tokens)
        result = session.generate(prompt, max_new_tokens=7, seed=seed, temperature=2.0)
        prompted = engine.tokenizer.decode(session.tokens[: -len(result.token_ids)])
        # Broken bytes at an end may become others, of which there are many in random tokens.
        assert not before or "\ufffd" in before + prompted or prompted == before + prompt
        text = prompted + result.text
        assert "\ufffd" in prompted or engine.tokenizer.decode(session.tokens) == text


def test_stop_tokens_on_an_engine(engine: Engine) -> None:
    whole = engine.generate(PROMPT, **GREEDY)
    end = whole.token_ids[5]
    result = engine.generate(PROMPT, **GREEDY, stop_token_ids=[end])
    assert result.finish_reason == "stop"
    assert result.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]
    assert result.text == engine.tokenizer.decode(result.token_ids[:-1])


def end_at(package: Path, token_id: int) -> Path:
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["tokenizer"]["eos_token_ids"] = [token_id]
    (package / "manifest.json").write_text(json.dumps(manifest))
    return package


def test_end_tokens_that_are_ignored(engine: Engine, change_package: Callable[..., Path]) -> None:
    whole = engine.generate(PROMPT, **GREEDY).token_ids
    ending = Engine(end_at(change_package(lambda manifest: None), whole[5]), threads=1)
    assert ending.generate(PROMPT, **GREEDY).finish_reason == "eos"
    assert ending.generate(PROMPT, **GREEDY).token_ids == whole[: whole.index(whole[5])]
    result = ending.generate(PROMPT, **GREEDY, ignore_eos=True)
    assert (result.finish_reason, result.token_ids) == ("length", whole)


def test_token_ids_as_a_prompt(engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT).ids
    text = engine.generate(PROMPT, **GREEDY)
    for prompt in (ids, tuple(ids), np.array(ids)):
        result = engine.generate(prompt, **GREEDY)
        assert (result.text, result.token_ids, result.stats.prompt_tokens) == (text.text, text.token_ids, len(ids))
    session = engine.session()
    session.generate(ids[:3], max_new_tokens=2)
    session.generate([5, 6], max_new_tokens=1)
    assert session.tokens[5:7] == [5, 6]


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "at least one token"),
        ([300], ValueError, "each token id of a prompt must be from 0 to 299, got 300"),
        ([-1], ValueError, "each token id of a prompt must be from 0 to 299, got -1"),
        (["a"], TypeError, "prompt.*sequence of integers"),
        ([1.5], TypeError, "prompt.*sequence of integers"),
        (b"a", TypeError, "prompt.*sequence of integers"),
        (None, TypeError, "prompt.*sequence of integers, got None"),
    ],
)
def test_prompts_of_another_form(engine: Engine, prompt: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        engine.generate(prompt)


@pytest.mark.parametrize("unlimited", [0, -1, None])
def test_no_limit_but_the_context(engine: Engine, unlimited: int | None) -> None:
    result = engine.generate(PROMPT, max_new_tokens=unlimited, context=20, temperature=0, ignore_eos=True)
    assert (result.finish_reason, result.stats.prompt_tokens + result.stats.new_tokens) == ("context", 20)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stop_token_ids": [300]}, ValueError, "each of stop_token_ids must be from 0 to 299, got 300"),
        ({"stop_token_ids": [-1]}, ValueError, "each of stop_token_ids must be from 0 to 299, got -1"),
        ({"stop_token_ids": 5}, TypeError, "stop_token_ids must be a sequence of integers, got 5"),
        ({"stop_token_ids": "5"}, TypeError, "stop_token_ids must be a sequence of integers"),
        ({"ignore_eos": 1}, TypeError, "ignore_eos must be True or False, got 1"),
        ({"max_new_tokens": "8"}, TypeError, "max_new_tokens must be an integer"),
    ],
)
def test_wrong_options(engine: Engine, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        engine.generate(PROMPT, **options)


TURNS = "{%% for m in messages %%}<|start|>{{ m.role }}\n{{ m.content }}%s{%% endfor %%}<|start|>assistant\n"


def answering(
    change_package: Callable[..., Path], with_template: Any, template: str, special: list[str], plain: list[str]
) -> Engine:
    """A model with a chat template, and further special tokens and added ones that are not."""

    def edit(manifest: dict[str, Any]) -> None:
        with_template(template)(manifest)
        tokenizer = KINDS["prepend"]()
        tokenizer.add_special_tokens(special)
        tokenizer.add_tokens(plain)
        manifest["tokenizer"]["eos_token_ids"] = [1]
        manifest["contents"]["tokenizer.json"] = tokenizer.to_str().encode()

    return Engine(change_package(edit), threads=1)


@pytest.mark.parametrize(
    ("template", "special", "plain", "end"),
    [
        (TURNS % "<|im_end|>\n", ["<|im_end|>", "<|start|>"], [], "<|im_end|>"),
        (TURNS % "<|im_end|>\n", ["<|start|>"], ["<|im_end|>"], "<|im_end|>"),  # user-defined
        (TURNS % " \n <|im_end|>", ["<|im_end|>", "<|im"], [], "<|im_end|>"),
        (TURNS % "", ["<|start|>"], [], "<|start|>"),  # the next turn's beginning is the end of this one
        (TURNS % "\nEND<|im_end|>", ["<|im_end|>", "<|start|>"], [], None),
        (TURNS % "<|im_end|>", [], [], None),  # no token, but a text of some
        ("{{ raise_exception('one message') if messages[1:] }}", ["<|im_end|>"], [], None),
        ("{{ messages[0].nothing.at_all }}", ["<|im_end|>"], [], None),
    ],
)
def test_the_end_of_an_answer_in_the_template(
    change_package: Callable[..., Path],
    with_template: Any,
    template: str,
    special: list[str],
    plain: list[str],
    end: str | None,
) -> None:
    engine = answering(change_package, with_template, template, special, plain)
    ends = [1] if end is None else [1, engine.tokenizer.token_to_id(end)]
    assert engine.requests.prompts.end_token_ids == ends


def test_an_answer_ends_where_the_template_ends_it(
    chat_engine: Engine, change_package: Callable[..., Path], with_template: Any
) -> None:
    """With a token that the manifest does not name, be the text of a chat or not."""
    whole = chat_engine.generate(PROMPT, **GREEDY).token_ids
    token = whole[4]
    if token in whole[:4] or (text := chat_engine.tokenizer.id_to_token(token)) == END_OF_STORY:
        pytest.fail("the random model says this token before; choose another")
    tokenizer = Tokenizer.from_str(chat_engine.tokenizer.to_str())
    tokenizer.add_special_tokens([text])

    def edit(manifest: dict[str, Any]) -> None:
        with_template(TURNS % text)(manifest)
        manifest["contents"]["tokenizer.json"] = tokenizer.to_str().encode()

    engine = Engine(change_package(edit, chat_engine.path), threads=1, kv_type="float32")
    result = engine.generate(chat_engine.tokenizer.encode(PROMPT).ids, **GREEDY)
    assert (result.token_ids, result.finish_reason) == (whole[:4], "eos")
