"""Engram: hashed n-grams, before attention at a few layers; rows by the last tokens' ids.

Source: "Conditional Memory via Scalable Lookup" (arXiv 2601.07372), in the form of transformers'
`Qwen4ExpTextPLELayer` with one residual stream, whose parameters these are; its norms' weights are 1 + what it stores.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from crc32c import crc32c
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import Floats
from ..config import FLAG, WIDTH, ConfigError, Rule, check, integer
from ..graph.primitives import Matrix, Primitives, Value
from ..graph.weights import Weights
from .base import Memory, MemoryLayer, Read, Tokens, blocks

_TABLE = "embedding.weight"
_CANONICAL = "canonical_ids"
_CANONICAL_FILE = "canonical_ids.bin"
_ROWS_PER_TOKEN = 4096
_ROWS = 2**31 - 1
"""That the package format holds."""
_EXACT = 1 << 24
"""Ids below it are exact in float32, in which checkpoints are read."""

Numbers = tuple[tuple[int, ...], ...]


def _numbers(value: object) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(row, tuple) and all(type(number) is int and number > 0 for number in row) for row in value
    )


def _ids(value: object) -> bool:
    return isinstance(value, tuple) and all(type(number) is int and number >= 0 for number in value)


_HASHES = Rule("a list of positive integers for each of its layers", _numbers)


class Engram(MemoryLayer):
    """One layer's memory. x: the residual stream, e: the rows of all heads side by side, d: hidden.

    gate     s = <RMSNorm(W_key e), RMSNorm(x)> / sqrt(d);  g = sigmoid(sign(s) sqrt(max(|s|, 1e-6)))
    output   v = g W_value e;  y = v + SiLU(conv(RMSNorm(v)))     conv: causal, a channel each, dilated by n
    """

    canonical_ids: Tensor

    def __init__(self, vocab_size: int, hidden: int, eps: float, config: EngramConfig, index: int) -> None:
        super().__init__()
        self.memory, self.index = config, index
        self.embedding = nn.Embedding(sum(config.primes[index]), config.head_dim)
        self.key_proj = nn.Linear(config.dim, hidden, bias=False)
        self.value_proj = nn.Linear(config.dim, hidden, bias=False)
        self.norm_key = nn.RMSNorm(hidden, eps=eps)
        self.norm_query = nn.RMSNorm(hidden, eps=eps)
        if config.kernel:
            self.norm_conv = nn.RMSNorm(hidden, eps=eps)
            self.conv1d = nn.Conv1d(hidden, hidden, config.kernel, groups=hidden, dilation=config.ngram, bias=False)
        if config.canonical:
            self.register_buffer(_CANONICAL, torch.arange(vocab_size, dtype=torch.int32))

    def see_tokens(self, canonical: Callable[[], Sequence[int]]) -> None:
        if self.memory.canonical:
            ids = torch.tensor(canonical(), dtype=torch.int32)
            self.canonical_ids[: len(ids)] = ids

    def indices(self, ids: Tensor) -> Tensor:
        """Rows of the table. ids: int64 [b, t] -> [b, t, heads of all n]."""
        memory = self.memory
        shifted, open_ = [], torch.ones_like(ids, dtype=torch.bool)
        known = self.canonical_ids.long()[ids] if memory.canonical else ids
        resets = torch.isin(ids, ids.new_tensor(memory.reset))
        for back in range(memory.ngram):
            before = F.pad(known, (back, 0))[:, : ids.shape[1]]
            if back:  # nothing from there to here resets, and there is something
                open_ = open_ & F.pad(~resets, (back, 0), value=False)[:, : ids.shape[1]]
            shifted.append(before.where(open_, memory.pad))
        mix, rows = shifted[0] * memory.multipliers[self.index][0], []
        offsets = iter(memory.offsets(self.index))
        primes = iter(memory.primes[self.index])
        for n in range(1, memory.ngram):
            mix = mix ^ (shifted[n] * memory.multipliers[self.index][n])
            rows += [mix % next(primes) + next(offsets) for _ in range(memory.heads)]
        return torch.stack(rows, dim=-1)

    def inject(self, rows: Tensor, x: Tensor) -> Tensor:
        """The part that stays at inference. rows: e, [b, t, dim]; x: [b, t, d] -> y [b, t, d]."""
        similarity = (self.norm_key(self.key_proj(rows)) * self.norm_query(x)).sum(-1, keepdim=True)
        similarity = similarity * x.shape[-1] ** -0.5
        gate = torch.sigmoid(similarity.sign() * similarity.abs().clamp_min(1e-6).sqrt())
        value = gate * self.value_proj(rows)
        if not self.memory.kernel:
            return value
        seen = F.pad(self.norm_conv(value).transpose(1, 2), ((self.memory.kernel - 1) * self.memory.ngram, 0))
        return value + F.silu(self.conv1d(seen)).transpose(1, 2)

    def before_attention(self, x: Tensor, tokens: Tokens) -> Tensor:
        return x + self.inject(self.embedding(self.indices(tokens.ids)).flatten(-2), x)


@dataclass(frozen=True)
class EngramConfig(Memory):
    """Hashed n-grams at the layers `at`. The numbers that hashes are made of are data: a checkpoint and a package have
    them."""

    at: tuple[int, ...] = ()
    """Layers of the decoder, ascending."""
    ngram: int = 3
    """The longest n-gram, in tokens: there are those of 2 to so many."""
    heads: int = 8
    """Hashes of each length."""
    rows: int = 0
    """The least number of rows that a head's table has, where `primes` are not given."""
    kernel: int = 4
    """Taps of the convolution; 0: none."""
    canonical: bool = False
    """Token ids stand for canonical ones (`canonical_ids`); False: for themselves."""
    pad: int = 0
    """Canonical id of what is before the text, or before a reset."""
    reset: tuple[int, ...] = ()
    """Token ids that no n-gram reaches across, such as the end of a text."""
    multipliers: Numbers = ()
    """Of each layer: `ngram` odd numbers."""
    primes: Numbers = ()
    """Of each layer: rows of each head's table, those of shorter n-grams first."""

    kind = "engram"
    SETTINGS: ClassVar = {
        "engram_dim": "dim",
        "engram_layers": "at",
        "engram_ngram": "ngram",
        "engram_heads": "heads",
        "engram_rows": "rows",
        "engram_kernel": "kernel",
        "engram_canonical": "canonical",
        "engram_pad": "pad",
        "engram_reset": "reset",
        "engram_multipliers": "multipliers",
        "engram_primes": "primes",
    }
    RULES: ClassVar = {
        "engram_dim": integer(0, WIDTH),
        "engram_layers": Rule("layers' numbers, from 0", _ids),
        "engram_ngram": integer(2, 8),
        "engram_heads": integer(1, _ROWS_PER_TOKEN),
        "engram_rows": integer(0, 2**31 - 1),
        "engram_kernel": integer(0, 64),
        "engram_canonical": FLAG,
        "engram_pad": integer(0, 2**31 - 1),
        "engram_reset": Rule("token ids", _ids),
        "engram_multipliers": _HASHES,
        "engram_primes": _HASHES,
    }
    STATED = ("engram_multipliers", "engram_primes")
    KEPT = (
        "key_proj.weight",
        "value_proj.weight",
        "norm_key.weight",
        "norm_query.weight",
        "norm_conv.weight",
        "conv1d.weight",
        _CANONICAL,
    )
    RESIDUAL = ("engram.value_proj.weight",)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Numbers that nobody gave are made of the others."""
        own = {name: settings[name] for name in cls.SETTINGS if name in settings}
        check(cls.RULES, own)
        memory = super().from_settings(own)
        if not (memory.dim and memory.at and "vocab_size" in settings):
            return memory
        heads = len(memory.at) * memory.heads_per_token
        if heads > _ROWS_PER_TOKEN:
            raise ConfigError(f"a token has {heads} rows, at most {_ROWS_PER_TOKEN} are supported")
        made: dict[str, Any] = {}
        if not memory.multipliers:
            made["engram_multipliers"] = random_multipliers(len(memory.at), memory.ngram, settings["vocab_size"])
        if not memory.primes:
            if not memory.rows:
                raise ConfigError("engram_rows is 0: give the least number of rows of a head, or engram_primes")
            if heads * memory.rows > _ROWS:
                raise ConfigError(
                    f"engram_rows: {heads} heads of {memory.rows} rows, at most {_ROWS} in all are supported"
                )
            made["engram_primes"] = primes_from(memory.rows, len(memory.at), memory.heads_per_token)
        return super().from_settings({**own, **made})

    @property
    def heads_per_token(self) -> int:
        """Of a layer."""
        return (self.ngram - 1) * self.heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads_per_token

    def offsets(self, index: int) -> tuple[int, ...]:
        """The first row of each head in the table of the memory's layer `index`."""
        return tuple(itertools.accumulate(self.primes[index][:-1], initial=0))

    def check(self, config: Any) -> None:
        layers, heads = len(self.at), self.heads_per_token
        if not layers or list(self.at) != sorted(set(self.at)) or self.at[-1] >= config.layers:
            raise ConfigError(
                f"engram_layers is {list(self.at)}, expected some of the layers 0 to {config.layers - 1}, ascending"
            )
        if self.dim % heads:
            raise ConfigError(f"engram_dim is {self.dim}, expected a multiple of {heads}: (ngram - 1) * heads")
        for name, numbers, count in (("multipliers", self.multipliers, self.ngram), ("primes", self.primes, heads)):
            if [len(row) for row in numbers] != [count] * layers:
                raise ConfigError(f"engram_{name}: expected {count} numbers for each of the {layers} engram_layers")
        if max(map(max, self.multipliers)) * config.vocab_size >= 2**63:
            raise ConfigError("engram_multipliers: times a token id, one is beyond 63 bits")
        if sum(map(sum, self.primes)) > _ROWS:
            raise ConfigError(f"engram_primes: {sum(map(sum, self.primes))} rows, at most {_ROWS} in all are supported")
        for name, ids in (("pad", (self.pad,)), ("reset", self.reset)):
            if max(ids, default=0) >= config.vocab_size:
                raise ConfigError(f"engram_{name}: {max(ids)} is no token of {config.vocab_size}")
        if self.canonical and config.vocab_size > _EXACT:
            raise ConfigError(f"engram_canonical: supported up to {_EXACT} tokens, the model has {config.vocab_size}")

    def layers(self, config: Any) -> int:
        return len(self.at)

    def manifest(self, config: Any, files: Mapping[str, bytes]) -> dict[str, Any]:
        """Without what the address has."""
        own = {"engram_layers": list(self.at), "engram_kernel": self.kernel}
        address = self.address(config)
        if self.canonical:
            address["canonical"] = {"file": _CANONICAL_FILE, "crc32c": crc32c(files[_CANONICAL_FILE])}
        return {"kind": self.kind, "address": address, "layers": len(self.at), "row_dim": self.dim, **own}

    @classmethod
    def from_manifest(cls, entry: Mapping[str, Any]) -> dict[str, Any]:
        address = entry["address"]
        hashes = {name: [layer[name] for layer in address["layers"]] for name in ("multipliers", "primes")}
        of_address = {name: address[name] for name in ("ngram", "heads", "pad", "reset")} | hashes
        return {
            "engram_dim": entry["row_dim"],
            "engram_layers": entry["engram_layers"],
            "engram_kernel": entry["engram_kernel"],
            "engram_canonical": address["canonical"] is not None,
            **{f"engram_{name}": value for name, value in of_address.items()},
        }

    def address(self, config: Any) -> dict[str, Any]:
        base, layers = 0, []
        for index, primes in enumerate(self.primes):
            offsets = [base + offset for offset in self.offsets(index)]
            layers.append({"multipliers": list(self.multipliers[index]), "primes": list(primes), "offsets": offsets})
            base += sum(primes)
        numbers = {"ngram": self.ngram, "heads": self.heads, "pad": self.pad, "reset": list(self.reset)}
        return {"kind": "ngram_hash", **numbers, "canonical": None, "layers": layers}

    def tables(self, config: Any) -> dict[str, tuple[int, int]]:
        return {
            f"layers.{layer}.engram.folded_table": (sum(primes), self.head_dim)
            for layer, primes in zip(self.at, self.primes, strict=True)
        }

    def bundles(self, config: Any) -> tuple[int, int, int]:
        """A row each, of all layers one after the other."""
        return sum(map(sum, self.primes)), 1, self.head_dim

    def cut(self, config: Any, rows: Floats) -> list[Floats]:
        return np.split(rows[0], np.cumsum([sum(primes) for primes in self.primes])[:-1])

    def module(self, config: Any, layer: int) -> Engram | None:
        if layer not in self.at:
            return None
        return Engram(config.vocab_size, config.hidden, config.norm_eps, self, self.at.index(layer))

    def before_attention(self, g: Primitives, layer: int, x: Value, words: Value) -> Value:
        if layer not in self.at:
            return x
        prefix, hidden, index = f"layers.{layer}.engram", g.config.hidden, self.at.index(layer)
        projections = [Matrix(f"{prefix}.{name}_proj", hidden) for name in ("key", "value")]
        both = g.linear(g.rows(index, self.dim), *projections, name=f"{prefix}.projections")
        key, value = f"{prefix}.key", f"{prefix}.value"
        g.op("Split", [both], [key, value], axis=-1, num_outputs=2)
        alike = g.op("Mul", [g.norm(key, f"{prefix}.norm_key"), g.norm(x, f"{prefix}.norm_query")], f"{prefix}.alike")
        similarity = g.scaled(g.sum(alike, f"{prefix}.sum"), hidden**-0.5)
        size = g.op("Max", [g.op("Abs", [similarity], f"{prefix}.abs"), g.number(1e-6)], f"{prefix}.size")
        root = g.op("Sqrt", [size], f"{prefix}.root")
        signed = g.op("Mul", [root, g.op("Sign", [similarity], f"{prefix}.sign")], f"{prefix}.signed")
        out: Value = g.op("Mul", [value, g.op("Sigmoid", [signed], f"{prefix}.gate")], f"{prefix}.gated")
        if self.kernel:
            out = g.convolution(out, index, f"{prefix}.norm_conv", f"{prefix}.conv1d", self.ngram)
        return g.add(x, out, f"layers.{layer}.injected")

    def folded_rows(self, config: Any, read: Read) -> Iterator[Floats]:
        return self._rows(config, read, _TABLE)

    def stored_rows(self, config: Any, read: Read) -> Iterator[Floats]:
        return self._rows(config, read, "folded_table")

    def _rows(self, config: Any, read: Read, table: str) -> Iterator[Floats]:
        """Rows as they are: nothing is folded."""
        for layer, primes in zip(self.at, self.primes, strict=True):
            for rows in blocks(sum(primes), self.head_dim):
                yield read(f"layers.{layer}.engram.{table}", rows)[None]

    def files(self, config: Any, weights: Weights) -> dict[str, bytes]:
        """The canonical ids, which all layers share. ValueError if they do not, or are no tokens."""
        if not self.canonical:
            return {}
        names = [f"layers.{layer}.engram.{_CANONICAL}" for layer in self.at]
        first, *others = [weights(name) for name in names]
        limit = config.vocab_size
        with np.errstate(invalid="ignore"):
            ids = first.astype("<i4")
        wrong = np.flatnonzero((ids != first) | (first < 0) | (first >= limit))
        if wrong.size:
            raise ValueError(
                f"{names[0]}: token {wrong[0]} has {first[wrong[0]]:g}, expected an integer from 0 to {limit - 1}; "
                "the tensor belongs to another model"
            )
        for name, other in zip(names[1:], others, strict=True):
            if not np.array_equal(first, other):
                raise ValueError(f"{name}: differs from {names[0]}, expected the same in all layers; store it in each")
        return {_CANONICAL_FILE: ids.tobytes()}

    def fixed(self, config: Any, name: str) -> Floats | None:
        """Canonical ids of random weights: themselves."""
        return np.arange(config.vocab_size, dtype=np.float32) if name.endswith(_CANONICAL) else None


def random_multipliers(layers: int, ngram: int, vocab_size: int, seed: int = 0) -> Numbers:
    """Odd numbers whose product with a token id stays below 2^63."""
    generator = np.random.default_rng(seed)
    halves = generator.integers(0, (2**63 - 1) // vocab_size // 2, (layers, ngram))
    return tuple(tuple(2 * int(half) + 1 for half in row) for row in halves)


def primes_from(least: int, layers: int, heads: int) -> Numbers:
    """The first primes that are not below `least`, a different one for each head of each layer."""
    found = itertools.islice(filter(_is_prime, itertools.count(max(least, 2))), layers * heads)
    return tuple(zip(*[found] * heads, strict=True))


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
