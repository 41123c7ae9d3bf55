"""Detokenising and stop strings against references that see the whole text at once."""

from __future__ import annotations

from functools import cache
from itertools import chain, takewhile

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from meki.text import BROKEN, CONTEXT, PROVEN, Detokenizer, StopStrings, Vocabulary

from .tokenizers_of_kinds import EXACT, KINDS, TEXT


@cache
def vocabulary_of(kind: str) -> Vocabulary:
    return Vocabulary(KINDS[kind]())


def pieces_of(vocabulary: Vocabulary, prompt: list[int], ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(vocabulary, prompt)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def text_behind(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """All of the text but what it has in common with the prompt's."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    return whole[len(list(takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False)))) :]


def is_utf8(data: bytes, *, whole: bool) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return not whole and error.reason == "unexpected end of data"
    return True


def byte_runs(vocabulary: Vocabulary, ids: list[int]) -> list[bytes]:
    runs = [b""]
    for token_id in filter(vocabulary.has_text, ids):
        if token_id in vocabulary.bytes:
            runs[-1] += bytes([vocabulary.bytes[token_id]])
        else:
            runs.append(b"")
    return runs


def breaks_late(run: bytes) -> bool:
    """Long enough to be shown while it was UTF-8, and then it is not: see test_a_long_run_of_bytes_comes_out."""
    return len(run) > PROVEN and is_utf8(run[:PROVEN], whole=False) and not is_utf8(run, whole=True)


@st.composite
def sequences(draw: st.DrawFn, kind: str) -> tuple[list[int], list[int]]:
    """A prompt and what follows it, cut anywhere: any tokens, bytes, special ones, ids that the tokenizer lacks,
    texts."""
    vocabulary = vocabulary_of(kind)
    size = vocabulary.tokenizer.get_vocab_size()
    any_tokens = st.lists(st.integers(0, size + 9), max_size=6)
    special = st.sampled_from([[id] for id in vocabulary.special_tokens.values()])
    texts = st.sampled_from([TEXT, "a  ab the. ", "é🦊狐"]).map(lambda text: vocabulary.tokenizer.encode(text).ids)
    parts = [any_tokens, special, st.tuples(texts, st.integers(1, 9)).map(lambda pair: pair[0][-pair[1] :])]
    if bytes_ := [id for id in vocabulary.bytes if id is not None]:
        parts.append(st.lists(st.sampled_from(bytes_), max_size=5))
    ids = list(chain.from_iterable(draw(st.lists(st.one_of(parts), max_size=8))))
    cut = draw(st.integers(0, len(ids)))
    assume(not any(breaks_late(run) for run in byte_runs(vocabulary, ids)))
    return ids[:cut], ids[cut:]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_join_to_the_text_behind_the_prompt(kind: str, data: st.DataObject) -> None:
    prompt, ids = data.draw(sequences(kind))
    vocabulary = vocabulary_of(kind)
    assert "".join(pieces_of(vocabulary, prompt, ids)) == text_behind(vocabulary.tokenizer, prompt, ids)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_little_is_held_back(kind: str, data: st.DataObject) -> None:
    """Of bytes that may still make a character, or a run of byte tokens that may still be broken, and nothing else."""
    prompt, ids = data.draw(sequences(kind))
    vocabulary = vocabulary_of(kind)
    detokenizer = Detokenizer(vocabulary, prompt)
    shown = ""
    for count, token_id in enumerate(ids, 1):
        shown += detokenizer.push(token_id)
        so_far = text_behind(vocabulary.tokenizer, prompt, ids[:count])
        run = byte_runs(vocabulary, prompt + ids[:count])[-1]
        held = so_far.removeprefix(shown)
        assert so_far == shown + held or run  # a run may turn what was no part of the common beginning
        assert len(held) <= (PROVEN + 3 if run else 1)
        assert run or held in ("", BROKEN)


@pytest.mark.parametrize("kind", ["byte level", "prepend", "replace", "unigram", "metaspace, first"])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40))
def test_characters_are_never_broken(kind: str, text: str) -> None:
    vocabulary = vocabulary_of(kind)
    ids = vocabulary.tokenizer.encode(text).ids
    pieces = pieces_of(vocabulary, [], ids)
    assert "".join(pieces) == vocabulary.tokenizer.decode(ids)
    assert not any(BROKEN in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    vocabulary = vocabulary_of("byte level")
    ids = vocabulary.tokenizer.encode("🐻").ids
    assert len(ids) > 1  # not in the training text: its bytes are separate tokens
    assert pieces_of(vocabulary, [], ids) == [""] * (len(ids) - 1) + ["🐻", ""]
    assert pieces_of(vocabulary, [], ids[:-1])[-1] == BROKEN


def byte_ids(vocabulary: Vocabulary, data: bytes) -> list[int]:
    return [vocabulary.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]


def test_the_first_space_behind_a_prompt_is_text() -> None:
    vocabulary = vocabulary_of("prepend")
    encode, token = vocabulary.tokenizer.encode, vocabulary.tokenizer.token_to_id
    prompt = encode("the").ids
    assert pieces_of(vocabulary, prompt, [token("▁the"), token("ab")]) == [" the", "ab", ""]
    # After control tokens too, where a text stands before them; at the beginning of a text there is no space.
    assert pieces_of(vocabulary, [*prompt, token("</s>")], [token("▁the")]) == [" the", ""]
    assert pieces_of(vocabulary, [token("<s>")], [token("▁the"), token("▁the")]) == ["the", " the", ""]


@pytest.mark.parametrize("kind", ["prepend", "replace", "unigram"])
def test_bytes_that_make_no_character(kind: str) -> None:
    """The tokenizers library has U+FFFD for each byte of such a run, be some of them a character."""
    vocabulary = vocabulary_of(kind)
    a, e = vocabulary.tokenizer.token_to_id("a"), byte_ids(vocabulary, "é".encode())
    assert pieces_of(vocabulary, [a], [*e, *byte_ids(vocabulary, b"\xff"), a]) == ["", "", BROKEN * 3, "a", ""]
    assert pieces_of(vocabulary, [a], [*e, a]) == ["", "", "éa", ""]
    assert pieces_of(vocabulary, [a], e) == ["", "", "é"]


def test_a_prompt_that_ends_inside_a_character() -> None:
    for kind, dot in (("prepend", "▁"), ("byte level", "Ġ")):
        vocabulary = vocabulary_of(kind)
        space = vocabulary.tokenizer.token_to_id(dot)
        ids = vocabulary.tokenizer.encode("a🐻").ids
        assert pieces_of(vocabulary, ids[:-1], [ids[-1], space, space])[0] in ("", "🐻")
        assert "".join(pieces_of(vocabulary, ids[:-1], [ids[-1], space, space])) == "🐻  "
        assert "".join(pieces_of(vocabulary, ids[:-1], [space, space])) == "  "  # the broken one is the prompt's own


@pytest.mark.parametrize("kind", ["prepend", "replace"])
def test_a_long_run_of_bytes_comes_out(kind: str) -> None:
    """Character by character, once it was UTF-8 for long enough; a byte that breaks it leaves what was shown."""
    vocabulary = vocabulary_of(kind)
    a, text = vocabulary.tokenizer.token_to_id("a"), "ភាសាខ្មែរ" * 20
    pieces = pieces_of(vocabulary, [a], [*byte_ids(vocabulary, text.encode()), a])
    assert "".join(pieces) == text + "a"
    assert pieces[17] == text[:6] and pieces[18:24] == ["", "", text[6], "", "", text[7]]  # three bytes each
    broken = byte_ids(vocabulary, text[:10].encode() + b"\xe1\x9e")
    assert "".join(pieces_of(vocabulary, [a], [*broken, a])) == text[:10] + BROKEN * 2 + "a"
    assert pieces_of(vocabulary, [a], [*broken, *byte_ids(vocabulary, b"A")])[-2:] == [BROKEN * 3, ""]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_the_same_however_long_the_text(kind: str) -> None:
    """Counted in tokens that are decoded: no more for each than a few and the longest run that is held back."""
    vocabulary = Vocabulary(KINDS[kind]())
    decoded = 0

    def decode(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return vocabulary.tokenizer.decode(ids)

    vocabulary.decode = decode  # type: ignore[method-assign]
    size = vocabulary.tokenizer.get_vocab_size()
    ids = [(7919 * index) % size for index in range(2000)] + [vocabulary.tokenizer.encode(BROKEN).ids[-1]] * 2000
    pieces_of(vocabulary, ids, ids)
    assert decoded < len(ids) * (4 * CONTEXT + PROVEN)


def test_special_tokens_have_no_text() -> None:
    vocabulary = vocabulary_of("byte level")
    a, end, b = (vocabulary.tokenizer.token_to_id(token) for token in ("a", "</s>", "b"))
    assert pieces_of(vocabulary, [], [a, end, b]) == ["a", "", "b", ""]


def naive_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reads one character more at a time until the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], max(ending, key=len)
    return text, None


# Two letters: partial matches that overlap are the rule, not the exception.
@given(
    pieces=st.lists(st.text("ab", max_size=5), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4),
)
def test_stop_strings(pieces: list[str], stops: list[str]) -> None:
    expected, expected_stop = naive_stop("".join(pieces), stops)
    watch = StopStrings(stops)
    shown, seen, stopped = "", "", False
    for piece in pieces:
        certain, stopped = watch.push(piece)
        shown, seen = shown + certain, seen + piece
        if stopped:
            break
        held = seen.removeprefix(shown)
        assert seen.startswith(shown)
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)  # nothing held for nothing
    if not stopped:
        shown += watch.flush()
    assert (shown, watch.completed, stopped) == (expected, expected_stop, expected_stop is not None)


def test_a_stop_string_may_begin_inside_a_failed_match() -> None:
    watch = StopStrings(["aab"])
    assert [watch.push(letter) for letter in "xaaab"] == [
        ("x", False),
        ("", False),
        ("", False),
        ("a", False),
        ("", True),
    ]


def test_a_special_token_counts_as_the_text_that_a_stop_string_spells() -> None:
    special = {"<s>": 1, "</s>": 2, "<s>>": 3}

    def run(stop: str, *parts: str | int) -> tuple[str, bool]:
        watch = StopStrings([stop, "never"], special)
        text = ""
        for part in parts:
            piece, stopped = watch.push(part if isinstance(part, str) else watch.mark(part))
            text += piece
            if stopped:
                assert watch.completed == stop
                return text, True
        return text + watch.flush(), False

    assert run("</s>", "a", 2, "b") == ("a", True)
    assert run("</s>", "a</", "s>b") == ("a", True)  # ordinary tokens that spell it
    assert run("</s>", "a", 1, "b") == ("ab", False)
    assert run(".</s><s>x", "a.", 2, 1, "xy") == ("a", True)
    assert run(".</s><s>x", "a.", 2, 1, "y") == ("a.y", False)
    assert run("<s>>", "a", 3) == ("a", True)  # the longest name
    assert run("<s>>", "a", 1, ">") == ("a>", False)


@pytest.mark.parametrize("kind", EXACT)
@given(data=st.data())
def test_the_bytes_of_tokens_are_those_of_the_text(kind: str, data: st.DataObject) -> None:
    vocabulary = vocabulary_of(kind)
    text = data.draw(st.text(alphabet=TEXT + "\n~\x00\u0160", min_size=1))
    ids = vocabulary.tokenizer.encode(text).ids
    got = b"".join(map(vocabulary.token_bytes, ids)).decode()
    assert got.lstrip(" ") == vocabulary.decode(ids).lstrip(" ")  # a decoder may drop the first space


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_every_token(kind: str) -> None:
    vocabulary = vocabulary_of(kind)
    size = vocabulary.tokenizer.get_vocab_size()
    for token_id in range(size):
        data = vocabulary.token_bytes(token_id)
        text = vocabulary.decode([token_id])
        if token_id in vocabulary.special_tokens.values():
            assert data.decode() in vocabulary.special_tokens
        elif token_id not in vocabulary.bytes and BROKEN not in text:
            assert data.decode().lstrip(" ") == text.removeprefix("##").lstrip(" ")  # ## in a first word alone
    assert vocabulary.token_bytes(size + 5) == b""
    if vocabulary.bytes:
        assert {vocabulary.token_bytes(token_id)[0] for token_id in vocabulary.bytes} == set(range(256))


def test_a_space_before_a_word_is_one_of_its_bytes() -> None:
    for kind, token, expected in [
        ("prepend", "▁the", b" the"),
        ("unigram", "▁the", b" the"),
        ("metaspace decoder, first", "▁ab", b" ab"),
        ("byte level", "\u0120", b" "),
        ("byte level", "\u010a", b"\n"),
        ("word piece", "the", b" the"),
        ("word piece", "##the", b"the"),
    ]:
        vocabulary = vocabulary_of(kind)
        assert vocabulary.token_bytes(vocabulary.tokenizer.token_to_id(token)) == expected
