"""Tokenizers of GGUF metadata, against the tokenizers that they were made of and a naive SentencePiece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from meki.models.checkpoints.checkpoint import CheckpointError
from meki.models.checkpoints.gguf_tokenizer import read_gguf_tokenizer
from meki.models.tokenizer import TokenizerSpec

PATH = Path("m.gguf")
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type in the GGUF specification


def read(metadata: dict[str, Any]) -> TokenizerSpec:
    spec = read_gguf_tokenizer(PATH, metadata)
    assert spec is not None
    return spec


def tokenizer_of(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_buffer(read(metadata).json)


def ids_of(metadata: dict[str, Any], text: str) -> list[int]:
    return list(tokenizer_of(metadata).encode(text).ids)


def change(metadata: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Sets keys of `tokenizer.ggml.`; None removes one."""
    changed = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in changed.items() if value is not None}


# Byte-level BPE.


@pytest.fixture(scope="module")
def original(tokenizer_json: bytes) -> Tokenizer:
    """GPT-2's kind: the pre-tokenizer's built-in pattern."""
    return Tokenizer.from_buffer(tokenizer_json)


def bpe_metadata(original: Tokenizer, *more: tuple[str, int], **changes: Any) -> dict[str, Any]:
    """The tokens and merges of a byte-level tokenizer, and more tokens with their types."""
    model = json.loads(original.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    types = [CONTROL] + [NORMAL] * (len(tokens) - 1)  # the first is the end of a story
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens + [token for token, _ in more],
        "token_type": types + [kind for _, kind in more],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "eos_token_id": 0,
    }
    return change({}, **{**values, **changes})


@given(text=st.text())
def test_byte_level_equals_the_original(original: Tokenizer, text: str) -> None:
    tokenizer = tokenizer_of(bpe_metadata(original))
    for sample in (text, f"the cat {text} and the  ship"):
        ids = tokenizer.encode(sample).ids
        assert ids == original.encode(sample).ids
        assert tokenizer.decode(ids) == sample


SAMPLE = "I'LL pay  1234½ don't\n\n (x) a\u0301"

# By the definition of each pattern, read by hand. "|" stands between pieces.
PIECES = {
    "gpt-2": "I|'|LL| pay| | 1234½| don|'t|\n\n| (|x|)| a|\u0301",
    "smollm": "I|'|LL| pay|  |1|2|3|4|½| don|'t|\n\n| (|x|)| a|\u0301",
    "llama-bpe": "I|'LL| pay| | |123|4½| don|'t|\n\n| (|x|)| a|\u0301",
    "qwen2": "I|'LL| pay| | |1|2|3|4|½| don|'t|\n\n| (|x|)| á",
    "deepseek-r1-qwen": "I|'LL| pay| | |1|2|3|4|½| don|'t|\n\n| (|x|)| a|\u0301",
    "tekken": "I|'LL| pay| | |1|2|3|4|½| don|'t|\n\n| (|x|)| a\u0301",
    "gpt-4o": "I'LL| pay| | |123|4½| don't|\n\n| (|x|)| a\u0301",
    "seed-coder": "I|'LL| pay| | |1|2|3|4|½| don|'t|\n\n| (|x|)| a|\u0301",
    "deepseek-llm": "I|'|LL| pay|  |1234½| don|'|t|\n|\n| (|x|)| a|\u0301",
    "deepseek-coder": "I|'|LL| pay|  |1|2|3|4|½| don|'|t|\n|\n| (|x|)| a|\u0301",
    "deepseek-v3": "I|'LL| pay|  |123|4½| don|'t|\n\n| (|x|)| a\u0301",
    "default": "I|'|LL| pay| | |123|4½| don|'|t|\n\n |(|x|)| a|\u0301",
}
SAME = {
    **dict.fromkeys(("starcoder", "refact"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe"), "llama-bpe"),
    "megrez": "deepseek-r1-qwen",
}


@pytest.mark.parametrize("name", [*PIECES, *SAME])
def test_pre_tokenizers(original: Tokenizer, name: str) -> None:
    tokenizer = tokenizer_of(bpe_metadata(original, pre=name))
    text = tokenizer.normalizer.normalize_str(SAMPLE) if tokenizer.normalizer else SAMPLE
    pieces = [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == PIECES[SAME.get(name, name)].split("|")


@pytest.mark.parametrize(("name", "pieces"), [("qwen2", "x|)\n\n|y"), ("seed-coder", "x|)|\n\n|y")])
def test_line_ends_behind_marks(original: Tokenizer, name: str, pieces: str) -> None:
    cut = tokenizer_of(bpe_metadata(original, pre=name)).pre_tokenizer.pre_tokenize_str(pieces.replace("|", ""))
    assert [end - start for _, (start, end) in cut] == [len(piece) for piece in pieces.split("|")]


def test_whole_words(original: Tokenizer) -> None:
    """Vocabularies of tiktoken's kind have tokens that no merges lead to."""
    metadata = bpe_metadata(original, ("xyzzy", NORMAL))
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert ids_of(change(metadata, pre="llama-bpe"), "xyzzy") == [last]
    assert last not in ids_of(metadata, "xyzzy")


def test_control_and_user_defined_tokens(original: Tokenizer) -> None:
    more = [("<|im_end|>", CONTROL), ("<think>", USER), ("[PAD]", UNUSED)]
    metadata = bpe_metadata(original, *more)
    tokenizer, first = tokenizer_of(metadata), len(metadata["tokenizer.ggml.tokens"]) - 3
    ids = tokenizer.encode("cat<|im_end|><think>[PAD]").ids
    assert first in ids and first + 1 in ids
    assert first + 2 not in ids  # an unused token is no text
    assert tokenizer.decode(ids) == "cat<think>[PAD]"
    assert tokenizer.decode([first + 2]) == "[PAD]"


# What belongs to a tokenizer.


def test_end_tokens(original: Tokenizer) -> None:
    more = [("<|im_end|>", CONTROL), ("<|eot_id|>", CONTROL), ("</s>", NORMAL), ("<|x|>", CONTROL), ("<y>", CONTROL)]
    metadata = bpe_metadata(original, *more)
    first = len(metadata["tokenizer.ggml.tokens"]) - 5
    assert read(metadata).eos_token_ids == (0, first, first + 1)  # not a normal token that looks like one
    named = change(metadata, eos_token_id=first + 1, eot_token_id=first + 3, eom_token_id=first + 4)
    assert read(named).eos_token_ids == (first + 1, first + 3, first + 4, first)
    assert read(change(metadata, eos_token_id=None)).eos_token_ids == (first, first + 1)
    # Some files have the end of a turn as a token that a user defined.
    user_defined = bpe_metadata(original, ("<|im_end|>", USER), ("<think>", USER))
    assert read(user_defined).eos_token_ids == (0, first)


@pytest.mark.parametrize("none", [-1, 2**32 - 1])
def test_ids_that_say_there_is_no_token(original: Tokenizer, none: int) -> None:
    keys = ("bos_token_id", "eot_token_id", "padding_token_id", "unknown_token_id")
    metadata = bpe_metadata(original, add_bos_token=True)
    assert read(change(metadata, **dict.fromkeys(keys, none))) == read(metadata)
    assert read(change(SPM, unknown_token_id=none)).json == read(SPM).json


def test_ids_that_no_token_has(original: Tokenizer) -> None:
    metadata = bpe_metadata(original)
    with pytest.warns(
        UserWarning, match=r"m.gguf: tokenizer.ggml.eos_token_id is 10000, ignored: there are \d+ tokens"
    ):
        assert read(change(metadata, eos_token_id=10_000)).eos_token_ids == ()


@pytest.mark.parametrize(
    ("pre", "stated", "begins"),
    [
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("qwen2", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("falcon3", None, True),
        ("pixtral", None, True),
        ("smaug-bpe", None, False),
        ("tekken", None, True),
    ],
)
def test_bos(original: Tokenizer, pre: str, stated: bool | None, begins: bool) -> None:
    metadata = bpe_metadata(original, ("<s>", CONTROL), pre=pre, add_bos_token=stated)
    bos = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert read(change(metadata, bos_token_id=bos)).bos_token_id == (bos if begins else None)
    assert read(metadata).bos_token_id is None  # it does not say which


def test_sampling(original: Tokenizer) -> None:
    metadata = bpe_metadata(original)
    assert read(metadata).sampling == {}
    off = {"general.sampling.top_k": -1, "general.sampling.top_p": 0.0}
    assert read({**metadata, **off}).sampling == {"top_k": 0, "top_p": 0}
    stated = {"temp": float(np.float32(0.6)), "top_k": 20, "top_p": float(np.float32(0.95)), "mirostat": 2}
    metadata |= {f"general.sampling.{key}": value for key, value in stated.items()}
    assert read(metadata).sampling == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    with pytest.raises(CheckpointError, match=r"general.sampling: min_p is 7"):
        read({**metadata, "general.sampling.min_p": 7.0})
    with pytest.raises(CheckpointError, match="metadata is damaged"):
        read({**metadata, "general.sampling.min_p": "7"})


def test_chat_template(original: Tokenizer) -> None:
    metadata = bpe_metadata(original, ("<s>", CONTROL), ("<pad>", CONTROL))
    bos = len(metadata["tokenizer.ggml.tokens"]) - 2
    assert read(metadata).chat_template is None
    metadata = change(metadata, bos_token_id=bos, padding_token_id=bos + 1, unknown_token_id=0)
    spec = read({**metadata, "tokenizer.chat_template": "{{ bos_token }}"})
    assert spec.chat_template == "{{ bos_token }}"
    end = metadata["tokenizer.ggml.tokens"][0]
    assert spec.special_tokens == {"bos_token": "<s>", "eos_token": end, "unk_token": end, "pad_token": "<pad>"}


# SentencePiece.

LETTERS = "aehnt▁"
WORDS = ["th", "he", "▁t", "an", "▁th", "the", "▁the", "hen", "then", "▁then", "▁▁", "▁▁▁▁", "at", "tea", "ea"]
SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, *LETTERS, "<tool>"]
SPM_TYPES = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(WORDS) + len(LETTERS)), USER]
SPM_SCORES = [0.0] * 259 + [-float(rank) for rank in range(len(WORDS) + len(LETTERS))] + [0.0]
SPM = change(
    {},
    model="llama",
    pre="default",
    tokens=SPM_TOKENS,
    token_type=SPM_TYPES,
    scores=SPM_SCORES,
    bos_token_id=1,
    eos_token_id=2,
    unknown_token_id=0,
)


def sentencepiece(text: str) -> list[int]:
    """The algorithm as published: join the two neighbours that make the token of the best score, the leftmost first."""
    pieces = list(text.replace(" ", "▁"))
    scores = {token: SPM_SCORES[id] for id, token in enumerate(SPM_TOKENS) if SPM_TYPES[id] == NORMAL}
    while True:
        joined = [(pieces[i] + pieces[i + 1], i) for i in range(len(pieces) - 1)]
        known = [(-scores[piece], i) for piece, i in joined if piece in scores]
        if not known:
            break
        i = min(known)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids = []
    for piece in pieces:
        names = [piece] if piece in scores else [f"<0x{byte:02X}>" for byte in piece.encode()]
        ids += [SPM_TOKENS.index(name) for name in names]
    return ids


@given(text=st.text(alphabet="aehnt  zé😀\n") | st.text())
def test_sentencepiece(text: str) -> None:
    tokenizer = tokenizer_of(SPM)
    ids = tokenizer.encode(text).ids
    if not any(token in text for token in ("<unk>", "<s>", "</s>", "<tool>")):
        assert ids == (sentencepiece(" " + text) if text else [])
        # U+2581 is how a space is written, so it cannot come back as itself.
        assert tokenizer.decode(ids) == text.replace("▁", " ")
    plain = tokenizer_of(change(SPM, add_space_prefix=False))
    assert plain.encode(f"then{text}\n").ids == sentencepiece(f"then{text}\n") or "<" in text
    assert plain.decode(plain.encode(" the").ids) == " the"


def test_sentencepiece_special_tokens() -> None:
    tokenizer = tokenizer_of(SPM)
    the, tool = SPM_TOKENS.index("▁the"), SPM_TOKENS.index("<tool>")
    # A prefix for what follows a special token, too, as llama.cpp and the published tokenizer.json of Llama 2 have it.
    assert tokenizer.encode("the</s>the<tool>the").ids == [the, 2, the, tool, the]
    assert tokenizer.decode([the, 2, tool]) == "the<tool>"
    spec = read(SPM)
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))
    assert spec.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert read(change(SPM, add_bos_token=False)).bos_token_id is None


def test_sentencepiece_without_bytes() -> None:
    """What is neither a token nor bytes is one unknown token."""
    tokens = ["<unk>" if SPM_TYPES[id] == UNKNOWN else token for id, token in enumerate(SPM_TOKENS)]
    tokens = [f"byte{id}" if SPM_TYPES[id] == BYTE else token for id, token in enumerate(tokens)]
    ids = ids_of(change(SPM, tokens=tokens, add_space_prefix=False), "azé")
    assert ids == [SPM_TOKENS.index("a"), 0]


# Gemma.


def gemma_merges() -> list[tuple[str, str]]:
    """Every pair that makes a token, by the rank of what it makes."""
    known = {*WORDS, *LETTERS, *RUNS, "\n"}
    words = [*RUNS[::-1], *WORDS]
    return [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in known and word[cut:] in known
    ]


RUNS = ["\n\n", "\n\n\n", "▁▁▁"]
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *SPM_TOKENS[3:-1], "\n", *RUNS, "</s>"]
GEMMA_TURNS = ["<|tool_response>", "<|turn>", "<turn|>", '<|"|>']
GEMMA4 = change(
    {},
    model="gemma4",
    tokens=GEMMA_TOKENS + GEMMA_TURNS,
    token_type=[
        *[CONTROL] * 3,
        UNKNOWN,
        CONTROL,
        *[BYTE] * 256,
        *[NORMAL] * (len(GEMMA_TOKENS) - 261),
        USER,
        CONTROL,
        CONTROL,
        USER,
    ],
    merges=[" ".join(merge) for merge in gemma_merges()],
    bos_token_id=2,
    eos_token_id=1,
    unknown_token_id=3,
)


@pytest.fixture(scope="module")
def published() -> transformers.PreTrainedTokenizerBase:
    """That of transformers, which makes a tokenizer.json of the same tokens and merges."""
    vocabulary = {token: id for id, token in enumerate(GEMMA_TOKENS)}
    return transformers.GemmaTokenizer(vocabulary, gemma_merges(), additional_special_tokens=GEMMA_TURNS)


@given(text=st.text(alphabet="aehnt   zé😀\n\n") | st.text())
def test_gemma4_equals_the_published_tokenizer(published: transformers.PreTrainedTokenizerBase, text: str) -> None:
    for sample in (text, f"<|turn>then\n{text}<turn|>\n"):
        ids = tokenizer_of(GEMMA4).encode(sample).ids
        assert ids == published(sample, add_special_tokens=False)["input_ids"]


def test_gemma4_special_tokens() -> None:
    spec, tokenizer = read(GEMMA4), tokenizer_of(GEMMA4)
    first = len(GEMMA_TOKENS)
    assert spec.bos_token_id == 2  # where the file does not say, too
    assert spec.eos_token_ids == (1, first, first + 2)  # not "</s>", which is a tag of HTML here
    assert tokenizer.decode(tokenizer.encode('<|turn>the <|"|>\n\n<turn|>').ids) == 'the <|"|>\n\n'
    named = change(GEMMA4, eos_token_id=first + 2)
    assert read(named).eos_token_ids == (first + 2, 1, first)


def test_gemma3_special_tokens() -> None:
    """Runs of spaces and newlines are tokens that a user defined, found before a text is cut."""
    more = [("<end_of_turn>", CONTROL), ("\n", USER), ("\n\n", USER), ("  ", USER), ("   ", USER), ("</s>", USER)]
    tokens = [token for token in SPM_TOKENS if token != "</s>"] + [token for token, _ in more]
    types = [kind for token, kind in zip(SPM_TOKENS, SPM_TYPES, strict=True) if token != "</s>"]
    metadata = change(
        SPM,
        tokens=tokens,
        token_type=types + [kind for _, kind in more],
        scores=SPM_SCORES[1:] + [-1000.0] * len(more),
        add_space_prefix=False,
        eos_token_id=None,
    )
    spec, tokenizer = read(metadata), tokenizer_of(metadata)
    assert spec.eos_token_ids == (tokens.index("<end_of_turn>"),)
    ids = tokenizer.encode("then   the\n\n\n</s>").ids
    assert [tokens[id] for id in ids] == ["then", "   ", "the", "\n\n", "\n", "</s>"]


# What is refused.


def test_no_tokenizer() -> None:
    assert read_gguf_tokenizer(PATH, {}) is None
    assert read_gguf_tokenizer(PATH, {"tokenizer.ggml.model": "no_vocab"}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; supported: 'gpt2', 'llama', 'gemma4'"),
        ({"pre": "falcon"}, "tokenizer.ggml.pre is 'falcon'; known: deepseek-coder, .*, default, .*, tekken"),
        ({"pre": None}, "tokenizer.ggml.pre is 'none'; known: "),
        ({"tokens": None}, "tokenizer.ggml.tokens must be an array of strings, got NoneType"),
        ({"merges": None}, "tokenizer.ggml.merges must be an array of strings"),
        ({"merges": ["a b", "no token"]}, "its tokens and merges make no BPE"),
        ({"merges": ["abc"]}, "its tokens and merges make no BPE"),
        ({"token_type": [1, 2]}, "tokenizer.ggml.token_type has 2 entries for "),
        ({"eos_token_id": "</s>"}, "tokenizer.ggml.eos_token_id is '</s>', expected the id of a token"),
    ],
)
def test_refused(original: Tokenizer, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read(bpe_metadata(original, **changes))
    assert str(error.value).startswith("m.gguf: ")
    assert str(error.value).endswith("give the model's tokenizer.json (--tokenizer)")


def test_refused_twice(original: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.tokens has '<x>' twice"):
        read(bpe_metadata(original, ("<x>", CONTROL), ("<x>", NORMAL)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "tokenizer.ggml.scores has 0 entries for "),
        ({"scores": [0.0]}, "tokenizer.ggml.scores has 1 entries for "),
        ({"model": "gemma4"}, "tokenizer.ggml.merges must be an array of strings"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is true, which is not supported"),
    ],
)
def test_refused_sentencepiece(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(change(SPM, **changes))
