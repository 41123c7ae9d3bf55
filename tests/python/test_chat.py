"""Session.chat and Engine.chat: what is reused of the cache changes nothing but time."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from meki import Engine, Session, _core
from meki.models.tokenizer import END_OF_STORY

Message = dict[str, str]
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def rendered(engine: Engine, messages: list[Message]) -> list[int]:
    """The tokens of a conversation in the template of conftest.py."""
    text = "".join(f"{message['role'][0]}:{message['content']}{END_OF_STORY}" for message in messages) + "a:"
    return engine.tokenizer.encode(text, add_special_tokens=False).ids


def common_prefix(a: list[int], b: list[int]) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def one_by_one(engine: Engine) -> Session:
    """A session that computes every token in a step of its own, so that how the steps fall is the same for all: results
    are then equal to the last bit."""
    session = engine.session()
    session._core = _core.Session(engine._core, _core.SessionOptions(chunk=1))
    return session


QUESTION = user("The old lighthouse keeper counted the ships.")


def test_an_answer_is_the_most_probable_one_by_default(chat_engine: Engine) -> None:
    answers = [chat_engine.session().chat([QUESTION], max_new_tokens=12, seed=seed).token_ids for seed in range(3)]
    assert answers == [chat_engine.session().chat([QUESTION], max_new_tokens=12, temperature=0).token_ids] * 3
    sampled = [
        chat_engine.session().chat([QUESTION], max_new_tokens=12, seed=seed, temperature=2.0).token_ids
        for seed in range(3)
    ]
    assert len(set(map(tuple, sampled))) > 1


def test_an_answer_goes_on_after_the_template(chat_engine: Engine) -> None:
    session = chat_engine.session()
    messages = [{"role": "system", "content": "A story."}, QUESTION]
    result = session.chat(messages, **GREEDY)
    prompt = rendered(chat_engine, messages)
    assert session.tokens == prompt + result.token_ids
    assert (result.stats.prompt_tokens, result.stats.cached_tokens) == (len(prompt), 0)
    logits = chat_engine.logits(session.tokens)
    for position in range(len(prompt), len(session.tokens)):
        # 1e-3: as in test_engine.py, far above what the order of sums changes and far below the spread of the logits
        assert logits[position - 1][session.tokens[position]] >= logits[position - 1].max() - 1e-3


def test_a_conversation_computes_only_what_is_new(chat_engine: Engine) -> None:
    session = chat_engine.session()
    messages = [QUESTION]
    for turn in ("and wrote their names", "in a blue book"):
        before = session.tokens
        result = session.chat(messages, **GREEDY)
        shared = common_prefix(before, rendered(chat_engine, messages))
        assert shared - 1 <= result.stats.cached_tokens <= shared
        assert result.stats.prompt_tokens == len(rendered(chat_engine, messages))
        messages += [assistant(result.text), user(turn)]
    before = session.tokens
    stats = session.chat(messages, **GREEDY).stats
    # At least the first question and the first answer's beginning: a token of the answer may be split anew.
    assert stats.cached_tokens >= len(rendered(chat_engine, [QUESTION])) - 1
    assert stats.rom_requests <= stats.prompt_tokens - stats.cached_tokens + stats.new_tokens


WORDS = st.sampled_from(["", "The cat", " ship", "the keeper", "🦊", "a book of names"])
MOVES = st.lists(
    st.tuples(
        st.integers(0, 7),  # messages to keep of the conversation so far
        WORDS,
        st.sampled_from(["nothing", "nothing", "generate", "abandon", "logits", "prompt"]),  # what comes in between
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("kv_type", ["float32", "int8"])
@pytest.mark.parametrize("package", ["chat_package", "ngrams_chat_package"])
@settings(deadline=None, max_examples=20)
@given(moves=MOVES)
def test_any_conversations_give_what_fresh_sessions_give(
    request: pytest.FixtureRequest, package: str, kv_type: str, moves: list[tuple[int, str, str]]
) -> None:
    """To the last bit, so that sampled tokens are equal, too."""
    key = (package, kv_type)
    if key not in OPEN:
        OPEN[key] = Engine(request.getfixturevalue(package), threads=1, kv_type=kv_type)
    engine = OPEN[key]
    session = one_by_one(engine)
    messages: list[Message] = []
    options: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 4, "seed": 5}
    uncomputed = 0  # at the end of the sequence
    for keep, words, between in moves:
        if between == "generate":
            uncomputed = session.generate(words or "x", **options).finish_reason != "eos"
        elif between == "abandon":
            stream = session.stream(words or "x", **options)
            next(stream, None)
            uncomputed = stream.result.finish_reason != "eos"
        elif between == "logits":
            session.logits([5, 6])
            uncomputed = 0
        elif between == "prompt":  # as an interrupted prefill leaves it
            session._core.append([7] * 3)
            uncomputed += 3
        messages = [*messages[:keep], user(words)]
        before, prompt = session.tokens, rendered(engine, messages)
        result = session.chat(messages, **options)
        fresh = one_by_one(engine)
        assert result.token_ids == fresh.chat(messages, **options).token_ids
        assert session.tokens == fresh.tokens == prompt + result.token_ids
        assert result.stats.cached_tokens == min(
            common_prefix(before, prompt), len(before) - uncomputed, len(prompt) - 1
        )
        np.testing.assert_array_equal(session.logits([9]), fresh.logits([9]))
        uncomputed = 0
        messages.append(assistant(result.text))


OPEN: dict[tuple[str, str], Engine] = {}


@pytest.fixture(scope="module", autouse=True)
def close_engines() -> Iterator[None]:
    yield
    OPEN.clear()


def test_whole_chunks_change_only_rounding(chat_engine: Engine) -> None:
    session = chat_engine.session()
    messages = [QUESTION, assistant("and wrote their names in a blue book. " * 8), user("The cat")]
    for count in (1, 3, 1, 3):
        session.chat(messages[:count], **GREEDY)
        fresh = chat_engine.session()
        fresh.chat(messages[:count], **GREEDY)
        assert session.tokens == fresh.tokens
        # The order of sums: float32 noise on logits of a spread of 1.
        np.testing.assert_allclose(session.logits([9]), fresh.logits([9]), atol=1e-4)


@pytest.mark.parametrize("new_tokens", [1, 6])
def test_a_prompt_that_is_cached_as_a_whole(chat_engine: Engine, new_tokens: int) -> None:
    session = one_by_one(chat_engine)
    first, again = (session.chat([QUESTION], temperature=0, max_new_tokens=new_tokens) for _ in range(2))
    assert again.token_ids == first.token_ids
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1  # the last is computed for its logits


def test_tokens_that_wait_for_their_computation_are_not_cached(chat_engine: Engine) -> None:
    session = one_by_one(chat_engine)
    prompt = rendered(chat_engine, [QUESTION])
    session.logits(prompt[:5])
    session._core.append(prompt[5:9])  # as an interrupted prefill leaves them
    result = session.chat([QUESTION], **GREEDY)
    assert result.stats.cached_tokens == 5
    assert result.token_ids == one_by_one(chat_engine).chat([QUESTION], **GREEDY).token_ids


def test_stream_chat_is_chat_in_pieces(chat_engine: Engine) -> None:
    expected = chat_engine.session().chat([QUESTION], seed=3, max_new_tokens=20, stop="e")
    stream = chat_engine.session().stream_chat([QUESTION], seed=3, max_new_tokens=20, stop="e")
    assert stream.result.stats.cached_tokens == 0
    assert "".join(stream) == expected.text
    assert stream.result.token_ids == expected.token_ids


def test_a_generation_goes_on_after_a_chat(chat_engine: Engine) -> None:
    session = chat_engine.session()
    session.chat([QUESTION], **GREEDY)
    before = session.tokens
    result = session.generate(" and so on", **GREEDY)
    assert session.tokens[: len(before)] == before
    assert result.stats.cached_tokens == 0


def test_a_refused_conversation_changes_nothing(chat_package: Path) -> None:
    engine = Engine(chat_package, threads=1)
    session, untouched = (one_by_one(engine) for _ in range(2))
    for one in (session, untouched):
        one.chat([QUESTION], **GREEDY)
    late_system = [QUESTION, {"role": "system", "content": "Late."}]
    for messages, options, named in (
        ([user("a b " * 1000)], {}, r"conversation has \d+ tokens, the context holds 1024"),
        ([user("Hi")], {"temperature": -1}, "temperature"),
        (late_system, {}, "refuses these messages: a system message comes first"),
        ([user("\udcff")], {}, "not valid Unicode"),
        ([], {}, "at least one message"),
        ([{"role": "user"}], {}, '"content"'),
        ([QUESTION], {"continue_final_message": True}, "the last message is"),
        (
            [QUESTION],
            {"chat_template_kwargs": {"enable_thinkin": False}},
            "has no variable 'enable_thinkin'; it has: none",
        ),
    ):
        with pytest.raises(ValueError, match=named):
            session.chat(messages, **options)
    assert session.tokens == untouched.tokens
    follow = [QUESTION, assistant("It was"), user("late")]
    one, two = (each.chat(follow, **GREEDY) for each in (session, untouched))
    assert one.token_ids == two.token_ids
    assert one.stats.cached_tokens == two.stats.cached_tokens > 0


def test_a_refused_conversation_leaves_the_stream_running(chat_engine: Engine) -> None:
    session = chat_engine.session()
    stream = session.stream_chat([QUESTION], temperature=0, max_new_tokens=12)
    next(stream)
    with pytest.raises(ValueError, match="context holds"):
        session.stream_chat([user("a b " * 1000)])
    for _ in stream:
        pass
    expected = chat_engine.session().chat([QUESTION], temperature=0, max_new_tokens=12)
    assert stream.result.token_ids == expected.token_ids


def test_the_next_chat_ends_a_stream(chat_engine: Engine) -> None:
    session = chat_engine.session()
    stream = session.stream_chat([QUESTION], temperature=0, max_new_tokens=50)
    text = next(stream)
    session.chat([QUESTION], **GREEDY)
    assert list(stream) == []
    assert (stream.result.text, stream.result.finish_reason) == (text, None)


def test_a_conversation_that_fills_the_context(chat_engine: Engine) -> None:
    tokens = len(rendered(chat_engine, [QUESTION]))
    result = chat_engine.session(context=tokens).chat([QUESTION])
    assert (result.token_ids, result.finish_reason) == ([], "context")
    assert len(chat_engine.session(context=tokens + 3).chat([QUESTION], temperature=0).token_ids) <= 3
    with pytest.raises(ValueError, match=f"conversation has {tokens} tokens, the context holds {tokens - 1}"):
        chat_engine.session(context=tokens - 1).chat([QUESTION])


def test_an_end_of_turn_token_ends_the_answer(chat_package: Path, chat_engine: Engine, change_package: Any) -> None:
    ids = chat_engine.chat([QUESTION], temperature=0, max_new_tokens=8).token_ids
    ends = [ids[4], 0]
    engine = Engine(change_package(lambda m: m["tokenizer"].update(eos_token_ids=ends), chat_package), threads=1)
    result = engine.chat([QUESTION], temperature=0, max_new_tokens=8)
    assert result.finish_reason == "eos"
    assert result.token_ids == ids[: ids.index(ids[4])]


def test_the_template_alone_writes_special_tokens(package: Path, change_package: Any, with_template: Any) -> None:
    """What begins a prompt, the manifest's bos token and what the tokenizer adds, does not begin a conversation."""
    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single=f"{END_OF_STORY} $A", special_tokens=[(END_OF_STORY, 0)])

    def edit(manifest: dict[str, Any]) -> None:
        with_template("Hi {{ messages[0].content }}{{ eos_token }}")(manifest)
        manifest["tokenizer"]["bos_token_id"] = 0
        manifest["contents"]["tokenizer.json"] = tokenizer.to_str().encode()

    session = Engine(change_package(edit), threads=1).session()
    result = session.chat([user("The cat")], max_new_tokens=1)
    tokens = tokenizer.encode("Hi The cat", add_special_tokens=False).ids
    assert session.tokens == [*tokens, 0, *result.token_ids]


def test_a_template_that_writes_nothing(change_package: Any, with_template: Any) -> None:
    with pytest.raises(ValueError, match="makes no text of these messages"):
        Engine(change_package(with_template("{# nothing #}")), threads=1).chat([QUESTION])


def test_a_package_without_a_template(engine: Engine, chat_engine: Engine) -> None:
    assert (engine.can_chat, chat_engine.can_chat) == (False, True)
    for call in (engine.chat, engine.session().chat, engine.session().stream_chat):
        with pytest.raises(ValueError, match=r"no chat template.*--chat-template.*convert the model again"):
            call([QUESTION])


def test_a_template_of_the_users_own(
    engine: Engine, chat_package: Path, chat_engine: Engine, with_template: Any, tmp_path: Path
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("\ufeff{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", encoding="utf-8")
    one = Engine(engine.path, threads=1, chat_template=template)
    assert one.can_chat
    for package in (engine.path, chat_package):  # which has one, too
        session = Engine(package, threads=1, chat_template=str(template)).session()
        result = session.chat([user("The cat")], max_new_tokens=1)
        assert session.tokens == [*engine.tokenizer.encode("The cat").ids, 0, *result.token_ids]
    template.write_text("{% if %}")
    with pytest.raises(ValueError, match=r"mine\.jinja: the chat template does not parse: .*; give one that works"):
        Engine(engine.path, chat_template=template)
    with pytest.raises(FileNotFoundError):
        Engine(engine.path, chat_template=tmp_path / "gone.jinja")


def test_a_users_template_knows_what_begins_a_text(package: Path, change_package: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    path = change_package(lambda manifest: manifest["tokenizer"].update(bos_token_id=0))
    session = Engine(path, threads=1, chat_template=tmp_path / "mine.jinja").session()
    session.chat([user("The cat")], max_new_tokens=1)
    assert session.tokens[0] == 0


def test_an_answer_that_is_begun(chat_engine: Engine) -> None:
    """The conversation ends inside the answer: neither the end of the turn nor the beginning of another one."""
    session = chat_engine.session()
    messages = [QUESTION, assistant("It was late ")]
    result = session.chat(messages, continue_final_message=True, **GREEDY)
    prompt = f"u:{QUESTION['content']}{END_OF_STORY}a:It was late "
    assert session.tokens == chat_engine.tokenizer.encode(prompt).ids + result.token_ids
    again = "".join(chat_engine.session().stream_chat(messages, continue_final_message=True, **GREEDY))
    assert again == result.text == chat_engine.chat(messages, continue_final_message=True, **GREEDY).text
    assert messages == [QUESTION, assistant("It was late ")]


def test_variables_and_tools_reach_the_template(package: Path, change_package: Any, with_template: Any) -> None:
    text = "{{ tools[0].function.name if tools else 'none' }} {{ 'thinks' if enable_thinking else 'answers' }}"
    engine = Engine(change_package(with_template(text)), threads=1)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    for options, expected in (
        ({}, "none answers"),
        ({"tools": [], "chat_template_kwargs": {}}, "none answers"),
        ({"tools": tools, "chat_template_kwargs": {"enable_thinking": True}}, "weather thinks"),
    ):
        session = engine.session()
        result = session.chat([QUESTION], max_new_tokens=1, **options)
        assert session.tokens == engine.tokenizer.encode(expected).ids + result.token_ids
        assert engine.chat([QUESTION], max_new_tokens=1, **options).token_ids == result.token_ids


@pytest.fixture
def chatting(chat_package: Path) -> Engine:
    """An engine that has not chatted; its cache does not magnify float noise by rounding."""
    return Engine(chat_package, threads=1, kv_type="float32")


def test_consecutive_chats_share_a_cache(chatting: Engine) -> None:
    first = chatting.chat([QUESTION], **GREEDY)
    assert first.stats.cached_tokens == 0
    second = [QUESTION, assistant(first.text), user("The cat")]
    stats = chatting.chat(second, **GREEDY).stats
    assert stats.cached_tokens >= first.stats.prompt_tokens - 1
    for refused in ([], [user("a b " * 1000)]):
        with pytest.raises(ValueError):
            chatting.chat(refused)
    stats = chatting.chat(second, **GREEDY).stats
    assert stats.cached_tokens == stats.prompt_tokens - 1
    assert chatting.generate("The cat", max_new_tokens=3).stats.cached_tokens == 0  # a session of its own
    assert chatting.chat(second, **GREEDY).stats.cached_tokens == stats.cached_tokens


def test_a_cache_of_other_options_is_not_reused(chatting: Engine) -> None:
    chatting.chat([QUESTION], **GREEDY)
    assert chatting.chat([QUESTION], context=200, **GREEDY).stats.cached_tokens == 0
    assert chatting.chat([QUESTION], context=200, **GREEDY).stats.cached_tokens > 0
    assert chatting.chat([QUESTION], context=200, prefetch=False, **GREEDY).stats.cached_tokens == 0
    assert chatting.chat([QUESTION], context=200, max_new_tokens=0).finish_reason in ("context", "eos")
    with pytest.raises(ValueError, match="context must be from 0"):
        chatting.chat([QUESTION], context=-1)


def test_a_chat_during_a_chat_has_its_own_session(chatting: Engine) -> None:
    class Asking(dict[str, str]):
        """A message that chats while it is looked at: a second thread could not be so punctual."""

        inner: Any = None

        def get(self, key: str, default: Any = None) -> Any:
            if self.inner is None:
                self.inner = chatting.chat([user("A small ship")], **GREEDY)
            return super().get(key, default)

    message = Asking(QUESTION)
    outer = chatting.chat([message], **GREEDY)
    assert outer.token_ids == chatting.session().chat([QUESTION], **GREEDY).token_ids
    assert message.inner.token_ids == chatting.session().chat([user("A small ship")], **GREEDY).token_ids
    assert chatting.chat([QUESTION], **GREEDY).stats.cached_tokens > 0  # the one that ended last was kept


def test_threads_get_what_they_get_alone(chatting: Engine) -> None:
    conversations = [[user("The cat")], [QUESTION], [QUESTION, assistant("Yes."), user("The cat")]] * 4

    def chat(messages: list[Message]) -> list[int]:
        return chatting.chat(messages, seed=3, max_new_tokens=12, temperature=0.5).token_ids

    alone = [
        chatting.session().chat(messages, seed=3, max_new_tokens=12, temperature=0.5).token_ids
        for messages in conversations
    ]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(chat, conversations)) == alone


def test_the_kept_session_goes_with_the_engine(chat_package: Path) -> None:
    engine = Engine(chat_package, threads=1)
    engine.chat([QUESTION], **GREEDY)
    assert engine._pool is not None
    gone = weakref.ref(engine), *map(weakref.ref, engine._pool[1]._idle)
    assert len(gone) == 2
    gc.disable()
    try:
        del engine
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_manifests_must_say_whether_there_is_a_template(change_package: Callable[..., Path]) -> None:
    path = change_package(lambda manifest: None)
    manifest = json.loads((path / "manifest.json").read_text())
    for tokenizer in ({"chat_template": "x"}, {"chat_template": {}}, {"chat_template": {"file": "no.jinja"}}):
        manifest["tokenizer"].update(tokenizer)
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(OSError, match=r"chat_template|no\.jinja"):
            Engine(path)
    del manifest["tokenizer"]["chat_template"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(OSError, match='has no "chat_template"'):
        Engine(path)
