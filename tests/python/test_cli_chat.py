"""meki-run --chat, through main(); conversations on a terminal are in test_cli_interactive.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meki import Engine
from meki.cli.interactive import Conversation
from meki.cli.run import main
from meki.generation import TextStream

MESSAGE = "Once upon a time"
FIXED = ["--seed", "7", "--max-new-tokens", "12"]
OPTIONS: dict[str, Any] = {"seed": 7, "max_new_tokens": 12}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def run(package: Path, *arguments: str) -> int:
    return main(["--model", str(package), "--threads", "1", "--kv-type", "float32", *FIXED, "--chat", *arguments])


@pytest.fixture
def answer(chat_engine: Engine) -> Callable[..., str]:
    """The text that a new session answers."""
    return lambda *messages: chat_engine.session().chat(list(messages), **OPTIONS).text


def test_a_message_and_its_answer(chat_package: Path, answer: Callable[..., str], capsys) -> None:
    assert run(chat_package, MESSAGE) == 0
    assert capsys.readouterr().out == answer(user(MESSAGE)) + "\n"


def test_a_system_message(chat_package: Path, answer: Callable[..., str], capsys) -> None:
    assert run(chat_package, "--system", "Be brief.", MESSAGE) == 0
    assert capsys.readouterr().out == answer({"role": "system", "content": "Be brief."}, user(MESSAGE)) + "\n"


def test_an_answer_that_is_begun(chat_package: Path, answer: Callable[..., str], chat_engine: Engine, capsys) -> None:
    assert run(chat_package, "--assistant", "It was", MESSAGE) == 0
    messages = [user(MESSAGE), assistant("It was")]
    expected = chat_engine.session().chat(messages, continue_final_message=True, **OPTIONS)
    assert capsys.readouterr().out == expected.text + "\n" != answer(user(MESSAGE)) + "\n"


def test_a_terminal_shows_how_the_answer_begins(chat_package: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(chat_package, "--assistant", "It was", MESSAGE) == 0
    assert capsys.readouterr().out.startswith("It was")


def test_every_answer_of_a_conversation_begins_so(chat_package: Path, chat_engine: Engine, stdin, capsys) -> None:
    stdin(f"{MESSAGE}\nThe fox\n".encode())
    assert run(chat_package, "--interactive", "--assistant", "It was") == 0
    session, messages, texts = chat_engine.session(), [], []
    for message in (MESSAGE, "The fox"):
        messages += [user(message), assistant("It was")]
        texts.append(session.chat(messages, continue_final_message=True, **OPTIONS).text)
        messages[-1] = assistant("It was" + texts[-1])
    assert capsys.readouterr().out == "".join(text + "\n" for text in texts)


def test_a_template_and_its_variables(package: Path, engine: Engine, tmp_path: Path, capsys) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}{% if thinking %} Hm.{% endif %}")
    given = ("--chat-template", str(template))
    for variables, prompt in ((), MESSAGE), (("--chat-template-kwargs", '{"thinking": true}'), f"{MESSAGE} Hm."):
        assert run(package, *given, *variables, MESSAGE) == 0
        assert capsys.readouterr().out == engine.generate(prompt, temperature=0, **OPTIONS).text + "\n"
    assert run(package, *given, "--chat-template-kwargs", '{"thinkin": true}', MESSAGE) == 2
    assert "mine.jinja: the chat template has no variable 'thinkin'; it has: thinking" in capsys.readouterr().err
    template.write_text("{% if %}")
    assert run(package, *given, MESSAGE) == 2
    error = capsys.readouterr().err
    assert "mine.jinja: the chat template does not parse: " in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--chat-template", "gone.jinja"),
        ("--chat-template", "/"),
        ("--chat-template-kwargs", "[]"),
        ("--chat-template-kwargs", "{"),
    ],
)
def test_a_template_or_variables_of_another_form(chat_package: Path, option: str, value: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        run(chat_package, option, value, MESSAGE)
    assert caught.value.code == 2
    assert f"meki-run: error: argument {option}: expected a" in capsys.readouterr().err


def test_a_message_on_standard_input(chat_package: Path, answer: Callable[..., str], stdin, capsys) -> None:
    stdin(b"two\nlines\n")
    assert run(chat_package) == 0
    assert capsys.readouterr().out == answer(user("two\nlines")) + "\n"


def test_a_terminal_does_not_show_the_message_again(
    chat_package: Path, answer: Callable[..., str], monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(chat_package, MESSAGE) == 0
    assert capsys.readouterr().out == answer(user(MESSAGE)) + "\n"


def test_json(chat_package: Path, chat_engine: Engine, capsys) -> None:
    assert run(chat_package, "--json", MESSAGE) == 0
    out = json.loads(capsys.readouterr().out)
    expected = chat_engine.session().chat([user(MESSAGE)], **OPTIONS)
    assert set(out) == {"model", "text", "token_ids", "finish_reason", "stop", "stats", "message", "random_weights"}
    assert (out["text"], out["token_ids"], out["message"]) == (expected.text, expected.token_ids, expected.message)
    assert (out["stats"]["prompt_tokens"], out["stats"]["cached_tokens"]) == (expected.stats.prompt_tokens, 0)


def test_lines_are_messages_of_one_conversation(chat_package: Path, chat_engine: Engine, stdin, capsys) -> None:
    stdin(f"{MESSAGE}\n\n  \nThe fox\n".encode())
    assert run(chat_package, "--interactive", "--system", "Be brief.", "--stats") == 0
    messages = [{"role": "system", "content": "Be brief."}, user(MESSAGE)]
    session = chat_engine.session()
    first = session.chat(messages, **OPTIONS)
    second = session.chat([*messages, assistant(first.text), user("The fox")], **OPTIONS)
    captured = capsys.readouterr()
    assert captured.out == f"{first.text}\n{second.text}\n"
    prompts = [line for line in captured.err.splitlines() if line.startswith("prompt")]
    assert prompts[0].startswith(f"prompt        {first.stats.prompt_tokens} tokens, ") and "cached" not in prompts[0]
    cached = f"prompt        {second.stats.prompt_tokens} tokens, {second.stats.cached_tokens} of them cached, "
    assert prompts[1].startswith(cached) and second.stats.cached_tokens > 0


def test_a_terminal_without_a_prompt_is_a_conversation(
    chat_package: Path, answer: Callable[..., str], stdin, capsys
) -> None:
    stdin(f"{MESSAGE}\n".encode(), terminal=True)
    assert run(chat_package) == 0
    assert capsys.readouterr().out.replace("> ", "") == answer(user(MESSAGE)) + "\n"


def test_a_conversation_that_outgrows_the_context_begins_anew(
    chat_package: Path, answer: Callable[..., str], stdin, capsys
) -> None:
    stdin(f"{MESSAGE}\nThe fox said\nThe cat said\n".encode())
    assert run(chat_package, "--interactive", "--context", "40") == 0
    captured = capsys.readouterr()
    lines = [answer(user(text)) for text in (MESSAGE, "The fox said", "The cat said")]
    assert captured.out == "".join(line + "\n" for line in lines)
    notes = [line for line in captured.err.splitlines() if line.startswith("meki-run: note: ")]
    assert len(notes) == 2
    assert all("the context holds 40" in note and note.endswith("a new conversation begins here") for note in notes)


def test_a_full_context_begins_a_new_conversation(chat_package: Path, chat_engine: Engine, stdin, capsys) -> None:
    prompt = chat_engine.session().chat([user(MESSAGE)], max_new_tokens=1).stats.prompt_tokens
    stdin(f"{MESSAGE}\n{MESSAGE}\n".encode())
    assert run(chat_package, "--interactive", "--context", str(prompt + 5)) == 0
    captured = capsys.readouterr()
    first = chat_engine.session(context=prompt + 5).chat([user(MESSAGE)], **OPTIONS)
    assert first.finish_reason == "context"
    assert captured.out == f"{first.text}\n" * 2
    note = f"meki-run: note: the context of {prompt + 5} tokens is full; the next message starts a new conversation\n"
    assert captured.err.count(note) == 2


def test_a_message_that_no_context_holds_keeps_the_conversation(
    chat_package: Path, chat_engine: Engine, stdin, capsys
) -> None:
    stdin(f"{MESSAGE}\n{'a b ' * 500}\nThe fox\n".encode())
    assert run(chat_package, "--interactive", "--context", "200") == 0
    captured = capsys.readouterr()
    first = chat_engine.session().chat([user(MESSAGE)], **OPTIONS)
    messages = [user(MESSAGE), assistant(first.text), user("The fox")]
    assert captured.out == f"{first.text}\n{chat_engine.session().chat(messages, **OPTIONS).text}\n"
    assert "error: the conversation has" in captured.err and "note" not in captured.err


@pytest.mark.parametrize("pieces", [0, 3])
def test_ctrl_c_keeps_what_the_answer_has_said(
    chat_package: Path, answer: Callable[..., str], stdin, monkeypatch, capsys, pieces: int
) -> None:
    step, said = TextStream.__next__, []

    def interrupted(stream: TextStream) -> str:
        if len(said) == pieces:
            monkeypatch.setattr(TextStream, "__next__", step)
            raise KeyboardInterrupt
        said.append(step(stream))
        return said[-1]

    monkeypatch.setattr(TextStream, "__next__", interrupted)
    stdin(f"{MESSAGE}\nThe fox\n".encode())
    assert run(chat_package, "--interactive") == 0
    first = "".join(said)
    earlier = [user(MESSAGE), assistant(first)] if pieces else []
    assert capsys.readouterr().out == f"{first}\n\n{answer(*earlier, user('The fox'))}\n"


def test_an_interrupted_answer_stays_but_an_unanswered_message_does_not(chat_engine: Engine) -> None:
    session = chat_engine.session()
    conversation = Conversation(session, None, lambda note: pytest.fail(note))
    for _ in conversation.stream("The cat", **OPTIONS):
        pass
    conversation.stream("Unanswered", **OPTIONS).close()  # as Ctrl-C does, before a word was said
    stream = conversation.stream("The fox", **OPTIONS)
    said = next(stream)
    stream.close()
    conversation.stream("And then?", **OPTIONS)
    first = chat_engine.session().chat([user("The cat")], **OPTIONS).text
    expected = chat_engine.session()
    expected.stream_chat(
        [user("The cat"), assistant(first), user("The fox"), assistant(said), user("And then?")], **OPTIONS
    )
    assert session.tokens == expected.tokens


def test_an_empty_answer_is_an_answer(chat_engine: Engine) -> None:
    """Roles must alternate for many templates."""
    session = chat_engine.session()
    conversation = Conversation(session, None, lambda note: pytest.fail(note))
    first = chat_engine.session().chat([user("The cat")], **OPTIONS).text
    stream = conversation.stream("The cat", **OPTIONS, stop=first[0])
    assert list(stream) == []
    conversation.stream("The fox", **OPTIONS)
    expected = chat_engine.session()
    expected.stream_chat([user("The cat"), assistant(""), user("The fox")], **OPTIONS)
    assert session.tokens == expected.tokens


@pytest.mark.parametrize("arguments", [[MESSAGE], ["--interactive"], ["--json", MESSAGE]])
def test_a_model_without_a_template(package: Path, arguments: list[str], capsys) -> None:
    assert run(package, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("meki-run: error: ") and "the package has no chat template" in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--interactive", MESSAGE], "--interactive"),
        (["--context", "3", MESSAGE], "the context holds 3"),
        (["--temperature", "-1", MESSAGE], "temperature"),
    ],
)
def test_usage_errors(chat_package: Path, arguments: list[str], named: str, capsys) -> None:
    assert run(chat_package, *arguments) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("meki-run: error: ") and named in last


def test_what_the_template_refuses(chat_package: Path, change_package, with_template, capsys) -> None:
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}a:"
    assert run(change_package(with_template(text)), "--system", "Be brief.", MESSAGE) == 2
    assert "no system messages" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--system", "Be brief."), ("--assistant", "It"), ("--chat-template", __file__), ("--chat-template-kwargs", "{}")],
)
def test_what_belongs_to_a_chat_without_one(chat_package: Path, option: str, value: str, capsys) -> None:
    assert main(["--model", str(chat_package), option, value, MESSAGE]) == 2
    assert f"{option} is a part of a conversation; add --chat" in capsys.readouterr().err


def test_json_needs_a_message(chat_package: Path, stdin, capsys) -> None:
    stdin(b"", terminal=True)
    assert run(chat_package, "--json") == 2
    assert "no prompt" in capsys.readouterr().err
