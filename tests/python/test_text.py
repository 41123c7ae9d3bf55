"""Detokenising and stop strings against references that see the whole text at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from meki.models.tokenizer import END_OF_STORY, train_tokenizer
from meki.text import Detokenizer, StopStrings


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    # Few merges: most characters beyond ASCII stay split into bytes, some become tokens that hold parts of characters.
    return train_tokenizer(["Füchse mögen Käse. 狐狸喜歡奶酪。 🦊🧀🦊 naïve café"] * 3, 290)


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@given(ids=st.lists(st.integers(0, 299)))
def test_pieces_join_to_the_decoded_tokens(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Any tokens: broken UTF-8, special tokens, and ids that the tokenizer does not have (a padded vocabulary)."""
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")))
def test_characters_are_never_broken(tokenizer: Tokenizer, text: str) -> None:
    pieces = pieces_of(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""  # nothing is left over after a complete text


def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🐻").ids
    assert len(ids) > 1  # not in the training text: its bytes are separate tokens
    assert pieces_of(tokenizer, ids) == [""] * (len(ids) - 1) + ["🐻", ""]
    assert pieces_of(tokenizer, ids[:-1])[-1] == "\ufffd"


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id(END_OF_STORY)
    assert "".join(pieces_of(tokenizer, [*tokenizer.encode("a").ids, end, *tokenizer.encode("b").ids])) == "ab"


def naive_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Reads one character more at a time until the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


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
    assert (shown, stopped) == (expected, expected_stop)


def test_a_stop_string_may_begin_inside_a_failed_match() -> None:
    watch = StopStrings(["aab"])
    assert [watch.push(letter) for letter in "xaaab"] == [
        ("x", False),
        ("", False),
        ("", False),
        ("a", False),
        ("", True),
    ]
