"""What `tokenizer.ggml.pre` of a GGUF file stands for: how a text is cut before bytes are merged.

The patterns are those of the published tokenizer.json of the models that the names come from, as llama.cpp has them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PreTokenizer:
    """Patterns that cut a text, one after the other."""

    patterns: tuple[str, ...]
    nfc: bool = False
    """The text is normalised first. The file does not say; the published tokenizers do it."""
    whole_words: bool = False
    """Of tiktoken's kind: a piece that is a token is that token, whatever the merges make of it."""
    begins: bool = False
    """A text begins with BOS, where the file does not say."""


def _either(*patterns: str) -> str:
    return "|".join(patterns)


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _either(_SUFFIX, _WORD, r"\p{N}{1,3}", _MARKS + r"[\r\n]*", _SPACES)
_QWEN2 = _either(_SUFFIX, _WORD, r"\p{N}", _MARKS + r"[\r\n]*", _SPACES)
_SEED_CODER = _either(_SUFFIX, _WORD, r"\p{N}", _MARKS, _SPACES)

_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_UPPER_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = _either(_LOWER_WORD, _UPPER_WORD, r"\p{N}", _MARKS + r"[\r\n/]*", _SPACES)
_GPT_4O = _either(f"{_LOWER_WORD}{_SUFFIX}?", f"{_UPPER_WORD}{_SUFFIX}?", r"\p{N}{1,3}", _MARKS + r"[\r\n/]*", _SPACES)

# Of deepseek-llm: letters with case, but not all of them. Code points in hexadecimal.
_CASED = """
    41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a 38c 38e-3a1
    3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a
    1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4
    1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128
    212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183-2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d
    a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f
    104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
"""
_LETTERS = "".join("-".join(rf"\x{{{end}}}" for end in span.split("-")) for span in _CASED.split())
_ASIAN = r"[\x{800}-\x{9fa5}\x{ac00}-\x{d7ff}]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_LETTERS}]+",
    r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
    r"\s+$",
    _ASIAN,
    r"\p{N}+",
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\x{4e00}-\x{9fa5}\x{3040}-\x{30ff}]+",
    _either(
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        _SPACES,
    ),
)

_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_TIKTOKEN = PreTokenizer((_LLAMA3,), whole_words=True, begins=True)
PRE_TOKENIZERS = {
    # What llama.cpp does for files that were made before pre-tokenizers had names.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _TIKTOKEN),
    "smaug-bpe": PreTokenizer((_LLAMA3,), whole_words=True),
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), PreTokenizer((_QWEN2,))),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, begins=True),
    "gpt-4o": PreTokenizer((_GPT_4O,)),
    "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}")),
    "deepseek-v3": PreTokenizer(_DEEPSEEK_V3),
}
"""By name."""
