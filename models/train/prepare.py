"""A run's text: the tokenizer and the tokens, made once and kept in a directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from meki.package.files import write_file

from ..arguments import UsageError
from ..tokenizer import END_OF_STORY, TokenizerSpec, parse_tokenizer, read_tokenizer, train_tokenizer
from .data import TokenFile, documents, fingerprint, sizes_of, write_tokens


def check_texts(sources: Sequence[Path]) -> None:
    """UsageError unless the files are there."""
    for source in sources:
        if not source.is_file():
            raise UsageError(f"{source}: no such file of text")


def prepare_tokenizer(given: Path | None, sources: Sequence[Path], vocab_size: int, out: Path) -> TokenizerSpec:
    """The user's tokenizer, or one that is trained on the text, kept in `out`."""
    kept = out / "tokenizer.json"
    if given is not None:
        return read_tokenizer(given)
    if not (kept.exists() and (out / "train.json").exists()):  # without its tokens it may be of another text
        if vocab_size <= 256:
            raise UsageError(
                f"vocab_size is {vocab_size}, expected at least 257, as a tokenizer that is trained on the text "
                "has every byte and an end token; raise it, or give a --tokenizer"
            )

        def texts() -> Iterator[str]:
            for source in sources:
                yield from (text for text, _ in documents(source, END_OF_STORY))

        write_file(kept, train_tokenizer(texts(), vocab_size).to_str(pretty=True).encode())
    return read_tokenizer(kept)


def prepare_tokens(name: str, sources: Sequence[Path], tokenizer: TokenizerSpec, out: Path) -> TokenFile:
    """The text as ids, which are in `out` after the first time."""
    file, parsed, end = out / f"{name}.tokens", parse_tokenizer(tokenizer.json), tokenizer.eos_token_ids[0]
    if not file.with_suffix(".json").exists():
        return write_tokens(file, sources, parsed, end)
    tokens = TokenFile.open(file)
    if tokens.tokenizer != fingerprint(parsed, end):
        raise UsageError(f"{file}: has tokens of another tokenizer; give the same to go on, or another directory")
    if tokens.sources != sizes_of(sources):
        raise UsageError(
            f"{file}: has the tokens of {', '.join(name for name, _ in tokens.sources)} as they were then, not of "
            f"{', '.join(map(str, sources))}; give the same files to go on, or another directory"
        )
    return tokens
