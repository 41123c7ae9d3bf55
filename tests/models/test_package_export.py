"""The package as a directory: manifest, replacing, interruption."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from meki.models.architectures.llama import Decoder
from meki.models.config import ConfigError
from meki.models.package import export_package
from meki.models.tokenizer import TokenizerSpec

MATRICES = 300 * 64 + 3 * (128 * 64 + 64 * 64 + 192 * 64 + 64 * 96)
"""Weights of the embeddings and, in 3 layers, of q, k and v, o, gate and up, down."""


@pytest.fixture
def export(
    make_model: Callable[..., Decoder], tokenizer_spec: TokenizerSpec, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """export(**arguments of export_package): a small model as tmp_path / "p"."""

    def run(model: Decoder | None = None, **arguments: Any) -> dict[str, Any]:
        tokenizer = arguments.pop("tokenizer", tokenizer_spec)
        arguments = {"name": "p", "weights": "float32", "provenance": {"weights": "random"}, **arguments}
        return export_package(model or make_model(), tokenizer, tmp_path / "p", **arguments)

    return run


def test_manifest(export: Callable[..., dict[str, Any]], make_model: Callable[..., Decoder], tmp_path: Path) -> None:
    manifest = export(card="# Ünicode\n", rows="int8", weights="int8")
    path = tmp_path / "p"
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]
    assert json.loads((path / "manifest.json").read_text(encoding="utf-8")) == manifest
    assert (path / "README.md").read_text(encoding="utf-8") == "# Ünicode\n"
    present = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"}
    assert manifest.pop("files") == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in present.items()
    }
    content_id = hashlib.sha256(present["memory.rom"][4096:]).hexdigest()[:32]
    errors = manifest.pop("quantization_error")
    # test_graph.test_decode_bytes has the values.
    assert manifest["weights"].pop("decode_bytes") > manifest["weights"].pop("dense_decode_bytes")
    assert 0 < errors["weights"]["overall"] <= errors["weights"]["worst"] < 0.01 and 0 < errors["rows"] < 0.01
    assert manifest == {
        "format": "meki-package",
        "version": 6,
        "name": "p",
        "architecture": {
            **{"kind": "llama", "vocab_size": 300, "layers": 3, "hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2},
            **{"head_dim": 16, "context": 128, "rope_theta": 10_000.0, "norm_eps": 1e-6, "qk_norm": True},
            **{"qkv_bias": False, "tied_embeddings": True, "rope_factors": [], "nope_layers": []},
            "ffn_kind": "swiglu",
        },
        "kv_caches": None,
        "memory": {
            **{"kind": "meki", "address": {"kind": "token"}, "layers": 3, "row_dim": 32, "file": "memory.rom"},
            **{"row_type": "int8", "content_id": content_id, "projector_norm": False, "memory_experts": "both"},
            **{"memory_projector": "swiglu", "memory_position": "parallel_ffn", "memory_fusion": "add_sigmoid"},
        },
        "parameters": {"ram": make_model().config.ram_parameters, "rom": 3 * 300 * 32},
        "stages": [{"file": "stage0.onnx", "rows": None}, {"file": "stage1.onnx", "rows": [0, 3]}],
        "dense_stages": [{"file": "dense.onnx"}],
        "weights": {"type": "int8", "block": 32, "types": {"int8": MATRICES + 3 * 2 * 32 * 64}},
        "tokenizer": {
            "file": "tokenizer.json",
            "bos_token_id": None,
            "eos_token_ids": [0],
            "chat_template": None,
        },
        "sampling": {},
        "provenance": {"weights": "random"},
    }


def test_dense_package(export: Callable[..., dict[str, Any]], make_model: Callable[..., Decoder]) -> None:
    manifest = export(make_model(memory_dim=0))
    assert manifest["memory"] is None
    assert manifest["dense_stages"] is None
    assert manifest["weights"].pop("decode_bytes") > 0
    assert manifest["weights"] == {
        **{"type": "float32", "block": None, "dense_decode_bytes": None},
        "types": {"float32": MATRICES},
    }
    assert manifest["stages"] == [{"file": "stage0.onnx", "rows": None}]
    assert set(manifest["files"]) == {"stage0.onnx", "weights.bin", "tokenizer.json"}


def test_what_belongs_to_a_tokenizer(
    export: Callable[..., dict[str, Any]], tokenizer_json: bytes, tmp_path: Path
) -> None:
    template = "{{ bos_token }}\r\n{{ messages[0].content }} Ünicode"
    spec = TokenizerSpec(tokenizer_json, 7, (3, 5), template, {"bos_token": "<s>"}, {"top_k": 20})
    manifest = export(tokenizer=spec)
    assert manifest["tokenizer"] == {
        "file": "tokenizer.json",
        "bos_token_id": 7,
        "eos_token_ids": [3, 5],
        "chat_template": {"file": "chat_template.jinja", "variables": {"bos_token": "<s>"}},
    }
    assert (tmp_path / "p" / "chat_template.jinja").read_bytes() == template.encode()
    assert "chat_template.jinja" in manifest["files"] and manifest["sampling"] == {"top_k": 20}


@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_ids"])
def test_tokens_out_of_the_vocabulary(
    export: Callable[..., dict[str, Any]], tokenizer_spec: TokenizerSpec, tmp_path: Path, field: str
) -> None:
    spec = dataclasses.replace(tokenizer_spec, **{field: 300 if field == "bos_token_id" else (300,)})
    with pytest.raises(ValueError, match=f"tokenizer: {field} has 300, expected ids of 0 to 299"):
        export(tokenizer=spec)
    assert list(tmp_path.iterdir()) == []


def test_progress_reaches_the_total(export: Callable[..., dict[str, Any]], make_model: Callable[..., Decoder]) -> None:
    last: dict[str, tuple[int, int]] = {}
    manifest = export(progress=lambda phase, done, total: last.update({phase: (done, total)}))
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    parameters = make_model().config.ram_parameters
    assert last == {"dense weights": (parameters,) * 2, "memory rows": (300, 300), "checksums": (size, size)}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("interrupted", ["dense weights", "memory rows", "checksums"])
def test_interrupted(export: Callable[..., dict[str, Any]], tmp_path: Path, interrupted: str, existing: bool) -> None:
    """Nothing is left, or what was there before."""
    before = export(name="old") if existing else None

    def stop(phase: str, done: int, total: int) -> None:
        if phase == interrupted:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(progress=stop, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == (["p"] if existing else [])
    if existing:
        assert json.loads((tmp_path / "p" / "manifest.json").read_text()) == before


def test_what_a_killed_export_left_does_no_harm(export: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    leftover = tmp_path / ".p.4711.partial"
    leftover.mkdir()
    (leftover / "junk").write_text("half a file")
    assert "junk" not in export()["files"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


def test_existing_target(export: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    export(name="old")
    with pytest.raises(FileExistsError, match=r"p: exists already; .*--overwrite"):
        export()
    export(name="new", overwrite=True)
    assert json.loads((tmp_path / "p" / "manifest.json").read_text())["name"] == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


def test_never_overwrites_what_is_not_a_package(export: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"p: exists, but has no manifest.json"):
        export(overwrite=True)
    assert (tmp_path / "p" / "thesis.txt").read_text() == "precious"


def test_tokenizer_too_large(export: Callable[..., dict[str, Any]], tokenizer_json: bytes, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_buffer(tokenizer_json)
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"extra{i}" for i in range(301 - size)])
    with pytest.raises(ValueError, match="largest token id is 300, but the model's vocabulary has 300 tokens"):
        export(tokenizer=TokenizerSpec(tokenizer.to_str().encode()))
    assert list(tmp_path.iterdir()) == []


def test_not_a_tokenizer(export: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer: not in the tokenizers library's JSON format"):
        export(tokenizer=TokenizerSpec(b"{}"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["layers.1.mlp.up_proj.weight", "layers.2.meki.embeddings.weight", "layers.0.input_layernorm.weight"]
)
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_weights_that_are_not_finite(
    export: Callable[..., dict[str, Any]], make_model: Callable[..., Decoder], tmp_path: Path, name: str, weights: str
) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="memory rows of bundles" if "embeddings" in name else name):
        export(model, weights=weights)
    assert list(tmp_path.iterdir()) == []


def test_shapes_that_blocks_do_not_divide(
    export: Callable[..., dict[str, Any]], make_model: Callable[..., Decoder], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="ffn is 100"):
        export(make_model(ffn=100), weights="int8")
    assert list(tmp_path.iterdir()) == []
