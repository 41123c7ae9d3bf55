"""Speculative decoding where users meet it: arguments of the engine, streams, chats, meki-run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meki import Engine
from meki.cli.run import main
from meki.models.tokenizer import TokenizerSpec, train_tokenizer

PROMPT = "The cat and the keeper had fish. The cat and the keeper had"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def target(make_package: Callable[..., Path]) -> Engine:
    return Engine(make_package("int8"), threads=1)


@pytest.fixture(scope="module")
def smaller(make_package: Callable[..., Path]) -> Engine:
    return Engine(make_package("int8", memory_dim=0, layers=1), threads=1)


def test_the_same_text_in_every_form(target: Engine, smaller: Engine) -> None:
    for options in (GREEDY, {**GREEDY, "temperature": 0.9, "seed": 3}):
        expected = target.generate(PROMPT, **options)
        assert (expected.stats.drafted_tokens, expected.stats.accepted_tokens) == (0, 0)
        for draft in (target, smaller, "lookup"):
            result = target.generate(PROMPT, draft=draft, draft_tokens=4, **options)
            assert (result.text, result.token_ids) == (expected.text, expected.token_ids)
            assert result.finish_reason == expected.finish_reason == "length"
            assert 0 <= result.stats.accepted_tokens <= result.stats.drafted_tokens
            assert "".join(target.stream(PROMPT, draft=draft, **options)) == expected.text
        its = target.generate(PROMPT, draft=target, **options).stats
        assert its.accepted_tokens > 0
        assert its.decode_tokens_per_s is not None


def test_stop_strings_and_abandoned_streams_keep_what_was_handed_out(target: Engine) -> None:
    plain = target.generate(PROMPT, **GREEDY)
    for count in range(1, 12):
        ends = plain.token_ids[count]
        results, sessions = [], [target.session(draft=draft) for draft in (None, target)]
        for session in sessions:
            results.append(session.generate(PROMPT, stop_token_ids=[ends], **GREEDY))
            assert results[-1].finish_reason == "stop"
            assert session.tokens[-len(results[-1].token_ids) :] == results[-1].token_ids
            results.append(session.generate(" The", **GREEDY))
        assert [its.token_ids for its in results[:2]] == [its.token_ids for its in results[2:]]
    text = plain.text[5:8]
    stopped = [target.generate(PROMPT, draft=draft, stop=text, **GREEDY) for draft in (None, target)]
    assert stopped[0].token_ids == stopped[1].token_ids
    assert stopped[0].text == stopped[1].text
    for pieces in range(1, 8):
        session = target.session(draft=target)
        stream = session.stream(PROMPT, **GREEDY)
        for _ in range(pieces):
            next(stream)
        so_far = stream.result.token_ids
        assert session.tokens[-len(so_far) :] == so_far
        stream.close()
        session.rewind(len(session.tokens) - 1)
        assert session.tokens[-1:] == so_far[-2:-1] or len(so_far) == 1


def test_a_chat_is_kept_with_its_draft(chat_package: Path) -> None:
    engine = Engine(chat_package, threads=1)
    messages = [{"role": "user", "content": "The cat?"}]
    options: dict[str, Any] = {"max_new_tokens": 8}
    for draft in (None, "lookup", engine):
        first = engine.chat(messages, draft=draft, **options)
        assert first.stats.cached_tokens == 0
        again = engine.chat(messages, draft=draft, **options)
        assert again.stats.cached_tokens > 0
        assert again.token_ids == first.token_ids
    assert again.stats.drafted_tokens > 0
    assert engine.chat(messages, draft=engine, draft_tokens=3, **options).stats.cached_tokens == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draft": "itself"}, ValueError, "draft must be an Engine, \"lookup\" or None, got 'itself'"),
        ({"draft": 3}, TypeError, "draft must be an Engine"),
        ({"draft": "lookup", "draft_tokens": 0}, ValueError, "draft_tokens must be from 1 to 15, got 0"),
        ({"draft": "lookup", "draft_tokens": 16}, ValueError, "draft_tokens must be from 1 to 15, got 16"),
        ({"draft": "lookup", "draft_tokens": 1.5}, TypeError, "draft_tokens must be an integer"),
        ({"draft_tokens": 4}, ValueError, "draft_tokens is of a draft, and there is none"),
    ],
)
def test_arguments_that_cannot_be(target: Engine, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        target.session(**options)


def test_a_session_is_no_draft(target: Engine) -> None:
    with pytest.raises(TypeError, match="draft must be an Engine"):
        target.session(draft=target.session(draft="lookup"))  # type: ignore[arg-type]


def test_a_draft_model_of_another_vocabulary(
    target: Engine, make_package: Callable[..., Path], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="has a vocabulary of 320 tokens, the model one of 300"):
        target.session(draft=Engine(make_package("int8", vocab_size=320)))
    from meki.models.package import export_package

    tokenizer = train_tokenizer(["Words that nobody else has: zebra, quartz, yacht, sphinx, judge."], 300)
    export_package(
        make_model(memory_dim=0), TokenizerSpec(tokenizer.to_str().encode(), eos_token_ids=(0,)), tmp_path / "other",
        name="other", weights="int8", rows="float16", provenance={"weights": "random"},
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"other: a draft model needs the tokenizer of .*small, whose tokens are others"
    ):
        target.session(draft=Engine(tmp_path / "other"))


def test_the_command_line(target: Engine, smaller: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", str(target.path), "--temperature", "0", "--max-new-tokens", "40", "--ignore-eos", PROMPT]
    assert main(command) == 0
    expected = capsys.readouterr().out
    for options in (["--prompt-lookup"], ["--draft", str(smaller.path)], ["--draft", str(target.path)]):
        assert main([*options, *command]) == 0
        assert capsys.readouterr().out == expected
    assert main(["--draft", str(target.path), "--draft-tokens", "3", "--stats", *command]) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("drafted "))
    assert line.endswith(" accepted (100%)")
    assert main(["--draft", str(target.path), "--json", *command]) == 0
    stats = json.loads(capsys.readouterr().out)["stats"]
    assert stats["accepted_tokens"] == stats["drafted_tokens"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft-tokens", "4"], "--draft-tokens is for speculative decoding; add --prompt-lookup or --draft"),
        (["--prompt-lookup", "--draft-tokens", "16"], "draft_tokens must be from 1 to 15, got 16"),
        (["--draft", "no-such-model"], "no model 'no-such-model'"),
    ],
)
def test_command_lines_that_cannot_be(
    target: Engine, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["--model", str(target.path), *options, PROMPT]) == 2
    assert message in capsys.readouterr().err


def test_a_draft_model_and_lookup_exclude_each_other(target: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--model", str(target.path), "--prompt-lookup", "--draft", str(target.path), PROMPT])
    assert exit_info.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err
