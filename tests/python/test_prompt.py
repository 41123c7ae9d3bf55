"""Prompts to tokens, by tokenizers of each kind, against what they decode to."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meki.prompt import LONG_TEXT, PromptEncoder, tokenizer_errors

from .tokenizers_of_kinds import EXACT, KINDS, SPECIAL

Make = Callable[[str], PromptEncoder]


def open_encoder(directory: Path) -> PromptEncoder:
    tokenizer = {"file": "tokenizer.json", "bos_token_id": None, "eos_token_ids": [], "chat_template": None}
    return PromptEncoder(directory, {"tokenizer": tokenizer, "architecture": {"vocab_size": 400}})


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Make:
    @cache
    def make(kind: str) -> PromptEncoder:
        directory = tmp_path_factory.mktemp("tokenizer")
        KINDS[kind]().save(str(directory / "tokenizer.json"))
        return open_encoder(directory)

    return make


@pytest.mark.parametrize("kind", EXACT)
@given(before=st.text("abthe .é", min_size=1), text=st.text("abthe .é", min_size=1))
def test_a_further_prompt_is_its_text_alone(encoder_of: Make, kind: str, before: str, text: str) -> None:
    encoder = encoder_of(kind)
    sequence = encoder.encode(before, first=True)
    whole = encoder.tokenizer.decode(sequence + encoder.encode(text, first=False))
    assert whole == encoder.tokenizer.decode(sequence) + text


@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(st.sampled_from(["the", " ab", "a", ".", *SPECIAL, "<tool>"])))
def test_what_follows_an_added_token_is_as_ever(encoder_of: Make, kind: str, parts: list[str]) -> None:
    encoder = encoder_of(kind)
    behind = "</s>" + "".join(parts)
    usual = encoder.tokenizer.encode(behind, add_special_tokens=False).ids
    assert encoder.encode(behind, first=False) == usual
    further = encoder.encode("a" + behind, first=False)
    assert further[-len(usual) :] == usual
    assert encoder.tokenizer.decode(further[: -len(usual)]) == "a"


def test_a_first_prompt_is_what_the_tokenizer_makes_of_it(encoder_of: Make) -> None:
    for kind in KINDS:
        encoder = encoder_of(kind)
        assert encoder.encode("the a", first=True) == encoder.tokenizer.encode("the a").ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_encoded_as_any_other(encoder_of: Make, kind: str) -> None:
    """Which happens in another way, so that other threads can run meanwhile."""
    encoder, text = encoder_of(kind), "the ab é." * (LONG_TEXT // 8)
    for special in (False, True):
        expected = encoder.tokenizer.encode(text, add_special_tokens=special).ids
        assert encoder.encode_text(text, special=special) == expected


def test_nothing_is_copied_where_nothing_is_put_in_front(encoder_of: Make) -> None:
    same = [kind for kind in KINDS if encoder_of(kind).continuing is encoder_of(kind).tokenizer]
    assert same == ["byte level", "replace", "metaspace, never", "metaspace decoder, never", "word piece", "words"]


def test_the_copy_differs_in_that_alone(encoder_of: Make) -> None:
    encoder = encoder_of("prepend")
    tokenizer, continuing = (json.loads(one.to_str()) for one in (encoder.tokenizer, encoder.continuing))
    assert tokenizer["normalizer"]["normalizers"][1:] == continuing["normalizer"]["normalizers"]
    assert {**tokenizer, "normalizer": None} == {**continuing, "normalizer": None}


class MallInfo(ctypes.Structure):
    """Of glibc's mallinfo2(3)."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    )


@pytest.mark.parametrize("kind", ["byte level", "unigram"])
def test_an_encoder_leaves_no_memory_behind(tmp_path: Path, kind: str) -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("the C library does not say what is allocated (glibc from 2.33 on does)")
    libc.mallinfo2.restype = MallInfo
    text = " ".join(f"the ab {number}" for number in range(300))
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))

    def rounds(count: int) -> int:
        """Bytes that are allocated afterwards."""
        for _ in range(count):
            encoder = open_encoder(tmp_path)
            encoder.encode(text, first=True)
            encoder.encode(text, first=False)
        return int(libc.mallinfo2().uordblks)

    before = rounds(20)
    # 300 words in the library's cache are more than 20,000 bytes.
    assert rounds(100) - before < 100 * 2_000


def test_an_interrupt_before_the_block_of_a_guard_is_no_fault_of_the_tokenizer() -> None:
    """Ctrl-C between entering and the block closes the guard's generator: it is not to raise anything of its own."""
    guard = tokenizer_errors(lambda error: AssertionError(f"told as the tokenizer's: {error!r}"))
    guard.__enter__()
    guard.gen.close()  # type: ignore[attr-defined]
