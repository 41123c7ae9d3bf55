"""The tokenizer of a GGUF file's metadata, rebuilt in the tokenizers library's form.

The keys are those of the GGUF specification, section "Tokenizer"; what they leave open (defaults, which texts end a
turn) is as llama.cpp has it, whose files these are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..tokenizer import TokenizerSpec, checked_sampling, usable_template
from .checkpoint import CheckpointError
from .gguf_pre_tokenizers import PRE_TOKENIZERS

_REMEDY = "give the model's tokenizer.json (--tokenizer)"

# Tokens that end a turn or a text, if they are not ordinary ones. eos_token_id alone misses one of the two that a chat
# model has; some files have it as user-defined.
_END_TEXTS = {
    "<EOT>",
    "<end_of_turn>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek's bars are not ASCII)
}
_END_CONTROL = "</s>"
"""Ends a text, too, but only as a control token: Gemma has it as HTML's, user-defined."""
_NO_TOKEN = (-1, 2**32 - 1)
"""What files have as the id of a token that there is not: -1, signed and unsigned."""
_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_TEMPLATE_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def read_gguf_tokenizer(path: Path, metadata: Mapping[str, Any]) -> TokenizerSpec | None:
    """The tokenizer that `metadata` (a GGUF file's keys and values) describes; None if the file has none.

    path: for messages. CheckpointError if it is of a kind that is not supported, or broken.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    try:
        tokens, types = _vocabulary(values)
        if kind == "gpt2":
            tokenizer, begins = _byte_level(values, tokens)
        elif kind in ("llama", "gemma4"):
            merges = _listed_merges(values) if kind == "gemma4" else _merges_of_scores(values, tokens, types)
            tokenizer, begins = _sentencepiece(path, values, tokens, merges), True
        else:
            raise CheckpointError(f"tokenizer.ggml.model is {kind!r}; supported: 'gpt2', 'llama', 'gemma4'")
        _add_tokens(tokenizer, tokens, types)
        keys = (*_END_IDS, *_TEMPLATE_TOKENS.values())
        named = {key: id for key in keys if (id := _token(path, values, tokens, key)) is not None}
        if not isinstance(begins := values.get("add_bos_token", begins), bool):
            raise CheckpointError(f"tokenizer.ggml.add_bos_token is {begins!r}, expected true or false")
        sampling = _sampling(metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; {_REMEDY}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: the tokenizer's metadata is damaged: {error}; {_REMEDY}") from error
    texts = {name: tokens[named[key]] for name, key in _TEMPLATE_TOKENS.items() if key in named}
    ends = [named[key] for key in _END_IDS if key in named]
    found = (TokenType.CONTROL, TokenType.USER_DEFINED)
    ends += [id for id, token in enumerate(tokens) if token in _END_TEXTS and types[id] in found]
    ends += [id for id, token in enumerate(tokens) if token == _END_CONTROL and types[id] == TokenType.CONTROL]
    return TokenizerSpec(
        json=tokenizer.to_str().encode(),
        bos_token_id=named.get("bos_token_id") if begins else None,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        chat_template=usable_template(path, metadata.get("tokenizer.chat_template")),
        sampling=sampling,
        special_tokens=texts,
    )


_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def _sampling(metadata: Mapping[str, Any]) -> dict[str, float]:
    keys = {name: f"general.sampling.{key}" for name, key in _SAMPLING.items()}
    # Stored as float32: 0.6 is meant, not 0.60000002.
    stated = {name: round(metadata[key], 6) for name, key in keys.items() if key in metadata}
    return checked_sampling("general.sampling", stated)


def _vocabulary(values: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """The tokens and their types (gguf.TokenType), by id."""
    tokens = _strings(values, "tokens")
    types = values.get("token_type", [TokenType.NORMAL] * len(tokens))
    if not all(isinstance(type, int) for type in types):
        raise CheckpointError("tokenizer.ggml.token_type must be an array of integers")
    if len(types) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    ids = {token: id for id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(id for id, token in enumerate(tokens) if ids[token] != id)
        raise CheckpointError(f"tokenizer.ggml.tokens has {tokens[twice]!r} twice: {twice} and {ids[tokens[twice]]}")
    return tokens, types


def _strings(values: Mapping[str, Any], key: str) -> list[str]:
    strings = values.get(key)
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise CheckpointError(f"tokenizer.ggml.{key} must be an array of strings, got {type(strings).__name__}")
    return strings


def _token(path: Path, values: Mapping[str, Any], tokens: Sequence[str], key: str) -> int | None:
    """None: the file says that there is none, or does not say. One that no token has is ignored with a warning."""
    id = values.get(key)
    if id is None or id in _NO_TOKEN:
        return None
    if not isinstance(id, int):
        raise CheckpointError(f"tokenizer.ggml.{key} is {id!r}, expected the id of a token")
    if 0 <= id < len(tokens):
        return id
    warnings.warn(f"{path}: tokenizer.ggml.{key} is {id}, ignored: there are {len(tokens)} tokens", stacklevel=2)
    return None


def _byte_level(values: Mapping[str, Any], tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """BPE over bytes in GPT-2's alphabet, and whether a text begins with BOS where the file does not say."""
    name = values.get("pre", "none")
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(f"tokenizer.ggml.pre is {name!r}; known: {', '.join(sorted(PRE_TOKENIZERS))}")
    kind = PRE_TOKENIZERS[name]
    tokenizer = _bpe(tokens, _listed_merges(values), ignore_merges=kind.whole_words)
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in kind.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, kind.begins


def _listed_merges(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.partition(" ") for merge in _strings(values, "merges"))
    return [(left, right) for left, _, right in pairs]


def _sentencepiece(
    path: Path, values: Mapping[str, Any], tokens: Sequence[str], merges: Sequence[tuple[str, str]]
) -> Tokenizer:
    """SentencePiece's BPE: characters, with bytes for those that are no token; spaces are U+2581."""
    if values.get("remove_extra_whitespaces", False):
        raise CheckpointError("tokenizer.ggml.remove_extra_whitespaces is true, which is not supported")
    unknown = _token(path, values, tokens, "unknown_token_id") or 0
    tokenizer = _bpe(tokens, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    # Of every text, and of what follows a special token.
    prefix = values.get("add_space_prefix", values["model"] == "llama")
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_of_scores(values: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best score of the result first.

    SentencePiece joins the adjacent pieces that make the token of the highest score; a list of pairs by rank says that.
    """
    scores = values.get("scores", [])
    if len(scores) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    ids = {token: id for id, token in enumerate(tokens) if types[id] == TokenType.NORMAL}
    pairs = [
        (-scores[id], ids[token[:cut]], ids[token[cut:]])
        for token, id in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(tokens[left], tokens[right]) for _, left, right in sorted(pairs)]


def _bpe(tokens: Sequence[str], merges: Sequence[tuple[str, str]], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges, **options))
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"its tokens and merges make no BPE: {error}") from error


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens become special tokens (no text), user-defined ones are found in a text before it is cut."""
    for type, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        chosen = [token for token, given in zip(tokens, types, strict=True) if given == type]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in chosen])
