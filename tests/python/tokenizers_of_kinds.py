"""A small tokenizer of each kind that models come with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from meki.models.tokenizer import train_tokenizer

TEXT = "Füchse mögen Käse. 狐狸喜歡奶酪。 🦊🧀🦊 naïve café"
SPECIAL = ("<s>", "</s>")
PIECES = ["▁a", "▁ab", "▁the", "the", "ab", "▁▁", "é", "\ufffd", "狐", "▁", "a", "b", "t", "h", "e", "."]
SCHEMES = ("always", "first", "never")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def finish(tokenizer: Tokenizer, decoder: decoders.Decoder | None) -> Tokenizer:
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def byte_level(*, prefix: bool = False) -> Tokenizer:
    # Few merges: most characters beyond ASCII stay split into bytes, some become tokens that hold parts of characters.
    tokenizer = train_tokenizer([TEXT] * 3, 290)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return finish(tokenizer, decoders.ByteLevel())


def sentencepiece() -> Tokenizer:
    """BPE that falls back to bytes."""
    vocabulary = {token: id for id, token in enumerate(["<unk>", *BYTES, *PIECES])}
    merges = [("t", "h"), ("th", "e"), ("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁", "the"), ("▁", "▁")]
    vocabulary["th"] = len(vocabulary)
    return Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))


def bytes_of_spaces(*, strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


def prepend() -> Tokenizer:
    """Llama 2's, and that of a GGUF file of kind "llama"."""
    tokenizer = sentencepiece()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return finish(tokenizer, bytes_of_spaces(strip=True))


def replace() -> Tokenizer:
    """Gemma's: nothing in front of a text."""
    tokenizer = sentencepiece()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return finish(tokenizer, bytes_of_spaces(strip=False))


def metaspace(scheme: str) -> Tokenizer:
    tokenizer = sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return finish(tokenizer, bytes_of_spaces(strip=scheme != "never"))


def metaspace_decoder(scheme: str) -> Tokenizer:
    tokenizer = sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme=scheme)])
    return finish(tokenizer, decoders.Metaspace(prepend_scheme=scheme))


def unigram() -> Tokenizer:
    """T5's, with bytes."""
    scores = [("<unk>", 0.0), *((byte, -20.0) for byte in BYTES), *((piece, -float(len(piece))) for piece in PIECES)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return finish(tokenizer, decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]))


def word_piece() -> Tokenizer:
    pieces = ["[UNK]", "the", "##the", "a", "##a", "b", "##b", "ab", ".", "##.", "'", "s", "n't", "é", "##é", "\ufffd"]
    tokenizer = Tokenizer(models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return finish(tokenizer, decoders.WordPiece())


def words() -> Tokenizer:
    """Without a decoder."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "the": 2, "\ufffd": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return finish(tokenizer, None)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level, prefix space": partial(byte_level, prefix=True),
    "prepend": prepend,
    "replace": replace,
    **{f"metaspace, {scheme}": partial(metaspace, scheme) for scheme in SCHEMES},
    **{f"metaspace decoder, {scheme}": partial(metaspace_decoder, scheme) for scheme in SCHEMES},
    "unigram": unigram,
    "word piece": word_piece,
    "words": words,
}
EXACT = [name for name in KINDS if name not in ("word piece", "words")]
"""Those whose tokens keep every character of a text."""
