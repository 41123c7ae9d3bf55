"""What every importer gives: a configuration, and where each weight of the decoder is found in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meki.package.files import check_downloaded

from ..architectures import ARCHITECTURES
from ..architectures.base import Architecture, Model, load_weights
from ..blocks import BLOCK, Blocks, Floats
from ..config import ConfigError, check
from ..memories import MEMORIES
from ..memories.base import ALL
from ..rom import StoredRows
from ..source import Source, SourceRows, lazy_source
from ..tokenizer import TokenizerSpec


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted. The message has its path, what was found, what was expected, a remedy."""


class TensorFile(Protocol):
    """The tensors of a checkpoint by its own names. For one thread."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, rows: slice = ALL) -> Tensor:
        """float32 on the CPU; those rows of dimension 0. Must not keep what it has read."""


@dataclass(frozen=True)
class Part:
    """Where a weight of the decoder is found."""

    name: str
    """Of the tensor in the checkpoint."""
    shape: tuple[int, ...]
    """Its shape there, as the configuration wants it."""
    convert: Callable[[NDArray[Any]], NDArray[Any]] | None = None
    """From the checkpoint's rows to the decoder's, some of them or in another order: of values and, where it is held in
    blocks, of codes, scales and minimums alike. None: the same. Tables that are read by rows need None."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was looked at, but not read yet."""

    path: Path
    config: Architecture
    tensors: TensorFile
    parts: Mapping[str, Part]
    """By the names of `config.shapes(folded)`."""
    read_tokenizer: Callable[[], TokenizerSpec | None]
    """The checkpoint's own; None: it has none. Called unless the user names another; CheckpointError."""
    provenance: dict[str, str]
    ignored: Callable[[str], bool]
    """Tensors of the checkpoint that hold no weights, by name."""
    folded: bool = False
    """The memories are folded tables."""
    trimmed: bool = False
    """The user asked for a vocabulary size: tables may have more rows than that, which are left out."""
    blocks: Callable[[str, slice], Blocks | None] | None = None
    """Those rows of a tensor, if the checkpoint has it in blocks; CheckpointError. None: it has none that are
    quantised."""
    rounded: Callable[[str], bool] = lambda name: False
    """Beside such blocks: whether a tensor that is in none, a matrix, is to become int8 rather than float32."""


def check_fetched(path: Path) -> None:
    """CheckpointError if the file is a pointer of Git LFS."""
    try:
        check_downloaded(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def check_window(path: Path, name: str, window: Any, context: Any) -> None:
    """CheckpointError if layers attend to `window` positions alone, of `context`; None: to all."""
    if window is not None and context is not None and window < context:
        raise CheckpointError(
            f"{path}: {name} is {window}, supported is attention to all positions of the context, which is {context}; "
            f"within {window} positions the model is the same: give --set context={window}"
        )


def make_config(
    path: Path, values: Mapping[str, Any], overrides: Mapping[str, Any], tensors: TensorFile, kind: str = "llama"
) -> Architecture:
    """A configuration of what the checkpoint says and what the user says instead.

    values: settings of the architecture `kind`, None or absent where the checkpoint does not say. CheckpointError for a
    field that nobody gives, and for a configuration that no model can have, or none with these tensors.
    """
    merged = {name: value for name, value in {**values, **overrides}.items() if value is not None}
    architecture = ARCHITECTURES[kind]
    for name in architecture.STATED:
        if name not in merged:
            raise CheckpointError(
                f"{path}: the checkpoint does not say what {name} is; give it with --set {name}=VALUE"
            )
    for memory in MEMORIES.values():
        missing = [name for name in memory.STATED if not merged.get(name)]
        if merged.get(next(iter(memory.SETTINGS))) and missing:
            raise CheckpointError(
                f"{path}: the checkpoint does not say what {missing[0]} is; expected the numbers that its rows were "
                f"trained with: give them with --set {missing[0]}=VALUE"
            )
    try:
        config = architecture.from_settings(merged)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; correct it with --set FIELD=VALUE") from error
    least = config.layers * config.feed_forward.matrices
    if least > len(tensors.shapes):  # whose names and shapes alone would take minutes
        raise CheckpointError(
            f"{path}: layers is {config.layers}, which have at least {least} tensors, but the checkpoint has "
            f"{len(tensors.shapes)} tensors in all; it is incomplete, or correct it with --set FIELD=VALUE"
        )
    return config


def check_setting(path: Path, name: str, value: object) -> None:
    """CheckpointError if the setting `name` cannot be `value`. For those of which lists are made before there is a
    configuration, which checks all."""
    try:
        check(ARCHITECTURES["llama"].RULES, {name: value})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; correct it with --set FIELD=VALUE") from error


def checkpoint_source(checkpoint: Checkpoint) -> Source:
    """The checkpoint as an export takes it, read lazily.

    CheckpointError for a missing tensor, one of another shape, and one that would be left over.
    """
    _check_tensors(checkpoint)
    tensors, parts = checkpoint.tensors, checkpoint.parts

    def read(name: str, rows: slice) -> Floats:
        part = parts[name]
        if part.convert is not None:
            values = part.convert(tensors.read(part.name).numpy())
        else:
            ours = slice(*rows.indices(part.shape[0])) if part.shape else ALL
            values = tensors.read(part.name, ours).numpy()
        return np.asarray(values, order="C")

    source = lazy_source(checkpoint.config, read, checkpoint.folded)
    if checkpoint.blocks is None:
        return source
    return replace(source, blocks=CheckpointBlocks(checkpoint), rows=_stored_rows(checkpoint))


def _stored_rows(checkpoint: Checkpoint) -> SourceRows | None:
    """The memory's rows in blocks, if the checkpoint has them side by side and a ROM holds such blocks."""
    config, memory, read = checkpoint.config, checkpoint.config.memory, checkpoint.blocks
    if read is None or memory is None or memory.JOINT_TABLE is None:
        return None
    name = checkpoint.parts[memory.JOINT_TABLE].name
    stored, (_, rows, width) = read(name, slice(0)), memory.bundles(config)
    if stored is None or stored.type not in ("int8", "int4") or stored.order is not None or width % BLOCK:
        return None

    def blocks() -> Iterator[StoredRows]:
        for bundles in memory.token_blocks(config):
            its = read(name, bundles)
            if its is None:
                raise CheckpointError(
                    f"{checkpoint.path}: tensor {name}: has scales that float16 does not hold; have the rows rounded "
                    "anew: --rows float16"
                )
            shape = (bundles.stop - bundles.start, rows, -1)
            codes, scales = (part.reshape(shape).swapaxes(0, 1) for part in (its.codes, its.scales))
            yield StoredRows(codes, scales.astype(np.float16))

    return SourceRows(stored.type, blocks)


@dataclass(frozen=True)
class CheckpointBlocks:
    """The decoder's weights as a checkpoint holds them, where it does so in blocks; others become what it says."""

    checkpoint: Checkpoint

    def type(self, name: str) -> str | None:
        """Of BLOCK_TYPES, or None."""
        stored = self._look(name)
        if stored is None:
            return "int8" if self.checkpoint.rounded(self.checkpoint.parts[name].name) else None
        return stored.type

    def order(self, name: str) -> NDArray[np.int64] | None:
        """Which input each column is for, as in `Blocks`."""
        stored = self._look(name)
        return None if stored is None else stored.order

    def read(self, name: str) -> Blocks | None:
        """Of the decoder's shape, the rows in its order; None: not in blocks. CheckpointError."""
        assert self.checkpoint.blocks is not None
        part = self.checkpoint.parts[name]
        stored = self.checkpoint.blocks(part.name, slice(part.shape[0]) if part.shape else ALL)
        if stored is None or part.convert is None:
            return stored
        minimums = None if stored.minimums is None else part.convert(stored.minimums)
        return replace(stored, codes=part.convert(stored.codes), scales=part.convert(stored.scales), minimums=minimums)

    def _look(self, name: str) -> Blocks | None:
        """Without any rows."""
        assert self.checkpoint.blocks is not None
        return self.checkpoint.blocks(self.checkpoint.parts[name].name, slice(0))


def checkpoint_model(checkpoint: Checkpoint) -> Model:
    """The model in PyTorch, float32, in training form. CheckpointError."""
    if checkpoint.folded:
        raise CheckpointError(
            f"{checkpoint.path}: the memories are folded, which cannot be undone; give the training form"
        )
    source = checkpoint_source(checkpoint)
    with torch.device("meta"):
        model = checkpoint.config.module()
    load_weights(model, source)
    return model


def _check_tensors(checkpoint: Checkpoint) -> None:
    path, found = checkpoint.path, checkpoint.tensors.shapes
    assert checkpoint.parts.keys() == checkpoint.config.shapes(checkpoint.folded).keys()
    missing = {part.name: part for part in checkpoint.parts.values() if part.name not in found}
    if missing:
        first = next(iter(missing.values()))
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path}: no tensor {first.name}{others}, which {_describe(checkpoint.config)} needs with shape "
            f"{list(first.shape)}; the checkpoint is incomplete or its configuration is another model's"
        )
    for part in checkpoint.parts.values():
        got = found[part.name]
        trimmed = checkpoint.trimmed and part.shape[1:] == got[1:] and got and got[0] > part.shape[0]
        if got != part.shape and not (trimmed and part.shape[0] == checkpoint.config.vocab_size):
            raise CheckpointError(
                f"{path}: tensor {part.name} has shape {list(got)}, {_describe(checkpoint.config)} needs "
                f"{list(part.shape)}; correct the configuration with --set FIELD=VALUE"
            )
    used = {part.name for part in checkpoint.parts.values()}
    left = sorted(name for name in found if name not in used and not checkpoint.ignored(name))
    if left:
        others = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise CheckpointError(
            f"{path}: tensor {left[0]}{others} has no place in {_describe(checkpoint.config)}; "
            "the model is of another architecture, and leaving weights out would change what it says"
        )


def _describe(config: Architecture) -> str:
    values = config.settings()
    widths = [next(iter(kind.SETTINGS)) for kind in MEMORIES.values()]
    shown = ("layers", "hidden", "ffn", "experts", "heads", "kv_heads", "head_dim", *widths, "vocab_size")
    return f"a decoder with {', '.join(f'{name}={values[name]}' for name in shown if name in values)}"
