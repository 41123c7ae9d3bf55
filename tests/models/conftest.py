"""A naive runtime for packages: onnx's reference evaluator with the operators of docs/package-format.md written from
their equations, and a ROM reader written from docs/rom-format.md."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


def crc32c_bitwise(data: bytes) -> int:
    """CRC-32C by its definition (RFC 3720), a bit at a time."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def read_rom(data: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """The header's fields and all rows, float32 [layers, entries, row_dim], element by element; checks nothing."""
    names = "version mark entries layers row_dim row_type group bundle_bytes bundle_stride data_offset file_bytes"
    header: dict[str, Any] = dict(zip(names.split(), struct.unpack_from("<IIQIIIIQQQQ", data, 8), strict=True))
    header.update(magic=data[:8], content_id=data[72:88], reserved=data[88:4092], checksum=data[4092:4096])
    layers, row_dim, kind = header["layers"], header["row_dim"], header["row_type"]
    groups = -(-row_dim // header["group"]) if header["group"] else 0
    row_bytes = {1: 2 * row_dim, 2: row_dim, 3: (row_dim + 1) // 2, 4: 4 * row_dim}[kind]
    rows = np.zeros((layers, header["entries"], row_dim), np.float32)
    for token in range(header["entries"]):
        start = header["data_offset"] + token * header["bundle_stride"]
        scales = struct.unpack_from(f"<{layers * groups}e", data, start)
        for layer in range(layers):
            row = start + 2 * layers * groups + layer * row_bytes
            for i in range(row_dim):
                if kind in (1, 4):
                    code = "<e" if kind == 1 else "<f"
                    rows[layer, token, i] = struct.unpack_from(code, data, row + struct.calcsize(code) * i)[0]
                    continue
                if kind == 2:
                    code = struct.unpack_from("<b", data, row + i)[0]
                else:
                    code = (data[row + i // 2] >> (4 * (i % 2)) & 15) - 8
                rows[layer, token, i] = np.float32(scales[layer * groups + i // header["group"]]) * np.float32(code)
    return header, rows


# By the numbers of docs/package-format.md: bits, what a code of 0 is stored as, scales of a block, minimums of it.
PACKED_TYPES = {1: (8, 128, 1, 0), 2: (4, 8, 1, 0), 3: (4, 0, 1, 1), 4: (8, 128, 1, 1), 5: (8, 128, 2, 0)}


def unpack_weight(weight: np.ndarray, code: int, outputs: int) -> np.ndarray:
    """A packed matrix, uint8 [bytes], as float32 [outputs, k], element by element; checks the padding of the last
    panel."""
    bits, zero, scales, minimums = PACKED_TYPES[code]
    panels, block_bytes = -(-outputs // 16), 64 * bits + 32 * (scales + minimums)
    assert weight.dtype == np.uint8 and weight.ndim == 1 and weight.size % (panels * block_bytes) == 0
    weight = weight.reshape(panels, -1, block_bytes)
    values = np.zeros((panels * 16, weight.shape[1] * 32), np.float32)
    for n, k in np.ndindex(values.shape):
        panel, r = divmod(n, 16)
        block, column = weight[panel, k // 32].tobytes(), k % 32
        scale, minimum = (
            struct.unpack_from("<e", block, 64 * bits + 32 * place + 2 * r)[0]
            for place in (column * scales // 32, scales + minimums - 1)
        )
        high, place = divmod(column, 16) if bits == 4 else (0, column)
        byte = block[64 * (place // 4) + 4 * r + place % 4]
        q = (byte if bits == 8 else byte >> 4 * high & 15) - zero
        assert n < outputs or (q == 0 and scale == 0)
        values[n, k] = np.float32(scale) * np.float32(q) + (np.float32(minimum) if minimums else 0)
    return values[:outputs]


@functools.cache
def unpack_once(data: bytes, code: int, outputs: int) -> np.ndarray:
    return unpack_weight(np.frombuffer(data, np.uint8), code, outputs)


def unpack_parts(weight: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Matrices one below the other, of as many columns."""
    sizes = [-(-rows // 16) * (64 * PACKED_TYPES[code][0] + 32 * sum(PACKED_TYPES[code][2:])) for code, rows in parts]
    ends = np.cumsum(sizes) * (weight.size // sum(sizes))
    pieces = np.split(weight, ends[:-1])
    return np.concatenate(
        [unpack_once(piece.tobytes(), int(code), int(rows)) for piece, (code, rows) in zip(pieces, parts, strict=True)]
    )


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + np.float32(epsilon)) * weight


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(float(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3)))


class Linear(OpRun):
    """residual + f(x) W^T, or residual + RMSNorm(f(x) W^T), with activations in float32: what the runtime's int8
    activations approximate."""

    op_domain = "meki"

    def _run(
        self,
        x: np.ndarray,
        weight: np.ndarray,
        parts: np.ndarray,
        norm: np.ndarray | None = None,
        residual: np.ndarray | None = None,
        post_norm: np.ndarray | None = None,
        *,
        swiglu: int,
        epsilon: float,
        geglu: int = 0,
    ) -> tuple[np.ndarray]:
        if norm is not None:
            x = rms_norm(x, norm, epsilon)
        matrix = unpack_parts(weight, parts)
        if swiglu or geglu:
            k = matrix.shape[1]
            gate, up = x[..., :k], x[..., k : 2 * k]
            x = (gelu(gate) if geglu else gate / (1 + np.exp(-gate))) * up
        product = x @ matrix.T
        if post_norm is not None:
            product = rms_norm(product, post_norm, epsilon)
        return (product if residual is None else residual + product,)


class Injection(OpRun):
    """A memory's injection, with activations in float32; by default MeKi's folded form."""

    op_domain = "meki"

    def _run(
        self,
        x: np.ndarray,
        h: np.ndarray,
        norm: np.ndarray | None,
        gate_proj: np.ndarray,
        rows: np.ndarray,
        out_proj: np.ndarray,
        post_norm: np.ndarray,
        context: np.ndarray | None = None,
        context_norm: np.ndarray | None = None,
        scale: np.ndarray | None = None,
        *,
        gate_proj_type: int,
        out_proj_type: int,
        epsilon: float,
        layer: int,
        activation: int = 0,
        multiply: int = 0,
        context_layer: int = 0,
        row_scale: float = 1,
    ) -> tuple[np.ndarray]:
        w_out = unpack_once(out_proj.tobytes(), out_proj_type, x.shape[-1])
        w_gate = unpack_once(gate_proj.tobytes(), gate_proj_type, rows.shape[-1])
        gate = (h if norm is None else rms_norm(h, norm, epsilon)) @ w_gate.T
        opened = (
            1 / (1 + np.exp(-gate)),
            gate / (1 + np.exp(-gate)),
            gelu(gate),
        )[activation]
        row = rows[layer] * np.float32(row_scale)
        if context is not None:
            its = np.split(context, context.shape[-1] // row.shape[-1], axis=-1)[context_layer]
            row = row + rms_norm(its, context_norm, epsilon)
        out = x + rms_norm((row * opened if multiply else row + opened) @ w_out.T, post_norm, epsilon)
        return (out if scale is None else out * scale,)


class Experts(OpRun):
    """A token at a time through the experts it is sent to, with activations in float32."""

    op_domain = "meki"

    def _run(
        self,
        x: np.ndarray,
        norm: np.ndarray,
        router: np.ndarray,
        gate_up: np.ndarray,
        down: np.ndarray,
        residual: np.ndarray | None = None,
        *,
        experts: int,
        experts_per_token: int,
        norm_topk_prob: int,
        gate_up_type: int,
        down_type: int,
        epsilon: float,
    ) -> tuple[np.ndarray]:
        def matrices(weight: np.ndarray, code: int, outputs: int) -> np.ndarray:
            if code:
                weight = unpack_once(weight.tobytes(), code, experts * outputs)
            return weight.reshape(experts, outputs, -1)

        down = matrices(down, down_type, x.shape[-1])
        width = down.shape[2]
        gate_up = matrices(gate_up, gate_up_type, 2 * width)
        out = np.zeros_like(x) if residual is None else residual.copy()
        for t, h in enumerate(rms_norm(x[0], norm, epsilon)):
            logits = router @ h
            shares = np.exp(logits - logits.max())
            shares /= shares.sum()
            chosen = sorted(range(experts), key=lambda e: (-shares[e], e))[:experts_per_token]
            total = shares[chosen].sum() if norm_topk_prob else np.float32(1)
            for e in chosen:
                gate, up = np.split(gate_up[e] @ h, 2)
                out[0, t] += shares[e] / total * (down[e] @ (gate / (1 + np.exp(-gate)) * up))
        return (out,)


class Embedding(OpRun):
    op_domain = "meki"

    def _run(self, ids: np.ndarray, weight: np.ndarray, outputs: int, type: int) -> tuple[np.ndarray]:
        return (unpack_once(weight.tobytes(), type, outputs)[ids],)


class Attention(OpRun):
    """A position and a head at a time, in float64. Its cache: float32 [key or value, position, kv head, head_dim]."""

    op_domain = "meki"
    op_schema = None  # not that of ONNX's own Attention

    def _run(
        self,
        qkv: np.ndarray,
        past: np.ndarray,
        total_sequence_length: np.ndarray,
        cos: np.ndarray | None = None,
        sin: np.ndarray | None = None,
        q_norm: np.ndarray | None = None,
        k_norm: np.ndarray | None = None,
        key_offsets: np.ndarray | None = None,
        frequencies: np.ndarray | None = None,
        *,
        heads: int,
        kv_heads: int,
        epsilon: float,
        head_dim: int = 0,
        scale: float = 0,
        window: int = 0,
        value_norm: int = 0,
        shared: int = 0,
    ) -> tuple[np.ndarray, ...]:
        head_dim = head_dim or 2 * cos.shape[1]
        scale = scale or head_dim**-0.5
        tokens, first = qkv.shape[1], int(total_sequence_length) - qkv.shape[1]
        split = qkv.astype(np.float64).reshape(tokens, -1, head_dim)
        assert split.shape[1] == heads + (0 if shared else 2 * kv_heads)
        cache = past.copy().view(np.float32).reshape(2, -1, kv_heads, head_dim)
        out = np.zeros((tokens, heads, head_dim))
        offsets = np.zeros((kv_heads, head_dim)) if key_offsets is None else key_offsets.reshape(kv_heads, head_dim)

        def turned(x: np.ndarray, norm: np.ndarray | None, position: int) -> np.ndarray:
            if norm is not None:
                x = x / np.sqrt(np.mean(x**2) + epsilon) * norm
            low, high = x[: head_dim // 2], x[head_dim // 2 :]
            if frequencies is None:
                c, s = cos[position], sin[position]
            else:
                angles = position * np.pad(frequencies, (0, head_dim // 2 - len(frequencies)))
                c, s = np.cos(angles), np.sin(angles)
            return np.concatenate((low * c - high * s, high * c + low * s))

        for t in range(tokens):
            position = first + t
            for g in range(0 if shared else kv_heads):
                value = split[t, heads + kv_heads + g]
                cache[0, position, g] = turned(split[t, heads + g] - offsets[g], k_norm, position)
                cache[1, position, g] = value / np.sqrt(np.mean(value**2) + epsilon) if value_norm else value
        for t in range(tokens):
            position = first + t
            seen = range(max(0, position + 1 - window) if window else 0, position + 1)
            for h in range(heads):
                g = h // (heads // kv_heads)
                keys = [cache[0, p, g] + turned(offsets[g], None, p) for p in seen]
                scores = np.stack(keys) @ turned(split[t, h], q_norm, position) * scale
                weights = np.exp(scores - scores.max())
                out[t, h] = weights / weights.sum() @ cache[1, seen, g]
        heads_out = out.reshape(1, tokens, -1).astype(np.float32)
        return (heads_out,) if shared else (heads_out, cache.reshape(-1).view(np.uint8))


class ShortConvolution(OpRun):
    """A token and a tap at a time. Its cache: float32 [position, channels]."""

    op_domain = "meki"

    def _run(
        self,
        x: np.ndarray,
        past: np.ndarray,
        total_sequence_length: np.ndarray,
        norm: np.ndarray,
        weight: np.ndarray,
        dilation: int,
        epsilon: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        kernel, channels = weight.shape
        first = int(total_sequence_length) - x.shape[1]
        cache = past.copy().view(np.float32).reshape(-1, channels)
        cache[first : first + x.shape[1]] = rms_norm(x[0], norm, epsilon)
        out = np.zeros_like(x)
        for t in range(x.shape[1]):
            sources = [(tap, first + t - (kernel - 1 - tap) * dilation) for tap in range(kernel)]
            total = sum(weight[tap] * cache[position] for tap, position in sources if position >= 0)
            out[0, t] = x[0, t] + total / (1 + np.exp(-total))
        return out, cache.reshape(-1).view(np.uint8)


def naive_ngrams(address: dict[str, Any], ids: list[int]) -> list[list[int]]:
    """Bundles of the last of `ids` for each of the memory's layers, with Python's integers (docs/package-format.md,
    "N-grams"); without canonical ids."""
    window = [ids[-1]]
    for token in reversed(ids[:-1]):
        if token in address["reset"]:
            break
        window.append(token)
    window += [address["pad"]] * address["ngram"]
    rows = []
    for layer in address["layers"]:
        rows.append([])
        for head, (prime, offset) in enumerate(zip(layer["primes"], layer["offsets"], strict=True)):
            mix = 0
            for back in range(2 + head // address["heads"]):
                mix ^= window[back] * layer["multipliers"][back]
            rows[-1].append(mix % prime + offset)
    return rows


class ReferenceSession:
    """One sequence on one package."""

    def __init__(self, package: Path, capacity: int | None = None, stages: str = "stages") -> None:
        """stages: "stages" or "dense_stages" of the manifest."""
        self.manifest = json.loads((package / "manifest.json").read_text())
        architecture = self.manifest["architecture"]
        operators = [Attention, Embedding, Experts, Injection, Linear, ShortConvolution]
        self.stages = [
            (ReferenceEvaluator(onnx.load(package / stage["file"]), new_ops=operators), stage.get("rows"))
            for stage in self.manifest[stages]
        ]
        memory = self.manifest["memory"]
        self.rows = read_rom((package / memory["file"]).read_bytes())[1] if memory else None
        caches = self.manifest["kv_caches"] or [architecture] * architecture["layers"]
        # Garbage beyond the sequence must not matter: NaN shows it if it does.
        self.values: dict[str, np.ndarray] = {
            f"past.{layer}": np.full(
                2 * (capacity or architecture["context"]) * its["kv_heads"] * its["head_dim"], np.nan, np.float32
            ).view(np.uint8)
            for layer, its in enumerate(caches)
            if "shared" not in its
        }
        if memory:
            size = architecture["context"] * architecture["hidden"]
            self.values |= {
                f"past_convolution.{layer}": np.full(size, np.nan, np.float32).view(np.uint8)
                for layer in range(memory["layers"])
            }
        self.ids: list[int] = []

    def step(self, ids: np.ndarray, logit_index: list[int] | None = None) -> np.ndarray:
        """Appends tokens; float32 logits [len(logit_index), vocab_size], of all of them if None."""
        index = np.arange(len(ids)) if logit_index is None else np.array(logit_index)
        self.ids += [int(token) for token in ids]
        self.values |= {
            "token_ids": np.array(ids, np.int64)[None],
            "total_sequence_length": np.array(len(self.ids), np.int32),
            "logit_index": index.astype(np.int64),
        }
        for stage, layers in self.stages:
            if layers is not None:
                self.values["rows"] = self.step_rows(len(ids))[slice(*layers)]
            outputs = stage.run(None, {name: self.values[name.replace("shared", "past")] for name in stage.input_names})
            for name, value in zip(stage.output_names, outputs, strict=True):
                self.values[name.replace("present", "past")] = value
        return self.values["logits"]

    def step_rows(self, tokens: int) -> np.ndarray:
        """Of all the memory's layers for the last `tokens` ids, float32 [layers, tokens, row_dim]."""
        address = self.manifest["memory"]["address"]
        if address["kind"] == "token":
            ids = np.array(self.ids[-tokens:])
            return self.rows[:, np.where(ids < self.rows.shape[1], ids, 0)]
        ends = range(len(self.ids) - tokens + 1, len(self.ids) + 1)
        bundles = np.array([naive_ngrams(address, self.ids[:end]) for end in ends])
        return self.rows[0, bundles].reshape(tokens, bundles.shape[1], -1).transpose(1, 0, 2)


@pytest.fixture(scope="session")
def naive_unpack() -> Callable[[np.ndarray, int, int], np.ndarray]:
    return unpack_weight


@pytest.fixture(scope="session")
def ngrams() -> Callable[[dict[str, Any], list[int]], list[list[int]]]:
    return naive_ngrams


@pytest.fixture(scope="session")
def reference_session() -> type[ReferenceSession]:
    return ReferenceSession


@pytest.fixture(scope="session")
def naive_rom() -> Callable[[bytes], tuple[dict[str, Any], np.ndarray]]:
    return read_rom


@pytest.fixture(scope="session")
def naive_crc32c() -> Callable[[bytes], int]:
    return crc32c_bitwise


@pytest.fixture(scope="session")
def tokenizer_file(tokenizer_json: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(tokenizer_json)
    return path
