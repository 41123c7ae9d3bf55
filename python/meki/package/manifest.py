"""The manifest of a package (docs/package-format.md) as Python reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import _core
from ..options import SAMPLING, check_options
from .files import MANIFEST, file_sha256


def read_manifest(directory: Path, provider: str = "cpu", soc: str = "") -> dict[str, Any]:
    """The checked manifest: the engine checks what it runs by, this function what only Python reads. PackageError, and
    ValueError for a chip that the package is not compiled for."""
    text = _core.read_manifest(str(directory), provider, soc)
    try:
        manifest: dict[str, Any] = json.loads(text)
    except ValueError as error:  # what Python's parser does not take: a byte-order mark
        raise _core.PackageError(f"{directory / MANIFEST}: not valid JSON: {error}") from error

    def check(good: bool, field: str, got: object, expected: str) -> None:
        if not good:
            path = directory / MANIFEST
            raise _core.PackageError(f"{path}: {field} is {got!r}, expected {expected}; convert the model again")

    for field in ("parameters", "weights", "quantization_error", "provenance"):
        got = manifest.get(field)
        check(isinstance(got, dict), field, got, "an object")
    for field in ("ram", "rom", *({"active"} & manifest["parameters"].keys())):
        got = manifest["parameters"].get(field)
        check(type(got) is int and got >= 0, f"parameters.{field}", got, "a number of parameters")
    architecture = manifest["architecture"]
    check(isinstance(architecture.get("kind"), str), "architecture.kind", architecture.get("kind"), "a string")
    if "experts" in architecture:
        for field in ("experts", "experts_per_token"):
            got = architecture.get(field)
            check(type(got) is int and got > 0, f"architecture.{field}", got, "a number of experts")
    heads, kv_heads = architecture["heads"], architecture["kv_heads"]
    check(heads % kv_heads == 0, "architecture.heads", heads, f"a multiple of kv_heads, which is {kv_heads}")
    weights = manifest["weights"]
    check(isinstance(weights.get("type"), str), "weights.type", weights.get("type"), "a string")
    types = weights.get("types")
    good = isinstance(types, dict) and all(type(count) is int and count > 0 for count in types.values())
    check(good, "weights.types", types, "an object of numbers of weights")
    check(isinstance(weights.get("block", 0), int | None), "weights.block", weights.get("block"), "an integer or null")
    got = manifest.get("sampling")
    check(isinstance(got, dict) and got.keys() <= set(SAMPLING), "sampling", got, f"an object of {', '.join(SAMPLING)}")
    try:
        check_options(manifest["sampling"])
    except (TypeError, ValueError) as error:
        check(False, "sampling", got, f"values in their ranges ({error})")
    tokenizer, vocab_size = manifest["tokenizer"], architecture["vocab_size"]
    bos = tokenizer.get("bos_token_id", "missing")
    check(
        bos is None or (type(bos) is int and 0 <= bos < vocab_size), "tokenizer.bos_token_id", bos, "null or a token id"
    )
    if tokenizer["chat_template"] is not None:
        got = tokenizer["chat_template"].get("variables")
        good = isinstance(got, dict) and all(isinstance(value, str) for value in got.values())
        check(good, "tokenizer.chat_template.variables", got, "an object of strings")
    if "quality" in manifest:
        got = manifest["quality"]
        check(isinstance(got, dict), "quality", got, "an object")
        for field, (is_good, expected) in _QUALITY.items():
            check(is_good(got.get(field)), f"quality.{field}", got.get(field), expected)
    targets = compiled_targets(manifest)
    parts = {"": manifest, **{f"qnn.{chip}.": target for chip, target in targets.items()}}
    for where, part in parts.items():
        for name, entry in part["files"].items():
            got = entry.get("sha256")
            good = isinstance(got, str) and re.fullmatch("[0-9a-f]{64}", got) is not None
            check(good, f'{where}files["{name}"].sha256', got, "64 hexadecimal digits")
    return manifest


_TEXT = (lambda value: isinstance(value, str), "a string")
_COUNT = (lambda value: type(value) is int and value > 0, "a number of them")
_FIGURE = (lambda value: type(value) in (int, float), "a number")
_PERPLEXITY = (lambda value: type(value) in (int, float) and value > 0, "a number above 0")
_QUALITY: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("source", "text", "sha256", "kv_type"), _TEXT),
    **dict.fromkeys(("bytes", "tokens", "context"), _COUNT),
    **dict.fromkeys(("perplexity", "reference_perplexity"), _PERPLEXITY),
    **dict.fromkeys(("kl_divergence", "kl_standard_error", "same_top_token"), _FIGURE),
}
"""What was measured of a package: of each figure whether it is one, and what is expected."""


def compiled_targets(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the package is compiled for, by chip."""
    targets: dict[str, dict[str, Any]] = manifest.get("qnn", {})
    return targets


def reads_per_token(manifest: dict[str, Any]) -> int:
    """Bundles of the ROM that hold a token's rows; 0 without a memory."""
    if manifest["memory"] is None:
        return 0
    address = manifest["memory"]["address"]
    return sum(len(layer["primes"]) for layer in address["layers"]) if address["kind"] == "ngram_hash" else 1


def target_directory(directory: Path, chip: str) -> Path:
    """Where the files of a compiled target are."""
    return directory / "qnn" / chip


def check_parsed_files(directory: Path, manifest: dict[str, Any], chip: str | None = None) -> None:
    """The SHA-256 sums of the files that go through a parser: tokenizer, chat template, and the graphs, with a `chip`
    those that are compiled for it (not their binaries). All are small. PackageError."""
    tokenizer = manifest["tokenizer"]
    parsed = [tokenizer, tokenizer["chat_template"]]
    if chip is None:
        parsed += [*manifest["stages"], *(manifest["dense_stages"] or [])]
    for name in (entry["file"] for entry in parsed if entry is not None):
        check_sha256(directory / name, manifest["files"][name]["sha256"], lambda size: None)
    files = compiled_targets(manifest)[chip]["files"] if chip is not None else {}
    for name in (name for name in files if name.endswith(".onnx")):
        check_sha256(target_directory(directory, chip or "") / name, files[name]["sha256"], lambda size: None)


def check_sha256(path: Path, expected: str, advance: Callable[[int], object]) -> None:
    """PackageError if the file's SHA-256 sum is not `expected`. `advance` is called with each block's size."""
    digest = file_sha256(path, advance)
    if digest != expected:
        raise _core.PackageError(
            f"{path}: SHA-256 is {digest}, the manifest says {expected}; the file is damaged or was "
            "replaced: install or convert the model again"
        )


def has_random_weights(manifest: dict[str, Any]) -> bool:
    """Whether nobody trained these weights, so that what the model says means nothing."""
    return bool(manifest["provenance"].get("weights") == "random")
