"""meki-info: what a package holds, and whether it is intact."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import _core
from ..package import check_sha256, compiled_targets, find_model, read_manifest, reads_per_token, target_directory
from ..package.signature import check_signature
from .arguments import Parser, path
from .errors import run_command
from .output import quality_text

_STEP = 1 << 20
"""Bytes of bundles read between two signs of progress."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 broken package, 2 usage, 130 interrupted, 141 output closed."""
    parser = Parser("meki-info", description="Show what a package holds.", epilog="Reference: docs/cli.md")
    parser.add_argument("model", metavar="MODEL", help="name or package directory")
    parser.add_argument("--verify", action="store_true", help="read every file and check all checksums")
    parser.add_argument(
        "--key",
        type=path,
        metavar="FILE",
        help="with --verify: the Ed25519 public key that must have signed the package",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return run_command(parser.prog, lambda: _run(parser.parse_args(argv)))


def _run(arguments: argparse.Namespace) -> None:
    path = find_model(arguments.model)
    if arguments.key is not None:
        if not arguments.verify:
            raise ValueError("--key is for --verify: a signature of files that are not read says nothing; give both")
        check_signature(path, arguments.key)
    manifest = read_manifest(path)
    # A copy for the CPU alone may leave out what is compiled for a chip, as a whole; what is there must be complete.
    # The other way round is no package to describe: what goes to a phone is for the engine there.
    for chip in compiled_targets(manifest):
        if target_directory(path, chip).exists():
            read_manifest(path, "qnn", chip)
    info = _describe(path, manifest)
    if arguments.verify:
        _verify(path, manifest)
    info["verified"] = arguments.verify
    info["signed_by"] = arguments.key and str(arguments.key)
    print(json.dumps(info, indent=2) if arguments.json else "\n".join(_lines(info)))


def _verify(directory: Path, manifest: dict[str, Any]) -> None:
    """PackageError for the first file whose SHA-256 sum, or ROM bundle whose CRC-32C, is not what it should be;
    compiled targets that were left out of this copy are passed over. Shows progress on stderr if that is a terminal."""
    files: dict[Path, dict[str, Any]] = {directory / name: entry for name, entry in manifest["files"].items()}
    for chip, target in compiled_targets(manifest).items():
        root = target_directory(directory, chip)
        if root.exists():
            files.update((root / name, entry) for name, entry in target["files"].items())
    total = sum(entry["bytes"] for entry in files.values())
    with tqdm(total=total, desc="SHA-256", unit="B", unit_scale=True, leave=False, disable=None) as progress:
        for path, entry in files.items():
            check_sha256(path, entry["sha256"], progress.update)
    if manifest["memory"] is not None:
        _verify_rom(directory / manifest["memory"]["file"])


def _verify_rom(path: Path) -> None:
    rom = _core.Rom(str(path))
    bundles = rom.info.entries
    step = max(1, _STEP // rom.info.bundle_stride)
    with tqdm(total=bundles, desc="bundles", unit="", unit_scale=True, leave=False, disable=None) as progress:
        for first in range(0, bundles, step):
            count = min(step, bundles - first)
            rom.verify(first, count)
            progress.update(count)


def _describe(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest, with what follows from it and from the ROM's header."""
    parameters, rom = manifest["parameters"], None
    if manifest["memory"] is not None:
        header = _core.Rom(str(path / manifest["memory"]["file"])).info
        rom = {
            "weights": parameters["rom"],
            "file_bytes": header.file_bytes,
            "bundle_bytes": header.bundle_bytes,
            "reads_per_token": reads_per_token(manifest),
        }
    info = {"path": str(path), **manifest, "ram_parameters": parameters["ram"], "rom": rom}
    if targets := compiled_targets(manifest):
        info["qnn"] = {
            chip: {**target, "present": target_directory(path, chip).exists()} for chip, target in targets.items()
        }
    return info


def _shares(types: dict[str, int]) -> str:
    """Of the weights, by type, the most first."""
    whole = sum(types.values())
    return ", ".join(f"{count / whole:.0%} {type}" for type, count in sorted(types.items(), key=lambda it: -it[1]))


def _attention(caches: list[dict[str, int]]) -> str:
    """How many layers see which positions, and with whose keys and values."""
    own = [cache for cache in caches if "shared" not in cache]
    kinds = dict.fromkeys((cache["window"], cache["kv_heads"], cache["head_dim"]) for cache in own)
    parts = []
    for kind in kinds:
        count = sum((cache["window"], cache["kv_heads"], cache["head_dim"]) == kind for cache in own)
        window, kv_heads, head_dim = kind
        seen = f"the last {window:,} positions" if window else "all positions"
        parts.append(f"{count} over {seen} with {kv_heads} KV heads of {head_dim}")
    shared = len(caches) - len(own)
    return ", ".join(parts) + (f", {shared} with the keys and values of others" if shared else "")


def _lines(info: dict[str, Any]) -> Iterator[str]:
    shape, memory, rom = info["architecture"], info["memory"], info["rom"]
    experts = f" x {shape['experts_per_token']} of {shape['experts']} experts" if "experts" in shape else ""
    active = info["parameters"].get("active")
    weights, tokenizer = info["weights"], info["tokenizer"]
    rows = [
        ("name", info["name"]),
        ("path", info["path"]),
        (
            "decoder",
            f"{shape['kind']}, {shape['layers']} layers, hidden {shape['hidden']}, FFN {shape['ffn']}{experts}, "
            f"{shape['heads']} heads of {shape['head_dim']}, {shape['kv_heads']} KV heads, "
            f"vocabulary {shape['vocab_size']:,}, context {shape['context']:,}",
        ),
        *([("attention", _attention(info["kv_caches"]))] if info.get("kv_caches") else []),
        ("RAM parameters", f"{info['ram_parameters']:,}" + (f", {active:,} of them active a token" if active else "")),
        ("weight type", weights["type"] + (f", blocks of {weights['block']}" if weights.get("block") else "")),
        *([("matrices", _shares(weights["types"]))] if len(weights["types"]) > 1 else []),
    ]
    reads = rom["reads_per_token"] if rom else 0
    if rom is None:
        rows.append(("memory", "none" if experts else "none: a dense model"))
    else:
        rows += [
            ("memory", f"{memory['kind']}, rows of {memory['row_dim']}, {memory['row_type']}"),
            ("ROM weights", f"{rom['weights']:,} in {rom['file_bytes']:,} bytes"),
            ("one token", f"{reads * rom['bundle_bytes']:,} bytes in {'one read' if reads == 1 else f'{reads} reads'}"),
        ]
    bos = "none" if tokenizer["bos_token_id"] is None else tokenizer["bos_token_id"]
    rows.append(("tokenizer", f"{tokenizer['file']}, BOS {bos}, EOS {tokenizer['eos_token_ids']}"))
    chat = tokenizer["chat_template"]
    rows.append(("chat template", "none" if chat is None else chat["file"]))
    rows.append(("sampling", _text(info["sampling"]) or "the runtime's defaults"))
    if "quality" in info:
        rows.append(("quality", quality_text(info)))
    yield from _section(rows)
    stages = ((stage["file"], _rows_of(stage["rows"])) for stage in info["stages"])
    yield from _section(stages, "stages")
    files = info["files"].items()
    yield from _section(
        ((name, f"{file['bytes']:>15,} bytes  sha256 {file['sha256'][:12]}") for name, file in files), "files"
    )
    for chip, target in compiled_targets(info).items():
        yield from _section(_target_rows(target), f"compiled for {chip}")
    for title in ("quantization_error", "provenance"):
        yield from _section(((key, _text(value)) for key, value in info[title].items()), title.replace("_", " "))
    if info["verified"]:
        yield "\nverified: all SHA-256 sums" + ("" if rom is None else " and all bundle checksums") + " are right"
        if info["signed_by"]:
            yield f"signed by the owner of {info['signed_by']}"


def _target_rows(target: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "chip", target["chip"]
    yield "precision", target["precision"]
    yield "context", f"{target['context']:,} tokens, prefill in chunks of {target['chunk']:,}"
    yield "without memory", "also compiled" if target["dense_decode"] else "not compiled"
    size = sum(file["bytes"] for file in target["files"].values())
    yield (
        "size",
        f"{size:,} bytes in {len(target['files'])} files" + ("" if target["present"] else ", not in this copy"),
    )


def _section(rows: Any, title: str | None = None) -> Iterator[str]:
    if title:
        yield f"\n{title}"
    indent = "  " if title else ""
    yield from (f"{indent}{label:<18}{value}" for label, value in rows)


def _text(value: Any) -> str:
    """What the manifest holds for people: values of any kind."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_text(part)}" for key, part in value.items())
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _rows_of(layers: list[int] | None) -> str:
    return "no memory rows" if layers is None else f"memory rows of layers {layers[0]} to {layers[1] - 1}"
