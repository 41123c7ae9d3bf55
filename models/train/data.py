"""Training text as token ids: tokenised once, piece by piece, into a file that is mapped; batches are cut out of it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from meki.package.files import open_text, read_object, replace_file, write_file

PIECE = 1 << 20
"""Characters of a document that are in memory at a time, and of documents that are tokenised together."""
Ids = NDArray[np.unsignedinteger]


def documents(path: Path, separator: str) -> Iterator[tuple[str, bool]]:
    """The documents of a file, in pieces of about PIECE that end with a line: (text, whether the document ends here).

    A .jsonl has one a line, its member "text"; another file has a line `separator` between two, and white space around
    a document is none of it. ValueError for a line of JSON that is no such object, and as `open_text`.
    """
    if ".jsonl" in path.suffixes:
        yield from _json_lines(path)
        return
    lines: list[str] = []
    begun = False  # a piece of this document is out

    def text() -> str:
        joined = "".join(lines)
        return joined.rstrip() if begun else joined.strip()

    size = 0
    with open_text(path) as file:
        for line in file:
            if line.rstrip("\r\n") == separator:
                if text() or begun:
                    yield text(), True
                lines, size, begun = [], 0, False
                continue
            lines.append(line)
            size += len(line)
            if size > PIECE and (piece := text()):
                yield piece, False
                joined = "".join(lines)
                lines, size, begun = [joined[len(joined.rstrip()) :]], 0, True  # the space goes with what follows
    if text() or begun:
        yield text(), True


def _json_lines(path: Path) -> Iterator[tuple[str, bool]]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError("its text is no string")
                text.encode()  # JSON can name half a surrogate pair, which is no character
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(
                    f'{path}: line {number} is no object with a "text": {error!r}; expected {{"text": "..."}}'
                ) from error
            yield text, True


@dataclass(frozen=True)
class TokenFile:
    """Token ids of some texts, one document after the other, each with the end token behind it."""

    ids: Ids
    """[n], mapped."""
    documents: int
    bytes: int
    """Of the documents in UTF-8, and one for each end."""
    sources: list[tuple[str, int]]
    """What `sizes_of` said of the files."""
    tokenizer: str
    """What `fingerprint` said of the tokenizer."""

    @property
    def bits_per_nat(self) -> float:
        """Bits a byte of the text for each nat a token."""
        return len(self.ids) / self.bytes / math.log(2)

    @classmethod
    def open(cls, path: Path) -> TokenFile:
        """ValueError if it is not what `write_tokens` left there."""
        try:
            about = read_object(path.with_suffix(".json"))
            ids = np.memmap(path, np.dtype(about["dtype"]), "r")
            if len(ids) != about["tokens"]:
                raise ValueError(f"it has {len(ids)} tokens, expected {about['tokens']}")
            sources = [(name, size) for name, size in about["sources"]]
            return cls(ids, about["documents"], about["bytes"], sources, about["tokenizer"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            remedy = f"remove {path.with_suffix('.json').name}, and the text is tokenised again"
            raise ValueError(f"{path}: not as it was written: {error}; {remedy}") from error


def sizes_of(sources: Sequence[Path]) -> list[tuple[str, int]]:
    """Names and bytes of files: what tells whether they are the ones that were tokenised."""
    return [(source.name, source.stat().st_size) for source in sources]


def fingerprint(tokenizer: Tokenizer, end: int) -> str:
    """What tells whether it is the tokenizer, and the token behind a document, that the ids come from."""
    return hashlib.sha256(f"{end} {tokenizer.to_str()}".encode()).hexdigest()


def write_tokens(path: Path, sources: Sequence[Path], tokenizer: Tokenizer, end: int) -> TokenFile:
    """Tokenises `sources` into `path`, with what is known about it beside it as .json; each is there when it is whole.

    end: id of the token behind every document, whose text is the separator of text files. Shows progress on stderr, if
    that is a terminal. ValueError for texts without a document, and for an end that the tokenizer does not have.
    """
    separator = tokenizer.id_to_token(end)
    if separator is None:
        raise ValueError(f"tokenizer: has no token {end}, which is to end a text; correct the eos_token_id beside it")
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32).newbyteorder("<")
    about: dict[str, Any] = {"dtype": dtype.str, "tokens": 0, "documents": 0, "bytes": 0, "sources": sizes_of(sources)}
    about["tokenizer"] = fingerprint(tokenizer, end)
    with (
        replace_file(path) as partial,
        partial.open("wb") as file,
        tqdm(unit="tok", unit_scale=True, disable=None) as bar,
    ):

        def flush(pieces: list[tuple[str, bool]]) -> None:
            encoded = tokenizer.encode_batch_fast([text for text, _ in pieces], add_special_tokens=False)
            for piece, (text, ends) in zip(encoded, pieces, strict=True):
                ids = np.array([*piece.ids, *([end] if ends else [])], dtype)
                file.write(ids.tobytes())
                about["tokens"] += len(ids)
                about["documents"] += ends
                about["bytes"] += len(text.encode()) + ends
                bar.update(len(ids))

        pieces: list[tuple[str, bool]] = []
        size = 0
        for source in sources:
            bar.set_description(source.name)
            for piece in documents(source, separator):
                pieces.append(piece)
                size += len(piece[0])
                if size > PIECE:
                    flush(pieces)
                    pieces, size = [], 0
        flush(pieces)
        if not about["documents"]:
            raise ValueError(f"{', '.join(map(str, sources))}: no text; give files with at least one document")
    write_file(path.with_suffix(".json"), json.dumps(about).encode())
    return TokenFile.open(path)


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, windows: int, length: int) -> tuple[int, NDArray[np.int64]]:
    """Where the first window of an epoch begins, and the order of them."""
    random = np.random.default_rng((seed, epoch))
    return int(random.integers(length)), random.permutation(windows)


def batch_at(ids: Ids, step: int, batch: int, length: int, seed: int) -> Tensor:
    """Batch `step`, int64 [batch, length + 1]: a function of its arguments alone, so that a resumed run sees what an
    unbroken one would. Every epoch cuts the ids at another offset and shuffles the windows."""
    windows = (len(ids) - length - 1) // length
    rows = []
    for index in range(step * batch, (step + 1) * batch):
        epoch, position = divmod(index, windows)
        offset, order = _epoch(seed, epoch, windows, length)
        start = offset + int(order[position]) * length
        rows.append(ids[start : start + length + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def spread_windows(ids: Ids, count: int, length: int) -> Tensor:
    """int64 [count, length + 1], evenly spread over the ids."""
    starts = np.linspace(0, len(ids) - length - 1, count).astype(int)
    return torch.from_numpy(np.stack([ids[start : start + length + 1] for start in starts]).astype(np.int64))
