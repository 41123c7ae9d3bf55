"""A tokenizer.json and what stands beside it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models

from meki.models.package import check_tokenizer
from meki.models.tokenizer import (
    END_OF_STORY,
    TokenizerSpec,
    canonical_ids,
    parse_tokenizer,
    read_tokenizer,
    train_tokenizer,
    with_visible_marks,
    without_unknown_tokens,
)


@pytest.fixture
def folder(tokenizer_json: bytes, tmp_path: Path) -> Path:
    """A tokenizer with two more special tokens, 300 and 301."""
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    assert tokenizer.get_vocab_size() == 300
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def test_alone(folder: Path) -> None:
    spec = read_tokenizer(folder / "tokenizer.json")
    assert spec == TokenizerSpec((folder / "tokenizer.json").read_bytes(), eos_token_ids=(0,))


def test_alone_without_the_end_of_story(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(END_OF_STORY, "<|other|>"))
    assert read_tokenizer(path).eos_token_ids == ()


def test_all_that_belongs_to_it(folder: Path) -> None:
    special = {
        "bos_token": {"content": "<|im_start|>", "special": True},
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "unk_token": "<|im_end|>",
    }
    write(folder, "tokenizer_config.json", {**special, "add_bos_token": True, "chat_template": "{{ Ünicode }}"})
    sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": None, "max_length": 9}
    write(folder, "generation_config.json", {"eos_token_id": [301, 7], "do_sample": True, **sampling})
    write(folder, "config.json", {"eos_token_id": 8})
    spec = read_tokenizer(folder / "tokenizer.json")
    assert spec.bos_token_id == 300
    assert spec.eos_token_ids == (301, 7, 8)
    assert spec.chat_template == "{{ Ünicode }}"
    assert spec.sampling == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert spec.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|im_end|>"}


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False}, {"add_bos_token": None}])
def test_beginning_that_is_not_added(folder: Path, settings: dict[str, Any]) -> None:
    write(folder, "tokenizer_config.json", {"bos_token": "<|im_start|>", **settings})
    assert read_tokenizer(folder / "tokenizer.json").bos_token_id is None


def test_end_tokens_that_are_stated(folder: Path) -> None:
    """No guess where a file speaks, be it of none."""
    write(folder, "generation_config.json", {"eos_token_id": []})
    assert read_tokenizer(folder / "tokenizer.json").eos_token_ids == ()
    write(folder, "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    assert read_tokenizer(folder / "tokenizer.json").eos_token_ids == (301,)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokenizer_config.json", {"eos_token": "<|gone|>"}, "has no token '<|gone|>', which the files beside it name"),
        ("tokenizer_config.json", {"bos_token": "<|gone|>", "add_bos_token": True}, "has no token '<|gone|>'"),
        ("generation_config.json", {"do_sample": True, "top_p": 2}, "generation_config.json: top_p is 2.0"),
        ("generation_config.json", {"eos_token_id": [[1]]}, "eos_token_id has [1], expected token ids"),
        ("config.json", {"eos_token_id": "two"}, "eos_token_id has 'two', expected token ids"),
    ],
)
def test_neighbours_of_another_form(folder: Path, name: str, value: Any, message: str) -> None:
    write(folder, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_tokenizer(folder / "tokenizer.json")


def test_several_templates(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert read_tokenizer(folder / "tokenizer.json").chat_template == "plain"
    (folder / "chat_template.jinja").write_bytes(b"a file\r\nof its own")  # which comes first, byte for byte
    assert read_tokenizer(folder / "tokenizer.json").chat_template == "a file\r\nof its own"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ({"default": "x"}, "it is a dict, expected a string"),
        ([{"name": "default", "template": 3}], "it is a int, expected a string"),
        ("{% endfor %}", "line 1: "),
    ],
)
def test_a_template_that_cannot_be_used(folder: Path, template: Any, reason: str) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": template})
    with pytest.warns(
        UserWarning, match=rf"{folder}/tokenizer_config.json: the chat template .*: {reason}.*--chat-tem"
    ):
        assert read_tokenizer(folder / "tokenizer.json").chat_template is None


@pytest.mark.parametrize("stated", [{}, {"temperature": None}, {"temperature": 1}])
def test_sampling_without_a_temperature_is_at_1(folder: Path, stated: dict[str, Any]) -> None:
    """As transformers does; the runtime's own default is lower."""
    write(folder, "generation_config.json", {"do_sample": True, "top_k": 20, **stated})
    assert read_tokenizer(folder / "tokenizer.json").sampling == {"temperature": 1.0, "top_k": 20}


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_neighbours(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{folder / name}: (not valid JSON|got a JSON list)"):
        read_tokenizer(folder / "tokenizer.json")


def test_missing_and_damaged(folder: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"gone.json: no such tokenizer; name a tokenizer.json with --tokenizer"
    ):
        read_tokenizer(folder / "gone.json")
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.warns(UserWarning, match=r"chat_template.jinja: the chat template cannot be used .*: 'utf-8' codec"):
        assert read_tokenizer(folder / "tokenizer.json").chat_template is None
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{folder}/tokenizer.json: tokenizer: not in the tokenizers library"):
        read_tokenizer(folder / "tokenizer.json")


def test_a_panic_of_the_library(folder: Path) -> None:
    """Which is no Exception: a prefix that is longer than the word that it should begin."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "abc"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(ValueError, match=rf"{folder}/tokenizer.json: tokenizer: not in .*range.*; get it from"):
        read_tokenizer(folder / "tokenizer.json")


def test_a_model_without_a_token_for_what_it_lacks(folder: Path) -> None:
    """It can be loaded, and fails on nearly any text: conversion says so, not the first prompt."""
    model = {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(ValueError, match="Encountered an unknown token"):
        read_tokenizer(folder / "tokenizer.json")


# Tokens that only the files beside a tokenizer.json know.

FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


def ids_of(folder: Path, text: str) -> list[int]:
    return list(Tokenizer.from_buffer(read_tokenizer(folder / "tokenizer.json").json).encode(text).ids)


def ids_of_transformers(folder: Path, text: str) -> list[int]:
    return list(transformers.PreTrainedTokenizerFast.from_pretrained(folder)(text)["input_ids"])


@pytest.mark.parametrize(
    "beside",
    [
        {"tokenizer_config": {"added_tokens_decoder": {"303": {"content": "<b>"}, "302": {"content": "<a>", **FLAGS}}}},
        {"tokenizer_config": {"additional_special_tokens": ["<b>"]}, "added_tokens": {"<b>": 303, "<a>": 302}},
    ],
)
def test_tokens_that_only_the_files_beside_have(folder: Path, beside: dict[str, Any]) -> None:
    for name, value in beside.items():
        write(folder, f"{name}.json", value)
    ids = ids_of(folder, "the <a>cat<b>")
    assert 302 in ids and 303 in ids
    assert ids == ids_of_transformers(folder, "the <a>cat<b>")


def test_tokens_that_the_files_beside_describe_otherwise(folder: Path) -> None:
    """A token of the vocabulary that is not known to be one in a text, and other flags, which are theirs."""
    ke = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("eper")
    stated = {"content": "<|im_end|>", **FLAGS, "lstrip": True}
    config = {"added_tokens_decoder": {str(ke): {"content": "eper", **FLAGS}, "301": stated}, "eos_token": "<|im_end|>"}
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    ids = ids_of(folder, "keeper  <|im_end|>")
    assert ids[-2:] == [ke, 301]  # the spaces before it are part of it
    assert ids == ids_of_transformers(folder, "keeper  <|im_end|>")


def test_special_tokens_of_the_vocabulary(folder: Path) -> None:
    """Part of a word, unless it is known to be a token of its own."""
    eper = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("eper")
    assert eper not in ids_of(folder, "the keeper")
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "eper"})
    ids = ids_of(folder, "the keeper")
    assert ids[-1] == eper
    assert ids == ids_of_transformers(folder, "the keeper")


def test_nothing_is_rewritten_without_need(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text + "\n\n")
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": {"300": {"content": "<|im_start|>", **FLAGS}}})
    assert read_tokenizer(folder / "tokenizer.json").json == (text + "\n\n").encode()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"305": "<|im_end|>"}, "token '<|im_end|>' has id 305, but there its id is 301; correct one of them, or name"),
        ({"301": "<new>"}, "token '<new>' has id 301, but there 301 is '<|im_end|>'; correct"),
        ({"309": "<new>"}, "token '<new>' has id 309, but there its id is 302; correct"),
        ({"302": ["<new>"]}, "are not ids and tokens: TypeError"),
        ({"first": "<new>"}, "are not ids and tokens: ValueError"),
    ],
)
def test_tokens_that_contradict(folder: Path, tokens: dict[str, Any], message: str) -> None:
    decoder = {id: {"content": content, **FLAGS} for id, content in tokens.items()}
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": decoder})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_tokenizer(folder / "tokenizer.json")
    assert str(error.value).startswith(f"{folder}")


# What other programs write, and take.


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"top_k": -1, "top_p": 0}, {"temperature": 1, "top_k": 0, "top_p": 0}),
        ({"temperature": "0.7", "top_k": 20.0}, {"temperature": 0.7, "top_k": 20}),
    ],
)
def test_sampling_as_others_write_it(folder: Path, stated: dict[str, Any], expected: dict[str, float]) -> None:
    write(folder, "generation_config.json", {"do_sample": True, **stated})
    assert read_tokenizer(folder / "tokenizer.json").sampling == expected


def test_end_tokens_as_others_write_them(folder: Path) -> None:
    write(folder, "generation_config.json", {"eos_token_id": ["301", 7.0, None]})
    with pytest.raises(ValueError, match="eos_token_id has None"):
        read_tokenizer(folder / "tokenizer.json")
    write(folder, "generation_config.json", {"eos_token_id": ["301", 7.0, 999, -1]})
    spec = read_tokenizer(folder / "tokenizer.json")
    with pytest.warns(UserWarning, match="end tokens 999, -1 are ignored, the vocabulary's ids are 0 to 301"):
        assert without_unknown_tokens(spec, 302).eos_token_ids == (301, 7)


def test_special_tokens_that_the_model_does_not_have(tokenizer_json: bytes) -> None:
    """As Gemma 3's token for images, of which a model for texts has no row. Ordinary ones are another model's."""
    tokenizer = parse_tokenizer(tokenizer_json)
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<image>"])
    with pytest.warns(UserWarning, match=f"special tokens <image> are left out: the model has {size} tokens"):
        kept = without_unknown_tokens(TokenizerSpec(tokenizer.to_str().encode()), size)
    check_tokenizer(kept, size)
    text = "the cat <image> sat"
    assert parse_tokenizer(kept.json).encode(text).ids == parse_tokenizer(tokenizer_json).encode(text).ids
    whole = TokenizerSpec(tokenizer.to_str().encode())
    assert without_unknown_tokens(whole, size + 1) == whole
    tokenizer.add_tokens(["ordinary"])
    with pytest.warns(UserWarning, match="special tokens <image>"):
        wrong = without_unknown_tokens(TokenizerSpec(tokenizer.to_str().encode()), size)
    with pytest.raises(ValueError, match="its largest token id is "):
        check_tokenizer(wrong, size)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_marks_and_zeros_around_a_file(folder: Path, name: str) -> None:
    write(folder, "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    (folder / "chat_template.jinja").write_text("{{ x }}")
    plain = read_tokenizer(folder / "tokenizer.json")
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes() + bytes(3))
    assert read_tokenizer(folder / "tokenizer.json") == plain


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_pointers_of_git_lfs(folder: Path, name: str) -> None:
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=f"{folder / name}: is a Git LFS pointer, .*: git lfs pull"):
        read_tokenizer(folder / "tokenizer.json")


def test_a_key_that_is_there_twice(folder: Path) -> None:
    """The last one counts, as for everyone."""
    (folder / "generation_config.json").write_text('{"eos_token_id": 5, "eos_token_id": 6}')
    assert read_tokenizer(folder / "tokenizer.json").eos_token_ids == (6,)


def test_marks_of_an_answers_parts_have_a_text() -> None:
    tokenizer = train_tokenizer(["a thought and an answer"] * 4, 270)
    tokenizer.add_special_tokens(["<turn|>", "<|channel>", "<channel|>"])
    spec = TokenizerSpec(tokenizer.to_str().encode(), eos_token_ids=(270,))
    visible = with_visible_marks(spec)
    assert dataclasses.replace(visible, json=spec.json) == spec
    text = "<|channel>thought\na<channel|>an answer<turn|>"
    ids = tokenizer.encode(text).ids
    after = parse_tokenizer(visible.json)
    assert after.encode(text).ids == ids
    assert tokenizer.decode(ids) == "thought\naan answer"
    assert after.decode(ids) == "<|channel>thought\na<channel|>an answer"
    assert with_visible_marks(visible) is visible


def test_canonical_ids_are_alike_but_for_case_accents_forms_and_space_around() -> None:
    words = [
        "the",
        " the",
        "The",
        " THE\n",
        "th e",
        "cafe",
        " Café",
        "Cafe\u0301",
        "ﬁne",
        "fine",
        " ",
        "\n\n",
        "\u0301",
        "é",
    ]
    words += ["e", "\u00a0"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="the"))
    ids = canonical_ids(tokenizer)
    alike = [{word for word, its in zip(words, ids, strict=True) if its == number} for number in range(max(ids) + 1)]
    assert alike == [
        *({"the", " the", "The", " THE\n"}, {"th e"}, {"cafe", " Café", "Cafe\u0301"}, {"ﬁne", "fine"}),
        *({" ", "\n\n", "\u00a0"}, {"\u0301"}, {"é", "e"}),
    ]


def test_parts_of_characters_are_alike_to_nothing_else() -> None:
    tokenizer = train_tokenizer(["éé the The"] * 4, 262)
    ids = canonical_ids(tokenizer)
    assert len(ids) == tokenizer.get_vocab_size() and max(ids) < len(ids)
    for token, number in enumerate(ids):
        if "\ufffd" in tokenizer.decode([token], skip_special_tokens=False):
            assert ids.count(number) == 1
    assert ids[tokenizer.token_to_id("A")] == ids[tokenizer.token_to_id("a")]
