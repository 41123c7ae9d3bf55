"""Which tokens are allowed, with tokenizers of every kind: any walk along them is a text of the grammar."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from meki import Engine
from meki.options import Form
from meki.prompt import PromptEncoder
from meki.structured import Constraint, Grammars
from meki.text import Detokenizer

from .tokenizers_of_kinds import KINDS

END = "</s>"
PADDING = 70


def normalised() -> Tokenizer:
    tokenizer = KINDS["byte level"]()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


def few_letters() -> Tokenizer:
    letters = {letter: token_id for token_id, letter in enumerate("AaĠword,1numbe.Ċ")}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


ALL = {**KINDS, "normalised": normalised, "few letters": few_letters}
REFUSED = [name for name in KINDS if name.startswith("metaspace decoder") or name in ("unigram", "word piece", "words")]
"""Kinds that llguidance does not know, or whose spaces it takes for another character."""


def make_grammars(kind: str, directory: Path) -> tuple[Grammars, PromptEncoder]:
    tokenizer = ALL[kind]()
    tokenizer.save(str(directory / "tokenizer.json"))
    ends = [tokenizer.token_to_id(END)]
    settings = {"file": "tokenizer.json", "bos_token_id": None, "eos_token_ids": ends, "chat_template": None}
    vocab_size = tokenizer.get_vocab_size() + PADDING
    prompts = PromptEncoder(directory, {"tokenizer": settings, "architecture": {"vocab_size": vocab_size}})
    return Grammars(prompts, vocab_size), prompts


def walk(grammars: Grammars, prompts: PromptEncoder, regex: str, seed: int) -> str | None:
    """A text of random tokens among those allowed; None: it did not end."""
    choice = random.Random(seed)
    constraint = grammars.constraint(Form("regex", regex))
    detokenizer = Detokenizer(prompts.vocabulary, prompts.encode("ab the", first=True))
    pieces = []
    for _ in range(300):
        mask = int.from_bytes(constraint.allowed(), "little")
        allowed = [token for token in range(mask.bit_length()) if mask >> token & 1]
        assert allowed[-1] < prompts.tokenizer.get_vocab_size()  # none of those that pad the vocabulary
        token = choice.choice(allowed)
        if token in prompts.end_token_ids:
            break
        pieces.append(detokenizer.push(token))
        if constraint.accept(token):
            break
    else:
        return None
    return "".join(pieces) + detokenizer.flush()


@pytest.mark.parametrize("kind", [name for name in ALL if name not in (*REFUSED, "few letters")])
@pytest.mark.parametrize(
    "regex",
    ["( the| a|b|é|狐|🦊| ){3,9}\\.?", "[ -\u30ff]{2,6}", "(?s:.{4,9})", "the(ab)*", "  ab  ab", "e\u0301E\ufb01x"],
)
def test_walks(kind: str, regex: str, tmp_path: Path) -> None:
    grammars, prompts = make_grammars(kind, tmp_path)
    texts = [walk(grammars, prompts, regex, seed) for seed in range(10)]
    assert any(text is not None for text in texts)
    for text in texts:
        assert text is None or re.fullmatch(regex, text), text


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused(kind: str, tmp_path: Path) -> None:
    grammars, _ = make_grammars(kind, tmp_path)
    with pytest.raises(ValueError, match="regex does not work with this model's tokenizer"):
        grammars.constraint(Form("regex", "a"))


def only(constraint: Constraint) -> int:
    """The token that alone is allowed."""
    mask = int.from_bytes(constraint.allowed(), "little")
    assert mask.bit_count() == 1
    return mask.bit_length() - 1


def test_tokens_that_a_grammar_names(tmp_path: Path) -> None:
    grammars, prompts = make_grammars("byte level", tmp_path)
    tokenizer = prompts.tokenizer
    a, special = tokenizer.token_to_id("a"), tokenizer.token_to_id("<s>")
    constraint = grammars.constraint(Form("grammar", f'start: "a" <s> <[{special}]>'))
    assert only(constraint) == a
    assert not constraint.accept(a)
    assert only(constraint) == special
    assert not constraint.accept(special)
    assert only(constraint) == special
    assert constraint.accept(special)
    with pytest.raises(ValueError, match="unknown special token"):
        grammars.constraint(Form("grammar", "start: <nobody>"))


def test_a_text_that_no_token_goes_on_with(tmp_path: Path) -> None:
    grammars, prompts = make_grammars("few letters", tmp_path)
    constraint = grammars.constraint(Form("regex", "ax"))
    a = prompts.tokenizer.token_to_id("a")
    assert only(constraint) == a
    assert not constraint.accept(a)
    with pytest.raises(
        ValueError, match="regex cannot be used: the model has no token with which the text could go on"
    ):
        constraint.allowed()


def test_a_vocabulary_beyond_the_tokenizer(make_package: Callable[..., Path]) -> None:
    engine = Engine(make_package(vocab_size=381), threads=1)
    assert engine.vocab_size > engine.tokenizer.get_vocab_size()
    for seed in range(3):
        result = engine.generate("a", regex="[a-z0-9]{20}", temperature=5, seed=seed)
        assert re.fullmatch("[a-z0-9]{20}", result.text)


def test_a_model_without_an_end_token(change_package: Callable[..., Path]) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["tokenizer"]["eos_token_ids"] = []

    with pytest.raises(ValueError, match="regex: the model has no end token"):
        Engine(change_package(edit), threads=1).generate("a", regex="a")
